"""Multi-head attention whose maps stay on a TPU's chip: Pallas kernels, forward and backward.

A program has the tokens of one or several windows, of all heads side by side as the projections give them: neither
heads nor queries, keys and values are ever taken apart in memory. Between the passes nothing is kept but q, k and v;
the backward pass computes the maps again, which costs less than to read them.
"""

import functools

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


def _logits(q, k, bias_ref, mask_ref, head, window, scale):
  logits = product(q, k, 1, 1) * scale
  if bias_ref is not None:
    logits += bias_ref[head]
  return logits if mask_ref is None else logits + mask_ref[window]


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, mask_ref, y_ref, *, width, scale):
  @pl.loop(0, q_ref.shape[1])
  def _(window):
    for lanes, heads in head_groups(q_ref.shape[-1], width):
      q, k, v = (ref[0, window, :, lanes] for ref in (q_ref, k_ref, v_ref))
      y = jnp.zeros(q.shape, jnp.float32)
      for i, head in enumerate(heads):
        own = own_lanes(i, q.shape[-1], width)
        weights, total = softmax(_logits(jnp.where(own, q, 0), k, bias_ref, mask_ref, head, window, scale))
        y = jnp.where(own, product(weights.astype(v.dtype), v, 1, 0) / total, y)
      y_ref[0, window, :, lanes] = y.astype(y_ref.dtype)


def _backward_kernel(
  q_ref, k_ref, v_ref, bias_ref, mask_ref, dy_ref, dq_ref, dk_ref, dv_ref, dbias_ref=None, *, width, scale
):
  if dbias_ref is not None:

    @pl.when(pl.program_id(1) == 0)
    def _():
      dbias_ref[...] = jnp.zeros_like(dbias_ref)

  @pl.loop(0, q_ref.shape[1])
  def _(window):
    for lanes, heads in head_groups(q_ref.shape[-1], width):
      q, k, v, dy = (ref[0, window, :, lanes] for ref in (q_ref, k_ref, v_ref, dy_ref))
      dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
      for i, head in enumerate(heads):
        own = own_lanes(i, q.shape[-1], width)
        own_q, own_dy = jnp.where(own, q, 0), jnp.where(own, dy, 0)
        weights, total = softmax(_logits(own_q, k, bias_ref, mask_ref, head, window, scale))
        attn = weights / total
        dv += product(attn.astype(v.dtype), own_dy, 0, 0)
        dlogits = softmax_gradient(attn, product(own_dy, v, 1, 1))
        if dbias_ref is not None:
          dbias_ref[0, head] += dlogits
        dlogits = (dlogits * scale).astype(q.dtype)
        dq = jnp.where(own, product(dlogits, k, 1, 0), dq)
        dk += product(dlogits, own_q, 0, 0)
      for ref, x in ((dq_ref, dq), (dk_ref, dk), (dv_ref, dv)):
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
