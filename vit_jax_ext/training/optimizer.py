"""AdamW as the papers' recipes use it."""

from collections.abc import Sequence

import jax
import optax

from vit_jax_ext.errors import UserError


def decay_mask(params: dict, no_decay: Sequence[str]) -> dict:
  """Tells which parameters are decayed: all but vectors (biases, norms) and those named in `no_decay`."""

  def decays(path, param) -> bool:
    return param.ndim > 1 and not {part.key for part in path} & set(no_decay)

  return jax.tree_util.tree_map_with_path(decays, params)


def learning_rate_schedule(
  *, peak: float, initial: float, floor: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
  """Linear warm-up from `initial` to `peak`, then a cosine to `floor` at `total_steps`.

  Raises:
    UserError: the warm-up is not shorter than the training.
  """
  if not 0 <= warmup_steps < total_steps:
    raise UserError(
      f"optimizer.warmup_steps {warmup_steps} must be below the {total_steps} steps of the run; change one of them"
    )
  return optax.warmup_cosine_decay_schedule(initial, peak, warmup_steps, total_steps, floor)


def adamw(
  schedule: optax.Schedule,
  *,
  weight_decay: float,
  no_decay: Sequence[str],
  clip_norm: float | None,
  b1: float = 0.9,
  b2: float = 0.999,
) -> optax.GradientTransformation:
  """Returns AdamW with decoupled weight decay, scaled by the schedule, after clipping by global norm (None: not)."""
  steps = [optax.adamw(schedule, b1, b2, weight_decay=weight_decay, mask=lambda params: decay_mask(params, no_decay))]
  if clip_norm is not None:
    steps.insert(0, optax.clip_by_global_norm(clip_norm))
  return optax.chain(*steps)
