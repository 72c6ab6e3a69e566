"""The device mesh and where arrays lie on it."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import psutil

from vit_jax_ext.errors import UserError

AXES = ("data", "fsdp", "model")


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh over the devices: axes data, fsdp0, fsdp1, ... and model.

  The fsdp axis appears in its prime factors. So an array that 8 does not divide, as DeepViT-L's 420 x 1260, can be
  split in 4 along one dimension and in 2 along another.

  Args:
    shape: size of each axis of `AXES`; one of them may be -1, what the others leave.
    devices: all of all hosts by default, or those of a topology that is only compiled for.

  Raises:
    UserError: the sizes do not multiply to the number of devices, the model axis leaves a host, or data does not divide
      by the number of TPU slices, which it alone spans.
  """
  devices = jax.devices() if devices is None else devices
  sizes, number = [shape[axis] for axis in AXES], len(devices)
  if sizes.count(-1) == 1:
    rest = -math.prod(sizes)
    if rest > 0 and number % rest == 0:
      sizes[sizes.index(-1)] = number // rest
  if math.prod(sizes) != number or min(sizes) < 1:
    asked = ", ".join(f"{axis}={shape[axis]}" for axis in AXES)
    raise UserError(f"mesh {asked} does not fit {number} device(s); the axes must multiply to it, one may be -1")
  data, fsdp, model = sizes
  factors = _prime_factors(fsdp)
  names = ("data", *(f"fsdp{i}" for i in range(len(factors))), "model")
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if data % slices:
    raise UserError(f"mesh data={data} does not divide over {slices} slices; choose a multiple of {slices}")
  # Laid out by its three axes, which follow the network's topology, and only then refined.
  make_grid = functools.partial(mesh_utils.create_hybrid_device_mesh, devices=devices, allow_split_physical_axes=True)
  if slices > 1:
    grid = make_grid((data // slices, fsdp, model), (slices, 1, 1))
  else:
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  per_host = sum(device.process_index == devices[0].process_index for device in devices)
  if _leaves_hosts(grid) and per_host % model == 0:
    # The torus' order puts a host's devices into several groups; hosts come first then, each with whole groups.
    here = math.gcd(fsdp, per_host // model)
    rest = per_host // model // here  # divides data, as data * fsdp are the groups of all hosts
    grid = make_grid((rest, here, model), (data // rest, fsdp // here, 1), process_is_granule=True)
  if _leaves_hosts(grid):
    # Such hosts would have to read the same images.
    raise UserError(f"mesh model={model} reaches over hosts of {per_host} devices; choose a divisor")
  grid = grid.reshape(data, *factors, model)
  return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _leaves_hosts(grid: np.ndarray) -> bool:
  """Returns whether the model axis, the last one of a grid of devices, has devices of several hosts."""
  return any(len({device.process_index for device in group}) > 1 for group in grid.reshape(-1, grid.shape[-1]))


def _prime_factors(number: int) -> list[int]:
  for divisor in range(2, number + 1):
    if number % divisor == 0:
      return [divisor, *_prime_factors(number // divisor)]
  return []


def axis_sizes(mesh: Mesh) -> dict[str, int]:
  """Returns the size of each axis of `AXES`, the factors of fsdp multiplied again."""
  data, model = mesh.shape["data"], mesh.shape["model"]
  return {"data": data, "fsdp": mesh.size // data // model, "model": model}


def bytes_per_device(tree: Any, shardings: Any) -> int:
  """Returns what each device holds of arrays or ShapeDtypeStructs with these shardings."""
  sizes = jax.tree.map(lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
  return sum(jax.tree.leaves(sizes))


def limit_at_hand() -> int:
  """Returns the bytes that each of this machine's devices has; those that are parts of the host share its memory."""
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  return limit or psutil.virtual_memory().available // jax.local_device_count()


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Batches are split over the data and fsdp axes."""
  return NamedSharding(mesh, P(tuple(axis for axis in mesh.axis_names if axis != "model")))


def traced_on(mesh: Mesh, function: Callable) -> Callable:
  """Returns `function`, which sees while it is traced which mesh it is for; kernels need to (models.attention)."""

  @functools.wraps(function)
  def traced(*args, **kw):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kw)

  return traced


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, P())


def check_batch_size(name: str, batch_size: int, mesh: Mesh, multiple_of: int = 1) -> None:
  """Raises UserError unless the batch divides over the mesh's data axes times `multiple_of`."""
  divisor = mesh.size // mesh.shape["model"] * multiple_of
  if batch_size < 1 or batch_size % divisor:
    below = max(batch_size // divisor, 1) * divisor
    raise UserError(
      f"{name} {batch_size} does not divide by {divisor} (data x fsdp x accumulation); "
      f"the nearest sizes are {below} and {below + divisor}"
    )


def check_group(name: str, group: int | None, batch_size: int, mesh: Mesh) -> None:
  """Checks that groups of images make up a batch, and that they and the devices' parts of it do not cut each other.

  Args:
    name: of the group's size in the config.
    group: images that are drawn for, or counted, together; None for all.
    batch_size: images that the devices work on at once.
    mesh: of the devices.

  Raises:
    UserError: the batch does not divide by the group, or neither of group and part by the other; says which sizes do.
  """
  part = batch_size // (mesh.size // mesh.shape["model"])

  def fits(size: int) -> bool:
    return batch_size % size == 0 and (part % size == 0 or size % part == 0)

  if group is not None and (group < 1 or not fits(group)):
    sizes = [size for size in range(1, batch_size + 1) if fits(size)]
    below, above = [size for size in sizes if size < group][-1:], [size for size in sizes if size > group][:1]
    raise UserError(
      f"{name} {group} does not divide {batch_size} images, of which each device has {part}; "
      f"the nearest that fit: {', '.join(map(str, below + above))}"
    )
