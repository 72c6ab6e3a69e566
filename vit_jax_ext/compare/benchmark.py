"""How fast a model is and how much memory it takes: its compiled forward pass and training step, timed.

Every model is treated alike: uint8 images that are normalised on the device, in training AdamW and label smoothing,
no augmentation, no dropout, float32 parameters, one device.
"""

from collections.abc import Callable, Mapping
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import psutil

from vit_jax_ext.files import size
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import normalize, split_model
from vit_jax_ext.training import optimizer
from vit_jax_ext.training.losses import make_loss
from vit_jax_ext.training.train_step import TrainState, make_train_step

PROGRAMS = ("forward", "training")
SECONDS = 0.5  # of one measurement, at least


class OutOfMemoryError(RuntimeError):
  """A program does not fit in the memory that is free."""


class Benchmark:
  """One model at one batch size and precision.

  Args:
    spec: `name` and `overrides` of the model, as in config.model.
    num_classes: of the model.
    batch_size: images.
    dtype: of the computation.

  Attributes:
    facts: what `compile` has found out, per program P of PROGRAMS: P_compile_seconds; P_memory, the bytes that it takes
      with its arguments and results; P_activations, the bytes it takes besides; and compiled_multiply_adds, half of the
      operations that XLA counts in the forward pass of one image, elementwise ones included.

  Raises:
    UserError: the model cannot be made so.
  """

  def __init__(self, spec: Mapping[str, Any], num_classes: int, batch_size: int, dtype: str):
    self.batch_size = batch_size
    self.facts: dict[str, float] = {}
    self._compiled: dict[str, jax.stages.Compiled] = {}
    variant = registry.get_variant(spec["name"])
    model = registry.abstract_model(
      {"name": spec["name"], "overrides": {**spec["overrides"], "dtype": dtype, "param_dtype": "float32"}}, num_classes
    )
    self._graphdef, self._params, self._stats = split_model(model)
    self._tx = optimizer.adamw(1e-3, weight_decay=0.05, no_decay=variant.no_decay, clip_norm=None)

    def forward(params, stats, batch):
      images = normalize(batch["image"], variant.mean, variant.std)
      return nnx.merge(self._graphdef, params, stats)(images)[0]

    loss = make_loss(self._graphdef, mean=variant.mean, std=variant.std, label_smoothing=0.1)
    train_step = make_train_step(loss, self._tx, seed=0)
    self._functions = {
      "forward": jax.jit(forward),
      "training": jax.jit(train_step, donate_argnums=0),
    }
    self._batch = {
      "image": jax.ShapeDtypeStruct((batch_size, *model.image_size, 3), jnp.uint8),
      "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }

  def compile(self, program: str) -> None:
    """Compiles one of PROGRAMS.

    Raises:
      OutOfMemoryError: it would not fit; it is then not kept.
      jax.errors.JaxRuntimeError: XLA cannot compile it.
    """
    state = (self._params, self._stats)
    arguments = state if program == "forward" else (jax.eval_shape(self._train_state, *state),)
    start = time.perf_counter()
    compiled = self._functions[program].lower(*arguments, self._batch).compile()
    memory = compiled.memory_analysis()
    taken = (
      memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes
    )  # fmt: skip
    self.facts |= {
      f"{program}_compile_seconds": time.perf_counter() - start,
      f"{program}_memory": taken,
      f"{program}_activations": memory.temp_size_in_bytes,
    }
    if program == "forward":
      self.facts["compiled_multiply_adds"] = compiled.cost_analysis()["flops"] / 2 / self.batch_size
    free = free_memory()
    if taken > free:
      raise OutOfMemoryError(f"{program} takes {size(taken)} of memory, {size(free)} are free")
    self._compiled[program] = compiled

  def images_per_second(self, program: str) -> float:
    """Times a compiled program, after one run untimed; its arrays are made before and gone afterwards.

    Raises:
      jax.errors.JaxRuntimeError: it fails, such as for lack of memory.
    """
    compiled = self._compiled[program]
    image = np.random.default_rng(0).integers(0, 256, self._batch["image"].shape, np.uint8)
    batch = jax.device_put({"image": image, "label": np.zeros(self.batch_size, np.int32)})
    params, stats = self._weights()
    if program == "forward":
      rate = _calls_per_second(lambda _: compiled(params, stats, batch), None)
    else:
      rate = _calls_per_second(lambda state: compiled(state, batch)[0], self._train_state(params, stats))
    return rate * self.batch_size

  def _train_state(self, params: Any, stats: Any) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, stats, self._tx.init(params), {})

  def _weights(self) -> tuple[Any, Any]:
    """Returns parameters and statistics at little cost: matrices from one pool of random numbers, vectors of ones."""
    weights = (self._params, self._stats)
    pool = np.random.default_rng(0).normal(0, 0.02, max(leaf.size for leaf in jax.tree.leaves(weights)))

    def fill(leaf):
      return jnp.ones(leaf.shape) if leaf.ndim == 1 else jnp.array(pool[: leaf.size].reshape(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, weights)


def _calls_per_second(call: Callable[[Any], Any], state: Any) -> float:
  """Times `state = call(state)`, asynchronously in runs that double until SECONDS are over."""
  state = jax.block_until_ready(call(state))
  calls, run, start = 0, 1, time.perf_counter()
  while (elapsed := time.perf_counter() - start) < SECONDS:
    for _ in range(run):
      state = call(state)
    jax.block_until_ready(state)
    calls, run = calls + run, 2 * run
  return calls / elapsed


def free_memory() -> int:
  """Returns the bytes that a program can have on the first device."""
  if stats := jax.local_devices()[0].memory_stats():
    return stats["bytes_limit"] - stats["bytes_in_use"]
  return psutil.virtual_memory().available
