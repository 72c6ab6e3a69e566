"""Depthwise convolution of 3x3 on a TPU's chip: Pallas kernels, forward and backward.

Nine shifted images are nine reads where they come from memory; here an image is read once. Its tokens stay side by
side, row by row, as all else has them: an array of rows would have to be copied, for 14 or 28 columns fill no tiles.
"""

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from vit_jax_ext.models.kernels import LANES, call, clear_sums, like, on_each_device, tiled_bytes, vmem_bytes

TAPS = [(i, j) for i in range(3) for j in range(3)]
TOKENS = 4096  # of the images that one program works on
Grid = tuple[int, int]


def lane_parts(dim: int) -> list[slice]:
  """Returns the lanes of each tile: single rows of arrays of one tile's width can be read anywhere."""
  return [slice(first, min(first + LANES, dim)) for first in range(0, dim, LANES)]


def working_shapes(tokens: int, dim: int, grid: Grid) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
  """Returns the shapes of an image in parts of its lanes, and of one between zeros."""
  parts, zeros = len(lane_parts(dim)), -(-(grid[1] + 1) // 8) * 8
  return (parts, tokens, LANES), (parts, tokens + 2 * zeros, LANES)


def _pad(ref, image, padded):
  """Puts an image between zeros."""
  zeros = (padded.shape[1] - ref.shape[1]) // 2
  padded[...] = jnp.zeros(padded.shape, jnp.float32)
  for part, lanes in enumerate(lane_parts(ref.shape[2])):
    padded[part, zeros : zeros + ref.shape[1], : lanes.stop - lanes.start] = ref[image, :, lanes].astype(jnp.float32)


def _write(source, ref, image):
  """Writes an image that lies in parts."""
  for part, lanes in enumerate(lane_parts(ref.shape[2])):
    ref[image, :, lanes] = source[part, :, : lanes.stop - lanes.start].astype(ref.dtype)


def _places(grid, stripe):
  """Returns the column that each token of a row has in its stripe, (columns, 1), where they are more than one."""
  column = jax.lax.broadcasted_iota(jnp.int32, (grid[1], 1), 0)
  width = grid[1] if stripe is None else stripe[1]
  return column if width == grid[1] else column - width * jax.lax.div(column, width)


def _neighbours(padded, part, row, grid, stripe, places):
  """Yields tap and what each token of a row has there, (columns, lanes); zeros beyond its stripe."""
  rows, columns = grid
  height, width = stripe or grid
  zeros = (padded.shape[1] - rows * columns) // 2
  for i, j in TAPS:
    x = padded[part, pl.ds(zeros + (row + i - 1) * columns + j - 1, columns)]
    seen = {0: places > 0, 1: None, 2: places < width - 1}[j]
    if height < rows and i != 1:
      same = jax.lax.div(row + i - 1, height) == jax.lax.div(row, height)
      seen = same if seen is None else seen & same
    yield 3 * i + j, x if seen is None else jnp.where(seen, x, 0)


def convolve(ref, image, kernel_ref, bias_ref, padded, y, grid, stripe=None) -> None:
  """Convolves an image of `ref` (images, tokens, C) into `y`.

  Args:
    ref, image: where it is found.
    kernel_ref, bias_ref: in parts of the lanes, see `in_parts`.
    padded, y: float32, see `working_shapes`; `padded` is worked with.
    grid, stripe: see `depthwise_conv`.
  """
  (rows, columns), places = grid, _places(grid, stripe)
  _pad(ref, image, padded)

  @pl.loop(0, rows)
  def _(row):
    for part in range(padded.shape[0]):
      taps = _neighbours(padded, part, row, grid, stripe, places)
      y[part, pl.ds(row * columns, columns)] = bias_ref[part] + sum(x * kernel_ref[part, pl.ds(t, 1)] for t, x in taps)


def convolve_backward(ref, dy_ref, image, kernel_ref, padded, padded_dy, dx, sums, grid, stripe=None) -> None:
  """Finds the gradient of an image from that of the result, and adds to those of kernel and bias.

  Args:
    ref, dy_ref, image: where the image and the gradient of the result are found.
    kernel_ref, grid, stripe: see `convolve`.
    padded, padded_dy, dx: as `padded`, `padded` and `y` there.
    sums: (parts, 10, columns, lanes), of what each tap meets, and of dy itself.
  """
  (rows, columns), places = grid, _places(grid, stripe)
  zeros = (padded.shape[1] - rows * columns) // 2
  _pad(ref, image, padded)
  _pad(dy_ref, image, padded_dy)

  @pl.loop(0, rows)
  def _(row):
    for part in range(padded.shape[0]):
      dy = padded_dy[part, pl.ds(zeros + row * columns, columns)]
      for tap, x in _neighbours(padded, part, row, grid, stripe, places):
        sums[part, tap] += x * dy
      sums[part, len(TAPS)] += dy
      # The tap of a neighbour's gradient lies opposite to the neighbour.
      taps = _neighbours(padded_dy, part, row, grid, stripe, places)
      dx[part, pl.ds(row * columns, columns)] = sum(x * kernel_ref[part, pl.ds(8 - tap, 1)] for tap, x in taps)


def _forward_kernel(x_ref, kernel_ref, bias_ref, y_ref, padded, y, *, grid, stripe):
  @pl.loop(0, x_ref.shape[0])
  def _(image):
    convolve(x_ref, image, kernel_ref, bias_ref, padded, y, grid, stripe)
    _write(y, y_ref, image)


def _backward_kernel(x_ref, kernel_ref, dy_ref, dx_ref, sums_ref, padded, padded_dy, dx, sums, *, grid, stripe):
  clear_sums([sums_ref])
  sums[...] = jnp.zeros_like(sums)

  @pl.loop(0, x_ref.shape[0])
  def _(image):
    convolve_backward(x_ref, dy_ref, image, kernel_ref, padded, padded_dy, dx, sums, grid, stripe)
    _write(dx, dx_ref, image)

  sums_ref[0] += sums[...].sum(axis=2)


def _bytes(x: jax.Array, grid: Grid, images: int) -> int:
  """Returns what the kernel of the backward pass takes on the chip with so many images of x in a program."""
  _, tokens, dim = x.shape
  alone, padded = working_shapes(tokens, dim, grid)
  # Three arrays, of which the next part is on its way while one is worked on.
  moved = 2 * 3 * images * tiled_bytes((tokens, dim), x.dtype.itemsize)
  return tiled_bytes(alone, 4) + 2 * tiled_bytes(padded, 4) + moved


def fits(x: jax.Array, grid: Grid) -> bool:
  """Returns whether the kernels have room on the chip for an image of x (images, tokens, C)."""
  return _bytes(x, grid, 1) <= vmem_bytes()


def _images_at_once(x: jax.Array, grid: Grid) -> int:
  """Returns how many images of x (images, tokens, C) one program works on at most."""
  most = max(1, TOKENS // x.shape[1])
  return max(d for d in range(1, most + 1) if d == 1 or _bytes(x, grid, d) <= vmem_bytes())


def in_parts(x: jax.Array) -> jax.Array:
  """Returns (rows, C) as (parts, rows, lanes)."""
  parts = len(lane_parts(x.shape[1]))
  return jnp.pad(x, ((0, 0), (0, parts * LANES - x.shape[1]))).reshape(len(x), parts, LANES).swapaxes(0, 1)


def from_parts(x: jax.Array, dim: int) -> jax.Array:
  """Inverse of `in_parts`, of all but the first axis."""
  return x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1)[:, :, :dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def depthwise_conv(
  x: jax.Array, kernel: jax.Array, bias: jax.Array, grid: Grid, stripe: Grid | None = None
) -> jax.Array:
  """Returns x convolved, each channel by itself and padded with zeros, in the dtype of x; computed in float32.

  Args:
    x: (images, tokens, C).
    kernel: (9, C) float32, row by row.
    bias: (1, C) float32.
    grid: (rows, columns) of tokens.
    stripe: (height, width) of parts of the image that see nothing of each other, or None.
  """
  forward = functools.partial(_forward_kernel, grid=grid, stripe=stripe)

  def run(arrays):
    x = arrays["q"]
    alone, padded = working_shapes(*x.shape[1:], grid)
    flops = 2 * len(TAPS) * x.size
    return call(forward, arrays, {"y": like(x)}, flops, [padded, alone], _images_at_once(x, grid))

  arrays = dict(q=x, kernel_for_all=in_parts(kernel), bias_for_all=in_parts(bias))
  return on_each_device(run, arrays, ["y"])[0]


def _forward(x, kernel, bias, grid, stripe):
  return depthwise_conv(x, kernel, bias, grid, stripe), (x, kernel)


def _backward(grid, stripe, residuals, dy):
  x, kernel = residuals
  backward = functools.partial(_backward_kernel, grid=grid, stripe=stripe)

  def run(arrays):
    x = arrays["q"]
    alone, padded = working_shapes(*x.shape[1:], grid)
    sums = (alone[0], len(TAPS) + 1, grid[1], LANES)
    results = {"dq": like(x), "tap_sums": jax.ShapeDtypeStruct((1, alone[0], len(TAPS) + 1, LANES), jnp.float32)}
    flops, scratch = 4 * len(TAPS) * x.size, [padded, padded, alone, sums]
    dx, found = call(backward, arrays, results, flops, scratch, _images_at_once(x, grid))
    return dx, from_parts(found, x.shape[2])

  dx, sums = on_each_device(run, dict(q=x, kernel_for_all=in_parts(kernel), y=dy), ["dq", "tap_sums"])
  sums = sums.sum(axis=0)
  return dx, sums[: len(TAPS)], sums[len(TAPS) :]


depthwise_conv.defvjp(_forward, _backward)
