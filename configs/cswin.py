"""CSWin on ImageNet-1k: Dong et al., CVPR 2022, arXiv 2107.00652; README and main.py of microsoft/CSWin-Transformer.

Run: python main.py --config=configs/cswin.py:SIZE --workdir=DIR
Hardware: the authors had 8 GPUs with 256 images each, for base 128.
SIZE, and the paper's ImageNet top-1: tiny 82.8, small 83.6, base 84.2.
"""

from configs import common

# Size -> images per GPU, stochastic depth, weight decay and average of the weights: README's commands.
VARIANTS = {
  "tiny": (256, 0.2, 0.05, 0.99984),
  "small": (256, 0.4, 0.05, 0.99984),
  "base": (128, 0.5, 0.1, 0.99992),
}


def get_config(size: str = "tiny"):
  """Returns the config of one size."""
  return recipe(f"cswin_{size}", size)


def recipe(model: str, size: str):
  """Returns the recipe of a size; configs/boat.py trains BOAT on CSWin with it."""
  per_gpu, drop_path, weight_decay, ema_decay = VARIANTS[size]
  config = common.deit_recipe(model, batch_size=8 * per_gpu)  # --lr 2e-3 or 1e-3: 5e-4 * B / 512
  config.model.overrides.drop_path_rate = drop_path
  config.optimizer.weight_decay = weight_decay
  config.ema_decay = ema_decay
  config.optimizer.warmup_epochs = 20.0
  config.total_epochs = 310  # --epochs 300 and --cooldown-epochs 10, the defaults
  config.optimizer.cooldown_epochs = 10.0
  config.optimizer.epochs_behind = 0  # main.py steps the scheduler with epoch + 1
  config.augment.interpolation = "random"  # --train-interpolation's default
  config.augment.repeats = 1  # not used
  config.augment.mixing_batch = per_gpu
  config.augment.erase_mixed = True  # main.py is timm's train.py: its loader erases last
  config.when_smoke.model = dict(
    overrides=dict(image_size=64, depth=(2, 1), embed_dim=16, num_heads=(2, 4), split_size=(1, 2))
  )
  return config
