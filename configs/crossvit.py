"""CrossViT on ImageNet-1k: Chen, Fan, Panda, ICCV 2021, arXiv 2103.14899, section 4.1; main.py of IBM/CrossViT.

Run: python main.py --config=configs/crossvit.py:VARIANT --workdir=DIR
Hardware: the authors had 32 GPUs with 128 images each. Any number of devices that divides the batch will do; with a
smaller --config.batch_size the learning rate shrinks in proportion.
VARIANT, and the paper's ImageNet top-1: tiny 73.4, small 81.0, base 82.2, 9 73.9, 15 81.5, 18 82.5, 9_dagger 77.1,
15_dagger 82.3, 18_dagger 82.8; fine-tuned at 384 pixels, 15_dagger_384 83.5, 18_dagger_384 83.9.
"""

from configs import common

VARIANTS = ("tiny", "small", "base", "9", "15", "18", "9_dagger", "15_dagger", "18_dagger", "15_dagger_384",
            "18_dagger_384")  # fmt: skip
WEIGHTS = "https://github.com/IBM/CrossViT/releases/download/weights-0.1/crossvit_{}_224.pth"


def get_config(variant: str = "15_dagger"):
  """Returns the config of one variant."""
  fine_tuned = variant.endswith("_384")
  config = common.deit_recipe(
    f"crossvit_{variant}" + ("" if fine_tuned else "_224"),
    batch_size=4096,  # section 4.1
  )
  config.augment.mixing_batch = 128  # 32 GPUs
  config.optimizer.warmup_epochs = 30.0  # section 4.1
  config.augment.repeats = 3  # main.py's default; the paper names it for CrossViT-18 only
  if fine_tuned:
    # 30 epochs, says section 4.1. The rest is DeiT's, on whose code the authors built.
    common.fine_tune(config, WEIGHTS.format(variant.removesuffix("_384")))
    config.optimizer.warmup_epochs = 5.0  # main.py's default
  config.when_smoke.model = dict(overrides=dict(image_size=60, depth=((1, 1),), embed_dim=(16, 32), num_heads=(2, 2)))
  return config
