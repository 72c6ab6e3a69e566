"""What comes before attention and after it, on a TPU's chip: Pallas kernels, forward and backward.

Before: the norm with queries, keys and values. After: the output projection, stochastic depth and the residual. Each
reads the residual stream once, as it lies (`token_kernels`), and what it reads or writes for attention lies token by
token, as the kernels of attention have it.
"""

import functools

import jax
import jax.numpy as jnp

from vit_jax_ext.models import token_kernels
from vit_jax_ext.models.kernels import LANES, clear_sums, like, on_each_device, product, tiled_bytes
from vit_jax_ext.models.token_kernels import Layout, as_read


def fits(x: jax.Array, dtype: jnp.dtype, arrays: int, shares: int) -> bool:
  """Returns whether the kernels take x (B, tokens, C) and products of `dtype`.

  Args:
    x, dtype: see `token_kernels.fits`.
    arrays: queries, keys and values of all shares, as often as they are used.
    shares: of the channels, which each of these has one of.
  """
  _, tokens, dim = x.shape
  moved = 3 * Layout.of(x).tiled_bytes(tokens, dim) + arrays * tiled_bytes((tokens, dim // shares), 2)
  weights = 8 * tiled_bytes((dim, dim), 4) + 4 * tiled_bytes((dim, LANES), 4)
  return token_kernels.fits(x, dtype, moved, weights, 3 * dim)


def _flops(x: jax.Array, w: jax.Array, products: int = 1) -> int:
  """Returns those of so many products of tokens x (B, tokens, C) with w (C, columns)."""
  return 2 * products * x.size * w.shape[1]


def _columns(ref, part: int, number: int) -> slice:
  """Returns the columns of `part` of so many equal ones."""
  width = ref.shape[-1] // number
  return slice(part * width, (part + 1) * width)


def _project_kernel(x_ref, scale_ref, bias_ref, w_ref, b_ref, *part_refs, layout, epsilon):
  def body(image, some):
    normed = layout.normalise(x_ref[layout.at(image, some)], epsilon)[0] * scale_ref[...] + bias_ref[...]
    normed = layout.rows(normed).astype(w_ref.dtype)
    for part, ref in enumerate(part_refs):
      own = _columns(w_ref, part, len(part_refs))
      ref[image, some, :] = (product(normed, w_ref[:, own], 1, 0) + b_ref[:, own]).astype(ref.dtype)

  layout.over_tokens(x_ref.shape, w_ref.shape[1], body)


def _project_backward_kernel(x_ref, dx_after_ref, scale_ref, bias_ref, w_ref, *refs, parts, layout, epsilon):
  """`refs`: gradients of `parts`, then that of x, and sums."""
  dpart_refs, (dx_ref, *sums) = refs[: len(parts)], refs[len(parts) :]
  dscale_ref, dbias_ref, dw_ref, db_ref = sums
  dtype, number = w_ref.dtype, max(parts) + 1
  clear_sums(sums)

  def body(image, some):
    at = layout.at(image, some)
    unit, inverse = layout.normalise(x_ref[at], epsilon)
    normed = (unit * scale_ref[...] + bias_ref[...]).astype(dtype)
    dnormed = jnp.zeros_like(unit)
    for part in range(number):
      own = _columns(w_ref, part, number)
      dparts = [ref[image, some, :] for ref, of in zip(dpart_refs, parts, strict=True) if of == part]
      dpart = sum(x.astype(jnp.float32) for x in dparts).astype(dtype) if len(dparts) > 1 else dparts[0]
      db_ref[0, :, own] += product(jnp.ones((8, len(dpart)), dtype), dpart, 1, 0)[:1]
      dw_ref[0, :, own] += product(normed, dpart, 1 - layout.axis, 0)
      dnormed += product(dpart, w_ref[:, own], 1, 1) if layout.axis else product(w_ref[:, own], dpart, 1, 1)
    dbias_ref[0] += layout.sum_tokens(dnormed)
    dscale_ref[0] += layout.sum_tokens(dnormed * unit)
    dx_ref[at] = dx_after_ref[at] + layout.normalise_backward(dnormed * scale_ref[...], unit, inverse)

  layout.over_tokens(x_ref.shape, w_ref.shape[1], body)


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
  layout = Layout.of(x)
  kernel = functools.partial(_project_kernel, layout=layout, epsilon=epsilon)
  weights = as_read(layout, scale=scale, bias=bias) | {"w_for_all": w.astype(dtype), "b_for_all": b[None]}

  def run(arrays):
    part = jax.ShapeDtypeStruct((len(arrays["q"]), x.shape[1], len(b) // number), dtype)
    return token_kernels.call(kernel, arrays, dict.fromkeys(names, part), layout, _flops(arrays["q"], w))

  found = on_each_device(run, {"q": layout.turn(x), **weights}, names)
  return x, [found[part] for part in parts]


def _project_forward(x, norm, linear, parts, epsilon, dtype):
  return project_normed(x, norm, linear, parts, epsilon, dtype), (x, norm, linear)


def _project_backward(parts, epsilon, dtype, residuals, gradients):
  x, (scale, bias), (w, b) = residuals
  dx_after, dparts = gradients
  layout = Layout.of(x)
  kernel = functools.partial(_project_backward_kernel, parts=parts, layout=layout, epsilon=epsilon)
  weights = as_read(layout, scale=scale, bias=bias) | {"w_for_all": w.astype(dtype)}
  arrays = {"q": layout.turn(x), "y": layout.turn(dx_after), **weights}
  arrays |= {f"dpart{i}": dpart for i, dpart in enumerate(dparts)}
  shapes = dict(w_sums=w.shape, b_sums=(1, len(b)))
  sums = {name: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for name, shape in shapes.items()}
  sums = token_kernels.sums_of(layout, dict(scale=scale, bias=bias)) | sums

  def run(arrays):
    results = {"dx": like(arrays["q"]), **sums}
    return token_kernels.call(kernel, arrays, results, layout, _flops(arrays["q"], w, 2))

  dx, *found = on_each_device(run, arrays, ["dx", *sums])
  dtypes = (scale.dtype, bias.dtype, dtype, b.dtype)
  dscale, dbias, dw, db = (token_kernels.over_devices(x, dtype) for x, dtype in zip(found, dtypes, strict=True))
  return layout.turn(dx), (dscale.reshape(len(w)), dbias.reshape(len(w))), (dw, db[0])


project_normed.defvjp(_project_forward, _project_backward)


def _add_kernel(x_ref, keep_ref, w_ref, b_ref, *refs, number, terms, layout):
  """`refs`: the terms of a `number` of parts, the result and, if asked for, the sums of the parts side by side."""
  term_refs, (result_ref, *total_refs) = refs[: number * terms], refs[number * terms :]

  def body(image, some):
    projected, at = b_ref[...], layout.at(image, some)
    for part in range(number):
      own = _columns(w_ref, part, number)
      y = sum(ref[image, some, :].astype(jnp.float32) for ref in term_refs[part * terms : (part + 1) * terms])
      y = y.astype(w_ref.dtype)
      projected = projected + (product(y, w_ref[own], 1, 0) if layout.axis else product(w_ref[:, own], y, 1, 1))
      for ref in total_refs:
        ref[image, some, own] = y
    result_ref[at] = x_ref[at] + keep_ref[image, 0, 0] * projected

  layout.over_tokens(x_ref.shape, 3 * len(w_ref), body)


def _add_backward_kernel(dx_ref, y_ref, keep_ref, w_ref, *refs, layout):
  """`refs`: gradients of the parts, then sums."""
  *dpart_refs, dw_ref, db_ref = refs
  clear_sums((dw_ref, db_ref))

  def body(image, some):
    dbranch = dx_ref[layout.at(image, some)] * keep_ref[image, 0, 0]
    db_ref[0] += layout.sum_tokens(dbranch)
    turned = layout.rows(dbranch).astype(w_ref.dtype)
    y, dbranch = y_ref[image, some, :], dbranch.astype(w_ref.dtype)
    dw_ref[0] += product(y, dbranch, 0, 0) if layout.axis else product(dbranch, y, 1, 0)
    for part, ref in enumerate(dpart_refs):
      own = _columns(w_ref, part, len(dpart_refs))
      dpart = product(dbranch, w_ref[own], 1, 1) if layout.axis else product(turned, w_ref[:, own], 1, 0)
      ref[image, some, :] = dpart.astype(ref.dtype)

  layout.over_tokens(dx_ref.shape, 3 * len(w_ref), body)


def _add(x, ys, keep, linear, totals: bool) -> list[jax.Array]:
  """Returns the result, and y if asked for."""
  (w, b), terms, layout = linear, [y for part in ys for y in part], Layout.of(x)
  kernel = functools.partial(_add_kernel, number=len(ys), terms=len(ys[0]), layout=layout)
  arrays = {"q": layout.turn(x), "keep_scalars": keep, **as_read(layout, w=w.astype(terms[0].dtype), b=b)}
  arrays |= {f"y{i}": y for i, y in enumerate(terms)}

  def run(arrays):
    total = {"y": jax.ShapeDtypeStruct((len(arrays["q"]), *x.shape[1:]), terms[0].dtype)} if totals else {}
    return token_kernels.call(kernel, arrays, {"dx": like(arrays["q"]), **total}, layout, _flops(arrays["q"], w))

  result, *total = on_each_device(run, arrays, ["dx", "y"][: 1 + totals])
  return [layout.turn(result), *total]


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
  layout = Layout.of(dx)
  kernel = functools.partial(_add_backward_kernel, layout=layout)
  names, parameters = [f"dy{i}" for i in range(len(terms))], dict(w=w.astype(y.dtype), b=b)
  arrays = {"q": layout.turn(dx), "y": y, "keep_scalars": keep, **as_read(layout, w=parameters["w"])}
  sums = token_kernels.sums_of(layout, parameters)

  def run(arrays):
    images, tokens, dim = arrays["y"].shape
    part = jax.ShapeDtypeStruct((images, tokens, dim // len(terms)), y.dtype)
    results = dict.fromkeys(names, part) | sums
    return token_kernels.call(kernel, arrays, results, layout, _flops(arrays["q"], w, 2))

  found = on_each_device(run, arrays, [*names, *sums])
  dw, db = token_kernels.add_up(layout, found[len(terms) :], parameters)
  return dx, [[dy] * number for dy, number in zip(found, terms, strict=False)], None, (dw, db)


add_projected.defvjp(_add_forward, _add_backward)
