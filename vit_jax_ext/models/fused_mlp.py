"""The MLP half of a block on a TPU's chip, x + keep * mlp(norm(x)): Pallas kernels, forward and backward.

An MLP of narrow tokens takes as long as its hidden activations, four times as wide, take to be written and read. Here
they never leave the chip: the backward pass computes them again. See `narrow_tokens` for how tokens lie, in which all
six products read their operands as they are.
"""

import functools

import jax
import jax.numpy as jnp

from vit_jax_ext.models import narrow_tokens
from vit_jax_ext.models.gelu import gelu_derivative, normal_cdf
from vit_jax_ext.models.kernels import LANES, like, on_each_device, product, tiled_bytes
from vit_jax_ext.models.narrow_tokens import clear_sums, from_left, normalise, normalise_backward, over_tokens


def fits(x: jax.Array, dtype: jnp.dtype, hidden: int) -> bool:
  """Returns whether the kernels take x (B, tokens, C), and have room for so many `hidden` activations of a token."""
  _, tokens, dim = x.shape
  weights = 2 * tiled_bytes((hidden, LANES), 4) + 5 * tiled_bytes((hidden, dim), 4)
  return narrow_tokens.fits(x, dtype, 3 * tiled_bytes((dim, tokens), 4), weights, hidden)


def _forward_kernel(x_ref, keep_ref, scale_ref, bias_ref, w1_ref, b1_ref, w2_ref, b2_ref, y_ref, *, epsilon):
  dtype = w1_ref.dtype

  def body(some):
    x = x_ref[0, :, some]
    normed = normalise(x, epsilon)[0] * scale_ref[...] + bias_ref[...]
    hidden = product(w1_ref[...], normed.astype(dtype), 1, 0) + b1_ref[...]
    y = product(w2_ref[...], (hidden * normal_cdf(hidden)).astype(dtype), 1, 0) + b2_ref[...]
    y_ref[0, :, some] = x + keep_ref[0, 0, 0] * y

  over_tokens(x_ref.shape[2], w1_ref.shape[0], body)


def _backward_kernel(
  x_ref, dy_ref, keep_ref, scale_ref, bias_ref, w1_ref, b1_ref, w1_turned_ref, w2_turned_ref, dx_ref, *sums, epsilon
):
  dscale_ref, dbias_ref, dw1_ref, db1_ref, dw2_ref, db2_ref = sums
  dtype = w1_ref.dtype
  clear_sums(sums)

  def body(some):
    unit, inverse = normalise(x_ref[0, :, some], epsilon)
    normed = (unit * scale_ref[...] + bias_ref[...]).astype(dtype)
    hidden = product(w1_ref[...], normed, 1, 0) + b1_ref[...]
    cdf = normal_cdf(hidden)
    dy = dy_ref[0, :, some]
    dbranch = dy * keep_ref[0, 0, 0]
    db2_ref[0] += dbranch.sum(axis=1, keepdims=True)
    dbranch = dbranch.astype(dtype)
    dw2_ref[0] += product(dbranch, (hidden * cdf).astype(dtype), 1, 1)
    dhidden = product(w2_turned_ref[...], dbranch, 1, 0) * gelu_derivative(hidden, cdf)
    db1_ref[0] += dhidden.sum(axis=1, keepdims=True)
    dhidden = dhidden.astype(dtype)
    dw1_ref[0] += product(dhidden, normed, 1, 1)
    dnormed = product(w1_turned_ref[...], dhidden, 1, 0)
    dbias_ref[0] += dnormed.sum(axis=1, keepdims=True)
    dscale_ref[0] += (dnormed * unit).sum(axis=1, keepdims=True)
    dx_ref[0, :, some] = dy + normalise_backward(dnormed * scale_ref[...], unit, inverse)

  over_tokens(x_ref.shape[2], w1_ref.shape[0], body)


def _flops(products: int, x: jax.Array, w: jax.Array) -> int:
  """Returns those of so many products of the tokens of x (images, C, tokens) with w (hidden, C)."""
  return 2 * products * x.shape[0] * x.shape[2] * w.size


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def add_mlp(x, keep, norm, fc1, fc2, epsilon: float, dtype: jnp.dtype) -> jax.Array:
  """Returns x + keep * fc2(gelu(fc1(norm(x)))).

  Args:
    x: (B, tokens, C) float32, where it `fits`.
    keep: (B, 1, 1) float32, factors of the branch, by stochastic depth; without a gradient.
    norm: scale and bias of a LayerNorm, (C,) float32 each.
    fc1, fc2: kernel and bias of a Linear, (C, hidden), (hidden,) and (hidden, C), (C,), float32.
    epsilon: of the norm.
    dtype: of what products take.
  """
  (scale, bias), (w1, b1), (w2, b2) = norm, fc1, fc2
  weights = from_left(scale=scale, bias=bias, w1=w1.astype(dtype), b1=b1, w2=w2.astype(dtype), b2=b2)
  kernel = functools.partial(_forward_kernel, epsilon=epsilon)

  def run(arrays):
    return narrow_tokens.call(kernel, arrays, {"y": like(arrays["q"])}, _flops(2, arrays["q"], w1))

  (y,) = on_each_device(run, {"q": x.swapaxes(1, 2), "keep_scalars": keep, **weights}, ["y"])
  return y.swapaxes(1, 2)


def _forward(x, keep, norm, fc1, fc2, epsilon, dtype):
  return add_mlp(x, keep, norm, fc1, fc2, epsilon, dtype), (x, keep, norm, fc1, fc2)


def _backward(epsilon, dtype, residuals, dy):
  x, keep, (scale, bias), (w1, b1), (w2, b2) = residuals
  w1, w2 = w1.astype(dtype), w2.astype(dtype)
  weights = from_left(scale=scale, bias=bias, w1=w1, b1=b1) | {"w1_turned_for_all": w1, "w2_turned_for_all": w2}
  arrays = {"q": x.swapaxes(1, 2), "y": dy.swapaxes(1, 2), "keep_scalars": keep, **weights}
  kernel = functools.partial(_backward_kernel, epsilon=epsilon)
  parameters = dict(scale=scale, bias=bias, w1=w1, b1=b1, w2=w2, b2=b2)
  sums = narrow_tokens.sums_of(parameters)

  def run(arrays):
    return narrow_tokens.call(kernel, arrays, {"dq": like(arrays["q"]), **sums}, _flops(5, arrays["q"], w1))

  dx, *found = on_each_device(run, arrays, ["dq", *sums])
  dscale, dbias, dw1, db1, dw2, db2 = narrow_tokens.add_up(found, parameters)
  return dx.swapaxes(1, 2), None, (dscale, dbias), (dw1, db1), (dw2, db2)


add_mlp.defvjp(_forward, _backward)
