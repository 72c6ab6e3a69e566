"""Multi-head attention whose maps stay on a TPU's chip: Pallas kernels, forward and backward.

A program has the tokens of one or several windows, of all heads side by side as the projections give them: heads are
never taken apart in memory, nor are queries, keys and values where one projection gives all three. Between the passes
nothing is kept but q, k and v; the backward pass computes the maps again, which costs less than to read them.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from vit_jax_ext.models.kernels import (
  call,
  clear_sums,
  head_groups,
  head_shards,
  heads_at_once,
  like,
  on_each_device,
  own_lanes,
  product,
  product_flops,
  softmax,
  softmax_gradient,
)


@dataclasses.dataclass(frozen=True)
class Group:
  """Heads that share some lanes.

  Args:
    q, k, v: (tokens, lanes), of all of them.
    heads: their numbers.
    add: `add(logits, head)` gives a head's logits with their bias and mask.
    dy: gradient of the result, (tokens, lanes).
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  heads: range
  add: Callable
  dy: jax.Array | None = None


def _at_once(groups, width):
  """Yields lists of (group, head, its lanes): each step is taken for all of a list, so that its results are at hand."""
  every = [(x, head, own_lanes(i, x.q.shape[-1], width)) for x in groups for i, head in enumerate(x.heads)]
  number = heads_at_once(len(groups[0].q), len(groups[0].k))
  for first in range(0, len(every), number):
    yield every[first : first + number]


def _collect(results, each, found):
  """Adds to `found` what the heads have in their own lanes, an array for each group."""
  for result, (group, head, own) in zip(results, each, strict=True):
    if head == group.heads[0]:
      found.append(result)
    else:
      found[-1] = jnp.where(own, result, found[-1])


def forward_heads(groups: list[Group], width: int, scale: float) -> list[jax.Array]:
  """Returns the attention of each group's heads, (queries, lanes) float32.

  Args:
    groups: all with as many queries and keys.
    width: of a head.
    scale: of the logits.
  """
  found = []
  for each in _at_once(groups, width):
    logits = [x.add(product(jnp.where(own, x.q, 0), x.k, 1, 1) * scale, head) for x, head, own in each]
    weights = [softmax(x, groups[0].q.dtype) for x in logits]
    pairs = zip(weights, each, strict=True)
    _collect([product(w.astype(x.v.dtype), x.v, 1, 0) * inverse for (w, inverse), (x, *_) in pairs], each, found)
  return found


def backward_heads(
  groups: list[Group], width: int, scale: float
) -> tuple[list[tuple[jax.Array, jax.Array, jax.Array]], list[jax.Array]]:
  """Returns the float32 gradients of each group's q, k and v, and of the logits of each head in turn."""
  dqs, dks, dvs, every = [], [], [], []
  for each in _at_once(groups, width):
    logits = [x.add(product(jnp.where(own, x.q, 0), x.k, 1, 1) * scale, head) for x, head, own in each]
    dattn = [product(jnp.where(own, x.dy, 0), x.v, 1, 1) for x, _, own in each]
    attn = [weights * inverse for weights, inverse in (softmax(x, groups[0].q.dtype) for x in logits)]
    _collect([product(a.astype(x.dy.dtype), x.dy, 0, 0) for a, (x, *_) in zip(attn, each, strict=True)], each, dvs)
    dlogits = [softmax_gradient(a, d) for a, d in zip(attn, dattn, strict=True)]
    rounded = [(d * scale).astype(x.q.dtype) for d, (x, *_) in zip(dlogits, each, strict=True)]
    _collect([product(d, x.k, 1, 0) for d, (x, *_) in zip(rounded, each, strict=True)], each, dqs)
    _collect([product(d, x.q, 0, 0) for d, (x, *_) in zip(rounded, each, strict=True)], each, dks)
    every += dlogits
  return list(zip(dqs, dks, dvs, strict=True)), every


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
    parts, add = head_groups(y_ref.shape[-1], width), adder(bias_ref, mask_ref, window)
    groups = [Group(*(ref[0, window, :, lanes] for ref in (q_ref, k_ref, v_ref)), heads, add) for lanes, heads in parts]
    for (lanes, _), y in zip(parts, forward_heads(groups, width, scale), strict=True):
      y_ref[0, window, :, lanes] = y.astype(y_ref.dtype)


def _backward_kernel(
  q_ref, k_ref, v_ref, bias_ref, mask_ref, dy_ref, dq_ref, dk_ref, dv_ref, dbias_ref=None, *, width, scale
):
  if dbias_ref is not None:
    clear_sums([dbias_ref])

  @pl.loop(0, dy_ref.shape[1])
  def _(window):
    parts, add = head_groups(dy_ref.shape[-1], width), adder(bias_ref, mask_ref, window)
    groups = []
    for lanes, heads in parts:
      q, k, v, dy = (ref[0, window, :, lanes] for ref in (q_ref, k_ref, v_ref, dy_ref))
      groups.append(Group(q, k, v, heads, add, dy))
    gradients, dlogits = backward_heads(groups, width, scale)
    for (lanes, _), three in zip(parts, gradients, strict=True):
      for ref, x in zip((dq_ref, dk_ref, dv_ref), three, strict=True):
        ref[0, window, :, lanes] = x.astype(ref.dtype)
    if dbias_ref is not None:
      for head, x in enumerate(dlogits):
        dbias_ref[0, head] += x


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
  names = ["dq", "dk", "dv"] if bias is None else ["dq", "dk", "dv", "dbias_sums"]

  def run(arrays):
    results = {f"d{name}": like(arrays[name]) for name in "qkv"}
    if bias is not None:
      results["dbias_sums"] = jax.ShapeDtypeStruct((1, *arrays["bias"].shape), jnp.float32)
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
