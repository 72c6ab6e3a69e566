"""Trains the runs of studies that are missing: all cells from one seed before the next, so that a study that is stopped
can be compared already.
"""

from collections.abc import Mapping, Sequence
import os
import time
from typing import Any

from vit_jax_ext import compilation_cache
from vit_jax_ext import config as configs
from vit_jax_ext.attention import similarity
from vit_jax_ext.compare import report
from vit_jax_ext.console import Countdown
from vit_jax_ext.studies.probe import read_probe
from vit_jax_ext.studies.study import Cell, Study, Thresholds, find_studies, read_study
from vit_jax_ext.training.train import train

# First guesses, on two CPU cores, for the time left: seconds to get ready, per operation of the forward pass, in a
# cell's first run and in the next ones, whose programs are in the cache.
READY = {"first run": 16e-3, "next run": 6e-3}


def run_studies(
  name: str,
  seeds: int | None,
  overrides: Sequence[str],
  output: str,
  thresholds: Thresholds,
) -> tuple[list[dict[str, Any]], list[str]]:
  """Trains the runs of studies that are not there yet, and writes studies/NAME.json and report.html after each.

  Args:
    name: of STUDIES or PROBES, "all", or a config file with a STUDY.
    seeds: how many, from `config.seed` on; None for 2, in probes 5.
    overrides: KEY=VALUE for every run.
    output: folder; the runs' workdirs are studies/NAME/CELL/seed_I in it.
    thresholds: from which similarity blocks and heads count as similar.

  Returns:
    What the studies' files hold, see `report.write`. A spread is the sample standard deviation over the seeds.
    And the paths of the files.

  Raises:
    UserError: an unknown study, what a config or a model does not know, cells that do not differ any more, runs of
      another config in the folder, an unwritable folder, impossible thresholds.
  """
  similarity.check_thresholds(**thresholds)  # before hours of training
  folder = os.path.join(output, report.STUDIES)
  studies = []
  for study, spec in find_studies(name).items():
    read, usual = (read_probe, 5) if configs.read_probe(spec) else (read_study, 2)
    studies.append(read(study, spec, overrides, seeds or usual, os.path.join(folder, study), thresholds))
  for each in studies:
    each.write(output)
  compilation_cache.use(studies[0].cells[0].runs[0].config)
  _train(studies, output)
  for each in studies:
    each.follow_up()
  _train(studies, output)
  written = [each.write(output) for each in studies]
  paths = dict.fromkeys(path for _, files in written for path in files)
  return [table for tables, _ in written for table in tables], [*paths]


def _train(studies: Sequence[Study], output: str) -> None:
  """Makes the runs that are missing, those of the first seed first."""
  jobs = []
  for study in studies:
    for cell in study.cells:
      jobs += [("next run" if i else "first run", study, cell, run) for i, run in enumerate(cell.missing())]
  jobs.sort(key=lambda job: job[-1].turn)
  work = {kind: (sum(job[2].operations for job in jobs if job[0] == kind), guess) for kind, guess in READY.items()}
  work["steps"] = (sum(cell.total_steps * cell.step_seconds for _, _, cell, _ in jobs), 1.0)
  with Countdown(work) as countdown:
    for kind, study, cell, run in jobs:
      with _Bar(countdown, cell, run.name, kind) as bar:
        cell.prepare(run)
        if run.top1 is None:
          scores = train(run.config, run.workdir, bar.begin)
          run.read(cell.total_steps, study.thresholds)
          run.top1 = scores["eval/top1"]
        else:
          bar.begin(cell.total_steps, cell.total_steps)
        cell.measure(run, study.thresholds)
      study.write(output)


class _Bar:
  """One run on the bar of all: `train` calls `begin`, and on what it returns the methods of `console.Progress`."""

  def __init__(self, countdown: Countdown, cell: Cell, name: str, kind: str):
    self._countdown, self._cell, self._name, self._kind = countdown, cell, name, kind
    self._clock = time.monotonic()
    countdown.show(name, log=True)

  def begin(self, first_step: int, total_steps: int) -> "_Bar":
    self._countdown.skip("steps", first_step * self._cell.step_seconds)
    return self

  def __enter__(self) -> "_Bar":
    return self

  def __exit__(self, *exception) -> None:
    self._lap(0.0)

  def step(self, step: int) -> None:
    self._lap(self._cell.step_seconds)
    self._countdown.show(f"{self._name}, step {step}/{self._cell.total_steps}", log=False)

  def log(self, step: int, scalars: Mapping[str, float]) -> None:
    what = f"{self._name}, step {step}/{self._cell.total_steps}, loss {scalars['train/loss']:.3f}"
    self._countdown.show(what, log=True)

  def _lap(self, weight: float) -> None:
    """Counts the time since the last one, up to the first step to getting ready."""
    seconds = time.monotonic() - self._clock
    self._clock += seconds
    if self._kind == "steps":
      self._countdown.done("steps", weight, seconds)
    else:
      self._countdown.done(self._kind, self._cell.operations, seconds)
      self._countdown.skip("steps", weight)
      self._kind = "steps"
