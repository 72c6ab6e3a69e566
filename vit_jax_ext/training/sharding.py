"""The device mesh and where arrays lie on it."""

from collections.abc import Mapping
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax_ext.errors import UserError

AXES = ("data", "fsdp", "model")


def make_mesh(shape: Mapping[str, int]) -> Mesh:
  """Returns the mesh over all devices of all hosts.

  Args:
    shape: size of each axis of `AXES`; one of them may be -1, what the others leave.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  sizes = [shape[axis] for axis in AXES]
  devices = jax.device_count()
  if sizes.count(-1) == 1:
    rest = -math.prod(sizes)
    if rest > 0 and devices % rest == 0:
      sizes[sizes.index(-1)] = devices // rest
  if math.prod(sizes) != devices or min(sizes) < 1:
    asked = ", ".join(f"{axis}={shape[axis]}" for axis in AXES)
    raise UserError(f"mesh {asked} does not fit {devices} device(s); the axes must multiply to it, one may be -1")
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Batches are split over the data and fsdp axes."""
  return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, P())


def check_batch_size(name: str, batch_size: int, mesh: Mesh, multiple_of: int = 1) -> None:
  """Raises UserError unless the batch divides over the mesh's data axes times `multiple_of`."""
  divisor = mesh.shape["data"] * mesh.shape["fsdp"] * multiple_of
  if batch_size < 1 or batch_size % divisor:
    below = max(batch_size // divisor, 1) * divisor
    raise UserError(
      f"{name} {batch_size} does not divide by {divisor} (data x fsdp x accumulation); "
      f"the nearest sizes are {below} and {below + divisor}"
    )
