"""The train state, one training step, one evaluation step: pure JAX, importable without TensorFlow."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from vit_jax_ext.models.batch_norm import DECAY
from vit_jax_ext.models.functional import normalize, split_model
from vit_jax_ext.training.losses import Batch, Loss, Metrics, binary_cross_entropy

CALIBRATION_BINS = 15  # of equal width, as in Guo et al. 2017, section 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """All that changes during training, as one pytree of plain dicts and arrays.

  Attributes:
    step: optimizer steps taken, int32.
    params: the model's nnx.Param values.
    stats: its nnx.BatchStat values (running means and variances); empty without BatchNorm.
    opt_state: the optimizer's.
    ema: exponential moving averages, {"params": ..., "stats": ...}; empty when switched off.
  """

  step: jax.Array
  params: Any
  stats: Any
  opt_state: Any
  ema: Any

  def checkpoint_items(self) -> dict[str, Any]:
    """Returns the parts that a checkpoint keeps apart, so that weights can be read alone; without empty ones."""
    items = {
      "model": {"params": self.params, "stats": self.stats},
      "ema": self.ema,
      "optimizer": {"step": self.step, "opt_state": self.opt_state},
    }
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}

  @classmethod
  def from_checkpoint(cls, items: dict[str, Any]) -> "TrainState":
    """Inverse of `checkpoint_items`."""
    return cls(**items["optimizer"], **items["model"], ema=items.get("ema") or {})


def init_state(create_model: Callable[[], nnx.Module], tx: optax.GradientTransformation, use_ema: bool) -> TrainState:
  """Returns the state before the first step. Run it under jit with out_shardings: nothing is then made twice."""
  _, params, stats = split_model(create_model())
  # The averages are buffers of their own, or donation would be offered the same memory twice.
  ema = jax.tree.map(jnp.copy, {"params": params, "stats": stats}) if use_ema else {}
  return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params), ema)


def activation_bytes(model: nnx.Module, batch_size: int) -> int:
  """Returns the bytes that the backward pass of `model` finds in memory, before the compiler merges or drops any.

  Found by tracing alone. Weights are counted where it needs them.
  """
  graphdef, params, stats = split_model(model)

  def residuals(params, stats, images):
    def total(params):
      rngs = nnx.Rngs(jax.random.key(0))
      return nnx.merge(graphdef, params, stats)(images, train=True, rngs=rngs)[0].sum()

    return jax.vjp(total, params)[1]

  images = jax.ShapeDtypeStruct((batch_size, *model.image_size, 3), jnp.float32)
  found = jax.eval_shape(residuals, params, stats, images)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found))


def make_train_step(
  loss: Loss,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  ema_decay: float = 0.0,
  accumulation_steps: int = 1,
  skip_nonfinite: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns `step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

  Args:
    loss: what is made smaller, see `losses.make_loss`.
    tx: the optimizer.
    seed: of all that is random in the loss; step s draws from fold_in(key(seed), s), so nothing random is stored.
    ema_decay: share of the old average that stays at each step; 0 switches the averages off. Those of BatchNorm's
      statistics start from the first batch's.
    accumulation_steps: the batch is worked off in this many equal parts, one after another, for one update.
    skip_nonfinite: a step whose loss or gradients are not finite changes nothing but the number of the step, also the
      schedule's.

  The batch holds `image` uint8 (B, H, W, 3) and `label`, see `make_loss`. Metrics are those of the loss, averaged over
  the parts, and grad_norm.
  """
  key = jax.random.key(seed)
  grad_fn = jax.grad(loss, has_aux=True)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    step_key = jax.random.fold_in(key, state.step)

    def accumulate(carry, indexed_part):
      stats, grads = carry
      index, part = indexed_part
      part_grads, (stats, metrics) = grad_fn(state.params, stats, part, jax.random.fold_in(step_key, index))
      return (stats, jax.tree.map(lambda total, g: total + g / accumulation_steps, grads, part_grads)), metrics

    if accumulation_steps == 1:
      grads, (stats, metrics) = grad_fn(state.params, state.stats, batch, step_key)
    else:
      # Part i takes every i-th image, so each device keeps its own images and none travels.
      parts = jax.tree.map(lambda x: x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1), batch)
      start = (state.stats, jax.tree.map(jnp.zeros_like, state.params))
      (stats, grads), metrics = jax.lax.scan(accumulate, start, (jnp.arange(accumulation_steps), parts))
      metrics = jax.tree.map(jnp.mean, metrics)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = {}
    if state.ema:
      new = {"params": params, "stats": _statistics_of_batch(state.stats, stats, accumulation_steps)}
      ema = jax.tree.map(lambda old, value: old + (1 - ema_decay) * (value - old), state.ema, new)
      ema["stats"] = jax.tree.map(lambda first, old: jnp.where(state.step == 0, first, old), new["stats"], ema["stats"])
    metrics["grad_norm"] = optax.global_norm(grads)
    new = TrainState(state.step + 1, params, stats, opt_state, ema)
    if skip_nonfinite:
      finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
      old = dataclasses.replace(state, step=new.step)
      new = jax.tree.map(
        lambda new, old: new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(finite, new, old),
        new,
        old,
        is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState),
      )
    return new, metrics

  return step


def _statistics_of_batch(before: Any, after: Any, updates: int) -> Any:
  """Returns the statistics of the batch that has turned the running averages `before` into `after`, in `updates` parts.

  These are what the averages over training average: the running ones begin at a variance of 1, beside which those of
  attention maps, about 1e-5, would not be seen for hundreds of steps. In float32 the first ones are off by up to 6e-7.
  """
  kept = DECAY**updates
  return jax.tree.map(lambda old, new: (new - kept * old) / (1 - kept), before, after)


def make_eval_step(
  graphdef: nnx.GraphDef, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any, Any, Batch], Metrics]:
  """Returns `step(params, stats, batch)`, sums over the images whose `mask` is True; `evaluate` makes scores of them.

  The batch holds `image`, `mask` and `label`: class indices (B,), or the valid classes of each image as bool
  (B, classes). A prediction is a hit when its class is valid, the rule of ImageNet-ReaL (Beyer et al. 2020); images
  without any valid class are not counted.

  Scalars: loss (minus the logarithm of the probability of all valid classes together, without smoothing: with one it is
  the cross-entropy), top1 and top5 (numbers of hits; top5 has one among the five likeliest classes, or among all when
  they are fewer), and count. And overconfidence (CALIBRATION_BINS,): confidence minus hit, summed over the images whose
  confidence, the probability of the likeliest class, is in the bin.
  """

  def step(params, stats, batch: Batch) -> Metrics:
    logits, _ = nnx.merge(graphdef, params, stats)(normalize(batch["image"], mean, std), train=False)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    valid = batch["label"]
    if valid.ndim == 1:
      valid = jax.nn.one_hot(valid, logits.shape[-1], dtype=bool)
    counted = batch["mask"] & valid.any(axis=-1)

    log_probabilities = jax.nn.log_softmax(logits)
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = jnp.take_along_axis(valid, best, axis=-1)
    confidence = jnp.exp(jnp.max(log_probabilities, axis=-1))
    # Bin m of M holds the confidences in ((m - 1) / M, m / M].
    bins = jnp.clip(jnp.ceil(confidence * CALIBRATION_BINS).astype(jnp.int32) - 1, 0, CALIBRATION_BINS - 1)
    in_bin = jax.nn.one_hot(bins, CALIBRATION_BINS, dtype=logits.dtype)
    per_image = {
      "loss": -jax.nn.logsumexp(log_probabilities, axis=-1, where=valid),
      "top1": hits[:, 0],
      "top5": hits.any(axis=-1),
      "count": counted,
      "overconfidence": in_bin * (confidence - hits[:, 0])[:, None],
    }

    def total(values):
      return jnp.sum(jnp.where(counted.reshape(-1, *[1] * (values.ndim - 1)), values, 0), axis=0)

    return jax.tree.map(total, per_image)

  return step


def make_multi_label_eval_step(
  graphdef: nnx.GraphDef, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any, Any, Batch], Metrics]:
  """Returns `step(params, stats, batch)` for images of several labels; `multi_label.evaluate` makes scores of it.

  The batch holds `image`, `mask` and `label`, bool (B, classes). Returned is what a ranking of all images needs:
  `logits` (B, classes), `loss` (B,), see `binary_cross_entropy`, and the batch's `mask` and `label`.
  """

  def step(params, stats, batch: Batch) -> Metrics:
    logits, _ = nnx.merge(graphdef, params, stats)(normalize(batch["image"], mean, std), train=False)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    loss = binary_cross_entropy(logits, batch["label"])
    return {"logits": logits, "loss": loss, "mask": batch["mask"], "label": batch["label"]}

  return step
