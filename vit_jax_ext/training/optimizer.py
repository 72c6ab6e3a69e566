"""AdamW as the papers' recipes use it."""

from collections.abc import Sequence
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax_ext.errors import UserError


def decay_mask(params: dict, no_decay: Sequence[str]) -> dict:
  """Tells which parameters are decayed: all but vectors (biases, norms) and those named in `no_decay`."""

  def decays(path, param) -> bool:
    return param.ndim > 1 and not {part.key for part in path} & set(no_decay)

  return jax.tree_util.tree_map_with_path(decays, params)


def learning_rate_schedule(
  *,
  peak: float,
  initial: float,
  floor: float,
  warmup_steps: int,
  total_steps: int,
  cooldown_steps: int = 0,
  warmup_prefix: bool = True,
  steps_per_epoch: float | None = None,
  epochs_behind: int = 0,
) -> optax.Schedule:
  """Linear warm-up from `initial` to `peak`, then a cosine to `floor`, at last `floor`.

  Args:
    peak, initial, floor: learning rates.
    warmup_steps, cooldown_steps: of the `total_steps`, at their beginning and at their end.
    total_steps: of the training.
    warmup_prefix: the cosine begins at `peak` when the warm-up ends. False: it begins at the first step and the warm-up
      takes the place of its beginning, as in timm and so in the papers: 30 epochs of 300 end at 0.976 of the peak.
    steps_per_epoch: the learning rate stays as it was at the epoch's first step, as in timm; None: no epochs.
    epochs_behind: epoch e has the learning rate of epoch e - `epochs_behind`, at least of the first. DeiT's main.py
      steps its scheduler after epoch e with e, not e + 1, so its first two epochs both begin the warm-up.

  Raises:
    UserError: warm-up and cool-down leave no step between them.
  """
  end = total_steps - cooldown_steps
  if not 0 <= warmup_steps < end:
    raise UserError(
      f"optimizer.warmup_steps {warmup_steps} (with warmup_epochs) must be below the {end} steps of the run "
      "(without cooldown_epochs); change one of them"
    )
  begin = warmup_steps if warmup_prefix else 0
  cosine = optax.cosine_decay_schedule(peak, end - begin, floor / peak if peak else 0.0)
  schedule = optax.join_schedules(
    [optax.linear_schedule(initial, peak, warmup_steps), lambda step: cosine(step + warmup_steps - begin)],
    [warmup_steps],
  )
  if steps_per_epoch is None:
    return schedule
  first_steps = np.round(steps_per_epoch * np.arange(math.ceil(total_steps / steps_per_epoch))).astype(np.int32)

  def of_epoch(step):
    epoch = jnp.searchsorted(first_steps, step, side="right") - 1
    return schedule(jnp.asarray(first_steps)[jnp.maximum(epoch - epochs_behind, 0)])

  return of_epoch


def classifier_mask(params: dict) -> dict:
  """Tells which parameters are the classifier's (CrossViT has two heads, and a distilled DeiT)."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key in ("head", "head_dist"), params)


# Stage and block in a parameter's name, of CrossViT, Swin and CSWin. What has a stage but no block ends the stage, as
# CrossViT's fusion and the merging of patches do; a block of ViT is a stage of its own.
_LAYERS = (
  r"blocks\.(\d+)\.blocks\.\d+\.(\d+)\.",
  r"layers\.(\d+)\.blocks\.(\d+)\.",
  r"stage(\d+)\.(\d+)\.",
  r"(?:blocks\.|layers\.|merge)(\d+)\.",
)


def layer_scales(params: dict, decay: float) -> dict:
  """Returns decay ** (layers between a parameter and the classifier), BEiT's factors of the learning rate.

  The classifier and the last norm have 1, the last block has `decay`, and so on to the patch embedding, with which
  class tokens and position embeddings go. Blocks of CrossViT's branches that have the same index count as one layer.
  """

  def place(path) -> tuple[float, ...]:
    """Sorts as the layers follow each other."""
    name = ".".join(str(part.key) for part in path) + "."
    if name.startswith(("head.", "head_dist.", "norm.")):
      return (math.inf,)
    match = next(filter(None, (re.match(pattern, name) for pattern in _LAYERS)), None)
    return (*map(int, match.groups()), math.inf)[:2] if match else (-1,)

  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  order = sorted({place(path) for path in paths})
  return jax.tree_util.tree_map_with_path(lambda path, _: decay ** (len(order) - 1 - order.index(place(path))), params)


def adamw(
  schedule: optax.Schedule,
  *,
  weight_decay: float,
  no_decay: Sequence[str],
  clip_norm: float | None,
  layer_decay: float = 1.0,
  linear_probe: bool = False,
  b1: float = 0.9,
  b2: float = 0.999,
) -> optax.GradientTransformation:
  """Returns AdamW with decoupled weight decay, scaled by the schedule, after clipping by global norm (None: not).

  Args:
    schedule: the learning rate.
    weight_decay: of the parameters that `decay_mask` chooses.
    no_decay: see `decay_mask`.
    clip_norm: largest norm of all gradients together.
    layer_decay: see `layer_scales`; 1 switches it off.
    linear_probe: train the classifier alone, and keep no moments of anything else.
    b1, b2: of the moments.
  """
  steps = [optax.adamw(schedule, b1, b2, weight_decay=weight_decay, mask=lambda params: decay_mask(params, no_decay))]
  if clip_norm is not None:
    steps.insert(0, optax.clip_by_global_norm(clip_norm))
  if layer_decay != 1:
    steps.append(
      optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, layer_scales(updates, layer_decay)))
    )
  tx = optax.chain(*steps)
  return optax.partition({True: tx, False: optax.set_to_zero()}, classifier_mask) if linear_probe else tx
