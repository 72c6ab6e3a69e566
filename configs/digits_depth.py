"""Does attention collapse in deep ViTs, and does re-attention keep it apart? Thin models on digits, DeepViT section 3.

Run all: python main.py study depth --output=DIR
Run one: python main.py --config=configs/digits_depth.py:FAMILY,DEPTH --workdir=DIR
FAMILY: vit, deepvit. DEPTH: number of blocks.
Hardware: 2 CPU cores, about a minute for each. Measured test top-1, means of two seeds: ViT 45 to 68%, DeepViT 93
to 95%.
"""

from configs import digits

# Argument -> name in the paper.
STUDY = {
  "vit,12": "ViT, 12 blocks",
  "vit,24": "ViT, 24 blocks",
  "vit,32": "ViT, 32 blocks",
  "deepvit,12": "DeepViT, 12 blocks",
  "deepvit,24": "DeepViT, 24 blocks",
  "deepvit,32": "DeepViT, 32 blocks",
}


def get_config(argument: str = "deepvit,24"):
  """Returns the config of one cell.

  Raises:
    ValueError: another argument than FAMILY,DEPTH.
  """
  family, _, depth = argument.partition(",")
  if family not in ("vit", "deepvit") or not depth.isdecimal() or int(depth) < 1:
    raise ValueError("give FAMILY,DEPTH with the family vit or deepvit, for example deepvit,24")
  config = digits.get_config(family)
  config.model.overrides.update(
    depth=int(depth), patch_size=6, embed_dim=32, num_heads=4, mlp_ratio=2, drop_path_rate=0.0
  )
  config.dataset.shift = config.dataset.scale = 0.0
  config.batch_size = 32
  config.total_steps = 400
  config.optimizer.learning_rate = 2e-3
  config.ema_decay = 0.0
  config.log_every_steps = 100
  config.eval_every_steps = 400
  return config
