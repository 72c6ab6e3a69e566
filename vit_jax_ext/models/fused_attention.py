"""Multi-head attention whose maps stay on a TPU's chip: Pallas kernels, forward and backward.

A program has the tokens of one or several windows, of all heads side by side as the projections give them: heads are
never taken apart in memory, nor are queries, keys and values where one projection gives all three. Between the passes
nothing is kept but q, k and v; the backward pass computes the maps again, which costs less than to read them.
"""

from collections.abc import Callable
import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from vit_jax_ext.models.kernels import (
  call,
  head_groups,
  head_shards,
  like,
  on_each_device,
  own_lanes,
  product,
  product_flops,
  softmax,
  softmax_gradient,
)


def forward_heads(q, k, v, heads: range, width: int, scale: float, add: Callable) -> jax.Array:
  """Returns attention of the heads that share some lanes, (queries, lanes) float32; `add(logits, head)` biases."""
  y = jnp.zeros(q.shape, jnp.float32)
  for i, head in enumerate(heads):
    own = own_lanes(i, q.shape[-1], width)
    weights, total = softmax(add(product(jnp.where(own, q, 0), k, 1, 1) * scale, head))
    y = jnp.where(own, product(weights.astype(v.dtype), v, 1, 0) / total, y)
  return y


def backward_heads(q, k, v, dy, heads: range, width: int, scale: float, add: Callable, dbias_ref=None):
  """Returns the float32 gradients of q, k and v, and adds those of the logits to `dbias_ref` (heads, n, n)."""
  dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  for i, head in enumerate(heads):
    own = own_lanes(i, q.shape[-1], width)
    own_q, own_dy = jnp.where(own, q, 0), jnp.where(own, dy, 0)
    weights, total = softmax(add(product(own_q, k, 1, 1) * scale, head))
    attn = weights / total
    dv += product(attn.astype(v.dtype), own_dy, 0, 0)
    dlogits = softmax_gradient(attn, product(own_dy, v, 1, 1))
    if dbias_ref is not None:
      dbias_ref[head] += dlogits
    dlogits = (dlogits * scale).astype(q.dtype)
    dq = jnp.where(own, product(dlogits, k, 1, 0), dq)
    dk += product(dlogits, own_q, 0, 0)
  return dq, dk, dv


def adder(bias_ref, mask_ref, window) -> Callable:
  """Returns the function that adds bias and mask to the logits of a head; one mask may be that of all windows."""

  def add(logits, head):
    if bias_ref is not None:
      logits += bias_ref[head]
    return logits if mask_ref is None else logits + mask_ref[window if mask_ref.shape[0] > 1 else 0]

  return add


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, y_ref, *, width, scale):
  @pl.loop(0, y_ref.shape[1])
  def _(window):
    for lanes, heads in head_groups(y_ref.shape[-1], width):
      q, k, v = (ref[0, window, :, lanes] for ref in (q_ref, k_ref, v_ref))
      y = forward_heads(q, k, v, heads, width, scale, adder(bias_ref, mask_ref, window))
      y_ref[0, window, :, lanes] = y.astype(y_ref.dtype)


def _backward_kernel(
  q_ref, k_ref, v_ref, bias_ref, mask_ref, dy_ref, dq_ref, dk_ref, dv_ref, dbias_ref=None, *, width, scale
):
  if dbias_ref is not None:

    @pl.when(pl.program_id(1) == 0)
    def _():
      dbias_ref[...] = jnp.zeros_like(dbias_ref)

  @pl.loop(0, dy_ref.shape[1])
  def _(window):
    for lanes, heads in head_groups(dy_ref.shape[-1], width):
      q, k, v, dy = (ref[0, window, :, lanes] for ref in (q_ref, k_ref, v_ref, dy_ref))
      add, own_dbias = adder(bias_ref, mask_ref, window), None if dbias_ref is None else dbias_ref.at[0]
      gradients = backward_heads(q, k, v, dy, heads, width, scale, add, own_dbias)
      for ref, x in zip((dq_ref, dk_ref, dv_ref), gradients, strict=True):
        ref[0, window, :, lanes] = x.astype(ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def fused_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, mask: jax.Array | None, width: int, scale: float
) -> jax.Array:
  """Returns softmax(scale * q k^T + bias + mask) v by head, (images, windows, queries, C).

  Args:
    q, k, v: (images, windows, tokens, C), the heads side by side.
    bias: (heads, queries, keys) float32 or None.
    mask: (windows, queries, keys) float32, 0 or -inf, or None; has no gradient.
    width: of a head.
    scale: of the logits.
  """
  kernel = functools.partial(_forward_kernel, width=width, scale=scale)
  arrays = dict(q=q, k=k, v=v, bias=bias, mask=mask)

  def run(arrays):
    return call(kernel, arrays, {"y": like(arrays["q"])}, 2 * product_flops(arrays))

  return on_each_device(run, arrays, ["y"], q.shape[-1] // width)[0]


def _forward(q, k, v, bias, mask, width, scale):
  return fused_attention(q, k, v, bias, mask, width, scale), (q, k, v, bias, mask)


def _backward(width, scale, residuals, dy):
  q, k, v, bias, mask = residuals
  kernel = functools.partial(_backward_kernel, width=width, scale=scale)
  names = ["dq", "dk", "dv"] if bias is None else ["dq", "dk", "dv", "dbias"]

  def run(arrays):
    results = {f"d{name}": like(arrays[name]) for name in "qkv"}
    if bias is not None:
      results["dbias"] = jax.ShapeDtypeStruct((len(arrays["q"]), *arrays["bias"].shape), jnp.float32)
    return call(kernel, arrays, results, 5 * product_flops(arrays))

  arrays = dict(q=q, k=k, v=v, bias=bias, mask=mask, dy=dy)
  dq, dk, dv, *dbias = on_each_device(run, arrays, names, q.shape[-1] // width)
  return dq, dk, dv, dbias[0].sum(axis=0) if dbias else None, None if mask is None else jnp.zeros_like(mask)


fused_attention.defvjp(_forward, _backward)


def thirds(ref) -> list:
  """Returns references to the queries, keys and values that `kernels.pack` has ordered side by side."""
  size = ref.shape[-1] // 3
  return [ref.at[..., pl.ds(i * size, size)] for i in range(3)]


def _packed_forward_kernel(qkv_ref, y_ref, *, width, scale):
  _forward_kernel(*thirds(qkv_ref), None, None, y_ref, width=width, scale=scale)


def _packed_backward_kernel(qkv_ref, dy_ref, dqkv_ref, *, width, scale):
  _backward_kernel(*thirds(qkv_ref), None, None, dy_ref, *thirds(dqkv_ref), width=width, scale=scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def packed_attention(qkv: jax.Array, num_heads: int, width: int, scale: float) -> jax.Array:
  """Returns softmax(scale * q k^T) v by head, (images, 1, tokens, heads * width).

  Args:
    qkv: (images, 1, tokens, 3 * heads * width), q, k and v as `kernels.pack` orders them, where `kernels.can_pack`.
    num_heads, width: heads, and channels of one.
    scale: of the logits.
  """
  kernel = functools.partial(_packed_forward_kernel, width=width, scale=scale)
  channels = num_heads // head_shards(num_heads) * width

  def run(arrays):
    y = jax.ShapeDtypeStruct((*arrays["q"].shape[:-1], channels), qkv.dtype)
    return call(kernel, arrays, {"y": y}, 2 * product_flops(dict(q=y, k=y)))

  return on_each_device(run, dict(q=qkv), ["y"], num_heads)[0]


def _packed_forward(qkv, num_heads, width, scale):
  return packed_attention(qkv, num_heads, width, scale), qkv


def _packed_backward(num_heads, width, scale, qkv, dy):
  kernel = functools.partial(_packed_backward_kernel, width=width, scale=scale)

  def run(arrays):
    flops = 5 * product_flops(dict(q=arrays["dy"], k=arrays["dy"]))
    return call(kernel, arrays, {"dq": like(arrays["q"])}, flops)

  return on_each_device(run, dict(q=qkv, dy=dy), ["dq"], num_heads)


packed_attention.defvjp(_packed_forward, _packed_backward)
