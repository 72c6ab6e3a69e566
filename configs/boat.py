"""BOAT on ImageNet-1k: Yu, Zhao, Li, Yu, BMVC 2022, arXiv 2201.13027; mahaoyuHKU/pytorch-boat.

On Swin and on CSWin it is trained as they are themselves: that repository changes the models' files alone.

Run: python main.py --config=configs/boat.py:VARIANT --workdir=DIR
Hardware: the authors had 8 GPUs; for swin_tiny 4 with 256 images each.
VARIANT: swin_tiny, swin_small, swin_base, cswin_tiny, cswin_small, cswin_base. Expected ImageNet top-1: we have no
published figure at hand; without feature-space attention, Swin has 81.2, 83.2, 83.5, and CSWin 82.8, 83.6, 84.2.
There is no recipe for 384 pixels: the repository has kept Swin's and CSWin's files for it, but its attention needs a
multiple of 49 tokens, which 96x96 are not.
"""

from configs import cswin, swin

VARIANTS = ("swin_tiny", "swin_small", "swin_base", "cswin_tiny", "cswin_small", "cswin_base")


def get_config(variant: str = "swin_tiny"):
  """Returns the config of one variant."""
  family, size = variant.split("_")
  if family == "cswin":
    return cswin.recipe(f"boat_{variant}", size)
  config = swin.recipe(f"boat_{variant}", size)
  config.augment.mixing_batch = 256 if size == "tiny" else 128  # BOAT-Swin/README.md: --batch-size, images per GPU
  return config
