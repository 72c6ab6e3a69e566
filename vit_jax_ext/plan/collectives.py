"""What a training step sends between devices and keeps on them, read from its program compiled for simulated devices.

The compiler's partitioner, which puts the collectives in, is the same for all platforms. What comes after it is not:
on accelerators an all-reduce of which each device needs a part becomes a reduce-scatter, small collectives are joined,
and other fusion and scheduling change the temporaries. So the bytes are an upper bound, the memory an estimate.
"""

from collections.abc import Iterator
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from vit_jax_ext.errors import UserError
from vit_jax_ext.training import sharding
from vit_jax_ext.training.experiment import Experiment

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COLLECTIVE = re.compile(rf"%?(\S+) = (.+?) ({'|'.join(KINDS)})\(")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|[\w%.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction of a program.

  Attributes:
    kind: one of KINDS.
    bytes: of its results on one device, at each execution.
    times: executions.
  """

  kind: str
  bytes: int
  times: int


def collectives(program: str) -> list[Collective]:
  """Returns the collectives of one execution of a compiled program.

  Loops count as often as they run; of branches every one counts.

  Args:
    program: optimised HLO, as from `jax.stages.Compiled.as_text`.

  Raises:
    ValueError: a collective is in a loop without a known number of rounds.
  """
  computations, entry = {}, None
  for line in program.splitlines():
    if header := re.match(r"(ENTRY )?%?(\S+) \(.*\{$", line):
      name = header[2]
      computations[name] = []
      entry = name if header[1] else entry
    elif computations and line.startswith("  "):
      computations[name].append(line)

  def walk(name: str, times: int | None) -> Iterator[Collective]:
    for line in computations[name]:
      if found := _COLLECTIVE.match(line.strip().removeprefix("ROOT ")):
        if times is None:
          raise ValueError(f"{found[1]} is in a loop without a known number of rounds")
        yield Collective(found[3], _bytes(found[2]), times)
      rounds = times
      if " while(" in line and times is not None:
        trips = _TRIPS.search(line)
        rounds = times * int(trips[1]) if trips else None
      for called in _CALLED.findall(line):
        for inner in re.findall(r"[\w.-]+", called):
          yield from walk(inner, rounds)

  return list(walk(entry, 1))


def _bytes(shapes: str) -> int:
  """Returns the size of an HLO array type or tuple of them, e.g. (f32[8,4]{1,0}, bf16[])."""
  total = 0
  for dtype, dims in _ARRAY.findall(shapes):
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    total += bits // 8 * math.prod(int(size) for size in dims.split(",") if size)
  return total


def simulate_devices(mesh: ml_collections.ConfigDict) -> None:
  """Gives this process as many CPU devices as the mesh has; to be called before JAX is used.

  Raises:
    UserError: an axis is left open.
  """
  if min(mesh.values()) < 1:
    raise UserError(f"mesh {dict(mesh)} leaves an axis open; give the size of each, e.g. --config.mesh.data=8")
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", math.prod(mesh.values()))


def measure(config: ml_collections.ConfigDict, num_classes: int) -> dict[str, Any]:
  """Returns what a training step of `config` moves and keeps on each device. Nothing is computed.

  Args:
    config: see configs/common.py; its mesh fits the devices.
    num_classes: of the dataset, which need not be there.
  """
  experiment = Experiment(config, num_classes, examples=config.batch_size)
  state = jax.eval_shape(experiment.init)
  batch = {
    "image": jax.ShapeDtypeStruct((config.batch_size, *experiment.model.image_size, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
  }
  lowered = experiment.train_step.lower(state, batch)
  # Machine code is of no interest here: at level 0 it is quickly made.
  compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
  found = collectives(compiled.as_text())
  memory = compiled.memory_analysis()

  by_kind = {}
  for kind in KINDS:
    if ours := [c for c in found if c.kind == kind]:
      operations, moved = sum(c.times for c in ours), sum(c.bytes * c.times for c in ours)
      by_kind[kind] = {"operations": operations, "bytes": moved, "largest": max(c.bytes for c in ours)}
  total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {
    "model": config.model.name,
    "mesh": sharding.axis_sizes(experiment.mesh),
    "batch_size": config.batch_size,
    "parameters": sum(param.size for param in jax.tree.leaves(state.params)),
    "remarks": experiment.layout.remarks(),
    "collectives": by_kind,
    "device": {
      "state": sharding.bytes_per_device(state, experiment.places),
      "batch": sharding.bytes_per_device(batch, jax.tree.broadcast(experiment.by_batch, batch)),
      "temporaries": memory.temp_size_in_bytes,
      "total": total + memory.temp_size_in_bytes,
    },
  }
