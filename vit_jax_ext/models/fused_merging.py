"""Merging of 2x2 neighbours with its norm, on a TPU's chip: Pallas kernels, forward and backward.

A program has an image, brings the neighbours together there, by loads of every other row, and multiplies the four by
their parts of the weights one after another. In memory nothing is brought together, and nothing normalised is kept.
"""

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from vit_jax_ext.models import token_kernels
from vit_jax_ext.models.fused_depthwise import lane_parts
from vit_jax_ext.models.kernels import LANES, call, clear_sums, like, on_each_device, product, tiled_bytes, vmem_bytes
from vit_jax_ext.models.token_kernels import DTYPE, Layout

NEIGHBOURS = [(0, 0), (1, 0), (0, 1), (1, 1)]  # (row, column), in the order of the released weights
CELLS = 400  # that are worked on at a time, at most
Grid = tuple[int, int]


def _scratch(x: jax.Array, backward: bool) -> list[tuple[int, ...]]:
  """Returns the shapes of arrays to work with: tokens in parts of the lanes, and the four neighbours of cells."""
  _, tokens, dim = x.shape
  parts = len(lane_parts(dim))
  return [(parts, tokens, LANES)] + [(4, parts, tokens // 4, LANES)] * (1 + backward)


def fits(x: jax.Array, dtype: jnp.dtype) -> bool:
  """Returns whether the kernels take x (B, tokens, C) and products of `dtype`, and have room on the chip."""
  _, tokens, dim = x.shape
  alone = jax.sharding.get_abstract_mesh().shape.get("model", 1) == 1
  moved = 2 * (2 * Layout.of(x).tiled_bytes(tokens, dim) + tiled_bytes((tokens // 4, 2 * dim), 4))
  weights = 3 * tiled_bytes((4 * dim, 2 * dim), 4)
  temporaries = 3 * tiled_bytes((4 * min(CELLS, tokens // 4), dim), 4)
  scratch = sum(tiled_bytes(shape, 4) for shape in _scratch(x, backward=True))
  room = moved + weights + temporaries + scratch <= vmem_bytes()
  return alone and room and x.dtype == jnp.float32 and dtype == DTYPE and 2 * dim >= LANES


def _gather(x_ref, tokens, cells, layout, grid):
  """Brings the neighbours of an image together, in `cells`."""
  (rows, columns), half = grid, grid[1] // 2
  x = layout.rows(x_ref[0])
  for part, lanes in enumerate(lane_parts(x.shape[1])):
    tokens[part, :, : lanes.stop - lanes.start] = x[:, lanes]

  @pl.loop(0, rows // 2)
  def _(row):
    for i, (down, right) in enumerate(NEIGHBOURS):
      for part in range(tokens.shape[0]):
        first = (2 * row + down) * columns + right
        cells[i, part, pl.ds(row * half, half)] = tokens[part, pl.ds(first, half, stride=2)]


def _scatter(cells, tokens, dx_ref, layout, grid):
  """Does the inverse, into `dx_ref`."""
  (rows, columns), half = grid, grid[1] // 2

  @pl.loop(0, rows // 2)
  def _(row):
    for i, (down, right) in enumerate(NEIGHBOURS):
      for part in range(tokens.shape[0]):
        first = (2 * row + down) * columns + right
        tokens[part, pl.ds(first, half, stride=2)] = cells[i, part, pl.ds(row * half, half)]

  dim = dx_ref.shape[1 + layout.axis]
  parts = [tokens[part, :, : lanes.stop - lanes.start] for part, lanes in enumerate(lane_parts(dim))]
  dx_ref[0] = layout.rows(jnp.concatenate(parts, axis=1))


def _over_cells(number, body):
  """Calls `body` with slices of the cells."""
  size = max((d for d in range(8, CELLS + 1, 8) if number % d == 0), default=number)

  @pl.loop(0, number // size)
  def _(i):
    body(pl.ds(pl.multiple_of(i * size, 8), size))  # where 8 does not divide the size, there is but one


def _load(cells, some, dim):
  """Returns the four neighbours of some cells, (cells, C) each."""
  widths = [lanes.stop - lanes.start for lanes in lane_parts(dim)]
  return [jnp.concatenate([cells[i, p, some, :w] for p, w in enumerate(widths)], axis=1) for i in range(4)]


def _mean(xs):
  """Returns the mean over the channels of all four."""
  return sum(x.sum(axis=1, keepdims=True) for x in xs) / (4 * xs[0].shape[1])


def _normalise(xs, epsilon):
  centre = _mean(xs)
  xs = [x - centre for x in xs]
  inverse = jax.lax.rsqrt(_mean([x * x for x in xs]) + epsilon)
  return [x * inverse for x in xs], inverse


def _forward_kernel(x_ref, scale_ref, bias_ref, w_ref, y_ref, tokens, cells, *, layout, grid, epsilon):
  dim = scale_ref.shape[1]
  _gather(x_ref, tokens, cells, layout, grid)

  def body(some):
    units, _ = _normalise(_load(cells, some, dim), epsilon)
    y = 0
    for i, unit in enumerate(units):
      normed = (unit * scale_ref[pl.ds(i, 1)] + bias_ref[pl.ds(i, 1)]).astype(w_ref.dtype)
      y += product(normed, w_ref[pl.ds(i * dim, dim)], 1, 0)
    y_ref[0, some] = y

  _over_cells(cells.shape[2], body)


def _backward_kernel(x_ref, dy_ref, scale_ref, bias_ref, w_ref, dx_ref, *refs, layout, grid, epsilon):
  """`refs`: sums of scale, bias and weights, then arrays to work with."""
  (*sums, tokens, cells, dcells), dim = refs, scale_ref.shape[1]
  dscale_ref, dbias_ref, dw_ref = sums
  clear_sums(sums)
  _gather(x_ref, tokens, cells, layout, grid)

  def body(some):
    units, inverse = _normalise(_load(cells, some, dim), epsilon)
    dy, dunits = dy_ref[0, some].astype(w_ref.dtype), []
    for i, unit in enumerate(units):
      own, scale = pl.ds(i * dim, dim), scale_ref[pl.ds(i, 1)]
      dnormed = product(dy, w_ref[own], 1, 1)
      dw_ref[0, own] += product((unit * scale + bias_ref[pl.ds(i, 1)]).astype(w_ref.dtype), dy, 0, 0)
      dbias_ref[0, pl.ds(i, 1)] += dnormed.sum(axis=0, keepdims=True)
      dscale_ref[0, pl.ds(i, 1)] += (dnormed * unit).sum(axis=0, keepdims=True)
      dunits.append(dnormed * scale)
    mean, slope = _mean(dunits), _mean([d * unit for d, unit in zip(dunits, units, strict=True)])
    for i, (dunit, unit) in enumerate(zip(dunits, units, strict=True)):
      dx = inverse * (dunit - mean - unit * slope)
      for part, lanes in enumerate(lane_parts(dim)):
        dcells[i, part, some, : lanes.stop - lanes.start] = dx[:, lanes]

  _over_cells(cells.shape[2], body)
  _scatter(dcells, tokens, dx_ref, layout, grid)


def _weights(scale, bias, w, dtype):
  return {
    "scale_for_all": scale.reshape(4, -1),
    "bias_for_all": bias.reshape(4, -1),
    "w_for_all": w.astype(dtype),
  }


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def merge(x, scale, bias, w, grid: Grid, epsilon: float, dtype: jnp.dtype) -> jax.Array:
  """Returns norm(neighbours) w, (B, tokens / 4, 2 C) float32, the neighbours being 4 C channels.

  Args:
    x: (B, tokens, C) float32, where it `fits`.
    scale, bias: of the norm, (4 C,) float32.
    w: (4 C, 2 C) float32.
    grid: (rows, columns) of tokens, both even.
    epsilon: of the norm.
    dtype: of what products take.
  """
  layout, (_, tokens, dim) = Layout.of(x), x.shape
  kernel = functools.partial(_forward_kernel, layout=layout, grid=grid, epsilon=epsilon)

  def run(arrays):
    images = len(arrays["q"])
    y = jax.ShapeDtypeStruct((images, tokens // 4, 2 * dim), jnp.float32)
    return call(kernel, arrays, {"y": y}, 2 * images * tokens // 4 * w.size, _scratch(x, backward=False))

  return on_each_device(run, {"q": layout.turn(x), **_weights(scale, bias, w, dtype)}, ["y"])[0]


def _forward(x, scale, bias, w, grid, epsilon, dtype):
  return merge(x, scale, bias, w, grid, epsilon, dtype), (x, scale, bias, w)


def _backward(grid, epsilon, dtype, residuals, dy):
  x, scale, bias, w = residuals
  layout = Layout.of(x)
  kernel = functools.partial(_backward_kernel, layout=layout, grid=grid, epsilon=epsilon)
  shapes = dict(scale_sums=(4, len(scale) // 4), bias_sums=(4, len(scale) // 4), w_sums=w.shape)
  sums = {name: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for name, shape in shapes.items()}

  def run(arrays):
    flops = 2 * 2 * len(arrays["q"]) * x.shape[1] // 4 * w.size
    return call(kernel, arrays, {"dx": like(arrays["q"]), **sums}, flops, _scratch(x, backward=True))

  arrays = {"q": layout.turn(x), "dy": dy, **_weights(scale, bias, w, dtype)}
  dx, *found = on_each_device(run, arrays, ["dx", *sums])
  dscale, dbias, dw = (
    token_kernels.over_devices(x, dtype) for x, dtype in zip(found, (scale.dtype, bias.dtype, dtype), strict=True)
  )
  return layout.turn(dx), dscale.reshape(-1), dbias.reshape(-1), dw


merge.defvjp(_forward, _backward)
