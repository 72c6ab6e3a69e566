"""Attention inside clusters of tokens on a TPU's chip: Pallas kernels, forward and backward.

A program has a whole image. It brings queries, keys and values of each head into the order of its clusters, where pairs
of clusters are windows of a single row (`fused_windows`), and what attention gives back to where the tokens lie. In
memory nothing is moved. The position term, a convolution of the values, is added there too (`fused_depthwise`).

To move is a product with a matrix of zeros and ones, made on the chip, or goes row by row where tokens are so many that
this takes less.
"""

import dataclasses
import functools
import math
from typing import Self

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.models import fused_depthwise, fused_windows
from vit_jax_ext.models.fused_depthwise import from_parts, in_parts
from vit_jax_ext.models.fused_windows import Windows
from vit_jax_ext.models.kernels import (
  LANES,
  call,
  clear_sums,
  head_groups,
  like,
  on_each_device,
  product_flops,
  tiled_bytes,
  vmem_bytes,
)

ROWS = 512  # of a permutation's matrix that are made at a time
MANY = 1024  # tokens from which on rows are moved one by one: a product's time grows with the square of their number
UNROLLED = (256, 512)  # rows, at least and at most; with fewer, the compiler's schedule is a third longer
STEPS = 8  # rows whose places are found from one address
ROW_FLOPS = 131_000 * 1.1  # what a product would do in the cycles that a row takes, by the schedule


def _unrolled(tokens: int, width: int) -> int | None:
  """Returns how many of the rows that are moved one by one are written out; None where a product moves them."""
  least, most = UNROLLED
  found = [n for n in range(most, least - 1, -STEPS) if tokens % n == 0]
  return found[0] if found and tokens >= MANY and width <= LANES else None


@dataclasses.dataclass(frozen=True)
class _Channels:
  """Channels of an array on the chip: `lanes` of `ref[prefix]`, (tokens, lanes)."""

  ref: jax.Array
  prefix: tuple[int, ...]
  lanes: pl.Slice

  @classmethod
  def of_head(cls, ref, head: int, width: int) -> Self:
    """Returns those of a head in (1, 1, tokens, C)."""
    return cls(ref, (0, 0), pl.ds(head * width, width))

  @classmethod
  def in_image(cls, image, head: int, width: int) -> Self:
    """Returns those of a head in an image in which windows are found."""
    several = max(1, LANES // width)
    return cls(image, (head // several,), pl.ds(head % several * width, width))

  def load(self, tokens: int, dtype: jnp.dtype) -> jax.Array:
    return self.ref[(*self.prefix, pl.ds(0, tokens), self.lanes)].astype(dtype)

  def store(self, some: pl.Slice, x: jax.Array) -> None:
    self.ref[(*self.prefix, some, self.lanes)] = x.astype(self.ref.dtype)


def _side_by_side(sources, tokens, dtype):
  return jnp.concatenate([source.load(tokens, dtype) for source in sources], axis=1)


def _move_by_product(index, sources, results, dtype):
  tokens, width = index.shape[1], sources[0].lanes.size
  x = _side_by_side(sources, tokens, dtype)
  precision = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST

  def fill(first, rows):
    own = jax.lax.broadcasted_iota(jnp.int32, (rows, tokens), 0) == index - first
    y = jnp.dot(own.astype(dtype), x, precision=precision, preferred_element_type=jnp.float32)
    for i, result in enumerate(results):
      result.store(pl.ds(first, rows), y[:, i * width : (i + 1) * width])

  @pl.loop(0, tokens // ROWS)
  def _(block):
    fill(pl.multiple_of(block * ROWS, ROWS), ROWS)

  if tokens % ROWS:
    fill(tokens - tokens % ROWS, tokens % ROWS)


def _move_rows(place_ref, head, source, target, back):
  """Moves rows of float32 arrays of 128 lanes, the only ones that can be anywhere."""
  tokens = source.shape[0]
  unrolled = _unrolled(tokens, LANES)
  # Numbers that the compiler does not know stay in registers; it would make constants anew for each row.
  steps = [jnp.minimum(pl.program_id(0), 0) + i for i in range(STEPS)]

  @pl.loop(0, tokens // unrolled)
  def _(block):
    row = pl.multiple_of(block * unrolled, unrolled)
    for first in range(0, unrolled, STEPS):
      places = place_ref.at[0, 0, pl.ds(head * tokens + row + first, STEPS)]
      for i, step in enumerate(steps):
        here, there = pl.ds(row + first + i, 1), pl.ds(places[step], 1)
        if back:
          target[here] = source[there]
        else:
          target[there] = source[here]


def _move(place_ref, order_ref, head, sources, results, back, dtype, rows):
  """Brings a head's channels of some arrays into the order of its clusters, or back; exact.

  Args:
    place_ref, order_ref: see `attend_clusters`; rows move one by one where there is no order, and places are scalars.
    sources, results: `_Channels`.
    dtype: what is moved is rounded to.
    rows: two arrays to work with.
  """
  if order_ref is not None:
    _move_by_product((order_ref if back else place_ref)[0, pl.ds(head, 1)], sources, results, dtype)
    return
  before, after = rows
  tokens, width = before.shape[0], sources[0].lanes.size
  several = LANES // width
  for first in range(0, len(sources), several):
    x = _side_by_side(sources[first : first + several], tokens, dtype)
    before[:, : x.shape[1]] = x.astype(jnp.float32)
    _move_rows(place_ref, head, before, after, back)
    for i, result in enumerate(results[first : first + several]):
      result.store(pl.ds(0, tokens), after[:, i * width : (i + 1) * width])


def _copy(image, ref, parts, to=None):
  """Copies an image that lies in parts, by the lanes that each has, into `ref`; adds it with `to`, the same."""
  for part, lanes in enumerate(parts):
    x = image[part, : ref.shape[2], : lanes.size]
    ref[0, 0, :, lanes] = (x if to is None else to[0, 0, :, lanes].astype(jnp.float32) + x).astype(ref.dtype)


def _forward_kernel(
  place_ref, order_ref, taps_ref, q_ref, k_ref, v_ref, mask_ref, y_ref, *refs, windows, width, scale, grid, kept
):
  """`refs`: queries, keys and values in the order of clusters, of which a number is `kept`, then as `_scratch` says."""
  ordered, (*sources, target), rows = refs[:kept], refs[kept : kept + 4], refs[kept + 4 :]
  tokens, dim = q_ref.shape[2:]
  parts = head_groups(dim, width)
  move = functools.partial(_move, place_ref, order_ref, dtype=q_ref.dtype, rows=rows)
  for image in sources:
    fused_windows.clear_behind(image, tokens)
  for head in range(dim // width):
    there = [_Channels.in_image(image, head, width) for image in sources]
    move(head, [_Channels.of_head(ref, head, width) for ref in (q_ref, k_ref, v_ref)], there, back=False)
  for image, ref in zip(sources, ordered, strict=False):
    _copy(image, ref, [lanes for lanes, _ in parts])
  fused_windows.attend_images(sources, target, None, mask_ref, parts, windows, width, scale, q_ref.dtype)
  for head in range(dim // width):
    move(head, [_Channels.in_image(target, head, width)], [_Channels.of_head(y_ref, head, width)], back=True)
  padded, term = _as_convolved(sources[:2], tokens, dim, grid)
  bias_ref = taps_ref.at[:, pl.ds(len(fused_depthwise.TAPS), 1)]
  fused_depthwise.convolve(v_ref.at[0], 0, taps_ref, bias_ref, padded, term, grid)
  _copy(term, y_ref, _lanes(dim), to=y_ref)


def _backward_kernel(
  place_ref, order_ref, taps_ref, q_ref, k_ref, v_ref, mask_ref, dy_ref, values_ref, *refs, windows, width, scale, grid
):
  """`refs`: gradients of queries, keys, values and taps, then what `_scratch` says."""
  *results, sums_ref = refs[:4]
  sums, sources, targets, rows = refs[4], refs[5:9], refs[9:12], refs[12:]
  clear_sums([sums_ref])
  tokens, dim = q_ref.shape[2:]
  parts = head_groups(dim, width)
  move = functools.partial(_move, place_ref, order_ref, dtype=q_ref.dtype, rows=rows)
  for image in sources:
    fused_windows.clear_behind(image, tokens)
  for image, ref in zip(sources, (q_ref, k_ref, v_ref), strict=False):
    for part, (lanes, _) in enumerate(parts):
      image[part, :tokens, : lanes.size] = ref[0, 0, :, lanes].astype(jnp.float32)
  for head in range(dim // width):
    move(head, [_Channels.of_head(dy_ref, head, width)], [_Channels.in_image(sources[3], head, width)], back=False)
  fused_windows.attend_images_backward(
    sources, targets, None, None, mask_ref, parts, windows, width, scale, q_ref.dtype
  )
  for head in range(dim // width):
    there = [_Channels.of_head(ref, head, width) for ref in results]
    move(head, [_Channels.in_image(image, head, width) for image in targets], there, back=True)
  padded, term, padded_dy = _as_convolved(sources[:3], tokens, dim, grid)
  sums[...] = jnp.zeros_like(sums)
  fused_depthwise.convolve_backward(values_ref.at[0], dy_ref.at[0], 0, taps_ref, padded, padded_dy, term, sums, grid)
  sums_ref[0] += sums[...].sum(axis=2)
  _copy(term, results[2], _lanes(dim), to=results[2])


def _lanes(dim: int) -> list[pl.Slice]:
  return [pl.ds(part.start, part.stop - part.start) for part in fused_depthwise.lane_parts(dim)]


def _as_convolved(images, tokens, dim, grid) -> list:
  """Returns references to room for a convolution where images lay: padded, and a result."""
  alone, padded = fused_depthwise.working_shapes(tokens, dim, grid)
  shapes = [padded, alone, padded][: len(images)]
  return [image.at[tuple(pl.ds(0, size) for size in shape)] for image, shape in zip(images, shapes, strict=True)]


def _scratch(q, windows, width, grid, backward: bool) -> list[tuple[int, ...]]:
  """Returns the shapes of arrays that a kernel works with, for q (..., tokens, C): images in which windows are found,
  or that are convolved, and rows that are moved one by one.
  """
  tokens, dim = q.shape[-2:]
  alone, padded = fused_depthwise.working_shapes(tokens, dim, grid)
  image = tuple(map(max, padded, fused_windows.working_shape(windows, tokens, dim, width)))
  sums = (alone[0], len(fused_depthwise.TAPS) + 1, grid[1], LANES)
  shapes = [sums, *[image] * 7] if backward else [image] * 4
  return shapes + [(tokens, LANES)] * (2 if _unrolled(tokens, width) else 0)


def fits(q: jax.Array, windows: Windows, width: int, grid: tuple[int, int]) -> bool:
  """Returns whether the kernels have room on the chip; the arguments are those of `attend_clusters`."""
  tokens = q.shape[1]
  shapes = _scratch(q, windows, width, grid, backward=True)
  if not _unrolled(tokens, width):
    shapes.append((min(ROWS, tokens), tokens))  # of a permutation's matrix
  moved = 2 * 8 * tiled_bytes(q.shape[1:], q.dtype.itemsize)  # the next image is on its way while one is worked on
  return moved + sum(tiled_bytes(shape, 4) for shape in shapes) <= vmem_bytes()


def _call(kernel, arrays, results, windows, width, scale, grid, backward):
  """Calls a kernel with permutations and taps as it takes them, and counts what it does."""
  q, place, order, taps = (arrays[name] for name in ("q", "place", "order", "taps_by_head"))
  others = {name: x for name, x in arrays.items() if name not in ("place", "order", "taps_by_head")}
  flops = (5 if backward else 2) * product_flops(dict(q=q, k=q)) // windows.number
  if _unrolled(q.shape[2], width):
    flops += round(ROW_FLOPS * place.size * (1 + math.ceil(3 / (LANES // width))))
    place, order, name = place.reshape(len(place), 1, -1), None, "place_scalars"
  else:
    flops, name = flops + 4 * product_flops(dict(q=q, k=q)), "place"
  kernel = functools.partial(kernel, windows=windows, width=width, scale=scale, grid=grid)
  arrays = {name: place, "order": order, "taps_for_all": in_parts(taps.T), **others}
  return call(kernel, arrays, results, flops, _scratch(q, windows, width, grid, backward))


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def _attend(q, k, v, order, place, mask, taps, windows, width, scale, grid):
  return _results(q, k, v, order, place, mask, taps, windows, width, scale, grid, kept=0)[0]


def _results(q, k, v, order, place, mask, taps, windows, width, scale, grid, kept):
  """Returns what attention gives and, for the backward pass, how many are `kept` of q, k and v in order."""
  arrays = dict(q=q, k=k, v=v, order=order, place=place, mask_for_all=mask, taps_by_head=taps)
  names = ["y", "dq", "dk", "dv"][: 1 + kept]
  kernel = functools.partial(_forward_kernel, kept=kept)

  def run(arrays):
    results = dict.fromkeys(names, like(arrays["q"]))
    return _call(kernel, arrays, results, windows, width, scale, grid, backward=False)

  return on_each_device(run, arrays, names, q.shape[-1] // width)


def _forward(q, k, v, order, place, mask, taps, windows, width, scale, grid):
  y, *ordered = _results(q, k, v, order, place, mask, taps, windows, width, scale, grid, kept=3)
  return y, (*ordered, v, order, place, mask, taps)


def _backward(windows, width, scale, grid, residuals, dy):
  *ordered, v, order, place, mask, taps = residuals
  arrays = dict(zip("qkv", ordered, strict=True)) | dict(order=order, place=place, mask_for_all=mask, taps_by_head=taps)
  names = ["dq", "dk", "dv", "taps_sums"]

  def run(arrays):
    results = dict.fromkeys(names[:3], like(arrays["q"]))
    dim = arrays["q"].shape[-1]
    parts = len(fused_depthwise.lane_parts(dim))
    results["taps_sums"] = jax.ShapeDtypeStruct((1, parts, taps.shape[1], LANES), jnp.float32)
    *found, sums = _call(_backward_kernel, arrays, results, windows, width, scale, grid, backward=True)
    return [*found, from_parts(sums, dim).swapaxes(1, 2)]

  dq, dk, dv, dtaps = on_each_device(run, arrays | dict(dy=dy, y=v), names, v.shape[-1] // width)
  return dq, dk, dv, None, None, jnp.zeros_like(mask), dtaps.sum(axis=0)


_attend.defvjp(_forward, _backward)


def attend_clusters(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  order: jax.Array,
  place: jax.Array,
  mask: np.ndarray,
  taps: jax.Array,
  windows: Windows,
  width: int,
  scale: float,
  grid: tuple[int, int],
) -> jax.Array:
  """Returns softmax(scale * q k^T + mask) v inside pairs of clusters, and the position term, (B, tokens, C).

  Args:
    q, k, v: (B, tokens, C), the heads side by side.
    order, place: see `fused_clustering.cluster_order`.
    mask: of a pair of clusters, (tokens of it, tokens of it), 0 or -inf.
    taps: (10, C) float32, nine of a depthwise convolution of v and its bias.
    windows: pairs of clusters in a row that has all.
    width: of a head.
    scale: of the logits.
    grid: (rows, columns) of tokens, as the convolution sees them.
  """
  _, mask = fused_windows.pad(None, mask[None], windows)
  return _attend(q[:, None], k[:, None], v[:, None], order, place, mask, taps.T, windows, width, scale, grid)[:, 0]
