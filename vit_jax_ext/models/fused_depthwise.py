"""Depthwise convolution of 3x3 on a TPU's chip: Pallas kernels, forward and backward.

Nine shifted images are nine reads where they come from memory; here an image is read once.
"""

from collections.abc import Callable, Sequence
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from vit_jax_ext.models.kernels import VMEM_BYTES, like, on_each_device, tiled_bytes, vmem_bytes

TAPS = [(i, j) for i in range(3) for j in range(3)]
TOKENS = 4096  # of the images that one program works on


def _pad(ref, image, padded):
  """Puts an image in the middle of `padded`, (1 + rows + 1, 1 + columns + 1, C) float32."""
  rows, columns = ref.shape[1:3]
  padded[...] = jnp.zeros_like(padded)

  @pl.loop(0, rows)
  def _(row):
    padded[row + 1, pl.ds(1, columns)] = ref[image, row].astype(jnp.float32)


def _neighbours(padded, row, columns, stripe):
  """Yields tap and what each token of a row has there, (columns, C); zeros beyond its stripe."""
  column = jax.lax.broadcasted_iota(jnp.int32, (columns, 1), 0)
  for i, j in TAPS:
    x = padded[row + i, pl.ds(j, columns)]
    if stripe is not None and (i, j) != (1, 1):
      down, right = (
        jax.lax.div(at + by - 1, size) - jax.lax.div(at, size)
        for at, by, size in zip((row, column), (i, j), stripe, strict=True)
      )
      x = jnp.where(2 * down + right == 0, x, 0)
    yield 3 * i + j, x


def _forward_kernel(x_ref, kernel_ref, bias_ref, y_ref, padded, *, stripe):
  images, rows, columns, _ = x_ref.shape

  @pl.loop(0, images)
  def _(image):
    _pad(x_ref, image, padded)

    @pl.loop(0, rows)
    def _(row):
      y = sum(x * kernel_ref[pl.ds(tap, 1)] for tap, x in _neighbours(padded, row, columns, stripe))
      y_ref[image, row] = (y + bias_ref[...]).astype(y_ref.dtype)


def _backward_kernel(x_ref, kernel_ref, dy_ref, dx_ref, sums_ref, padded, padded_dy, sums, *, stripe):
  """`sums`, (10, columns, C): of what each tap meets, and of dy itself."""
  images, rows, columns, _ = x_ref.shape

  @pl.when(pl.program_id(0) == 0)
  def _():
    sums_ref[...] = jnp.zeros_like(sums_ref)

  sums[...] = jnp.zeros_like(sums)

  @pl.loop(0, images)
  def _(image):
    _pad(x_ref, image, padded)
    _pad(dy_ref, image, padded_dy)

    @pl.loop(0, rows)
    def _(row):
      dy = padded_dy[row + 1, pl.ds(1, columns)]
      for tap, x in _neighbours(padded, row, columns, stripe):
        sums[tap] += x * dy
      sums[len(TAPS)] += dy
      # The tap of a neighbour's gradient lies opposite to the neighbour.
      dx = sum(x * kernel_ref[pl.ds(8 - tap, 1)] for tap, x in _neighbours(padded_dy, row, columns, stripe))
      dx_ref[image, row] = dx.astype(dx_ref.dtype)

  sums_ref[0] += sums[...].sum(axis=1)


def _bytes(x, images):
  """Returns what the kernel of the backward pass takes on the chip with so many images of x in a program."""
  _, rows, columns, dim = x.shape
  padded = tiled_bytes((rows + 2, columns + 2, dim), 4)
  # Three arrays, of which the next part is on its way while one is worked on.
  return 2 * padded + 2 * 3 * images * tiled_bytes((rows, columns, dim), x.dtype.itemsize)


def fits(x: jax.Array) -> bool:
  """Returns whether the kernels have room on the chip for an image of x (images, rows, columns, C)."""
  return _bytes(x, 1) <= vmem_bytes()


def _call(kernel: Callable, arrays: Sequence[jax.Array], results, scratch, flops: int) -> Sequence[jax.Array]:
  """Calls a kernel over blocks of images; what has four axes is images, of all else every program sees the same."""
  images, rows, columns, _ = arrays[0].shape
  most = max(1, TOKENS // (rows * columns))
  block = max(d for d in range(1, most + 1) if images % d == 0 and (d == 1 or _bytes(arrays[0], d) <= vmem_bytes()))

  def spec(x):
    if x.ndim == 4:
      return pl.BlockSpec((block, *x.shape[1:]), lambda i: (i, 0, 0, 0))
    return pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)

  return pl.pallas_call(
    kernel,
    grid=(images // block,),
    in_specs=[spec(x) for x in arrays],
    out_specs=[spec(x) for x in results],
    out_shape=results,
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    cost_estimate=pl.CostEstimate(
      flops=flops,
      transcendentals=0,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *results)),
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
  )(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def depthwise_conv(
  x: jax.Array, kernel: jax.Array, bias: jax.Array, stripe: tuple[int, int] | None = None
) -> jax.Array:
  """Returns x convolved, each channel by itself and padded with zeros, in the dtype of x; computed in float32.

  Args:
    x: (images, rows, columns, C).
    kernel: (9, C) float32, row by row.
    bias: (1, C) float32.
    stripe: (height, width) of parts of the image that see nothing of each other, or None.
  """
  kernel_of = functools.partial(_forward_kernel, stripe=stripe)

  def run(arrays):
    x = arrays["q"]
    padded = (x.shape[1] + 2, x.shape[2] + 2, x.shape[3])
    return _call(kernel_of, [*arrays.values()], [like(x)], [padded], 2 * len(TAPS) * x.size)

  return on_each_device(run, dict(q=x, kernel_for_all=kernel, bias_for_all=bias), ["y"])[0]


def _forward(x, kernel, bias, stripe):
  return depthwise_conv(x, kernel, bias, stripe), (x, kernel)


def _backward(stripe, residuals, dy):
  x, kernel = residuals
  kernel_of = functools.partial(_backward_kernel, stripe=stripe)

  def run(arrays):
    x = arrays["q"]
    padded = (x.shape[1] + 2, x.shape[2] + 2, x.shape[3])
    sums = (len(TAPS) + 1, *x.shape[2:])
    results = [like(x), jax.ShapeDtypeStruct((1, len(TAPS) + 1, x.shape[3]), jnp.float32)]
    return _call(kernel_of, [*arrays.values()], results, [padded, padded, sums], 4 * len(TAPS) * x.size)

  dx, sums = on_each_device(run, dict(q=x, kernel_for_all=kernel, y=dy), ["dq", "sums"])
  sums = sums.sum(axis=0)
  return dx, sums[: len(TAPS)], sums[len(TAPS) :]


depthwise_conv.defvjp(_forward, _backward)
