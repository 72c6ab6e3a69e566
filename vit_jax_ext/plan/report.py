"""What a step of an experiment needs on given devices, from the program that their own compiler makes of it."""

import collections
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from vit_jax_ext.plan import cost, memory
from vit_jax_ext.plan.collectives import MOVES, Collective, find_collectives
from vit_jax_ext.plan.compile import Compilation, DoesNotFitError, compile_program
from vit_jax_ext.plan.hlo import Instruction, Program
from vit_jax_ext.plan.kinds import Kind, Target
from vit_jax_ext.training import sharding
from vit_jax_ext.training.experiment import Experiment

DEAREST = 10


def plan(
  config: ml_collections.ConfigDict,
  target: Target,
  num_classes: int,
  examples: int,
  program: str = "train",
  experiment: Experiment | None = None,
) -> dict[str, Any]:
  """Returns what a program of an experiment needs on the devices of `target`. Nothing is computed.

  Args:
    config: see configs/common.py; its mesh fits the devices.
    target: devices to compile for.
    num_classes, examples: of the dataset, which need not be there.
    program: train, evaluate or predict.
    experiment: of these, which then knows the compiled program.

  Returns:
    The contents of plan.json, see docs/plan.md: seconds, bytes on each device, FLOPs and cycles of one.

  Raises:
    UserError: config and devices do not fit together.
    jax.errors.JaxRuntimeError: the compiler fails, other than for want of memory.
  """
  experiment = experiment or Experiment(config, num_classes, examples, devices=target.devices)
  about = {
    "model": config.model.name,
    "program": program,
    "devices": target.name,
    "chips": target.chips,
    "mesh": sharding.axis_sizes(experiment.mesh),
    "batch_size": config.batch_size,
    "accumulation_steps": config.optimizer.accumulation_steps,
    "parameters": sum(param.size for param in jax.tree.leaves(jax.eval_shape(experiment.init).params)),
    "remarks": experiment.layout.remarks(),
  }
  try:
    compilation = compile_program(config, experiment, program)
  except DoesNotFitError as error:
    return about | {"fits": False, "memory": {"total": error.needed, "limit": error.limit}}
  return about | measure(config, experiment, target, compilation, program)


def measure(
  config: ml_collections.ConfigDict, experiment: Experiment, target: Target, compilation: Compilation, program: str
) -> dict[str, Any]:
  """Returns the part of a plan that is read from the compiled program."""
  hlo = Program(compilation.compiled.as_text())
  executed = hlo.executed()
  needs = memory.needs(compilation, target)
  mesh = sharding.axis_sizes(experiment.mesh)
  islands = [_island(device) for device in experiment.mesh.devices.flat]
  found = find_collectives(hlo, mesh, islands)
  work = _work(hlo, executed, target.kind)
  return {
    "fits": needs["limit"] is None or needs["total"] <= needs["limit"],
    "memory": needs,
    "largest": memory.largest_arrays(hlo, executed),
    "work": work,
    "time": _time(config, experiment, target, work, found, program) if target.kind else None,
    "collectives": _by_kind(found, target),
    "least_sent": _least_sent(config, compilation.held["parameters"], mesh, program),
    "dearest": _dearest(hlo, executed, target.kind),
    "compilation": {"seconds": compilation.seconds, "peak_memory": compilation.peak_memory},
  }


def _island(device: jax.Device) -> int:
  """Returns the number of the slice of a TPU, of the host of a GPU; all simulated CPU devices are one."""
  return {"tpu": getattr(device, "slice_index", 0), "cpu": 0}.get(device.platform, device.process_index)


def _cycles(hlo: Program, instruction: Instruction, kind: Kind | None) -> int:
  """Returns the cycles of one execution on a TPU, estimated by the compiler or counted by us, else 0."""
  if not (kind and kind.clock):
    return 0
  if instruction.cycles is not None:
    return instruction.cycles
  return 0 if _only_moves(hlo, instruction) else cost.counted_cycles(hlo, instruction, kind)


def _only_moves(hlo: Program, instruction: Instruction) -> bool:
  """Returns whether an instruction is a collective, whose time is counted apart, or copies while others compute."""
  parts = [instruction]
  if instruction.opcode == "fusion":
    parts = [part for name in instruction.called() for part in hlo.computations[name].values()]
  return any(part.opcode in MOVES or part.opcode in ("copy-start", "slice-start") for part in parts)


def _work(hlo: Program, executed: Iterable[tuple[Instruction, int]], kind: Kind | None) -> dict[str, Any]:
  """Returns FLOPs, bytes to memory and, on a TPU, cycles."""
  flops = matmul_flops = moved = estimated = 0
  counted = collections.defaultdict(lambda: [0, 0])
  for instruction, times in executed:
    all_flops, in_matmuls = cost.flops(hlo, instruction)
    flops, matmul_flops = flops + all_flops * times, matmul_flops + in_matmuls * times
    moved += hlo.memory_bytes(instruction) * times
    cycles = _cycles(hlo, instruction, kind) * times
    if instruction.cycles is None and cycles:
      kernel = f" {instruction.target} {instruction.name.rstrip('.0123456789')}" if instruction.target else ""
      row = counted[instruction.opcode + kernel]
      row[0], row[1] = row[0] + times, row[1] + cycles
    else:
      estimated += cycles
  work = {"flops": flops, "matmul_flops": matmul_flops, "memory_bytes": moved, "unknown_loops": hlo.unknown_loops}
  if kind and kind.clock:
    rows = sorted(counted.items(), key=lambda item: -item[1][1])
    work["estimated_cycles"] = estimated
    work["counted"] = [{"what": what, "times": times, "cycles": cycles} for what, (times, cycles) in rows]
  return work


def _time(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  target: Target,
  work: dict[str, Any],
  found: Iterable[Collective],
  program: str,
) -> dict[str, float]:
  """Returns estimates: a step takes as long as computation or memory, whichever is slower, and exposed collectives."""
  kind = target.kind
  if kind.clock:
    computation = (work["estimated_cycles"] + sum(row["cycles"] for row in work["counted"])) / kind.clock
  else:
    computation = work["flops"] / kind.peak
  sent = collections.Counter()
  for one in found:
    far = one.far / kind.network if one.far and kind.network else 0.0
    sent[one.overlapped] += (one.near / kind.link + far) * one.times
  movement = work["memory_bytes"] / kind.bandwidth
  step = max(computation, movement, sent[True]) + sent[False]
  time = {
    "computation": computation,
    "memory": movement,
    "exposed_collectives": sent[False],
    "overlapped_collectives": sent[True],
    "step": step,
    "images_per_second": config.batch_size / step,
    "images_per_second_per_chip": config.batch_size / step / target.chips,
    "share_of_peak": work["matmul_flops"] / step / kind.peak,
  }
  if program == "train":
    time["training_hours"] = experiment.total_steps * step / 3600
  return time


def _by_kind(found: Iterable[Collective], target: Target) -> list[dict[str, Any]]:
  """Returns the collectives of a step, those of one sort together."""
  rows = collections.defaultdict(lambda: dict(operations=0, bytes=0, largest=0, sent_near=0.0, sent_far=0.0))
  for one in found:
    row = rows[one.kind, one.axes, one.overlapped, bool(one.far)]
    row["operations"] += one.times
    row["bytes"] += one.bytes * one.times
    row["largest"] = max(row["largest"], one.bytes)
    row["sent_near"] += one.near * one.times
    row["sent_far"] += one.far * one.times
  island = "host" if target.devices[0].platform == "gpu" else "slice"
  return [
    {"kind": kind, "axes": axes, "asynchronous": overlapped, "reach": f"between {island}s" if far else f"in a {island}"}
    | row
    for (kind, axes, overlapped, far), row in sorted(rows.items(), key=lambda item: -item[1]["bytes"])
  ]


def _least_sent(config: ml_collections.ConfigDict, stored: int, mesh: dict[str, int], program: str) -> dict[str, float]:
  """Returns the bytes that a device sends at least for gradients and parameters, each summed or gathered once.

  Gradients are summed over data and fsdp, and each device ends with those of the parameters that it keeps: a scatter
  over all, then a gather over data; in the type that the model computes in. Parameters are gathered over fsdp in
  bfloat16, which is what a TPU multiplies. What the model axis exchanges comes on top.

  Args:
    config: names the type.
    stored: bytes of the parameters that a device keeps, in float32.
    mesh: size of each axis.
    program: only training has gradients.
  """
  fsdp, copies = mesh["fsdp"], mesh["data"] * mesh["fsdp"]
  least = {"parameters": stored / 2 * (fsdp - 1)}
  if program == "train":
    share = jnp.dtype(config.model.overrides.get("dtype", "float32")).itemsize / 4
    least["gradients"] = share * stored * (fsdp * (copies - 1) / copies + (mesh["data"] - 1) / mesh["data"])
  return least


def _dearest(
  hlo: Program, executed: Iterable[tuple[Instruction, int]], kind: Kind | None
) -> dict[str, list[dict[str, Any]]]:
  """Returns where most cycles go, or bytes where there are no cycles, by line and by module."""
  sums = {"lines": {}, "modules": {}}
  for instruction, times in executed:
    work = _cycles(hlo, instruction, kind) * times, hlo.memory_bytes(instruction) * times
    for table, where in zip(sums.values(), hlo.place(instruction), strict=True):
      row = table.setdefault((where, hlo.direction(instruction)), [0, 0])
      row[0], row[1] = row[0] + work[0], row[1] + work[1]
  return {
    name: [
      {"where": where, "pass": direction, "cycles": cycles, "memory_bytes": moved}
      for (where, direction), (cycles, moved) in sorted(table.items(), key=lambda item: item[1], reverse=True)[:DEAREST]
    ]
    for name, table in sums.items()
  }
