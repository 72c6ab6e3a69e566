"""The MLP half of a block on a TPU's chip, x + keep * mlp(norm(x)): Pallas kernels, forward and backward.

Its hidden activations, four times as wide as the tokens, never leave the chip: the backward pass computes them again, a
seventh product for six, which takes less than to write and read them. See `token_kernels` for how tokens lie.
"""

import functools

import jax
import jax.numpy as jnp

from vit_jax_ext.models import token_kernels
from vit_jax_ext.models.gelu import gelu_derivative, normal_cdf
from vit_jax_ext.models.kernels import LANES, clear_sums, like, on_each_device, tiled_bytes
from vit_jax_ext.models.token_kernels import Layout, as_read


def fits(x: jax.Array, dtype: jnp.dtype, hidden: int) -> bool:
  """Returns whether the kernels take x (B, tokens, C), and have room for so many `hidden` activations of a token."""
  _, tokens, dim = x.shape
  weights = 2 * tiled_bytes((hidden, LANES), 4) + 5 * tiled_bytes((hidden, dim), 4)
  return token_kernels.fits(x, dtype, 3 * Layout.of(x).tiled_bytes(tokens, dim), weights, hidden)


def _forward_kernel(x_ref, keep_ref, scale_ref, bias_ref, w1_ref, b1_ref, w2_ref, b2_ref, y_ref, *, layout, epsilon):
  dtype = w1_ref.dtype

  def body(image, some):
    at = layout.at(image, some)
    x = x_ref[at]
    normed = layout.normalise(x, epsilon)[0] * scale_ref[...] + bias_ref[...]
    hidden = layout.multiply(w1_ref[...], normed.astype(dtype)) + b1_ref[...]
    y = layout.multiply(w2_ref[...], (hidden * normal_cdf(hidden)).astype(dtype)) + b2_ref[...]
    y_ref[at] = x + keep_ref[image, 0, 0] * y

  layout.over_tokens(x_ref.shape, b1_ref.size, body)


def _backward_kernel(
  x_ref, dy_ref, keep_ref, scale_ref, bias_ref, w1_read_ref, b1_ref, w1_ref, w2_ref, dx_ref, *sums,
  layout, epsilon,
):  # fmt: skip
  """`w1_read_ref`: as `Layout.weights` gives it; `w1_ref` and `w2_ref` as they are."""
  dscale_ref, dbias_ref, dw1_ref, db1_ref, dw2_ref, db2_ref = sums
  dtype = w1_ref.dtype
  clear_sums(sums)

  def body(image, some):
    at = layout.at(image, some)
    unit, inverse = layout.normalise(x_ref[at], epsilon)
    normed = (unit * scale_ref[...] + bias_ref[...]).astype(dtype)
    hidden = layout.multiply(w1_read_ref[...], normed) + b1_ref[...]
    cdf = normal_cdf(hidden)
    dy = dy_ref[at]
    dbranch = dy * keep_ref[image, 0, 0]
    db2_ref[0] += layout.sum_tokens(dbranch)
    dbranch = dbranch.astype(dtype)
    dw2_ref[0] += layout.outer((hidden * cdf).astype(dtype), dbranch)
    dhidden = layout.multiply_back(w2_ref[...], dbranch) * gelu_derivative(hidden, cdf)
    db1_ref[0] += layout.sum_tokens(dhidden)
    dhidden = dhidden.astype(dtype)
    dw1_ref[0] += layout.outer(normed, dhidden)
    dnormed = layout.multiply_back(w1_ref[...], dhidden)
    dbias_ref[0] += layout.sum_tokens(dnormed)
    dscale_ref[0] += layout.sum_tokens(dnormed * unit)
    dx_ref[at] = dy + layout.normalise_backward(dnormed * scale_ref[...], unit, inverse)

  layout.over_tokens(x_ref.shape, b1_ref.size, body)


def _flops(products: int, x: jax.Array, w: jax.Array) -> int:
  """Returns those of so many products of tokens x (B, tokens, C) with w (C, hidden)."""
  return 2 * products * x.size * w.shape[1]


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
  layout = Layout.of(x)
  weights = as_read(layout, scale=scale, bias=bias, w1=w1.astype(dtype), b1=b1, w2=w2.astype(dtype), b2=b2)
  kernel = functools.partial(_forward_kernel, layout=layout, epsilon=epsilon)

  def run(arrays):
    return token_kernels.call(kernel, arrays, {"y": like(arrays["q"])}, layout, _flops(2, arrays["q"], w1))

  (y,) = on_each_device(run, {"q": layout.turn(x), "keep_scalars": keep, **weights}, ["y"])
  return layout.turn(y)


def _forward(x, keep, norm, fc1, fc2, epsilon, dtype):
  return add_mlp(x, keep, norm, fc1, fc2, epsilon, dtype), (x, keep, norm, fc1, fc2)


def _backward(epsilon, dtype, residuals, dy):
  x, keep, (scale, bias), (w1, b1), (w2, b2) = residuals
  w1, w2, layout = w1.astype(dtype), w2.astype(dtype), Layout.of(x)
  weights = as_read(layout, scale=scale, bias=bias, w1_read=w1, b1=b1) | {"w1_for_all": w1, "w2_for_all": w2}
  arrays = {"q": layout.turn(x), "y": layout.turn(dy), "keep_scalars": keep, **weights}
  kernel = functools.partial(_backward_kernel, layout=layout, epsilon=epsilon)
  parameters = dict(scale=scale, bias=bias, w1=w1, b1=b1, w2=w2, b2=b2)
  sums = token_kernels.sums_of(layout, parameters)

  def run(arrays):
    results = {"dq": like(arrays["q"]), **sums}
    return token_kernels.call(kernel, arrays, results, layout, _flops(5, arrays["q"], w1))

  dx, *found = on_each_device(run, arrays, ["dq", *sums])
  dscale, dbias, dw1, db1, dw2, db2 = token_kernels.add_up(layout, found, parameters)
  return layout.turn(dx), None, (dscale, dbias), (dw1, db1), (dw2, db2)


add_mlp.defvjp(_forward, _backward)
