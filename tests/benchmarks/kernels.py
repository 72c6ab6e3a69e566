"""How long the Pallas kernels of the recipes' training steps take, by the schedules that the TPU compiler makes.

Run: python tests/benchmarks/kernels.py [MODEL ...]
Needs libtpu and no TPU. A schedule is a list of bundles, one a cycle; what is in a loop counts as often as it runs.
Waits for memory are not in it.
Beside the cycles of a step, of what each unit could do in them, the share that it does.
"""

import collections
import glob
import math
import os
import re
import sys
import tempfile

import jax
import rich.console
import rich.progress
import rich.table
from speed import RECIPES

UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")
BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s*(\w*)\s*:((?:\s*>)*)\s*\{")
LOOP_EXIT = re.compile(r"scmp\.\w+\.s32\.totalorder (\(%\S+\), )?%\S+, (\d+) /\* loop exit test")


def find_kernels(jaxpr, times: int = 1) -> collections.Counter:
  """Returns the calls of kernels in a program, alike ones together, and how often they run."""
  found = collections.Counter()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      found[Kernel(eqn)] += times
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns") and eqn.primitive.name != "pallas_call":
        found += find_kernels(inner, times * eqn.params.get("length", 1))
  return found


class Kernel:
  """A call of a kernel; equal to those that compute the same with arrays of the same shapes."""

  def __init__(self, eqn):
    self.eqn = eqn
    self.name = eqn.params["name"] or eqn.params["jaxpr"].debug_info.func_name
    self.shapes = [f"{x.aval.dtype}{list(x.aval.shape)}" for x in eqn.invars]
    self.text = f"{self.name} {self.shapes} {eqn.params['jaxpr']}"

  def __eq__(self, other):
    return self.text == other.text

  def __hash__(self):
    return hash(self.text)


def count_runs(bundles: list[str]) -> list[int]:
  """Returns how often each bundle of a schedule runs.

  LB marks where a loop begins, the signs > how deep it lies. A test that is done only where a loop ends is that of the
  loop around it. The outermost loop is over a kernel's programs, in two rounds more, which load and store. A loop whose
  limit is not a number, as that over the turns of BOAT's clustering, counts once.
  """
  trips, loops_of, loops, latest = {}, [], [], {}  # a loop is its depth and its first bundle
  for line in bundles:
    mark, signs = BUNDLE.match(line).groups()
    depth = signs.count(">")
    if "{}" not in line:  # else it is empty, and without its depth
      if mark == "LB":
        latest[depth] = len(loops_of)
      loops = [(d, latest[d]) for d in range(1, depth + 1)]
      for around, limit in LOOP_EXIT.findall(line) if loops else ():
        where = max(1, depth - bool(around))
        trips[where, latest[where]] = int(limit)
    loops_of.append(loops)
  trips = {loop: rounds - 2 if loop[0] == 1 and rounds > 2 else rounds for loop, rounds in trips.items()}
  return [math.prod(trips.get(loop, 1) for loop in loops) for loops in loops_of]


def read_schedule(folder: str) -> tuple[int, list[float]]:
  """Returns the cycles of the kernel whose compilation wrote into `folder`, and the share of each of UNITS in them."""
  for name in glob.glob(f"{folder}/*-schedule-analysis_final_bundles.txt"):
    with open(name) as file:
      if "-TLP-" not in name and 'custom_call_target="tpu_custom_call"' in file.read():
        stem = glob.escape(name.removesuffix("-schedule-analysis_final_bundles.txt").rpartition("-")[0])
  (bundles,) = (name for name in glob.glob(f"{stem}-*-final_bundles.txt") if "analysis" not in name)
  (uses,) = glob.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt")
  with open(bundles) as file:
    runs = count_runs([line for line in file if BUNDLE.match(line)])
  with open(uses) as file:
    _, names, capacity, _, *rows = file.read().splitlines()
  capacity = dict(zip(names.split(", "), map(int, capacity.split()), strict=True))
  used = dict.fromkeys(capacity, 0)
  for row, times in zip(rows, runs, strict=True):
    for name, number in zip(capacity, row.split(), strict=True):
      used[name] += times * int(number)
  cycles = sum(runs)
  return cycles, [used[name] / (capacity[name] * cycles) for name in UNITS]


def compile_alone(kernel: Kernel, mesh: jax.sharding.Mesh, dump: str) -> tuple[int, list[float]]:
  """Returns what `read_schedule` does."""
  for name in glob.glob(f"{dump}/*"):
    os.remove(name)
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arguments = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, sharding=where) for x in kernel.eqn.invars]
  jax.jit(lambda *values: kernel.eqn.primitive.bind(*values, **kernel.eqn.params)).lower(*arguments).compile()
  return read_schedule(dump)


def main(models: list[str], dump: str) -> None:
  """Prints a table for each model."""
  from vit_jax_ext import config as configs
  from vit_jax_ext.plan import compile as programs
  from vit_jax_ext.plan import kinds
  from vit_jax_ext.training.experiment import Experiment

  target = kinds.open_target("v5e:2x2", 1)
  mesh, known = jax.sharding.Mesh(target.devices[:1], ("data",)), {}
  for model in models:
    path, images = RECIPES[model]
    config = configs.load_config(path)
    configs.override(config, [f"batch_size={4 * images}", "model.overrides.dtype=bfloat16"])
    experiment = Experiment(config, 1000, 1_281_167, devices=target.devices)
    function, arguments, _ = programs.find_program(config, experiment, "train")
    kernels = find_kernels(function.trace(*arguments).jaxpr.jaxpr)
    table = rich.table.Table("kernel", "first array", "in a step", "10^6 cycles", *UNITS, title=model)
    total = 0
    for kernel, times in rich.progress.track(kernels.items(), model, console=rich.console.Console(stderr=True)):
      if kernel not in known:
        known[kernel] = compile_alone(kernel, mesh, dump)
      cycles, shares = known[kernel]
      total += times * cycles
      row = kernel.name, kernel.shapes[0], str(times), f"{times * cycles / 1e6:.2f}"
      table.add_row(*row, *(f"{share:.0%}" for share in shares))
    table.add_row("all", "", str(kernels.total()), f"{total / 1e6:.2f}")
    rich.console.Console(width=140).print(table)


if __name__ == "__main__":
  unknown = set(sys.argv[1:]) - set(RECIPES)
  if unknown:
    sys.exit(f"{', '.join(sorted(unknown))}: unknown; choose some of {', '.join(RECIPES)}")
  with tempfile.TemporaryDirectory() as folder:
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    main(sys.argv[1:] or list(RECIPES), folder)
