"""ViT on ImageNet-1k, the baselines: DeiT by its own recipe, and DeepViT's ViTs by DeepViT's.

DeiT: Touvron et al., ICML 2021, arXiv 2012.12877, Table 9. The others: see configs/deepvit.py.

Run: python main.py --config=configs/vit.py:VARIANT --workdir=DIR
Hardware: DeiT's authors had 16 GPUs with 64 images each for base, 4 with 256 for tiny and small.
VARIANT, and the papers' ImageNet top-1: deit_tiny 72.2, deit_small 79.8, deit_base 81.8; fine-tuned at 384 pixels on 16
GPUs with 32 images each, deit_base_384 83.1; 16b 78.88, 24b 79.35, 32b 79.27.
"""

from configs import common, deepvit

VARIANTS = ("deit_tiny", "deit_small", "deit_base", "deit_base_384", "16b", "24b", "32b")


def get_config(variant: str = "deit_small"):
  """Returns the config of one variant."""
  if not variant.startswith("deit"):
    return deepvit.recipe(f"vit_{variant}")  # no script of their own is published
  config = common.deit_recipe(f"{variant.removesuffix('_384')}_patch16_224", batch_size=1024)
  config.augment.mixing_batch = 64 if variant == "deit_base" else 256  # README's commands: images per GPU
  if variant == "deit_base_384":
    config.model.overrides.image_size = 384
    common.fine_tune(config, True)  # the published weights, which are those of 224 pixels
  config.when_smoke.model = dict(overrides=dict(image_size=32, depth=2, embed_dim=24, num_heads=4))
  return config
