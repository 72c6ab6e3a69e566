"""Re-attention whose maps stay on a TPU's chip: Pallas kernels, forward and backward.

A map's rows sum to 1, so each has the mean 1 / keys, and what mixing the heads does to the values can be said of the
centred maps Q_h = P_h - 1 / keys: with factors t of the mixing and s added to the maps of head g,

  y_g = sum_h t_hg Q_h v_g + s_g sum_k v_g.

So head h's map meets the values of all heads at once, a wide product, and the mixing is left to a few (tokens, C)
arrays: neither is the map of one head read for another one, nor does a cancellation lose the little by which maps
differ. What normalises them needs the covariance of P over the heads alone.
"""

import functools

import jax
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


def _map(q_ref, k_ref, lanes, own, scale):
  """Returns the map of a head, and its keys' and its own queries' lanes."""
  q, k = jnp.where(own, q_ref[0, 0, :, lanes], 0), k_ref[0, 0, :, lanes]
  weights, total = softmax(product(q, k, 1, 1) * scale)
  return weights / total, q, k


def _each_head(q_ref, width):
  """Yields head, lanes of its group, and which of them are its own."""
  for lanes, heads in head_groups(q_ref.shape[-1], width):
    for i, head in enumerate(heads):
      yield head, lanes, own_lanes(i, lanes.size, width)


def _add_logits_gradient(dlogits, q, k, lanes, own, scale, dq_ref, dk_ref):
  """Adds what comes from one head's logits to the float32 gradients of queries and keys."""
  dlogits = (dlogits * scale).astype(q.dtype)
  dq_ref[:, lanes] += jnp.where(own, product(dlogits, k, 1, 0), 0)
  dk_ref[:, lanes] += product(dlogits, q, 0, 0)


def _mix_kernel(q_ref, k_ref, v_ref, t_ref, s_ref, y_ref, *, width, scale):
  v = v_ref[0, 0]
  y = s_ref[0] * v.astype(jnp.float32).sum(axis=0, keepdims=True) + jnp.zeros(y_ref.shape[2:], jnp.float32)
  for head, lanes, own in _each_head(q_ref, width):
    attn, _, _ = _map(q_ref, k_ref, lanes, own, scale)
    centred = (attn - 1 / attn.shape[-1]).astype(v.dtype)
    y += product(centred, v, 1, 0) * t_ref[0, head : head + 1]
  y_ref[0, 0] = y.astype(y_ref.dtype)


def _mix_backward_kernel(
  q_ref, k_ref, v_ref, t_ref, s_ref, dy_ref, dq_ref, dk_ref, dv_ref, dt_ref, ds_ref, dq_sum, dk_sum, *, width, scale
):
  v, dy = v_ref[0, 0], dy_ref[0, 0].astype(jnp.float32)
  total_dy = dy.sum(axis=0, keepdims=True)
  ds_ref[0] = total_dy * v.astype(jnp.float32).sum(axis=0, keepdims=True)
  dv = s_ref[0] * total_dy + jnp.zeros(v.shape, jnp.float32)
  dq_sum[...], dk_sum[...] = jnp.zeros_like(dq_sum), jnp.zeros_like(dk_sum)
  for head, lanes, own in _each_head(q_ref, width):
    attn, q, k = _map(q_ref, k_ref, lanes, own, scale)
    centred = (attn - 1 / attn.shape[-1]).astype(v.dtype)
    mixed = (dy * t_ref[0, head : head + 1]).astype(v.dtype)
    dt_ref[0, head : head + 1] = (product(centred, v, 1, 0) * dy).sum(axis=0, keepdims=True)
    dv += product(centred, mixed, 0, 0)
    dlogits = softmax_gradient(attn, product(mixed, v, 1, 1))
    _add_logits_gradient(dlogits, q, k, lanes, own, scale, dq_sum, dk_sum)
  for ref, x in ((dq_ref, dq_sum[...]), (dk_ref, dk_sum[...]), (dv_ref, dv)):
    ref[0, 0] = x.astype(ref.dtype)


def _covariance_kernel(q_ref, k_ref, sums_ref, maps, *, width, scale):
  for head, lanes, own in _each_head(q_ref, width):
    attn, _, _ = _map(q_ref, k_ref, lanes, own, scale)
    maps[head] = attn - 1 / attn.shape[-1]
    for other in range(head + 1):
      sums_ref[0, head, other] = sums_ref[0, other, head] = jnp.sum(maps[head] * maps[other])


def _covariance_backward_kernel(
  q_ref, k_ref, dsums_ref, dq_ref, dk_ref, maps, dq_sum, dk_sum, *, width, scale
):  # fmt: skip
  for head, lanes, own in _each_head(q_ref, width):
    maps[head], _, _ = _map(q_ref, k_ref, lanes, own, scale)
  dq_sum[...], dk_sum[...] = jnp.zeros_like(dq_sum), jnp.zeros_like(dk_sum)
  for head, lanes, own in _each_head(q_ref, width):
    q, k = jnp.where(own, q_ref[0, 0, :, lanes], 0), k_ref[0, 0, :, lanes]
    # The centring drops out: a constant in each row has no gradient through the softmax.
    dattn = sum(maps[other] * (dsums_ref[0, head, other] + dsums_ref[0, other, head]) for other in range(maps.shape[0]))
    _add_logits_gradient(softmax_gradient(maps[head], dattn), q, k, lanes, own, scale, dq_sum, dk_sum)
  for ref, x in ((dq_ref, dq_sum), (dk_ref, dk_sum)):
    ref[0, 0] = x[...].astype(ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def mix_heads(
  q: jax.Array, k: jax.Array, v: jax.Array, t: jax.Array, s: jax.Array, width: int, scale: float
) -> jax.Array:
  """Returns y of this module's equation, (images, 1, tokens, C).

  Args:
    q, k, v: (images, 1, tokens, C), the heads side by side.
    t: (images, heads, C) float32, factor of map h for the values' channel c, the same for all of a head.
    s: (images, 1, C) float32, what is added to the maps that meet channel c.
    width: of a head.
    scale: of the logits.
  """
  kernel = functools.partial(_mix_kernel, width=width, scale=scale)

  def run(arrays):
    return call(kernel, arrays, {"y": like(arrays["q"])}, (1 + t.shape[1]) * product_flops(arrays))

  return on_each_device(run, dict(q=q, k=k, v=v, t=t, s=s), ["y"])[0]


def _mix_forward(q, k, v, t, s, width, scale):
  return mix_heads(q, k, v, t, s, width, scale), (q, k, v, t, s)


def _mix_backward(width, scale, residuals, dy):
  kernel = functools.partial(_mix_backward_kernel, width=width, scale=scale)
  arrays = dict(zip("qkvts", residuals, strict=True), dy=dy)

  def run(arrays):
    results = {f"d{name}": like(arrays[name]) for name in "qkvts"}
    tokens = arrays["q"].shape[2:]
    return call(kernel, arrays, results, (3 + 3 * arrays["t"].shape[1]) * product_flops(arrays), [tokens, tokens])

  return on_each_device(run, arrays, [f"d{name}" for name in "qkvts"])


mix_heads.defvjp(_mix_forward, _mix_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def covariance_sums(q: jax.Array, k: jax.Array, width: int, scale: float) -> jax.Array:
  """Returns the products of each two heads' centred maps, summed over queries and keys, (images, heads, heads) float32.

  Arguments as in `mix_heads`.
  """
  num_heads = q.shape[-1] // width
  kernel = functools.partial(_covariance_kernel, width=width, scale=scale)

  def run(arrays):
    images, _, tokens, _ = arrays["q"].shape
    sums = jax.ShapeDtypeStruct((images, num_heads, num_heads), jnp.float32)
    flops = product_flops(arrays) * (1 + num_heads / width)
    return call(kernel, arrays, {"sums_scalars": sums}, int(flops), [(num_heads, tokens, tokens)])

  return on_each_device(run, dict(q=q, k=k), ["sums_scalars"])[0]


def _covariance_forward(q, k, width, scale):
  return covariance_sums(q, k, width, scale), (q, k)


def _covariance_backward(width, scale, residuals, dsums):
  q, k = residuals
  num_heads = q.shape[-1] // width
  kernel = functools.partial(_covariance_backward_kernel, width=width, scale=scale)

  def run(arrays):
    tokens, channels = arrays["q"].shape[2:]
    scratch = [(num_heads, tokens, tokens), (tokens, channels), (tokens, channels)]
    flops = product_flops(arrays) * (3 + 2 * num_heads / width)
    return call(kernel, arrays, {"dq": like(arrays["q"]), "dk": like(arrays["k"])}, int(flops), scratch)

  return on_each_device(run, dict(q=q, k=k, dsums_scalars=dsums), ["dq", "dk"])


covariance_sums.defvjp(_covariance_forward, _covariance_backward)
