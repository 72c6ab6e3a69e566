"""What the studies of the probes share: the recipe of small models on generated images (docs/probes.md)."""

from configs import common


def recipe(probe: str, steps: int):
  """Returns the config of a probe's models, which choose their own; the study sets the learning rate."""
  config = common.base_config()
  config.dataset.name = f"probes/{probe}"
  config.dataset.crop = 1.0
  config.batch_size = 64
  config.total_steps = steps
  config.optimizer.warmup_steps = 50
  config.optimizer.clip_norm = 1.0
  config.label_smoothing = 0.0
  config.model.overrides.image_size = 32
  config.model.overrides.drop_path_rate = 0.0
  config.log_every_steps = 100
  config.eval_every_steps = steps
  config.checkpoint.every_steps = 500
  return config


def get_config(probe: str = "chains"):
  """Returns a ViT on a probe."""
  config = recipe(probe, 1000)
  config.model.name = "vit_16b"
  config.model.overrides.update(patch_size=8, embed_dim=64, num_heads=4, depth=4, mlp_ratio=2)
  config.optimizer.learning_rate = 3e-3
  return config
