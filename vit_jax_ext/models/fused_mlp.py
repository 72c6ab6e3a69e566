"""The MLP half of a block on a TPU's chip, x + keep * mlp(norm(x)): Pallas kernels, forward and backward.

Where tokens are many and narrow, as in the first stages of Swin and CSWin, an MLP's time is that of writing and reading
its hidden activations, four times as wide. Here they never leave the chip: the backward pass computes them again.
Tokens lie along the lanes and channels along the sublanes, so 96 channels need no padding, the norm's sums are no
shuffles, and all six products read their operands as they lie; the compiler keeps such tokens in this layout too.
"""

from collections.abc import Callable
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from vit_jax_ext.models.gelu import gelu_derivative, normal_cdf
from vit_jax_ext.models.kernels import LANES, VMEM_BYTES, like, on_each_device, product, tiled_bytes, vmem_bytes

WIDEST = 192  # channels: of wider tokens XLA's products take no longer than memory
HELD = 2**18  # hidden activations that a step works on, about


def _step(tokens: int, hidden: int) -> int:
  """Returns how many tokens are worked on at a time."""
  return min(tokens, max(1, HELD // hidden // LANES) * LANES)


def fits(x: jax.Array, hidden: int) -> bool:
  """Returns whether the kernels take x (B, tokens, C) and have room on the chip.

  Not where a mesh has a model axis, which would split the hidden activations.
  """
  _, tokens, dim = x.shape
  blocks = 2 * 3 * tiled_bytes((dim, tokens), 4)  # three arrays, of which the next part is on its way
  weights = 2 * tiled_bytes((hidden, LANES), 4) + 5 * tiled_bytes((hidden, dim), 4)
  temporaries = 4 * tiled_bytes((hidden, _step(tokens, hidden)), 4)
  alone = jax.sharding.get_abstract_mesh().shape.get("model", 1) == 1
  return alone and dim <= WIDEST and x.dtype == jnp.float32 and blocks + weights + temporaries <= vmem_bytes()


def _over_tokens(tokens: int, hidden: int, body: Callable) -> None:
  """Calls `body` with a slice of tokens after another, all of one size but the last."""
  size = _step(tokens, hidden)

  @pl.loop(0, tokens // size)
  def _(i):
    body(pl.ds(pl.multiple_of(i * size, LANES), size))

  if tokens % size:
    body(pl.ds(tokens - tokens % size, tokens % size))


def _normalise(x, epsilon):
  """Returns x (C, tokens) with mean 0 and variance 1 over the channels, and the inverse deviations."""
  x = x - x.mean(axis=0, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(x).mean(axis=0, keepdims=True) + epsilon)
  return x * inverse, inverse


def _forward_kernel(x_ref, keep_ref, scale_ref, bias_ref, w1_ref, b1_ref, w2_ref, b2_ref, y_ref, *, epsilon):
  dtype = w1_ref.dtype

  def body(some):
    x = x_ref[0, :, some]
    normed = _normalise(x, epsilon)[0] * scale_ref[...] + bias_ref[...]
    hidden = product(w1_ref[...], normed.astype(dtype), 1, 0) + b1_ref[...]
    y = product(w2_ref[...], (hidden * normal_cdf(hidden)).astype(dtype), 1, 0) + b2_ref[...]
    y_ref[0, :, some] = x + keep_ref[0, 0, 0] * y

  _over_tokens(x_ref.shape[2], w1_ref.shape[0], body)


def _backward_kernel(
  x_ref, dy_ref, keep_ref, scale_ref, bias_ref, w1_ref, b1_ref, w1_turned_ref, w2_turned_ref, dx_ref, *sums, epsilon
):
  dscale_ref, dbias_ref, dw1_ref, db1_ref, dw2_ref, db2_ref = sums
  dtype = w1_ref.dtype

  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in sums:
      ref[...] = jnp.zeros_like(ref)

  def body(some):
    unit, inverse = _normalise(x_ref[0, :, some], epsilon)
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
    dunit = dnormed * scale_ref[...]
    dunit -= dunit.mean(axis=0, keepdims=True) + unit * (dunit * unit).mean(axis=0, keepdims=True)
    dx_ref[0, :, some] = dy + inverse * dunit

  _over_tokens(x_ref.shape[2], w1_ref.shape[0], body)


def _call(kernel: Callable, arrays: dict, results: list[jax.ShapeDtypeStruct], products: int) -> list[jax.Array]:
  """Calls a kernel, a program for each image: of q, y and dy it has one; `products` of tokens with weights."""
  images, _, tokens = arrays["q"].shape

  def spec(x, each):
    if not each:
      return pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)
    return pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0), memory_space=pltpu.SMEM if x.size == images else None)

  return pl.pallas_call(
    kernel,
    grid=(images,),
    in_specs=[spec(x, not name.endswith("_for_all")) for name, x in arrays.items()],
    out_specs=[spec(x, x.shape == arrays["q"].shape) for x in results],
    out_shape=results,
    cost_estimate=pl.CostEstimate(
      flops=2 * products * images * tokens * arrays["w1_for_all"].size,
      transcendentals=0,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *results)),
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
  )(*arrays.values())


def _from_left(**parameters: jax.Array) -> dict[str, jax.Array]:
  """Returns parameters as a kernel reads them: vectors as columns, matrices to be multiplied from the left."""
  return {f"{name}_for_all": x[:, None] if x.ndim == 1 else x.swapaxes(0, 1) for name, x in parameters.items()}


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
  weights = _from_left(scale=scale, bias=bias, w1=w1.astype(dtype), b1=b1, w2=w2.astype(dtype), b2=b2)
  kernel = functools.partial(_forward_kernel, epsilon=epsilon)

  def run(arrays):
    return _call(kernel, arrays, [like(arrays["q"])], 2)

  (y,) = on_each_device(run, {"q": x.swapaxes(1, 2), "keep": keep, **weights}, ["y"])
  return y.swapaxes(1, 2)


def _forward(x, keep, norm, fc1, fc2, epsilon, dtype):
  return add_mlp(x, keep, norm, fc1, fc2, epsilon, dtype), (x, keep, norm, fc1, fc2)


def _backward(epsilon, dtype, residuals, dy):
  x, keep, (scale, bias), (w1, b1), (w2, b2) = residuals
  w1, w2 = w1.astype(dtype), w2.astype(dtype)
  weights = _from_left(scale=scale, bias=bias, w1=w1, b1=b1) | {"w1_turned_for_all": w1, "w2_turned_for_all": w2}
  arrays = {"q": x.swapaxes(1, 2), "y": dy.swapaxes(1, 2), "keep": keep, **weights}
  kernel = functools.partial(_backward_kernel, epsilon=epsilon)
  parameters = [scale, bias, w1, b1, w2, b2]

  def run(arrays):
    sums = [(1, *p.shape[::-1]) if p.ndim == 2 else (1, len(p), 1) for p in parameters]
    return _call(kernel, arrays, [like(arrays["q"]), *(jax.ShapeDtypeStruct(s, jnp.float32) for s in sums)], 5)

  dx, *sums = on_each_device(run, arrays, ["dq", *(f"sum{i}" for i in range(len(parameters)))])
  dscale, dbias, dw1, db1, dw2, db2 = (x.sum(axis=0).T.reshape(p.shape) for x, p in zip(sums, parameters, strict=True))
  return dx.swapaxes(1, 2), None, (dscale, dbias), (dw1, db1), (dw2, db2)


add_mlp.defvjp(_forward, _backward)
