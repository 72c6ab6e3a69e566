"""Attention inside windows of an image on a TPU's chip: Pallas kernels, forward and backward.

A program has a whole image as the projections give it, (tokens, C) row by row, and finds its windows there, rolled or
not: in memory the image is never rolled, cut into windows or put together again. A window is made of groups of
neighbouring tokens of a row, or of a column, whichever fills tiles of 8 rows better; what lies between its tokens and
the tile's end belongs to a neighbour, and is masked.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.models.fused_attention import Group, adder, backward_heads, forward_heads, thirds
from vit_jax_ext.models.kernels import (
  LANES,
  call,
  clear_sums,
  head_groups,
  head_shards,
  like,
  on_each_device,
  product_flops,
  tiled_bytes,
  vmem_bytes,
)

SUBLANES = 8  # rows of a tile
HEADS = 12  # of small windows that are worked on together; with 24 the schedules are a little longer


@dataclasses.dataclass(frozen=True)
class Windows:
  """How an image is cut.

  Args:
    grid: (rows, columns) of tokens.
    window: (height, width), which divide them.
    shift: by how much the image is rolled up and to the left before.
  """

  grid: tuple[int, int]
  window: tuple[int, int]
  shift: tuple[int, int] = (0, 0)

  @functools.cached_property
  def by_rows(self) -> bool:
    """Whether the groups are runs of a row."""
    h, w = self.window
    return h * _tiled(w) <= w * _tiled(h)

  @property
  def groups(self) -> tuple[int, int]:
    """Number and size of the groups of a window."""
    return self.window if self.by_rows else self.window[::-1]

  @property
  def number(self) -> int:
    """Of windows."""
    return math.prod(self.grid) // math.prod(self.window)

  def group(self, window: jax.Array, index: int, size: int) -> pl.Slice:
    """Returns where `size` tokens of a group of a window lie in the rolled image."""
    (_, columns), (h, w) = self.grid, self.window
    across = columns // w
    start = jax.lax.div(window, across) * h * columns + jax.lax.rem(window, across) * w
    if self.by_rows:
      return pl.ds(start + index * columns, size)
    return pl.ds(start + index, size, stride=columns)

  def fits(self, x: jax.ShapeDtypeStruct | jax.Array, width: int) -> bool:
    """Returns whether the kernels that find windows have room on the chip for an image of x (B, tokens, C).

    Args:
      x: queries, or their like.
      width: of a head.
    """
    tokens, dim = x.shape[1:]
    working = tiled_bytes(working_shape(self, tokens, dim, width), 4)
    return 7 * (working + 2 * tiled_bytes((tokens, dim), x.dtype.itemsize)) <= vmem_bytes()

  def pad(self, x: jax.Array, fill: float) -> jax.Array:
    """Returns (n, windows' tokens, windows' tokens) in the order of the groups, each filled up to tiles.

    Args:
      x: in the order of rows.
      fill: of the keys that are none.
    """
    groups, size = self.groups
    x = x.reshape(len(x), *self.window, *self.window)
    if not self.by_rows:
      x = x.transpose(0, 2, 1, 4, 3)
    more = (0, _tiled(size) - size)
    x = jnp.pad(x, [(0, 0)] * 4 + [more], constant_values=fill)
    x = jnp.pad(x, [(0, 0), (0, 0), more, (0, 0), (0, 0)])
    return x.reshape(len(x), groups * _tiled(size), groups * _tiled(size))


def _tiled(size: int) -> int:
  return -(-size // SUBLANES) * SUBLANES


def working_shape(windows: Windows, tokens: int, dim: int, width: int) -> tuple[int, int, int]:
  """Returns the shape of an image in which windows are found, (parts of the lanes, tokens and more, lanes)."""
  parts = head_groups(dim, width)
  behind = _tiled(windows.groups[1]) * (1 if windows.by_rows else windows.grid[1])
  return len(parts), tokens + behind, max(LANES, parts[0][0].size)


def _roll(source, target, grid, shift) -> None:
  """Rolls an image of `source` into `target`, up and to the left."""
  (rows, columns), (down, right) = grid, shift

  @pl.loop(0, rows)
  def _(row):
    there, here = jax.lax.rem(row + down, rows) * columns, row * columns
    for part in range(len(source)):
      target[part, pl.ds(here, columns - right)] = source[part, pl.ds(there + right, columns - right)]
      if right:
        target[part, pl.ds(here + columns - right, right)] = source[part, pl.ds(there, right)]


def clear_behind(image, tokens: int) -> None:
  """Clears what lies behind the tokens of an image in which windows are found, and that the last of them read."""
  image[:, tokens:] = jnp.zeros((image.shape[0], image.shape[1] - tokens, image.shape[2]), jnp.float32)


def _read(ref, target, spare, parts, windows) -> None:
  """Reads an image into `target`, rolled; behind it zeros.

  `target` and `spare` are float32 (parts, tokens and more, lanes): of single rows only those of one tile's width can be
  read anywhere.
  """
  tokens = ref.shape[2]
  clear_behind(target, tokens)
  place = spare if any(windows.shift) else target
  for part, (lanes, _) in enumerate(parts):
    place[part, :tokens, : lanes.size] = ref[0, 0, :, lanes].astype(jnp.float32)
  if any(windows.shift):
    _roll(spare, target, windows.grid, windows.shift)


def _write(source, ref, spare, parts, windows) -> None:
  """Writes an image that `source` has rolled."""
  if any(windows.shift):
    _roll(source, spare, windows.grid, [-s % side for s, side in zip(windows.shift, windows.grid, strict=True)])
    source = spare
  for part, (lanes, _) in enumerate(parts):
    ref[0, 0, :, lanes] = source[part, : ref.shape[2], : lanes.size].astype(ref.dtype)


def _load(image, part, window, lanes, windows, dtype) -> jax.Array:
  number, size = windows.groups
  rows = [image[part, windows.group(window, i, _tiled(size))] for i in range(number)]
  return jnp.concatenate(rows, axis=0)[:, : lanes.size].astype(dtype)


def _store(image, x, part, window, lanes, windows) -> None:
  number, size = windows.groups
  for i in range(number):
    first = i * _tiled(size)
    image[part, windows.group(window, i, size), : lanes.size] = x[first : first + size]


def _windows_at_once(windows, parts) -> int:
  """Returns how many windows are worked on together, as one waits less beside others."""
  most = max(1, HEADS // sum(len(heads) for _, heads in parts))
  return max(d for d in range(1, most + 1) if windows.number % d == 0)


def _places(first, several, parts):
  """Returns window, part, its lanes and heads of all that is worked on together."""
  return [(first + i, part, lanes, heads) for i in range(several) for part, (lanes, heads) in enumerate(parts)]


def attend_images(sources, target, bias_ref, mask_ref, parts, windows, width, scale, dtype) -> None:
  """Does attention inside the windows of an image that lies in working shape: q, k and v of `sources`, into `target`.

  Args:
    sources, target: float32, see `working_shape`.
    bias_ref, mask_ref: of the logits.
    parts: heads that share lanes, see `head_groups`.
    windows, width, scale: see `attend_windows`.
    dtype: of what products take.
  """
  several = _windows_at_once(windows, parts)

  @pl.loop(0, windows.number // several)
  def _(turn):
    places, groups = _places(turn * several, several, parts), []
    for window, part, lanes, heads in places:
      q, k, v = (_load(image, part, window, lanes, windows, dtype) for image in sources)
      groups.append(Group(q, k, v, heads, adder(bias_ref, mask_ref, window)))
    for (window, part, lanes, _), y in zip(places, forward_heads(groups, width, scale), strict=True):
      _store(target, y, part, window, lanes, windows)


def attend_images_backward(
  sources, targets, bias_ref, dbias_ref, mask_ref, parts, windows, width, scale, dtype
) -> None:
  """Turns q, k, v and the gradient of the result into the gradients of q, k and v; adds up that of the bias.

  The arguments are those of `attend_images`.
  """
  number, size = windows.groups
  slot = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (number * _tiled(size), 1), 0), _tiled(size))
  several = _windows_at_once(windows, parts)

  @pl.loop(0, windows.number // several)
  def _(turn):
    places, groups = _places(turn * several, several, parts), []
    for window, part, lanes, heads in places:
      q, k, v, dy = (_load(image, part, window, lanes, windows, dtype) for image in sources)
      groups.append(Group(q, k, v, heads, adder(bias_ref, mask_ref, window), jnp.where(slot < size, dy, 0)))
    gradients, dlogits = backward_heads(groups, width, scale)
    for (window, part, lanes, _), three in zip(places, gradients, strict=True):
      for image, x in zip(targets, three, strict=True):
        _store(image, x, part, window, lanes, windows)
    if dbias_ref is not None:
      number_of_heads = dbias_ref.shape[0]
      for head in range(number_of_heads):
        dbias_ref[head] += sum(dlogits[head::number_of_heads])


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, y_ref, *images, windows, width, scale):
  *sources, target = images
  parts = head_groups(q_ref.shape[-1], width)
  for ref, image in zip((q_ref, k_ref, v_ref), sources, strict=True):
    _read(ref, image, target, parts, windows)
  attend_images(sources, target, bias_ref, mask_ref, parts, windows, width, scale, q_ref.dtype)
  _write(target, y_ref, sources[0], parts, windows)


def _backward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, dy_ref, *refs, windows, width, scale):
  results, dbias_ref, sources, targets = refs[:3], None, refs[-7:-3], refs[-3:]
  parts = head_groups(q_ref.shape[-1], width)
  for ref, image in zip((q_ref, k_ref, v_ref, dy_ref), sources, strict=True):
    _read(ref, image, targets[0], parts, windows)
  if bias_ref is not None:
    clear_sums([refs[3]])
    dbias_ref = refs[3].at[0]
  attend_images_backward(sources, targets, bias_ref, dbias_ref, mask_ref, parts, windows, width, scale, q_ref.dtype)
  for image, ref in zip(targets, results, strict=True):
    _write(image, ref, sources[0], parts, windows)


def attend_windows(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
  mask: np.ndarray | None,
  windows: Windows,
  width: int,
  scale: float,
) -> jax.Array:
  """Returns softmax(scale * q k^T + bias + mask) v inside windows of images, (B, tokens, C).

  Args:
    q, k, v: (B, tokens, C), the image row by row, the heads side by side.
    bias: (heads, n, n) float32 or None, n the tokens of a window.
    mask: (windows, n, n), 0 or -inf, or None.
    windows: of the image.
    width: of a head.
    scale: of the logits.
  """
  bias, mask = pad(bias, mask, windows)
  return _attend(q[:, None], k[:, None], v[:, None], bias, mask, windows, width, scale)[:, 0]


def pad(bias, mask, windows):
  """Returns both in the order of the groups; a mask also where nothing but what fills tiles is to be hidden."""
  n, size = math.prod(windows.window), windows.groups[1]
  if mask is None and _tiled(size) != size:
    mask = np.zeros((1, n, n), np.float32)
  bias = None if bias is None else windows.pad(bias.astype(jnp.float32), 0)
  return bias, None if mask is None else windows.pad(jnp.asarray(mask, jnp.float32), -jnp.inf)


def _call(kernel, arrays, results, queries, products, images, windows, width, scale):
  """Calls a kernel that does `products` with `queries` or its like, with `images` images in float32."""
  kernel = functools.partial(kernel, windows=windows, width=width, scale=scale)
  flops = products * product_flops(dict(q=queries, k=queries)) // windows.number
  return call(kernel, arrays, results, flops, [working_shape(windows, *queries.shape[2:], width)] * images)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, bias, mask, windows, width, scale):
  def run(arrays):
    return _call(_forward_kernel, arrays, {"y": like(arrays["q"])}, arrays["q"], 2, 4, windows, width, scale)

  arrays = dict(q=q, k=k, v=v, bias=bias, mask_for_all=mask)
  return on_each_device(run, arrays, ["y"], q.shape[-1] // width)[0]


def _forward(q, k, v, bias, mask, windows, width, scale):
  return _attend(q, k, v, bias, mask, windows, width, scale), (q, k, v, bias, mask)


def _backward(windows, width, scale, residuals, dy):
  q, k, v, bias, mask = residuals
  names = ["dq", "dk", "dv"] if bias is None else ["dq", "dk", "dv", "dbias_sums"]

  def run(arrays):
    results = {f"d{name}": like(arrays[name]) for name in "qkv"}
    if bias is not None:
      results["dbias_sums"] = jax.ShapeDtypeStruct((1, *arrays["bias"].shape), jnp.float32)
    return _call(_backward_kernel, arrays, results, arrays["q"], 5, 7, windows, width, scale)

  arrays = dict(q=q, k=k, v=v, bias=bias, mask_for_all=mask, dy=dy)
  dq, dk, dv, *dbias = on_each_device(run, arrays, names, q.shape[-1] // width)
  return dq, dk, dv, dbias[0].sum(axis=0) if dbias else None, None if mask is None else jnp.zeros_like(mask)


_attend.defvjp(_forward, _backward)


def _packed_forward_kernel(qkv_ref, bias_ref, mask_ref, y_ref, *refs, values, **kw):
  q_ref, k_ref, v_ref = thirds(qkv_ref)
  if values:
    result, *refs = refs
    result[...] = v_ref[...]
  _forward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, y_ref, *refs, **kw)


def _packed_backward_kernel(qkv_ref, bias_ref, mask_ref, dy_ref, *refs, values, **kw):
  if values:
    dv_ref, *refs = refs
  dqkv_ref, *refs = refs
  results = thirds(dqkv_ref)
  _backward_kernel(*thirds(qkv_ref), bias_ref, mask_ref, dy_ref, *results, *refs, **kw)
  if values:
    results[2][...] += dv_ref[...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _attend_packed(qkv, bias, mask, windows, num_heads, scale, values):
  """Returns what attention gives and, with `values`, these, for which their gradient is added on the chip."""
  width, heads = qkv.shape[-1] // 3 // num_heads, num_heads // head_shards(num_heads)
  kernel, names = functools.partial(_packed_forward_kernel, values=values), ["y", *["v"] * values]

  def run(arrays):
    y = jax.ShapeDtypeStruct((*arrays["q"].shape[:-1], heads * width), qkv.dtype)
    return _call(kernel, arrays, dict.fromkeys(names, y), y, 2, 4, windows, width, scale)

  return on_each_device(run, dict(q=qkv, bias=bias, mask_for_all=mask), names, num_heads)


def _packed_forward(qkv, bias, mask, windows, num_heads, scale, values):
  return _attend_packed(qkv, bias, mask, windows, num_heads, scale, values), (qkv, bias, mask)


def _packed_backward(windows, num_heads, scale, values, residuals, gradients):
  qkv, bias, mask = residuals
  kernel, width = functools.partial(_packed_backward_kernel, values=values), qkv.shape[-1] // 3 // num_heads
  arrays = dict(q=qkv, bias=bias, mask_for_all=mask) | dict(zip(("dy", "dv"), gradients, strict=False))
  names = ["dq", *["dbias_sums"] * (bias is not None)]

  def run(arrays):
    results = {"dq": like(arrays["q"])}
    if bias is not None:
      results["dbias_sums"] = jax.ShapeDtypeStruct((1, *arrays["bias"].shape), jnp.float32)
    return _call(kernel, arrays, results, arrays["dy"], 5, 7, windows, width, scale)

  dqkv, *dbias = on_each_device(run, arrays, names, num_heads)
  return dqkv, dbias[0].sum(axis=0) if dbias else None, None if mask is None else jnp.zeros_like(mask)


_attend_packed.defvjp(_packed_forward, _packed_backward)


def attend_packed_windows(
  qkv: jax.Array, bias: jax.Array | None, mask: np.ndarray | None, windows: Windows, num_heads: int, scale: float
) -> jax.Array:
  """Does what `attend_windows` does, see there.

  Args:
    qkv: queries, keys and values (B, tokens, 3 C), as `kernels.pack` orders them, where `kernels.can_pack`.
    bias, mask, windows, num_heads, scale: as there.
  """
  (y,) = _attend_packed(qkv[:, None], *pad(bias, mask, windows), windows, num_heads, scale, False)
  return y[:, 0]


def attend_packed_stripes(
  qkv: jax.Array, windows: Windows, num_heads: int, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Does the same without bias and mask, and returns the values too, (B, tokens, C) both."""
  y, v = _attend_packed(qkv[:, None], *pad(None, None, windows), windows, num_heads, scale, True)
  return y[:, 0], v[:, 0]
