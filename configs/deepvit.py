"""DeepViT on ImageNet-1k: Zhou et al. 2021, arXiv 2103.11886; scripts/*.yaml of zhoudaquan/dvit_repo.

Run: python main.py --config=configs/deepvit.py:VARIANT --workdir=DIR
Hardware: the authors' scripts put 32 images on each GPU and do not say on how many; eight are assumed here.
VARIANT, and the paper's ImageNet top-1: 16b 79.10, 24b 79.99, 32b 80.90, s 82.3, l 83.1, l_384 84.25.
How l_384 was made is not published: it is fine-tuned here as DeiT was, from weights of l that you name:
--config.pretrained=WORKDIR or FILE (the authors' are behind the address in the config). BatchNorm trains on:
DeiT, which has none, fine-tunes in evaluation mode, and we take from that only that nothing is dropped.
"""

from configs import common

VARIANTS = ("16b", "24b", "32b", "s", "l", "l_384")
WEIGHTS_OF_L = (
  "https://drive.usercontent.google.com/download?id=1MTRm0NK_sPGRSyuD_hHJ1Zgw2diEaKLR&export=download&confirm=t"
)


def get_config(variant: str = "32b"):
  """Returns the config of one variant."""
  config = recipe(f"deepvit_{variant}")
  config.model.overrides.statistics_batch = 32  # of one GPU: sync_bn: false, batch_size: 32
  config.when_smoke.model.overrides.statistics_batch = 4
  if variant == "32b":
    config.model.overrides.dtype = "bfloat16"  # amp, in this script alone
    config.augment.mixup = 0.1
    config.augment.cutmix = 0.0
    config.cosine_regularizer.weight = 0.1  # loss/cross_entropy.py
    config.cosine_regularizer.blocks = tuple(range(12))  # cos_reg_component: 12, which the code counts from block 0
    config.when_smoke.cosine_regularizer = dict(blocks=(0,))
  if variant == "l_384":
    common.fine_tune(config, WEIGHTS_OF_L)
    config.optimizer.cooldown_epochs = 0.0  # so has DeiT
  if variant in ("s", "l", "l_384"):
    config.when_smoke.model.overrides.reattention_blocks = (1,)
  return config


def recipe(model: str):
  """Returns what DeepViT_{S,L,24B}*.yaml share; configs/vit.py trains the baselines with it."""
  config = common.deit_recipe(model, batch_size=8 * 32)
  config.augment.mixing_batch = 32  # batch_size: 32, of one GPU
  config.total_epochs = 310  # epochs: 300, and cooldown_epochs: 10
  config.optimizer.cooldown_epochs = 10.0
  # lr: 5e-4, whatever the batch: no rule for others is given. Linear as in the other papers, from the assumed batch.
  config.optimizer.learning_rate = 5e-4 * config.get_ref("batch_size").to_float() / 256
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.epochs_behind = 0  # train.py steps the scheduler with epoch + 1
  config.model.overrides.drop_path_rate = 0.2
  config.model.overrides.dtype = "float32"  # amp: false
  config.augment.interpolation = "random"  # train_interpolation: bilinear or bicubic, drawn for each image
  config.augment.repeats = 1  # use_repeated_aug: false
  config.augment.erase_mixed = True  # train.py of timm: its loader erases last
  config.ema_decay = 0.99996
  config.when_smoke.model = dict(overrides=dict(image_size=32, depth=2, embed_dim=24, num_heads=4))
  return config
