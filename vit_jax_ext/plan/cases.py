"""Many plans, each made by a process of its own and kept in a folder, so that nothing is compiled twice."""

from collections.abc import Sequence
import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import threading
import time
from typing import Any

import jax

from vit_jax_ext.config import CONFIGS, load_config, override
from vit_jax_ext.console import Countdown
from vit_jax_ext.errors import UserError
from vit_jax_ext.files import size, write_json
from vit_jax_ext.plan.kinds import open_target
from vit_jax_ext.plan.report import plan

RECIPES = ("crossvit.py:15_dagger", "deepvit.py:16b", "boat.py:swin_tiny", "swin.py:tiny", "cswin.py:tiny",
           "vit.py:deit_small")  # fmt: skip
DEVICES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x8", "h100:1x8")
# What XLA raises, and what JAX does where a platform's lowering or a kernel's does not take a program.
FAILURES = (jax.errors.JaxRuntimeError, NotImplementedError, ValueError)
SECONDS = 300.0  # first guess of a compilation
CELLS = ("images a chip", "fits", "step, ms", "images/s a chip", "of peak", "training, h")


@dataclasses.dataclass(frozen=True)
class Case:
  """A training step to be compiled.

  Attributes:
    config: as --config names it.
    overrides: KEY=VALUE of it.
    devices, slices, num_classes, examples: as on the command line.
  """

  config: str
  overrides: tuple[str, ...]
  devices: str
  slices: int
  num_classes: int
  examples: int

  def key(self) -> str:
    """Returns a digest of all that the plan depends on: the config's values, this package, the compilers."""
    config = load_config(self.config)
    override(config, self.overrides)
    sources = [path.read_text() for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))]
    compilers = {name: _version(name) for name in ("jax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")}
    about = [config.to_json_best_effort(), *dataclasses.astuple(self)[2:], compilers, sources]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def make_plan(case: Case, folder: str, countdown: Countdown) -> dict[str, Any]:
  """Returns the plan of a case, from `folder` if it is there already, else made and written there.

  One that cannot be made has nothing but "error", in words.
  """
  path = pathlib.Path(folder, f"{case.key()}.json")
  if path.is_file():
    countdown.skip("plan", 1)
    return json.loads(path.read_text())
  with (
    countdown.job("plan", 1, f"{case.config} on {case.devices} {' '.join(case.overrides)}"),
    # Whatever a compiler does to its process, even if it ends it, and whatever memory it keeps.
    concurrent.futures.ProcessPoolExecutor(
      1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)
    ) as pool,
  ):
    try:
      result = pool.submit(_plan, case).result()
    except concurrent.futures.process.BrokenProcessPool:
      return {"error": "the compiler crashed"}
  if "error" not in result:
    write_json(folder, path.name, result)
  return result


def _end_with(parent: int) -> None:
  """Ends this process when its parent is gone, in the midst of a compilation too."""

  def watch():
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _plan(case: Case) -> dict[str, Any]:
  try:
    config = load_config(case.config)
    override(config, case.overrides)
    return plan(config, open_target(case.devices, case.slices), case.num_classes, case.examples)
  except UserError as error:
    return {"error": str(error)}
  except FAILURES as error:
    return {"error": f"the compiler fails: {first_line(error)}"}


def first_line(error: Exception) -> str:
  """Returns what an error says, without the compiler's dump below it."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def plan_all(folder: str, overrides: Sequence[str], num_classes: int, examples: int) -> list[list[str]]:
  """Returns a table of RECIPES on DEVICES, its first row the titles; plans that `folder` has are not made again."""
  rows = [["recipe", "devices", *CELLS]]
  with Countdown({"plan": (len(RECIPES) * len(DEVICES), SECONDS)}) as countdown:
    for recipe in RECIPES:
      for devices in DEVICES:
        case = Case(str(CONFIGS / recipe), tuple(overrides), devices, 1, num_classes, examples)
        rows.append([recipe, devices, *cells(make_plan(case, folder, countdown))])
  return rows


def cells(found: dict[str, Any]) -> list[str]:
  """Returns what stands below CELLS for a plan; estimates have a ~."""
  if "error" in found:
    return ["", found["error"], "", "", "", ""]
  memory, images = found["memory"], found["batch_size"] / found["chips"]
  fits = f"{size(memory['total'])} of {size(memory['limit'])}"
  if not found["fits"]:
    return [f"{images:g}", f"no: {fits}", "", "", "", ""]
  time = found["time"]
  return [f"{images:g}", fits, f"~{time['step'] * 1e3:,.1f}", f"~{time['images_per_second_per_chip']:,.0f}",
          f"~{time['share_of_peak']:.1%}", f"~{time['training_hours']:,.1f}"]  # fmt: skip
