"""Which way of fusing the two branches of CrossViT learns best? The paper's Table 6 in small.

Run all: python main.py study fusion --output=DIR
Run one: python main.py --config=configs/digits_fusion.py:FUSION --workdir=DIR
FUSION: none, all_attention, class_token, pairwise, cross_attention.
Hardware: 2 CPU cores, about a minute for each, all-attention a little more.
"""

from configs import digits

# Argument -> name in the paper.
STUDY = VARIANTS = {
  "none": "no fusion",
  "all_attention": "all-attention",
  "class_token": "class token",
  "pairwise": "pairwise",
  "cross_attention": "cross-attention",
}


def get_config(fusion: str = "cross_attention"):
  """Returns the config of one scheme."""
  config = digits.get_config("crossvit")
  config.model.overrides.update(embed_dim=(32, 64), num_heads=(2, 2), fusion=fusion)
  config.dataset.shift = config.dataset.scale = 0.0  # with augmentation so few steps teach little
  config.batch_size = 32
  config.total_steps = 800
  config.optimizer.learning_rate = 1e-3  # with 2e-3 all-attention stays at chance
  config.ema_decay = 0.0
  config.log_every_steps = 100
  config.eval_every_steps = 800
  return config
