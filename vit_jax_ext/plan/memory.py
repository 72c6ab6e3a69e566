"""Memory of the devices: what a program needs of it, and what would make it fit."""

from collections.abc import Iterable, Iterator
import copy
from typing import Any

import ml_collections

from vit_jax_ext.config import override
from vit_jax_ext.errors import UserError
from vit_jax_ext.plan.compile import Compilation, DoesNotFitError, compile_program
from vit_jax_ext.plan.hlo import Instruction, Program
from vit_jax_ext.plan.kinds import Target
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.training.sharding import limit_at_hand

LARGEST = 10


def _limit(target: Target) -> int | None:
  """Returns the bytes of each device; None for simulated ones."""
  return limit_at_hand() if target.name == "here" else int(target.kind.memory) if target.kind else None


def needs(compilation: Compilation, target: Target) -> dict[str, int | None]:
  """Returns the bytes on each device by what they are for, their total, and the limit."""
  found = compilation.compiled.memory_analysis()
  rows = dict(compilation.held)
  rows["padding"] = found.argument_size_in_bytes - sum(rows.values())  # devices keep arrays in tiles
  rows["temporaries"] = found.temp_size_in_bytes
  rows["results"] = found.output_size_in_bytes - found.alias_size_in_bytes
  rows["program"] = found.generated_code_size_in_bytes
  return rows | {"total": sum(rows.values()), "limit": _limit(target)}


def largest_arrays(hlo: Program, executed: Iterable[tuple[Instruction, int]]) -> list[dict[str, Any]]:
  """Returns the largest arrays that a program keeps in memory, and where they come from."""
  found = {}
  for instruction, _ in executed:
    for array in instruction.results:
      if not array.on_chip:
        where = hlo.place(instruction)[0], hlo.direction(instruction)
        row = found.setdefault((array.dtype, array.shape, where), [array.padded_size, 0])
        row[1] += 1
  rows = sorted(found.items(), key=lambda item: -item[1][0])[:LARGEST]
  return [
    {"bytes": size, "array": f"{dtype}{list(shape)}", "number": number, "where": line, "pass": direction}
    for (dtype, shape, (line, direction)), (size, number) in rows
  ]


def find_remedies(
  config: ml_collections.ConfigDict,
  target: Target,
  num_classes: int,
  examples: int,
  program: str,
  found: dict[str, Any],
) -> dict[str, list[dict[str, Any]]]:
  """Returns flags with which a program that does not fit would, and the largest arrays; compiles it a few times.

  Args:
    config, target, num_classes, examples, program: as for `report.plan`.
    found: its result.

  Returns:
    remedies, rows of flags and total bytes, of which the last fits if any does; largest, the arrays of the program, or,
    where it has not compiled, of the first of those that has.
  """
  needed, limit = found["memory"]["total"], found["memory"]["limit"]
  remedies, largest = [], found.get("largest", [])
  for flags, changed in _candidates(config, program, len(target.devices), needed / limit):
    try:
      experiment = Experiment(changed, num_classes, examples, devices=target.devices)
      compilation = compile_program(changed, experiment, program)
    except UserError:  # the batch does not divide so
      continue
    except DoesNotFitError as error:
      remedies.append({"flags": flags, "total": error.needed})
      continue
    remedies.append({"flags": flags, "total": needs(compilation, target)["total"]})
    if not largest:
      hlo = Program(compilation.compiled.as_text())
      largest = largest_arrays(hlo, hlo.executed())
    if remedies[-1]["total"] <= limit:
      break
  return {"remedies": remedies, "largest": largest}


def _candidates(
  config: ml_collections.ConfigDict, program: str, devices: int, excess: float
) -> Iterator[tuple[str, ml_collections.ConfigDict]]:
  """Yields flags that need less memory, and configs with them: fewer images at once first, then other ways besides."""
  parts = 2
  while parts < excess:
    parts *= 2
  fewer = [
    f"optimizer.accumulation_steps={config.optimizer.accumulation_steps * factor}"
    if program == "train"
    else f"batch_size={config.batch_size // factor}"
    for factor in (parts, 2 * parts)
  ]
  trials = [[fewer[0]], [fewer[1]]]
  if program == "train" and not config.model.overrides.get("remat"):
    trials.append([fewer[1], "model.overrides.remat=True"])
  if devices > 1 and config.mesh.fsdp == 1:
    trials.append([fewer[1], "mesh.data=1", "mesh.fsdp=-1"])
  for assignments in trials:
    changed = copy.deepcopy(config)
    override(changed, assignments)
    yield " ".join(f"--config.{assignment}" for assignment in assignments), changed
