"""The fastest way to run a training step on given devices: how they are split, and how many images at once.

Three rounds: splits of data x fsdp x model; where there is no room in the best of them, or without any split of the
parameters, the fewest parts of the batch, one after another, that fit, with and without rematerialisation; of the best
of all these, larger batches, at once or else in more parts. Parts and rematerialisation buy memory with time, so they
are tried only where memory is short. Nothing else of the config changes.
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

PARTS = (1, 2, 4)  # of the batch
FACTORS = (2, 4)  # by which it grows


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
  # Six more of each of two splits, and two of each larger batch, at the most.
  with Countdown({"plan": (len(splits) + 2 * 2 * len(PARTS) + 2 * len(FACTORS), SECONDS)}) as countdown:

    def attempt(split: Iterable[str], parts: int = 1, remat: bool = False, factor: int = 1) -> Trial:
      overrides = (*split, f"optimizer.accumulation_steps={parts}", f"model.overrides.remat={remat}")
      if factor > 1:
        overrides += (f"batch_size={config.batch_size * factor}",)
      if overrides in trials:
        countdown.skip("plan", 1)
      else:
        changed = dataclasses.replace(case, overrides=(*case.overrides, *overrides))
        trials[overrides] = Trial(overrides, make_plan(changed, folder, countdown))
      return trials[overrides]

    def take_fewest(split: Iterable[str], many: Sequence[int], **other: Any) -> None:
      for tried, parts in enumerate(many, 1):
        if attempt(split, parts, **other).fits:
          countdown.skip("plan", len(many) - tried)
          return

    def best() -> Trial:
      return max(trials.values(), key=Trial.rank)

    for split in splits:
      attempt(split)
    for split in (best().overrides[:3], splits[0]):
      if attempt(split).fits:
        countdown.skip("plan", 2 * len(PARTS) - 1)
      else:
        take_fewest(split, PARTS[1:])
        take_fewest(split, PARTS, remat=True)
    *split, accumulation, remat = best().overrides
    parts = int(accumulation.rpartition("=")[2])
    for factor in FACTORS:
      take_fewest(split, (parts, parts * factor), remat=remat.endswith("True"), factor=factor)
  return sorted(trials.values(), key=Trial.rank, reverse=True)


def table(trials: Sequence[Trial]) -> list[list[str]]:
  """Returns the rows of a table, the first of them its titles."""
  return [["flags, all --config.", *CELLS], *([" ".join(trial.overrides), *cells(trial.plan)] for trial in trials)]


def _splits(devices: int) -> Iterator[tuple[int, int]]:
  """Yields (fsdp, model) of devices that a fast network connects: no split, some and all of the parameters; heads."""
  some = 2 ** round(math.log2(devices) / 2)
  yield from dict.fromkeys((fsdp, 1) for fsdp in (1, some, devices) if devices % fsdp == 0)
  yield from ((1, model) for model in (2, 4) if devices % model == 0)
