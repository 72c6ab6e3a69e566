"""Re-attention whose maps stay on a TPU's chip: Pallas kernels, forward and backward.

A map's rows sum to 1, so each has the mean 1 / keys, and what mixing the heads does to the values can be said of the
centred maps Q_h = P_h - 1 / keys: with factors t of the mixing and s added to the maps of head g,

  y_g = sum_h t_hg Q_h v_g + s_g sum_k v_g,

in which no cancellation loses the little by which maps differ. What normalises the mixed maps needs the covariance of P
over the heads alone.

A tile of all heads' maps is a matrix (ROWS * heads, keys) that lies in memory as it is. Mixing is its product with one
that has the factors where two rows are of the same query and zeros elsewhere, `_mixer`.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from vit_jax_ext.models.kernels import (
  call,
  head_groups,
  like,
  on_each_device,
  own_lanes,
  product,
  product_flops,
  softmax,
  softmax_gradient,
)

HIGHEST = jax.lax.Precision.HIGHEST
ROWS = 8  # of a map that are mixed at a time: those of a tile


def _each_head(q_ref, width):
  """Yields head, lanes of its group, and which of them are its own."""
  for lanes, heads in head_groups(q_ref.shape[-1], width):
    for i, head in enumerate(heads):
      yield head, lanes, own_lanes(i, lanes.size, width)


def _own(ref, lanes, own):
  """Returns an operand of a head's product, zero in its neighbours' lanes."""
  return jnp.where(own, ref[0, 0, :, lanes], 0)


def _make_maps(q_ref, k_ref, maps, width, scale):
  """Fills `maps` with the centred maps, and clears the rest of their last tile: 0 times a NaN is no 0."""
  tokens = q_ref.shape[2]
  if maps.shape[1] > tokens:
    maps[:, tokens:] = jnp.zeros((len(maps), maps.shape[1] - tokens, tokens), jnp.float32)
  for head, lanes, own in _each_head(q_ref, width):
    logits = product(_own(q_ref, lanes, own), k_ref[0, 0, :, lanes], 1, 1) * scale
    weights, inverse = softmax(logits, q_ref.dtype)
    maps[head, :tokens] = weights * inverse - 1 / tokens


def _spread(num_heads):
  """Returns what repeats heads for a tile, (ROWS * heads, heads), and which pairs of its rows are of one query."""
  shape = (ROWS * num_heads, num_heads)
  row, head = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
  repeat = (row >= ROWS * head) & (row < ROWS * (head + 1))
  row, other = (jax.lax.broadcasted_iota(jnp.int32, (shape[0], shape[0]), axis) for axis in (0, 1))
  return repeat.astype(jnp.float32), row % ROWS == other % ROWS


def _mixer(t):
  """Returns the matrix that mixes heads, new rows by old ones, (ROWS * heads, ROWS * heads) float32."""
  repeat, same = _spread(len(t))
  return jnp.where(same, product(product(repeat, t, 1, 1, HIGHEST), repeat, 1, 1, HIGHEST), 0)


def _mixer_gradient(dmixer, num_heads):
  """Returns the gradient of t from that of the mixer."""
  repeat, same = _spread(num_heads)
  return product(product(repeat, jnp.where(same, dmixer, 0), 0, 1, HIGHEST), repeat, 1, 0, HIGHEST)


def _each_tile(maps, function):
  """Calls function with the index of each tile of rows of all heads' maps."""

  @pl.loop(0, maps.shape[1] // ROWS)
  def _(tile):
    function((slice(None), pl.ds(pl.multiple_of(tile * ROWS, ROWS), ROWS)))


def _matrix(tile, dtype):
  """Returns a tile as a matrix (ROWS * heads, keys)."""
  return tile.reshape(-1, tile.shape[-1]).astype(dtype)


def _write_logits_gradients(q_ref, k_ref, maps, dmaps, dq_ref, dk_ref, dq_sum, dk_sum, width, scale):
  """Writes the gradients of queries and keys from those of the maps."""
  tokens, dtype = q_ref.shape[2], q_ref.dtype
  dq_sum[...], dk_sum[...] = jnp.zeros_like(dq_sum), jnp.zeros_like(dk_sum)
  for head, lanes, own in _each_head(q_ref, width):
    dlogits = softmax_gradient(maps[head, :tokens] + 1 / tokens, dmaps[head, :tokens])
    dlogits = (dlogits * scale).astype(dtype)
    dq_sum[:, lanes] += jnp.where(own, product(dlogits, k_ref[0, 0, :, lanes], 1, 0), 0)
    dk_sum[:, lanes] += product(dlogits, _own(q_ref, lanes, own), 0, 0)
  dq_ref[0, 0], dk_ref[0, 0] = dq_sum[...].astype(dtype), dk_sum[...].astype(dtype)


def _mix_kernel(q_ref, k_ref, v_ref, t_ref, s_ref, y_ref, maps, y_sum, *, width, scale):
  tokens, dtype = q_ref.shape[2], v_ref.dtype
  _make_maps(q_ref, k_ref, maps, width, scale)
  mixer = _mixer(t_ref[0]).astype(dtype)

  def mix(at):
    maps[at] = product(mixer, _matrix(maps[at], dtype), 1, 0).reshape(maps[at].shape)

  _each_tile(maps, mix)
  y_sum[...] = s_ref[0] * v_ref[0, 0].astype(jnp.float32).sum(axis=0, keepdims=True) + jnp.zeros_like(y_sum)
  for head, lanes, own in _each_head(q_ref, width):
    y_sum[:, lanes] += product(maps[head, :tokens].astype(dtype), _own(v_ref, lanes, own), 1, 0)
  y_ref[0, 0] = y_sum[...].astype(dtype)


def _mix_backward_kernel(
  q_ref, k_ref, v_ref, t_ref, s_ref, dy_ref, dq_ref, dk_ref, dv_ref, dt_ref, ds_ref,
  maps, others, dmixer, dq_sum, dk_sum, dv_sum, *, width, scale,
):  # fmt: skip
  tokens, dtype = q_ref.shape[2], v_ref.dtype
  total_dy = dy_ref[0, 0].astype(jnp.float32).sum(axis=0, keepdims=True)
  ds_ref[0] = total_dy * v_ref[0, 0].astype(jnp.float32).sum(axis=0, keepdims=True)
  dv_sum[...] = s_ref[0] * total_dy + jnp.zeros_like(dv_sum)
  _make_maps(q_ref, k_ref, maps, width, scale)
  mixer = _mixer(t_ref[0]).astype(dtype)

  def mix(at):
    others[at] = product(mixer, _matrix(maps[at], dtype), 1, 0).reshape(maps[at].shape)

  _each_tile(maps, mix)
  for head, lanes, own in _each_head(q_ref, width):
    dy = _own(dy_ref, lanes, own)
    dv_sum[:, lanes] += product(others[head, :tokens].astype(dtype), dy, 0, 0)
    others[head, :tokens] = product(dy, v_ref[0, 0, :, lanes], 1, 1)  # the gradient of the mixed map, in its place
  dmixer[...] = jnp.zeros_like(dmixer)

  def mix_back(at):
    dnew = _matrix(others[at], dtype)
    dmixer[...] += product(dnew, _matrix(maps[at], dtype), 1, 1)
    others[at] = product(mixer, dnew, 0, 0).reshape(maps[at].shape)

  _each_tile(maps, mix_back)
  dt_ref[0], dv_ref[0, 0] = _mixer_gradient(dmixer[...], len(maps)), dv_sum[...].astype(dtype)
  _write_logits_gradients(q_ref, k_ref, maps, others, dq_ref, dk_ref, dq_sum, dk_sum, width, scale)


def _covariance_kernel(q_ref, k_ref, sums_ref, maps, *, width, scale):
  _make_maps(q_ref, k_ref, maps, width, scale)
  for head in range(len(maps)):
    for other in range(head + 1):
      sums_ref[0, head, other] = sums_ref[0, other, head] = jnp.sum(maps[head] * maps[other])


def _covariance_backward_kernel(
  q_ref, k_ref, dsums_ref, dq_ref, dk_ref, maps, dmaps, dq_sum, dk_sum, *, width, scale
):  # fmt: skip
  _make_maps(q_ref, k_ref, maps, width, scale)
  mixer = (_mixer(dsums_ref[0]) + _mixer(dsums_ref[0].T)).astype(q_ref.dtype)

  def mix(at):
    dmaps[at] = product(mixer, _matrix(maps[at], q_ref.dtype), 1, 0).reshape(maps[at].shape)

  _each_tile(maps, mix)
  _write_logits_gradients(q_ref, k_ref, maps, dmaps, dq_ref, dk_ref, dq_sum, dk_sum, width, scale)


def _maps_shape(arrays, width):
  """Returns the shape of an image's maps, (heads, queries filled up to tiles, keys)."""
  tokens, channels = arrays["q"].shape[2:]
  return channels // width, -(-tokens // ROWS) * ROWS, tokens


def _mixing_flops(arrays, maps):
  """Returns the floating-point operations of one product with the mixers, of all images."""
  return 2 * len(arrays["q"]) * ROWS * maps[0] * math.prod(maps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def mix_heads(
  q: jax.Array, k: jax.Array, v: jax.Array, t: jax.Array, s: jax.Array, width: int, scale: float
) -> jax.Array:
  """Returns y of this module's equation, (images, 1, tokens, C).

  Args:
    q, k, v: (images, 1, tokens, C), the heads side by side.
    t: (images, heads, heads) float32, the factor of each map by that of each new one.
    s: (images, 1, C) float32, what is added to the maps that meet channel c.
    width: of a head.
    scale: of the logits.
  """
  kernel = functools.partial(_mix_kernel, width=width, scale=scale)

  def run(arrays):
    maps = _maps_shape(arrays, width)
    flops = 2 * product_flops(arrays) + _mixing_flops(arrays, maps)
    return call(kernel, arrays, {"y": like(arrays["q"])}, flops, [maps, arrays["q"].shape[2:]])

  return on_each_device(run, dict(q=q, k=k, v=v, t=t, s=s), ["y"])[0]


def _mix_forward(q, k, v, t, s, width, scale):
  return mix_heads(q, k, v, t, s, width, scale), (q, k, v, t, s)


def _mix_backward(width, scale, residuals, dy):
  kernel = functools.partial(_mix_backward_kernel, width=width, scale=scale)
  arrays = dict(zip("qkvts", residuals, strict=True), dy=dy)

  def run(arrays):
    results = {f"d{name}": like(arrays[name]) for name in "qkvts"}
    maps, tokens = _maps_shape(arrays, width), arrays["q"].shape[2:]
    flops = 5 * product_flops(arrays) + 3 * _mixing_flops(arrays, maps)
    return call(kernel, arrays, results, flops, [maps, maps, (ROWS * maps[0],) * 2, tokens, tokens, tokens])

  return on_each_device(run, arrays, [f"d{name}" for name in "qkvts"])


mix_heads.defvjp(_mix_forward, _mix_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def covariance_sums(q: jax.Array, k: jax.Array, width: int, scale: float) -> jax.Array:
  """Returns the products of each two heads' centred maps, summed over queries and keys, (images, heads, heads) float32.

  Arguments as in `mix_heads`.
  """
  kernel = functools.partial(_covariance_kernel, width=width, scale=scale)

  def run(arrays):
    maps = _maps_shape(arrays, width)
    sums = jax.ShapeDtypeStruct((len(arrays["q"]), maps[0], maps[0]), jnp.float32)
    flops = product_flops(arrays) * (1 + maps[0] / width)
    return call(kernel, arrays, {"sums_scalars": sums}, int(flops), [maps])

  return on_each_device(run, dict(q=q, k=k), ["sums_scalars"])[0]


def _covariance_forward(q, k, width, scale):
  return covariance_sums(q, k, width, scale), (q, k)


def _covariance_backward(width, scale, residuals, dsums):
  q, k = residuals
  kernel = functools.partial(_covariance_backward_kernel, width=width, scale=scale)

  def run(arrays):
    maps, tokens = _maps_shape(arrays, width), arrays["q"].shape[2:]
    flops = 3 * product_flops(arrays) + _mixing_flops(arrays, maps)
    results = {"dq": like(arrays["q"]), "dk": like(arrays["k"])}
    return call(kernel, arrays, results, flops, [maps, maps, tokens, tokens])

  return on_each_device(run, dict(q=q, k=k, dsums=dsums), ["dq", "dk"])


covariance_sums.defvjp(_covariance_forward, _covariance_backward)
