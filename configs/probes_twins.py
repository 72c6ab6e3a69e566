"""Does attention in clusters of the feature space compare what lies far apart, where windows cannot? BOAT as a probe.

Run all: python main.py study twins --output=DIR
Run one: python main.py --config=configs/probes_twins.py:CELL --workdir=DIR
CELL: swin, boat_swin, cswin, boat_cswin, all at about the same cost. ViT, which has one stage, cannot have both their
parameters and their multiply-adds.
"""

from configs import probes

STUDY = {"swin": "Swin", "boat_swin": "BOAT-Swin", "cswin": "CSWin", "boat_cswin": "BOAT-CSWin"}
WITHOUT_FSLA = {"without feature-space attention": {"local_attention": "image"}}
PROBE = {
  "learning_rates": (1e-3, 2e-3),
  "claims": (("boat_swin", "swin"), ("boat_cswin", "cswin")),
  "ablations": {"boat_swin": WITHOUT_FSLA, "boat_cswin": WITHOUT_FSLA},
}
# Stages of 4x4 and 2x2 tokens, a tile each in the first one, windows of 2x2. CSWin begins with 8x8.
SWIN = dict(patch_size=8, embed_dim=32, depths=(4, 1), num_heads=(4, 8), window_size=2)
CSWIN = dict(embed_dim=16, num_heads=(2, 4, 8), split_size=(2, 1, 2))
CLUSTERS = dict(cluster_size=4, overlap=2)
VARIANTS = {
  "swin": SWIN | dict(mlp_ratio=2.75),
  "boat_swin": SWIN | CLUSTERS | dict(mlp_ratio=2),
  "cswin": CSWIN | dict(depth=(1, 3, 1), mlp_ratio=2),
  "boat_cswin": CSWIN | CLUSTERS | dict(depth=(1, 2, 1), mlp_ratio=1),
}


def get_config(cell: str = "boat_swin"):
  """Returns the config of one cell."""
  config = probes.recipe("twins", 3000)
  config.model.name = f"{cell}_tiny"
  config.model.overrides.update(VARIANTS[cell])
  return config
