"""Kernels for TPUs in which tokens lie along the lanes and their channels along the sublanes: what they share.

Where tokens are many and narrow, as in the first stages of Swin and CSWin, a block's time is that of memory. XLA keeps
them in this layout too: 96 channels need no padding, and a norm's sums need no shuffles. What a kernel takes and gives
so is (images, C, tokens); each program works on one image, some tokens at a time.
"""

from collections.abc import Callable, Mapping, Sequence
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from vit_jax_ext.models.kernels import LANES, VMEM_BYTES, tiled_bytes, vmem_bytes

WIDEST = 192  # channels: of wider tokens XLA's products take no longer than memory
DTYPE = jnp.bfloat16  # of products; the kernels are no more precise
HELD = 2**18  # activations that a step works on, about


def step_size(tokens: int, width: int) -> int:
  """Returns how many tokens are worked on at a time, of `width` activations each."""
  return min(tokens, max(1, HELD // width // LANES) * LANES)


def fits(x: jax.Array, dtype: jnp.dtype, moved: int, weights: int, width: int) -> bool:
  """Returns whether a kernel takes x (B, tokens, C) and has room on the chip.

  Not where a mesh has a model axis, which would split what a token has of activations.

  Args:
    dtype: of products.
    moved: bytes of an image's arrays, of which the next ones are on their way while some are worked on.
    weights: bytes of what all programs see.
    width: activations of a token.
  """
  alone = jax.sharding.get_abstract_mesh().shape.get("model", 1) == 1
  temporaries = 4 * tiled_bytes((width, step_size(x.shape[1], width)), 4)
  room = 2 * moved + weights + temporaries <= vmem_bytes()
  return alone and room and x.shape[-1] <= WIDEST and x.dtype == jnp.float32 and dtype == DTYPE


def over_tokens(tokens: int, width: int, body: Callable) -> None:
  """Calls `body` with a slice of tokens after another, all of one size but the last."""
  size = step_size(tokens, width)

  @pl.loop(0, tokens // size)
  def _(i):
    body(pl.ds(pl.multiple_of(i * size, LANES), size))

  if tokens % size:
    body(pl.ds(tokens - tokens % size, tokens % size))


def normalise(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
  """Returns x (C, tokens) with mean 0 and variance 1 over the channels, and the inverse deviations."""
  x = x - x.mean(axis=0, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(x).mean(axis=0, keepdims=True) + epsilon)
  return x * inverse, inverse


def normalise_backward(dunit: jax.Array, unit: jax.Array, inverse: jax.Array) -> jax.Array:
  """Returns the gradient of x from that of `unit`; `unit` and `inverse` are what `normalise` gave."""
  mean = dunit.mean(axis=0, keepdims=True)
  return inverse * (dunit - mean - unit * (dunit * unit).mean(axis=0, keepdims=True))


def clear_sums(refs) -> None:
  """Clears what all programs add to, in the first of them."""

  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in refs:
      ref[...] = jnp.zeros_like(ref)


def from_left(**parameters: jax.Array) -> dict[str, jax.Array]:
  """Returns parameters as a kernel reads them: vectors as columns, matrices to be multiplied from the left."""
  return {f"{name}_for_all": x[:, None] if x.ndim == 1 else x.swapaxes(0, 1) for name, x in parameters.items()}


def call(
  kernel: Callable, arrays: Mapping[str, jax.Array], results: Mapping[str, jax.ShapeDtypeStruct], flops: int
) -> list[jax.Array]:
  """Calls a kernel, a program for each image, one after another.

  Args:
    kernel: takes references in the order of `arrays` and `results`.
    arrays, results: by name, with an entry for each image, in scalar memory if their name ends with _scalars; but of
      what ends with _for_all or _sums all programs see the same.
    flops: of all programs together, an estimate.
  """

  def spec(name, x):
    if name.endswith(("_for_all", "_sums")):
      return pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)
    space = pltpu.SMEM if name.endswith("_scalars") else None
    return pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, *[0] * (x.ndim - 1)), memory_space=space)

  return pl.pallas_call(
    kernel,
    grid=(arrays["q"].shape[0],),
    in_specs=[spec(name, x) for name, x in arrays.items()],
    out_specs=[spec(name, x) for name, x in results.items()],
    out_shape=list(results.values()),
    cost_estimate=pl.CostEstimate(
      flops=flops,
      transcendentals=0,
      bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays.values(), *results.values())),
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
  )(*arrays.values())


def sums_of(parameters: Mapping[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns what programs add the gradients of parameters to, shaped as `from_left` shapes them."""
  shapes = {name: jax.eval_shape(from_left, x=x)["x_for_all"].shape for name, x in parameters.items()}
  return {f"{name}_sums": jax.ShapeDtypeStruct((1, *shape), jnp.float32) for name, shape in shapes.items()}


def add_up(sums: Sequence[jax.Array], parameters: Mapping[str, jax.Array]) -> list[jax.Array]:
  """Returns the gradients of parameters from the sums of all devices."""
  return [x.sum(axis=0).T.reshape(p.shape) for x, p in zip(sums, parameters.values(), strict=True)]
