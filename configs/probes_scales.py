"""Do two branches with patches of two sizes read a coarse and a fine fact better than one? CrossViT as a probe.

Run all: python main.py study scales --output=DIR
Run one: python main.py --config=configs/probes_scales.py:CELL --workdir=DIR
CELL: vit, or a fusion: none, class_token, pairwise, cross_attention. Their MLPs make up for what a fusion has fewer
parameters. All-attention, quadratic in all tokens, costs too much for this company.
"""

from configs import probes

STUDY = {
  "vit": "ViT",
  "none": "CrossViT, no fusion",
  "class_token": "CrossViT, class token",
  "pairwise": "CrossViT, pairwise",
  "cross_attention": "CrossViT, cross-attention",
}
PROBE = {
  "learning_rates": (2e-3, 4e-3),
  "claims": (("cross_attention", "vit"), ("cross_attention", "none")),
  "ablations": {"cross_attention": {"without fusion": {"fusion": "none"}}},
}
CROSSVIT = dict(patch_size=(4, 8), embed_dim=(12, 48), num_heads=(4, 4), depth=((1, 2),))
VARIANTS = {
  "vit": dict(patch_size=8, embed_dim=48, num_heads=4, depth=4, mlp_ratio=2),
  "none": CROSSVIT | dict(mlp_ratio=(2, 5.5)),
  "class_token": CROSSVIT | dict(mlp_ratio=(2, 5.5)),
  "pairwise": CROSSVIT | dict(mlp_ratio=(2, 5)),
  "cross_attention": CROSSVIT | dict(embed_dim=(16, 56), mlp_ratio=(1, 2)),
}


def get_config(cell: str = "cross_attention"):
  """Returns the config of one cell."""
  config = probes.recipe("scales", 500)
  config.model.name = "vit_16b" if cell == "vit" else "crossvit_tiny_224"
  config.model.overrides.update(VARIANTS[cell])
  if cell != "vit":
    config.model.overrides.fusion = cell
  return config
