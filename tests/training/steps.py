"""The training step of a model, from all its options at once."""

from vit_jax_ext.training.losses import make_loss
from vit_jax_ext.training.train_step import make_train_step

UPDATE = ("seed", "ema_decay", "accumulation_steps", "skip_nonfinite")


def make_step(graphdef, tx, *, seed=0, **options):
  """`make_train_step` with `make_loss`; `options` are those of both."""
  update = {name: options.pop(name) for name in UPDATE if name in options}
  return make_train_step(make_loss(graphdef, **options), tx, seed=seed, **update)
