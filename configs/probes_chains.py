"""Does re-attention help to follow more steps than ViT's attention, one needing the other? DeepViT's claim as a probe.

Run all: python main.py study chains --output=DIR
Run one: python main.py --config=configs/probes_chains.py:FAMILY,DEPTH --workdir=DIR
FAMILY: vit, deepvit. DEPTH: 4 or 8 blocks, of widths that cost the same.
"""

from configs import probes

STUDY = VARIANTS = {
  "vit,4": "ViT, 4 blocks",
  "deepvit,4": "DeepViT, 4 blocks",
  "vit,8": "ViT, 8 blocks",
  "deepvit,8": "DeepViT, 8 blocks",
}
WITHOUT = {
  "without re-attention": {"reattention_blocks": ()},
  "without norm": {"reattention_norm": "none"},
  "layer norm": {"reattention_norm": "layer"},
}
PROBE = {
  "learning_rates": (2e-3, 4e-3),
  "claims": (("deepvit,4", "vit,4"), ("deepvit,8", "vit,8")),
  "ablations": {"deepvit,4": WITHOUT, "deepvit,8": WITHOUT},
}
WIDTHS = {"4": 64, "8": 44}


def get_config(argument: str = "deepvit,4"):
  """Returns the config of one cell."""
  family, depth = argument.split(",")
  config = probes.recipe("chains", 2000)
  config.model.name = f"{family}_16b"
  config.model.overrides.update(patch_size=8, embed_dim=WIDTHS[depth], num_heads=4, depth=int(depth), mlp_ratio=2)
  return config
