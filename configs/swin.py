"""Swin on ImageNet-1k: Liu et al., ICCV 2021, arXiv 2103.14030, section 4.1; config.py of microsoft/Swin-Transformer.

Run: python main.py --config=configs/swin.py:VARIANT --workdir=DIR
Hardware: the authors had 8 GPUs with 128 images each.
VARIANT, and the paper's ImageNet top-1: tiny 81.2, small 83.2, base 83.5; fine-tuned at 384 pixels, base_384 84.5.
The authors evaluate base_384 on the whole image, squeezed into the square. Here it is the central square, crop 1.0.
"""

from configs import common

# Variant -> stochastic depth: configs/swin_*_patch4_window7_224.yaml, swin_base_patch4_window12_384_finetune.yaml.
VARIANTS = {"tiny": 0.2, "small": 0.3, "base": 0.5, "base_384": 0.5}


def get_config(variant: str = "tiny"):
  """Returns the config of one variant."""
  size = variant.removesuffix("_384")
  config = recipe(f"swin_{size}", variant)
  config.augment.mixing_batch = 64 if size == "base" else 128  # get_started.md: --batch-size, images per GPU
  if variant == "base_384":
    # swin_base_patch4_window12_384_finetune.yaml; get_started.md: 8 GPUs, --batch-size 64 --accumulation-steps 2. The
    # paper's appendix differs, with a constant learning rate of 1e-5 and stochastic depth 0.1.
    config.model.overrides.update(image_size=384, window_size=12)
    config.pretrained = True  # the published weights, which are those of 224 pixels
    _set_learning_rates(config, base=2e-5, warmup=2e-8, floor=2e-7)
    config.optimizer.weight_decay = 1e-8
    config.optimizer.warmup_epochs = 5.0
    config.total_epochs = 30
    config.when_smoke.pretrained = None
  return config


def recipe(model: str, variant: str):
  """Returns the recipe of a variant; configs/boat.py trains BOAT on Swin with it."""
  config = common.deit_recipe(model, batch_size=1024)
  config.model.overrides.drop_path_rate = VARIANTS[variant]
  _set_learning_rates(config, base=5e-4, warmup=5e-7, floor=5e-6)
  config.optimizer.warmup_epochs = 20.0
  config.optimizer.per_epoch = False  # t_in_epochs=False
  config.optimizer.epochs_behind = 0
  config.optimizer.clip_norm = 5.0
  config.augment.repeats = 1  # not used
  config.when_smoke.model = dict(
    overrides=dict(image_size=64, depths=(2, 1), embed_dim=16, num_heads=(2, 4), window_size=4)
  )
  return config


def _set_learning_rates(config, *, base: float, warmup: float, floor: float) -> None:
  """Sets BASE_LR, WARMUP_LR and MIN_LR, all of which main.py scales with the batch, by B / 512."""
  batch_size = config.get_ref("batch_size").to_float()
  config.optimizer.learning_rate = base * batch_size / 512
  config.optimizer.initial_learning_rate = warmup * batch_size / 512
  config.optimizer.final_learning_rate = floor * batch_size / 512
