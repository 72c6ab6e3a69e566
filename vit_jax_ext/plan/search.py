"""The fastest way to run a training step on given devices: how they are split, and how many images at once.

Three rounds: splits of data x fsdp x model; of the best split that fits and of no split but of the data, the batch in
parts, one after another, with and without rematerialisation; of the best of these, larger batches, at once or in more
parts. Nothing else of the config changes.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import math
from typing import Any

from vit_jax_ext.config import load_config, override
from vit_jax_ext.console import Countdown
from vit_jax_ext.errors import UserError
from vit_jax_ext.plan.cases import CELLS, SECONDS, Case, cells, make_plan
from vit_jax_ext.plan.kinds import open_target

PARTS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Trial:
  """One way.

  Attributes:
    overrides: KEY=VALUE that it adds.
    plan: what it needs, see `report.plan`; or its "error".
  """

  overrides: tuple[str, ...]
  plan: dict[str, Any]

  @property
  def fits(self) -> bool:
    """Whether there is a plan, and room for it."""
    return self.plan.get("fits", False)

  def rank(self) -> tuple[bool, float]:
    """Returns what is larger for a better one: to fit, then images/s, or else less memory."""
    if "error" in self.plan:
      return False, -math.inf
    if not self.fits:
      return False, -self.plan["memory"]["total"]
    return True, self.plan["time"]["images_per_second"]


def search(case: Case, folder: str) -> list[Trial]:
  """Returns all that was tried, the best first.

  Args:
    case: where to start from; its own mesh and accumulation count for nothing.
    folder: keeps the plans, so that a search that was stopped goes on.

  Raises:
    UserError: nothing is published about the devices, or they are those at hand, which one process alone can have.
  """
  kind = case.devices.partition(":")[0]
  if kind in ("here", "cpu"):
    raise UserError(f"--search estimates, which cannot be done for {kind}; name a kind and shape, such as v5e:4x4")
  devices = len(open_target(case.devices, case.slices).devices) // case.slices
  config = load_config(case.config)
  override(config, case.overrides)
  splits = [("mesh.data=-1", f"mesh.fsdp={fsdp}", f"mesh.model={model}") for fsdp, model in _splits(devices)]
  trials: dict[tuple[str, ...], Trial] = {}
  with Countdown({"plan": (len(splits) + 4 * len(PARTS) + 4, SECONDS)}) as countdown:

    def compare(candidates: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
      for overrides in candidates:
        if overrides in trials:
          countdown.skip("plan", 1)
        else:
          changed = dataclasses.replace(case, overrides=(*case.overrides, *overrides))
          trials[overrides] = Trial(overrides, make_plan(changed, folder, countdown))
      return max(trials.values(), key=Trial.rank).overrides

    plain = ("optimizer.accumulation_steps=1", "model.overrides.remat=False")
    best = compare((*split, *plain) for split in splits)
    best = compare(
      (*split, f"optimizer.accumulation_steps={parts}", f"model.overrides.remat={remat}")
      for split in (best[:3], splits[0])
      for remat in (False, True)
      for parts in PARTS
    )
    *split, accumulation, remat = best
    parts = int(accumulation.rpartition("=")[2])
    compare(
      (*split, f"optimizer.accumulation_steps={more}", remat, f"batch_size={config.batch_size * factor}")
      for factor in (2, 4)
      for more in (parts, parts * factor)
    )
  return sorted(trials.values(), key=Trial.rank, reverse=True)


def table(trials: Sequence[Trial]) -> list[list[str]]:
  """Returns the rows of a table, the first of them its titles."""
  return [["flags, all --config.", *CELLS], *([" ".join(trial.overrides), *cells(trial.plan)] for trial in trials)]


def _splits(devices: int) -> Iterator[tuple[int, int]]:
  """Yields (fsdp, model) of devices that a fast network connects: no split, some and all of the parameters; heads."""
  some = 2 ** round(math.log2(devices) / 2)
  yield from dict.fromkeys((fsdp, 1) for fsdp in (1, some, devices) if devices % fsdp == 0)
  yield from ((1, model) for model in (2, 4) if devices % model == 0)
