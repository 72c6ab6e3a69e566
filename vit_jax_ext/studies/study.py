"""The studies of the compare command: the papers' questions, put to small models that are trained from several seeds.

A study is a config file with a STUDY (`config.read_study`); its runs are the study's cells. All cells are trained
from one seed before the next, so a study that is stopped can be compared already.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import json
import os
import pathlib
import statistics
import time
from typing import Any

from absl import logging
import jax
import ml_collections
import rich.console
import rich.table

from vit_jax_ext import config as configs
from vit_jax_ext.attention.measure import measure
from vit_jax_ext.compare import cost, report, results
from vit_jax_ext.compare.comparison import positive
from vit_jax_ext.compare.runs import read_metrics
from vit_jax_ext.console import Countdown
from vit_jax_ext.data.datasets import open_dataset
from vit_jax_ext.errors import UserError
from vit_jax_ext.models import layers
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.training.train import train
from vit_jax_ext.workdir import checkpoint

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# Name -> config file, and what is changed in it: from two seeds all three shall take half an hour on two CPU cores.
STUDIES = {
  "fusion": ("digits_fusion.py", ()),
  "depth": ("digits_depth.py", ("total_steps=400", "log_every_steps=100")),
  "boat": ("digits_boat.py", ()),
}
THRESHOLD = 0.8  # of similar blocks
SIMILARITY = "similarity.json"

# First guesses, on two CPU cores, for the time left: seconds to get ready, per operation of the forward pass, in a
# cell's first run and in the next ones, whose programs are in the cache; seconds of a training step, per operation and
# per multiply-add.
READY = {"first run": 16e-3, "next run": 6e-3}
STEP = (2e-5, 1.5e-10)


@dataclasses.dataclass
class _Run:
  """A cell from one seed, and what it gave: `top1` after the last step, readings of `images_per_second`."""

  name: str
  workdir: str
  config: ml_collections.ConfigDict
  top1: float | None = None
  images_per_second: Sequence[float] = ()
  similar_blocks: int | None = None

  def read(self, total_steps: int) -> None:
    """Reads what the run has left; `top1` only when the last step was saved too."""
    rows = read_metrics(self.workdir)
    self.images_per_second = [row[key] for row in rows if (key := "train/images_per_second") in row]
    last = [row[key] for row in rows if row["step"] == total_steps and (key := "eval/top1") in row]
    if last and checkpoint.latest_step(self.workdir) == total_steps:
      self.top1 = last[-1]
    path = os.path.join(self.workdir, "analysis", SIMILARITY)
    if os.path.exists(path):
      with open(path) as file:
        self.similar_blocks = json.load(file)["similar_blocks"]


@dataclasses.dataclass
class _Cell:
  """What a study compares with its other cells.

  Attributes:
    has_maps: whether the blocks' attention maps can be compared with each other.
    operations: of the forward pass of one image.
    step_seconds: a guess.
  """

  params: int
  multiply_adds: int
  operations: int
  has_maps: bool
  total_steps: int
  step_seconds: float
  runs: list[_Run]

  def missing(self) -> list[_Run]:
    return [run for run in self.runs if run.top1 is None or (self.has_maps and run.similar_blocks is None)]

  def row(self, with_maps: bool) -> list[Any]:
    """Returns the table's row but for the label (see `report.write`)."""
    top1 = [100 * run.top1 for run in self.runs if run.top1 is not None]
    blocks = [run.similar_blocks for run in self.runs if run.similar_blocks is not None]
    rates = [rate for run in self.runs for rate in run.images_per_second]
    return [
      _mean_and_spread(top1),
      *([_mean_and_spread(blocks)] if with_maps else ()),
      _three_digits(self.params / 1e6),
      _three_digits(self.multiply_adds / 1e6),
      round(statistics.median(rates)) if rates else None,
    ]


@dataclasses.dataclass
class _Study:
  name: str
  title: str
  text: str
  labels: list[str]
  cells: list[_Cell]

  def write(self, output: str) -> dict[str, Any]:
    """Writes the table of what is finished, and the page; returns the table."""
    with_maps = any(cell.has_maps for cell in self.cells)
    runs = sum(len(cell.runs) for cell in self.cells)
    missing = sum(len(cell.missing()) for cell in self.cells)
    table = {
      "title": self.title,
      "text": self.text + (f" Not finished: {runs - missing} of {runs} runs are in." if missing else ""),
      "columns": ["model", "top-1, %", *(["similar blocks"] if with_maps else ()), "parameters, M", "multiply-adds, M",
                  "training, images/s"],
      "rows": [[label, *cell.row(with_maps)] for label, cell in zip(self.labels, self.cells, strict=True)],
    }  # fmt: skip
    with results.replace(os.path.join(output, report.STUDIES), f"{self.name}.json") as file:
      json.dump(table, file, indent=1)
    report.write(output)
    return table


def run_studies(name: str, seeds: int | str, overrides: Sequence[str], output: str | None) -> list[dict[str, Any]]:
  """Trains the runs of studies that are not there yet, and writes studies/NAME.json and report.html after each.

  Args:
    name: of STUDIES, "all", or a config file with a STUDY.
    seeds: how many, from `config.seed` on.
    overrides: KEY=VALUE for every run.
    output: folder; the runs' workdirs are studies/NAME/CELL/seed_I in it.

  Returns:
    For each study what its file holds, see `report.write`. A spread is the sample standard deviation over the seeds.

  Raises:
    UserError: an unknown study, no number, what a config or a model does not know, cells that do not differ any more,
      runs of another config in the folder, no folder or an unwritable one.
  """
  if not output:
    raise UserError("the runs of a study need a folder; give --output=DIR")
  seeds = positive("seeds", seeds)
  studies = [
    _read_study(study, *source, overrides, seeds, os.path.join(output, report.STUDIES, study))
    for study, source in _sources(name).items()
  ]
  for each in studies:
    each.write(output)
  if not jax.config.jax_compilation_cache_dir:  # a cell's programs are the same for all seeds
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(os.path.join(output, report.STUDIES, ".compiled")))
  _train(studies, output)
  tables = [each.write(output) for each in studies]
  for table in tables:
    _print(table)
  for path in (*(os.path.join(report.STUDIES, f"{each.name}.json") for each in studies), report.FILE):
    print(f"wrote {os.path.join(output, path)}")
  return tables


def _sources(name: str) -> dict[str, tuple[str, Sequence[str]]]:
  """Returns name -> (config file, overrides) of the studies that are meant."""
  shipped = {study: (str(CONFIGS / file), changes) for study, (file, changes) in STUDIES.items()}
  if name == "all":
    return shipped
  if name in shipped:
    return {name: shipped[name]}
  path = name.partition(":")[0]
  if path.endswith(".py"):
    return {pathlib.Path(path).stem: (name, ())}
  names = [*shipped, "all"]
  nearest = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names)
  raise UserError(f"study {name!r} is unknown; did you mean {nearest}? Or give a config file that has a STUDY, FILE.py")


def _read_study(
  name: str, spec: str, changes: Sequence[str], overrides: Sequence[str], seeds: int, folder: str
) -> _Study:
  """Returns a study with what its runs have left in `folder`; refuses what could not be trained."""
  logging.info("study %s: building its models", name)
  title, labels = configs.read_study(spec)
  cells, settings, seen = [], {}, {}
  for argument, label in labels.items():
    config = configs.load_config(f"{spec}:{argument}")
    configs.override(config, [*changes, *overrides])
    twin = seen.setdefault(config.to_json_best_effort(sort_keys=True), label)
    if twin != label:
      raise UserError(f"study {name}: {twin!r} and {label!r} do not differ with --config."
                      f"{' --config.'.join(overrides)}; leave out what the study varies")  # fmt: skip
    cell, tested = _read_cell(f"{name}, {label}", config, seeds, os.path.join(folder, argument.replace(",", "_")))
    cells.append(cell)
    settings[f"{config.dataset.name}, {cell.total_steps} steps of {config.batch_size} images, tested on {tested}"] = 1
  text = [*settings, f"mean ± sample standard deviation of {seeds} seeds" if seeds > 1 else "one seed"]
  if any(cell.has_maps for cell in cells):
    text.append(f"similar blocks: those whose maps have a cosine of {THRESHOLD} or more with the next block's")
  text = "; ".join(text)
  return _Study(name, title, f"{text[0].upper()}{text[1:]}.", list(labels.values()), cells)


def _read_cell(name: str, config: ml_collections.ConfigDict, seeds: int, folder: str) -> tuple[_Cell, int]:
  """Returns a cell with what its runs have left in `folder`, and the number of images that it is tested on."""
  dataset = open_dataset(config.dataset.name, config.dataset.data_dir)
  tested = dataset.num_examples(config.dataset.eval_split)
  experiment = Experiment(config, len(dataset.class_names), dataset.num_examples(config.dataset.train_split))
  runs = []
  for seed in range(config.seed, config.seed + seeds):
    of_seed = config.copy_and_resolve_references()
    of_seed.seed = seed
    run = _Run(f"{name}, seed {seed}", os.path.join(folder, f"seed_{seed}"), of_seed)
    configs.check_workdir(run.workdir, run.config, option="output")
    run.read(experiment.total_steps)
    runs.append(run)
  forward = cost.trace_forward(experiment.model)
  adds, operations = sum(cost.module_costs(forward).values()), cost.count_operations(forward.jaxpr)
  cell = _Cell(
    params=cost.count_params(experiment.model),
    multiply_adds=adds,
    operations=operations,
    has_maps=isinstance(experiment.model, layers.IsotropicTransformer),
    total_steps=experiment.total_steps,
    step_seconds=STEP[0] * operations + STEP[1] * adds * config.batch_size,
    runs=runs,
  )
  return cell, tested


def _train(studies: Sequence[_Study], output: str) -> None:
  """Makes the runs that are missing, those of the first seed first."""
  jobs = []
  for study in studies:
    for cell in study.cells:
      jobs += [("next run" if i else "first run", study, cell, run) for i, run in enumerate(cell.missing())]
  jobs.sort(key=lambda job: job[-1].config.seed)
  work = {kind: (sum(job[2].operations for job in jobs if job[0] == kind), guess) for kind, guess in READY.items()}
  work["steps"] = (sum(cell.total_steps * cell.step_seconds for _, _, cell, _ in jobs), 1.0)
  with Countdown(work) as countdown:
    for kind, study, cell, run in jobs:
      with _Bar(countdown, cell, run.name, kind) as bar:
        if run.top1 is None:
          scores = train(run.config, run.workdir, bar.begin)
          run.read(cell.total_steps)
          run.top1 = scores["eval/top1"]
        else:
          bar.begin(cell.total_steps, cell.total_steps)
        if cell.has_maps:
          summary, _ = measure(run.config, run.workdir, threshold=THRESHOLD, head_threshold=0.5)
          with results.replace(os.path.join(run.workdir, "analysis"), SIMILARITY) as file:
            json.dump(summary, file, indent=2)
          run.similar_blocks = summary["similar_blocks"]
      study.write(output)


class _Bar:
  """One run on the bar of all: `train` calls `begin`, and on what it returns the methods of `console.Progress`."""

  def __init__(self, countdown: Countdown, cell: _Cell, name: str, kind: str):
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


def _mean_and_spread(values: Sequence[float]) -> list[float] | float | None:
  if len(values) > 1:
    return [statistics.mean(values), statistics.stdev(values)]
  return round(values[0], 2) if values else None


def _three_digits(value: float) -> float:
  return float(f"{value:.3g}")


def _print(table: Mapping[str, Any]) -> None:
  shown = rich.table.Table(*table["columns"], title=table["title"], caption=table["text"])
  for row in table["rows"]:
    shown.add_row(*map(report.study_cell, row))
  rich.console.Console(width=120).print(shown)
