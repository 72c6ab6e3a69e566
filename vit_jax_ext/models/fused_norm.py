"""The norm that begins a residual stream, on a TPU's chip: Pallas kernels, forward and backward.

What a convolution gives is read once, token by token, and written as the blocks that follow read it (`token_kernels`).
"""

import functools

import jax
import jax.numpy as jnp

from vit_jax_ext.models import token_kernels
from vit_jax_ext.models.kernels import clear_sums, like, on_each_device, tiled_bytes, vmem_bytes
from vit_jax_ext.models.token_kernels import DTYPE, FEWEST, Layout, as_read


def fits(x: jax.Array) -> bool:
  """Returns whether the kernels take x (B, tokens, C), and have room on the chip."""
  if x.ndim != 3 or x.dtype != DTYPE or x.shape[1] < FEWEST:
    return False
  layout, (_, tokens, dim) = Layout.of(x), x.shape
  alone = jax.sharding.get_abstract_mesh().shape.get("model", 1) == 1
  moved = layout.tiled_bytes(tokens, dim) + 2 * tiled_bytes((tokens, dim), x.dtype.itemsize)
  return alone and 2 * moved + 6 * layout.tiled_bytes(layout.step_size(tokens, dim), dim) <= vmem_bytes()


def _load(x_ref, image, some, layout):
  x = x_ref[image, some, :].astype(jnp.float32)
  return x if layout.axis else x.T


def _forward_kernel(x_ref, scale_ref, bias_ref, y_ref, *, layout, epsilon):
  def body(image, some):
    unit, _ = layout.normalise(_load(x_ref, image, some, layout), epsilon)
    y_ref[layout.at(image, some)] = unit * scale_ref[...] + bias_ref[...]

  layout.over_tokens(y_ref.shape, scale_ref.size, body)


def _backward_kernel(x_ref, dy_ref, scale_ref, dx_ref, dscale_ref, dbias_ref, *, layout, epsilon):
  clear_sums((dscale_ref, dbias_ref))

  def body(image, some):
    unit, inverse = layout.normalise(_load(x_ref, image, some, layout), epsilon)
    dy = dy_ref[layout.at(image, some)]
    dbias_ref[0] += layout.sum_tokens(dy)
    dscale_ref[0] += layout.sum_tokens(dy * unit)
    dx = layout.normalise_backward(dy * scale_ref[...], unit, inverse)
    dx_ref[image, some, :] = layout.rows(dx).astype(dx_ref.dtype)

  layout.over_tokens(dy_ref.shape, scale_ref.size, body)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """Returns LayerNorm of x (B, tokens, C) in float32, where x `fits`; scale and bias are (C,) float32."""
  layout = Layout.of(x)
  kernel = functools.partial(_forward_kernel, layout=layout, epsilon=epsilon)

  def run(arrays):
    y = jax.eval_shape(layout.turn, jax.ShapeDtypeStruct(arrays["q"].shape, jnp.float32))
    return token_kernels.call(kernel, arrays, {"y": y}, layout, 8 * arrays["q"].size)

  return layout.turn(on_each_device(run, {"q": x, **as_read(layout, scale=scale, bias=bias)}, ["y"])[0])


def _forward(x, scale, bias, epsilon):
  return normalise(x, scale, bias, epsilon), (x, scale, bias)


def _backward(epsilon, residuals, dy):
  x, scale, bias = residuals
  layout, parameters = Layout.of(x), dict(scale=scale, bias=bias)
  kernel = functools.partial(_backward_kernel, layout=layout, epsilon=epsilon)
  sums = token_kernels.sums_of(layout, parameters)

  def run(arrays):
    return token_kernels.call(kernel, arrays, {"dq": like(arrays["q"]), **sums}, layout, 20 * arrays["q"].size)

  arrays = {"q": x, "y": layout.turn(dy), **as_read(layout, scale=scale)}
  dx, *found = on_each_device(run, arrays, ["dq", *sums])
  return dx, *token_kernels.add_up(layout, found, parameters)


normalise.defvjp(_forward, _backward)
