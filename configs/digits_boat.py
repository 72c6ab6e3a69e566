"""What do BOAT's two attentions, its overlap and its balanced clusters bring? The paper's ablations in small, on Swin.

Run all: python main.py study boat --output=DIR
Run one: python main.py --config=configs/digits_boat.py:CELL --workdir=DIR
CELL: image, feature, both, no_overlap, kmeans. K-means clusters have no overlap: compare them with no_overlap.
Hardware: 2 CPU cores, less than a minute for each.
"""

from configs import digits

# Argument -> name after the paper: ISLA is image-space, FSLA feature-space local attention.
STUDY = VARIANTS = {
  "image": "ISLA alone",
  "feature": "FSLA alone",
  "both": "ISLA and FSLA",
  "no_overlap": "ISLA and FSLA, no overlap",
  "kmeans": "ISLA and FSLA, K-means",
}
OPTIONS = {
  "image": dict(local_attention="image"),
  "feature": dict(local_attention="feature"),
  "both": {},
  "no_overlap": dict(overlap=0),
  "kmeans": dict(clustering="kmeans", overlap=0),
}


def get_config(cell: str = "both"):
  """Returns the config of one cell."""
  config = digits.get_config("boat_swin")
  # Four blocks of 8x8 tokens, two of them bilateral; on Swin the last stage has no feature-space attention.
  config.model.overrides.update(embed_dim=32, depths=(4, 1), num_heads=(2, 4), **OPTIONS[cell])
  config.dataset.shift = config.dataset.scale = 0.0  # with augmentation so few steps teach little
  config.batch_size = 32
  config.total_steps = 400
  config.optimizer.learning_rate = 2e-3
  config.ema_decay = 0.0
  config.log_every_steps = 100
  config.eval_every_steps = 400
  return config
