"""What comes before attention and after it, of narrow tokens on a TPU's chip: Pallas kernels, forward and backward.

Before: the norm with queries, keys and values. After: the output projection, stochastic depth and the residual. Each
reads the residual stream once, as it lies (`narrow_tokens`), and what it reads or writes for attention lies token by
token, as the kernels of windows have it.
"""

import functools
import math

import jax
import jax.numpy as jnp

from vit_jax_ext.models import narrow_tokens
from vit_jax_ext.models.kernels import LANES, like, on_each_device, product, tiled_bytes
from vit_jax_ext.models.narrow_tokens import clear_sums, from_left, normalise, normalise_backward, over_tokens


def fits(x: jax.Array, dtype: jnp.dtype) -> bool:
  """Returns whether the kernels take x (B, tokens, C) and products of `dtype`."""
  _, tokens, dim = x.shape
  moved = 3 * tiled_bytes((dim, tokens), 4) + 3 * tiled_bytes((tokens, dim), 2)
  return narrow_tokens.fits(x, dtype, moved, 8 * tiled_bytes((dim, dim), 4) + 4 * tiled_bytes((dim, LANES), 4), 3 * dim)


def _flops(x: jax.Array, w: jax.Array, products: int = 1) -> int:
  """Returns those of so many products of the tokens of x (images, C, tokens) with w."""
  return 2 * products * x.shape[0] * x.shape[2] * math.prod(w.shape)


def _project_kernel(x_ref, scale_ref, bias_ref, w_ref, b_ref, *part_refs, epsilon):
  dim = x_ref.shape[1]

  def body(some):
    normed = normalise(x_ref[0, :, some], epsilon)[0] * scale_ref[...] + bias_ref[...]
    normed = normed.T.astype(w_ref.dtype)
    for i, ref in enumerate(part_refs):
      columns = slice(i * dim, (i + 1) * dim)
      ref[0, some, :] = (product(normed, w_ref[:, columns], 1, 0) + b_ref[:, columns]).astype(ref.dtype)

  over_tokens(x_ref.shape[2], w_ref.shape[1], body)


def _project_backward_kernel(
  x_ref, dx_after_ref, dq_ref, dk_ref, dv_ref, scale_ref, bias_ref, w_ref, dx_ref, *sums, epsilon
):
  dscale_ref, dbias_ref, dw_ref, db_ref = sums
  dim, dtype = x_ref.shape[1], w_ref.dtype
  clear_sums(sums)

  def body(some):
    unit, inverse = normalise(x_ref[0, :, some], epsilon)
    normed = (unit * scale_ref[...] + bias_ref[...]).astype(dtype)
    dnormed = jnp.zeros_like(unit)
    for i, ref in enumerate((dq_ref, dk_ref, dv_ref)):
      columns, dpart = slice(i * dim, (i + 1) * dim), ref[0, some, :]
      db_ref[0, :, columns] += product(jnp.ones((8, len(dpart)), dtype), dpart, 1, 0)[:1]
      dw_ref[0, :, columns] += product(normed, dpart, 1, 0)
      dnormed += product(w_ref[:, columns], dpart, 1, 1)
    dbias_ref[0] += dnormed.sum(axis=1, keepdims=True)
    dscale_ref[0] += (dnormed * unit).sum(axis=1, keepdims=True)
    dx_ref[0, :, some] = dx_after_ref[0, :, some] + normalise_backward(dnormed * scale_ref[...], unit, inverse)

  over_tokens(x_ref.shape[2], w_ref.shape[1], body)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def project_normed(x, norm, qkv, epsilon: float, dtype: jnp.dtype) -> tuple[jax.Array, list[jax.Array]]:
  """Returns x, and queries, keys and values of norm(x), (B, tokens, C) of `dtype` each.

  x is for the residual: so its gradient is added to that of the norm on the chip.

  Args:
    x: (B, tokens, C) float32, where it `fits`.
    norm: scale and bias of a LayerNorm, (C,) float32 each.
    qkv: kernel (C, 3 C) and bias (3 C,), float32.
    epsilon: of the norm.
    dtype: of what products take.
  """
  (scale, bias), (w, b) = norm, qkv
  kernel = functools.partial(_project_kernel, epsilon=epsilon)
  weights = from_left(scale=scale, bias=bias) | {"w_for_all": w.astype(dtype), "b_for_all": b[None]}

  def run(arrays):
    images, dim, tokens = arrays["q"].shape
    part = jax.ShapeDtypeStruct((images, tokens, dim), dtype)
    return narrow_tokens.call(kernel, arrays, dict(q=part, k=part, v=part), _flops(arrays["q"], w))

  return x, list(on_each_device(run, {"q": x.swapaxes(1, 2), **weights}, ["q", "k", "v"]))


def _project_forward(x, norm, qkv, epsilon, dtype):
  return project_normed(x, norm, qkv, epsilon, dtype), (x, norm, qkv)


def _project_backward(epsilon, dtype, residuals, gradients):
  x, (scale, bias), (w, b) = residuals
  dx_after, dparts = gradients
  kernel = functools.partial(_project_backward_kernel, epsilon=epsilon)
  weights = from_left(scale=scale, bias=bias) | {"w_for_all": w.astype(dtype)}
  arrays = {"q": x.swapaxes(1, 2), "y": dx_after.swapaxes(1, 2), **dict(zip(("dq", "dk", "dv"), dparts, strict=True))}
  shapes = dict(scale_sums=(len(w), 1), bias_sums=(len(w), 1), w_sums=w.shape, b_sums=(1, len(b)))
  sums = {name: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for name, shape in shapes.items()}

  def run(arrays):
    return narrow_tokens.call(kernel, arrays, {"dx": like(arrays["q"]), **sums}, _flops(arrays["q"], w, 2))

  dx, *found = on_each_device(run, arrays | weights, ["dx", *sums])
  dscale, dbias, dw, db = (x.sum(axis=0).reshape(p.shape) for x, p in zip(found, (scale, bias, w, b), strict=True))
  return dx.swapaxes(1, 2), (dscale, dbias), (dw, db)


project_normed.defvjp(_project_forward, _project_backward)


def _add_kernel(x_ref, y_ref, keep_ref, w_ref, b_ref, result_ref):
  def body(some):
    projected = product(w_ref[...], y_ref[0, some, :], 1, 1) + b_ref[...]
    result_ref[0, :, some] = x_ref[0, :, some] + keep_ref[0, 0, 0] * projected

  over_tokens(x_ref.shape[2], 3 * len(w_ref), body)


def _add_backward_kernel(dx_ref, y_ref, keep_ref, w_ref, dy_ref, dw_ref, db_ref):
  clear_sums((dw_ref, db_ref))

  def body(some):
    dbranch = dx_ref[0, :, some] * keep_ref[0, 0, 0]
    db_ref[0] += dbranch.sum(axis=1, keepdims=True)
    dw_ref[0] += product(dbranch.astype(w_ref.dtype), y_ref[0, some, :], 1, 0)
    dy_ref[0, some, :] = product(dbranch.T.astype(w_ref.dtype), w_ref[...], 1, 0).astype(dy_ref.dtype)

  over_tokens(dx_ref.shape[2], 3 * len(w_ref), body)


@jax.custom_vjp
def add_projected(x, y, keep, proj) -> jax.Array:
  """Returns x + keep * proj(y).

  Args:
    x: (B, tokens, C) float32, where it `fits`.
    y: (B, tokens, C) of the dtype that products take.
    keep: (B, 1, 1) float32, factors of the branch, by stochastic depth; without a gradient.
    proj: kernel and bias of a Linear, (C, C) and (C,), float32.
  """
  w, b = proj
  arrays = {"q": x.swapaxes(1, 2), "y": y, "keep_scalars": keep, **from_left(w=w.astype(y.dtype), b=b)}

  def run(arrays):
    return narrow_tokens.call(_add_kernel, arrays, {"dx": like(arrays["q"])}, _flops(arrays["q"], w))

  (result,) = on_each_device(run, arrays, ["dx"])
  return result.swapaxes(1, 2)


def _add_forward(x, y, keep, proj):
  return add_projected(x, y, keep, proj), (y, keep, proj)


def _add_backward(residuals, dx):
  y, keep, (w, b) = residuals
  arrays = {"q": dx.swapaxes(1, 2), "y": y, "keep_scalars": keep, **from_left(w=w.astype(y.dtype))}
  parameters = dict(w=w, b=b)
  sums = narrow_tokens.sums_of(parameters)

  def run(arrays):
    return narrow_tokens.call(
      _add_backward_kernel, arrays, {"dy": like(arrays["y"]), **sums}, _flops(arrays["q"], w, 2)
    )

  dy, *found = on_each_device(run, arrays, ["dy", *sums])
  dw, db = narrow_tokens.add_up(found, parameters)
  return dx, dy, None, (dw, db)


add_projected.defvjp(_add_forward, _add_backward)
