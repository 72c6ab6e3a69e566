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


def fits(x: jax.Array, dtype: jnp.dtype, arrays: int, shares: int) -> bool:
  """Returns whether the kernels take x (B, tokens, C) and products of `dtype`.

  Args:
    x, dtype: see `narrow_tokens.fits`.
    arrays: queries, keys and values of all shares, as often as they are used.
    shares: of the channels, which each of these has one of.
  """
  _, tokens, dim = x.shape
  moved = 3 * tiled_bytes((dim, tokens), 4) + arrays * tiled_bytes((tokens, dim // shares), 2)
  weights = 8 * tiled_bytes((dim, dim), 4) + 4 * tiled_bytes((dim, LANES), 4)
  return narrow_tokens.fits(x, dtype, moved, weights, 3 * dim)


def _flops(x: jax.Array, w: jax.Array, products: int = 1) -> int:
  """Returns those of so many products of the tokens of x (images, C, tokens) with w."""
  return 2 * products * x.shape[0] * x.shape[2] * math.prod(w.shape)


def _columns(ref, part: int, number: int) -> slice:
  """Returns the columns of `part` of so many equal ones."""
  width = ref.shape[-1] // number
  return slice(part * width, (part + 1) * width)


def _project_kernel(x_ref, scale_ref, bias_ref, w_ref, b_ref, *part_refs, epsilon):
  def body(some):
    normed = normalise(x_ref[0, :, some], epsilon)[0] * scale_ref[...] + bias_ref[...]
    normed = normed.T.astype(w_ref.dtype)
    for part, ref in enumerate(part_refs):
      own = _columns(w_ref, part, len(part_refs))
      ref[0, some, :] = (product(normed, w_ref[:, own], 1, 0) + b_ref[:, own]).astype(ref.dtype)

  over_tokens(x_ref.shape[2], w_ref.shape[1], body)


def _project_backward_kernel(x_ref, dx_after_ref, scale_ref, bias_ref, w_ref, *refs, parts, epsilon):
  """`refs`: gradients of `parts`, then that of x, and sums."""
  dpart_refs, (dx_ref, *sums) = refs[: len(parts)], refs[len(parts) :]
  dscale_ref, dbias_ref, dw_ref, db_ref = sums
  dtype, number = w_ref.dtype, max(parts) + 1
  clear_sums(sums)

  def body(some):
    unit, inverse = normalise(x_ref[0, :, some], epsilon)
    normed = (unit * scale_ref[...] + bias_ref[...]).astype(dtype)
    dnormed = jnp.zeros_like(unit)
    for part in range(number):
      own = _columns(w_ref, part, number)
      dparts = [ref[0, some, :] for ref, of in zip(dpart_refs, parts, strict=True) if of == part]
      dpart = sum(x.astype(jnp.float32) for x in dparts).astype(dtype) if len(dparts) > 1 else dparts[0]
      db_ref[0, :, own] += product(jnp.ones((8, len(dpart)), dtype), dpart, 1, 0)[:1]
      dw_ref[0, :, own] += product(normed, dpart, 1, 0)
      dnormed += product(w_ref[:, own], dpart, 1, 1)
    dbias_ref[0] += dnormed.sum(axis=1, keepdims=True)
    dscale_ref[0] += (dnormed * unit).sum(axis=1, keepdims=True)
    dx_ref[0, :, some] = dx_after_ref[0, :, some] + normalise_backward(dnormed * scale_ref[...], unit, inverse)

  over_tokens(x_ref.shape[2], w_ref.shape[1], body)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def project_normed(x, norm, linear, parts, epsilon: float, dtype: jnp.dtype) -> tuple[jax.Array, list[jax.Array]]:
  """Returns x, for the residual, and `parts` of the columns of norm(x) w + b, (B, tokens, columns) of `dtype` each.

  Gradients are added up on the chip: of x that of the residual to that of the norm, and of a part that of each time
  that it is asked for.

  Args:
    x: (B, tokens, C) float32, where it `fits`.
    norm: scale and bias of a LayerNorm, (C,) float32 each.
    linear: w (C, columns) and b (columns,), float32.
    parts: numbers of equal parts of the columns, each at least once, such as (0, 1, 2, 2): queries, keys, twice values.
    epsilon: of the norm.
    dtype: of what products take.
  """
  (scale, bias), (w, b) = norm, linear
  number, names = max(parts) + 1, [f"part{i}" for i in range(max(parts) + 1)]
  kernel = functools.partial(_project_kernel, epsilon=epsilon)
  weights = from_left(scale=scale, bias=bias) | {"w_for_all": w.astype(dtype), "b_for_all": b[None]}

  def run(arrays):
    images, _, tokens = arrays["q"].shape
    part = jax.ShapeDtypeStruct((images, tokens, len(b) // number), dtype)
    return narrow_tokens.call(kernel, arrays, dict.fromkeys(names, part), _flops(arrays["q"], w))

  found = on_each_device(run, {"q": x.swapaxes(1, 2), **weights}, names)
  return x, [found[part] for part in parts]


def _project_forward(x, norm, linear, parts, epsilon, dtype):
  return project_normed(x, norm, linear, parts, epsilon, dtype), (x, norm, linear)


def _project_backward(parts, epsilon, dtype, residuals, gradients):
  x, (scale, bias), (w, b) = residuals
  dx_after, dparts = gradients
  kernel = functools.partial(_project_backward_kernel, parts=parts, epsilon=epsilon)
  weights = from_left(scale=scale, bias=bias) | {"w_for_all": w.astype(dtype)}
  arrays = {"q": x.swapaxes(1, 2), "y": dx_after.swapaxes(1, 2), **weights}
  arrays |= {f"dpart{i}": dpart for i, dpart in enumerate(dparts)}
  shapes = dict(scale_sums=(len(w), 1), bias_sums=(len(w), 1), w_sums=w.shape, b_sums=(1, len(b)))
  sums = {name: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for name, shape in shapes.items()}

  def run(arrays):
    return narrow_tokens.call(kernel, arrays, {"dx": like(arrays["q"]), **sums}, _flops(arrays["q"], w, 2))

  dx, *found = on_each_device(run, arrays, ["dx", *sums])
  dscale, dbias, dw, db = (x.sum(axis=0).reshape(p.shape) for x, p in zip(found, (scale, bias, w, b), strict=True))
  return dx.swapaxes(1, 2), (dscale, dbias), (dw, db)


project_normed.defvjp(_project_forward, _project_backward)


def _add_kernel(x_ref, keep_ref, w_ref, b_ref, *refs, number, terms):
  """`refs`: the terms of a `number` of parts, the result and, if asked for, the sums of the parts side by side."""
  term_refs, (result_ref, *total_refs) = refs[: number * terms], refs[number * terms :]

  def body(some):
    projected = b_ref[...]
    for part in range(number):
      own = _columns(w_ref, part, number)
      y = sum(ref[0, some, :].astype(jnp.float32) for ref in term_refs[part * terms : (part + 1) * terms])
      y = y.astype(w_ref.dtype)
      projected = projected + product(w_ref[:, own], y, 1, 1)
      for ref in total_refs:
        ref[0, some, own] = y
    result_ref[0, :, some] = x_ref[0, :, some] + keep_ref[0, 0, 0] * projected

  over_tokens(x_ref.shape[2], 3 * len(w_ref), body)


def _add_backward_kernel(dx_ref, y_ref, keep_ref, w_ref, *refs):
  """`refs`: gradients of the parts, then sums."""
  *dpart_refs, dw_ref, db_ref = refs
  clear_sums((dw_ref, db_ref))

  def body(some):
    dbranch = dx_ref[0, :, some] * keep_ref[0, 0, 0]
    db_ref[0] += dbranch.sum(axis=1, keepdims=True)
    dw_ref[0] += product(dbranch.astype(w_ref.dtype), y_ref[0, some, :], 1, 0)
    dbranch = dbranch.T.astype(w_ref.dtype)
    for part, ref in enumerate(dpart_refs):
      own = _columns(w_ref, part, len(dpart_refs))
      ref[0, some, :] = product(dbranch, w_ref[:, own], 1, 0).astype(ref.dtype)

  over_tokens(dx_ref.shape[2], 3 * len(w_ref), body)


def _add(x, ys, keep, linear, totals: bool) -> list[jax.Array]:
  """Returns the result, and y if asked for."""
  (w, b), terms = linear, [y for part in ys for y in part]
  kernel = functools.partial(_add_kernel, number=len(ys), terms=len(ys[0]))
  arrays = {"q": x.swapaxes(1, 2), "keep_scalars": keep, **from_left(w=w.astype(terms[0].dtype), b=b)}
  arrays |= {f"y{i}": y for i, y in enumerate(terms)}

  def run(arrays):
    images, dim, tokens = arrays["q"].shape
    total = {"y": jax.ShapeDtypeStruct((images, tokens, dim), terms[0].dtype)} if totals else {}
    return narrow_tokens.call(kernel, arrays, {"dx": like(arrays["q"]), **total}, _flops(arrays["q"], w))

  result, *total = on_each_device(run, arrays, ["dx", "y"][: 1 + totals])
  return [result.swapaxes(1, 2), *total]


@jax.custom_vjp
def add_projected(x, ys, keep, linear) -> jax.Array:
  """Returns x + keep * (y w + b), y having as channels those of all parts, each a sum of arrays.

  Args:
    x: (B, tokens, C) float32, where it `fits`.
    ys: parts, each a list of as many arrays (B, tokens, channels) of the dtype that products take.
    keep: (B, 1, 1) float32, factors of the branch, by stochastic depth; without a gradient.
    linear: w (C, C) and b (C,), float32.
  """
  return _add(x, ys, keep, linear, totals=False)[0]


def _add_forward(x, ys, keep, linear):
  alone = len(ys) == len(ys[0]) == 1  # else y, side by side, takes less memory than its terms
  result, *total = _add(x, ys, keep, linear, totals=not alone)
  return result, (ys[0][0] if alone else total[0], [len(part) for part in ys], keep, linear)


def _add_backward(residuals, dx):
  y, terms, keep, (w, b) = residuals
  arrays = {"q": dx.swapaxes(1, 2), "y": y, "keep_scalars": keep, **from_left(w=w.astype(y.dtype))}
  names, parameters = [f"dy{i}" for i in range(len(terms))], dict(w=w, b=b)
  sums = narrow_tokens.sums_of(parameters)

  def run(arrays):
    images, tokens, dim = arrays["y"].shape
    part = jax.ShapeDtypeStruct((images, tokens, dim // len(terms)), y.dtype)
    results = dict.fromkeys(names, part) | sums
    return narrow_tokens.call(_add_backward_kernel, arrays, results, _flops(arrays["q"], w, 2))

  found = on_each_device(run, arrays, [*names, *sums])
  dw, db = narrow_tokens.add_up(found[len(terms) :], parameters)
  return dx, [[dy] * number for dy, number in zip(found, terms, strict=False)], None, (dw, db)


add_projected.defvjp(_add_forward, _add_backward)
