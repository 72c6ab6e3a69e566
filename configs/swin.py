"""Swin on ImageNet-1k: Liu et al., ICCV 2021, arXiv 2103.14030, section 4.1; config.py of microsoft/Swin-Transformer.

Run: python main.py --config=configs/swin.py:SIZE --workdir=DIR
Hardware: the authors had 8 GPUs with 128 images each.
SIZE, and the paper's ImageNet top-1: tiny 81.2, small 83.2, base 83.5.
"""

from configs import common

# Size -> stochastic depth: configs/swin_*_patch4_window7_224.yaml.
VARIANTS = {"tiny": 0.2, "small": 0.3, "base": 0.5}


def get_config(size: str = "tiny"):
  """Returns the config of one size."""
  config = recipe(f"swin_{size}", size)
  config.augment.mixing_batch = 64 if size == "base" else 128  # get_started.md: --batch-size, images per GPU
  return config


def recipe(model: str, size: str):
  """Returns the recipe of a size; configs/boat.py trains BOAT on Swin with it."""
  config = common.deit_recipe(model, batch_size=1024)
  config.model.overrides.drop_path_rate = VARIANTS[size]
  # WARMUP_LR 5e-7 and MIN_LR 5e-6 are scaled like the learning rate, BASE_LR 5e-4: B / 512.
  config.optimizer.initial_learning_rate = 5e-7 * config.get_ref("batch_size").to_float() / 512
  config.optimizer.final_learning_rate = 5e-6 * config.get_ref("batch_size").to_float() / 512
  config.optimizer.warmup_epochs = 20.0
  config.optimizer.per_epoch = False  # t_in_epochs=False
  config.optimizer.epochs_behind = 0
  config.optimizer.clip_norm = 5.0
  config.augment.repeats = 1  # not used
  config.when_smoke.model = dict(
    overrides=dict(image_size=64, depths=(2, 1), embed_dim=16, num_heads=(2, 4), window_size=4)
  )
  return config
