"""What the Pallas kernels for TPUs share: how one is called over images and windows, and its parts.

A head narrower than the matrix unit's 128 lanes shares them with its neighbours: in a product over the lanes those of
the others are masked out of one operand, so that no lane moves.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

LANES = 128
MAPS_SHARE = 16  # logits of the heads that are worked on together take at most 1 / MAPS_SHARE of the chip's memory
VMEM_BYTES = 96 * 2**20  # on the chip, that a program may use; `vmem_bytes` of chips that have less
# MiB in all, by kind; none for those whose compiler has no products of bfloat16 in kernels.
SMALL_VMEM = {"TPU v2": 0, "TPU v3": 0, "TPU v4": 16, "TPU v5": 64, "TPU v5p": 64, "TPU7x": 64}
TOKENS = 512  # of the windows that one program works on

Arrays = Mapping[str, jax.Array | None]


def _device() -> jax.sharding.AbstractDevice | jax.Device:
  """Returns one of those that the program is for that is being traced."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.abstract_device if not mesh.empty and mesh.abstract_device is not None else jax.devices()[0]


def vmem_bytes() -> int:
  """Returns what a kernel of the program that is being traced may use of its chip's memory, by the kind of TPU."""
  return min(VMEM_BYTES, SMALL_VMEM.get(_device().device_kind, 128) * 15 * 2**16)


def num_cores() -> int:
  """Returns how many cores a device of the program that is being traced has: a v4 and a v5p have two."""
  return getattr(_device(), "num_cores", None) or 1


def tiled_bytes(shape: Sequence[int], itemsize: int) -> int:
  """Returns the bytes of an array on the chip, in tiles of 8 rows of 128 lanes."""
  *others, rows, lanes = shape
  return math.prod(others) * -(-rows // 8) * 8 * -(-lanes // LANES) * LANES * itemsize


def heads_at_once(queries: int, keys: int) -> int:
  """Returns how many heads' maps are worked on together. One waits less for the units' results beside others."""
  return max(1, vmem_bytes() // (MAPS_SHARE * tiled_bytes((queries, keys), 4)))


def product(
  a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, precision: jax.lax.Precision | None = None
) -> jax.Array:
  """Returns the product of two matrices over an axis of each, in float32."""
  axes = (((axis_a,), (axis_b,)), ((), ()))
  return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def softmax(logits: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
  """Returns exponentials and the inverses of their sums over the last axis: multiply where there is less of it.

  Args:
    logits: float32.
    dtype: of what the maps meet; for bfloat16 the inverses may be a hundredth of its precision off.
  """
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  total = weights.sum(axis=-1, keepdims=True)
  if dtype != jnp.bfloat16:
    return weights, 1 / total
  # What a division does, without its care for sums that are zero or infinite: the largest weight is 1.
  inverse = pl.reciprocal(total, approx=True)
  return weights, inverse * (2 - total * inverse)


def softmax_gradient(attn: jax.Array, dattn: jax.Array) -> jax.Array:
  """Returns the gradient of the logits."""
  return attn * (dattn - (attn * dattn).sum(axis=-1, keepdims=True))


def head_groups(channels: int, width: int) -> list[tuple[pl.Slice, range]]:
  """Returns the lanes that are worked on together, and their heads.

  Args:
    channels: of all heads.
    width: of a head.
  """
  num_heads, size = channels // width, max(1, LANES // width)
  groups = [range(first, min(first + size, num_heads)) for first in range(0, num_heads, size)]
  return [(pl.ds(heads[0] * width, len(heads) * width), heads) for heads in groups]


def own_lanes(index: int, lanes: int, width: int) -> jax.Array:
  """Returns which of a group's lanes are those of its head `index`, (1, lanes) bool."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
  return (lane >= index * width) & (lane < (index + 1) * width)


def product_flops(arrays: Arrays) -> int:
  """Returns the floating-point operations of one product of queries by keys by C, of all images and windows."""
  return 2 * math.prod(arrays["q"].shape) * arrays["k"].shape[2]


def head_shards(num_heads: int) -> int:
  """Returns over how many devices `on_each_device` splits the heads of an image."""
  mesh = jax.sharding.get_abstract_mesh()
  shards = mesh.shape.get("model", 1) if all(kind == AxisType.Auto for kind in mesh.axis_types) else 1
  return shards if num_heads % shards == 0 else 1


def can_pack(dim: int, num_heads: int) -> bool:
  """Returns whether a device's share of `dim` channels fills tiles of lanes, which packed q, k, v begin with."""
  return dim // head_shards(num_heads) % LANES == 0


def pack(x: jax.Array, num_heads: int) -> jax.Array:
  """Orders queries, keys and values side by side, (..., 3 C), as kernels read them from one array.

  Where devices share the heads (`head_shards`), what is one device's lies together.
  """
  parts = x.reshape(*x.shape[:-1], 3, head_shards(num_heads), -1)
  return parts.swapaxes(-3, -2).reshape(x.shape)


def unpack(x: jax.Array, num_heads: int) -> jax.Array:
  """Inverse of `pack`."""
  parts = x.reshape(*x.shape[:-1], head_shards(num_heads), 3, -1)
  return parts.swapaxes(-3, -2).reshape(x.shape)


def clear_sums(refs: Sequence) -> None:
  """Clears what all programs of a core add to, in the first of them."""

  @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
  def _():
    for ref in refs:
      ref[...] = jnp.zeros_like(ref)


def call(
  kernel: Callable,
  arrays: Arrays,
  results: Mapping[str, jax.ShapeDtypeStruct],
  flops: int,
  scratch: Sequence[tuple[int, ...]] = (),
  images_at_once: int = 1,
) -> list[jax.Array]:
  """Calls a kernel over images and blocks of their windows.

  Args:
    kernel: takes references in the order of `arrays`, `results` and `scratch`; a function of a module, or
      `functools.partial` of one with what can be a key of a dictionary.
    arrays, results: by name. bias (heads, n, n), mask (windows, n, n); what ends with _for_all is seen whole; q and
      what begins like it (images, windows, tokens, C); all others have an entry for each image, in scalar memory if
      their name ends with _scalars. To results (1, ...) that end with _sums all programs add; what is returned has one
      for each core, (cores, ...).
    flops: of all programs together, an estimate.
    scratch: shapes of float32 arrays that a program works with.
    images_at_once: that a program has at most.
  """
  kernel = functools.partial(kernel)  # of a partial the same
  known = (tuple(kernel.keywords.items()), tuple(arrays), tuple(results.items()), flops, tuple(scratch), images_at_once)
  return _function(kernel.func, *known)(*arrays.values())


@functools.cache
def _function(kernel, keywords, names, results, flops, scratch, images_at_once) -> Callable:
  """Returns what `call` calls: for calls that are alike the same function, which is traced and lowered once."""

  def run(*values):
    arrays = dict(zip(names, values, strict=True))
    return _call(functools.partial(kernel, **dict(keywords)), arrays, dict(results), flops, scratch, images_at_once)

  run.__name__ = kernel.__name__.strip("_")
  return jax.jit(run)


def _call(kernel, arrays, results, flops, scratch, images_at_once):
  images, *others = arrays["q"].shape
  windows, tokens = others[:2] if len(others) == 3 else (1, 1)
  block = max(d for d in range(1, windows + 1) if windows % d == 0 and (d == 1 or d * tokens <= TOKENS))
  cores = num_cores() if images % num_cores() == 0 else 1
  some = max(d for d in range(1, images_at_once + 1) if images // cores % d == 0)
  turns = images // cores // some
  results = {name: like(x, cores) if name.endswith("_sums") else x for name, x in results.items()}

  def spec(name, x):
    if x is None:
      return None
    if name == "bias" or name.endswith("_for_all"):
      return pl.BlockSpec(x.shape, lambda core, i, j: (0,) * x.ndim)
    if name.endswith("_sums"):
      return pl.BlockSpec((1, *x.shape[1:]), lambda core, i, j: (core, *[0] * (x.ndim - 1)))
    if name == "mask":
      return pl.BlockSpec((block, *x.shape[1:]), lambda core, i, j: (j, 0, 0))
    if x.ndim == 4:
      return pl.BlockSpec((some, block, *x.shape[2:]), lambda core, i, j: (core * turns + i, j, 0, 0))
    space = pltpu.SMEM if name.endswith("_scalars") else None
    rest = (0,) * (x.ndim - 1)
    return pl.BlockSpec((some, *x.shape[1:]), lambda core, i, j: (core * turns + i, *rest), memory_space=space)

  moved = [x for x in (*arrays.values(), *results.values()) if x is not None]
  return pl.pallas_call(
    kernel,
    grid=(cores, turns, windows // block),
    in_specs=[spec(name, x) for name, x in arrays.items()],
    out_specs=[spec(name, x) for name, x in results.items()],
    out_shape=list(results.values()),
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    cost_estimate=pl.CostEstimate(
      flops=flops, transcendentals=0, bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved)
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
  )(*arrays.values())


def on_each_device(
  function: Callable[[Arrays], Sequence[jax.Array]], arrays: Arrays, results: Sequence[str], num_heads: int = 1
) -> tuple[jax.Array, ...]:
  """Calls `function(arrays)` with the images and heads of each device.

  The compiler cannot split a kernel. So where a mesh is set (`jax.sharding.use_abstract_mesh`), images are split over
  all of its axes but "model", and heads over that, where they divide.

  Args:
    function: returns arrays in the order of `results`.
    arrays: see `call`; of those whose name ends with _for_all every device gets the whole, of those with
      _by_head, whose first axis is that of the channels, those of its heads.
    results: names.
    num_heads: that can be split; 1 for none.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return tuple(function(arrays))
  axes = tuple(axis for axis in mesh.axis_names if axis != "model")
  images = axes if len(arrays["q"]) % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
  heads = "model" if head_shards(num_heads) > 1 else None

  def split(name):
    if name == "bias" or name.endswith("_by_head"):
      return P(heads)
    if name == "mask" or name.endswith("_for_all"):
      return P()
    if heads is None:
      return P(images)
    return P(images, None, None, heads) if name.lstrip("d") in ("q", "k", "v", "y") else P(images, heads)

  return jax.shard_map(
    lambda *values: tuple(function(dict(zip(arrays, values, strict=True)))),
    in_specs=tuple(None if x is None else split(name) for name, x in arrays.items()),
    out_specs=tuple(split(name) for name in results),
    check_vma=False,  # a kernel does not say over what its results vary
  )(*arrays.values())


def like(x: jax.Array, number: int | None = None) -> jax.ShapeDtypeStruct:
  """Returns its shape and dtype, with so many entries if a `number` is given."""
  return jax.ShapeDtypeStruct(x.shape if number is None else (number, *x.shape[1:]), x.dtype)
