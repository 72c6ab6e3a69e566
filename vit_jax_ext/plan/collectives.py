"""What devices send each other while a program runs."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import re

import numpy as np

from vit_jax_ext.plan.hlo import Instruction, Program

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MOVES = frozenset((*KINDS, *(f"{kind}-start" for kind in KINDS), "send", "recv"))


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective, as often as a step executes it.

  Attributes:
    kind: one of KINDS.
    axes: of the mesh, along which it goes.
    bytes: of the whole array on one device, at each execution: before a scatter, after a gather.
    times: executions.
    overlapped: whether the device computes meanwhile.
    near: bytes that a device sends, at each execution, within its slice (TPU) or host (GPU).
    far: those that it sends to others; in both cases what a ring needs at least.
  """

  kind: str
  axes: str
  bytes: int
  times: int
  overlapped: bool
  near: float
  far: float


def find_collectives(program: Program, mesh: Mapping[str, int], islands: Sequence[int]) -> list[Collective]:
  """Returns the collectives of one execution of a program.

  Args:
    program: for devices in the order of the mesh.
    mesh: size of each axis.
    islands: number of the slice or host of each device.
  """
  if program.partitions < len(islands):  # a program of one slice; the data axis alone spans several
    slices = len(islands) // program.partitions
    mesh, islands = {**mesh, "data": mesh["data"] // slices}, islands[: program.partitions]
  else:
    slices = 1
  found = {}
  for instruction, kind, times, overlapped in _instructions(program):
    channel = re.search(r"channel_id=(\d+)", instruction.rest)
    # A collective that other work is woven into stands in each of these fusions, always with its number.
    woven = overlapped and instruction.opcode == kind and channel
    found.setdefault(channel[1] if woven else instruction.name, (instruction, kind, times, overlapped))
  return [_measure(program, *collective, mesh, islands, slices) for collective in found.values()]


def _instructions(program: Program) -> Iterator[tuple[Instruction, str, int, bool]]:
  """Yields (instruction, kind, executions, whether it is asynchronous), the parts of one that is cut up one by one."""
  in_background = {
    name
    for computation in program.computations.values()
    for instruction in computation.values()
    if instruction.opcode == "async-start"
    for name in instruction.called()
  }
  for outer, times in program.executed():
    parts = [outer]
    if outer.opcode == "fusion":
      parts = [part for name in outer.called() for part in program.computations[name].values()]
    opcodes, targets = {part.opcode for part in parts}, {part.target for part in parts}
    woven = "AsyncCollectiveStart" in targets or outer.computation in in_background
    for part in parts:
      kind = part.opcode.removesuffix("-start")
      if kind == "all-reduce" and "dynamic-slice" in opcodes:  # the TPU's reduce-scatter
        yield part, "reduce-scatter", times, woven
      elif kind in KINDS:
        begun = part.opcode != kind and '"is_sync":true' not in part.rest
        yield part, kind, times, woven or begun or '"async_collective_fusion_config"' in part.rest
      elif part.opcode == "send" and (transfer := re.search(r'megascale_transfer_type="(\w+)"', part.rest)):
        yield part, transfer[1].lower().replace("_", "-"), times, True


def _measure(
  program: Program,
  instruction: Instruction,
  kind: str,
  times: int,
  overlapped: bool,
  mesh: Mapping[str, int],
  islands: Sequence[int],
  slices: int,
) -> Collective:
  operands = [array.size for array in program.operands(instruction)]
  results = [array.size for array in instruction.results]
  if instruction.opcode == "send":  # each slice by way of its hosts to the others
    factor = 2 if kind == "all-reduce" else 1
    return Collective(kind, "data", operands[0], times, overlapped, 0.0, factor * operands[0] * (slices - 1) / slices)
  if instruction.opcode in ("all-gather-start", "collective-permute-start"):  # whose result repeats the operands
    results = results[len(operands) : 2 * len(operands)]
  size = max(sum(operands), sum(results))
  groups = replica_groups(instruction.rest, len(islands))
  near, far = _sent(kind, size, groups, islands)
  return Collective(kind, _axes(groups, mesh), size, times, overlapped, near, far)


def _sent(kind: str, size: int, groups: Sequence[Sequence[int]], islands: Sequence[int]) -> tuple[float, float]:
  """Returns the bytes that a device sends within its island and to others, if each island first sums up its own."""
  members = len(groups[0])
  shared = max(len({islands[device] for device in group}) for group in groups)  # islands that a group is spread over
  own = members / shared
  if kind == "collective-permute":
    return (0.0, float(size)) if shared > 1 else (float(size), 0.0)
  if kind == "all-to-all":
    return size * (own - 1) / members, size * (shared - 1) / shared
  factor = 2 if kind == "all-reduce" else 1
  return factor * size * (own - 1) / own, factor * size / own * (shared - 1) / shared


def _axes(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> str:
  """Returns the axes along which the members of a group differ."""
  coordinates = np.array(np.unravel_index(np.concatenate([np.asarray(group) for group in groups]), [*mesh.values()]))
  start, varying = 0, np.zeros(len(mesh), bool)
  for group in groups:
    part = coordinates[:, start : start + len(group)]
    varying |= (part != part[:, :1]).any(axis=1)
    start += len(group)
  return " x ".join(axis for axis, differs in zip(mesh, varying, strict=True) if differs) or "none"


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
  """Returns the groups of devices that exchange something, in any of the ways in which HLO writes them.

  Args:
    attributes: of the instruction.
    devices: number of all.
  """
  if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
    return _listed(pairs[1])
  if lists := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
    return _listed(lists[1])
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
    shape, start, order = map(_numbers, iota.groups(default=""))
    ids = np.arange(math.prod(start)).reshape(start)
    return (ids.transpose(order) if order else ids).reshape(shape).tolist()
  if mesh := re.search(
    r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
  ):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    start, order = _numbers(mesh[2] or ""), _numbers(mesh[3] or "")
    ids = np.arange(math.prod(sizes.values())).reshape(start or [*sizes.values()])
    ids = (ids.transpose(order) if order else ids).reshape([*sizes.values()])
    along = [[*sizes].index(name) for name in re.findall(r"'(\w+)'", mesh[4])]
    return np.moveaxis(ids, along, range(-len(along), 0)).reshape(-1, math.prod(ids.shape[i] for i in along)).tolist()
  return [list(range(devices))]


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]


def _listed(text: str) -> list[list[int]]:
  return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text)]
