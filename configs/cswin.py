"""CSWin on ImageNet-1k: Dong et al., CVPR 2022, arXiv 2107.00652; README and main.py of microsoft/CSWin-Transformer.

Run: python main.py --config=configs/cswin.py:VARIANT --workdir=DIR
Hardware: the authors had 8 GPUs with 256 images each, for base 128, for base_384 32.
VARIANT, and the paper's ImageNet top-1: tiny 82.8, small 83.6, base 84.2; fine-tuned at 384 pixels, base_384 85.4, in
the README 85.5.
"""

from configs import common

# Variant -> images per GPU, stochastic depth, weight decay and average of the weights: README's commands.
VARIANTS = {
  "tiny": (256, 0.2, 0.05, 0.99984),
  "small": (256, 0.4, 0.05, 0.99984),
  "base": (128, 0.5, 0.1, 0.99992),
  "base_384": (32, 0.7, 1e-8, 0.9998),
}


def get_config(variant: str = "tiny"):
  """Returns the config of one variant."""
  config = recipe(f"cswin_{variant.removesuffix('_384')}", variant)
  if variant == "base_384":  # README's command, and the defaults of finetune.py
    config.model.overrides.update(image_size=384, split_size=(1, 2, 12, 12))
    config.pretrained = True  # the published weights, which are those of 224 pixels
    # --lr 5e-6. finetune.py does not scale it; the README does, where it halves -b of the training for want of memory.
    config.optimizer.learning_rate = 5e-6 * config.get_ref("batch_size").to_float() / 256
    config.optimizer.final_learning_rate = 5e-7  # --min-lr
    config.optimizer.warmup_epochs = 0.0
    config.total_epochs = 30  # --epochs 20 and --cooldown-epochs 10
    config.augment.mixup = config.augment.cutmix = 0.1
    config.when_smoke.pretrained = None
  return config


def recipe(model: str, variant: str):
  """Returns the recipe of a variant; configs/boat.py trains BOAT on CSWin with it."""
  per_gpu, drop_path, weight_decay, ema_decay = VARIANTS[variant]
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
