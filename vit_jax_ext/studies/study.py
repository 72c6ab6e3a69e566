"""What a study is: a question put to small models, its cells, each trained from several seeds; and what came out.

A study is a config file with a STUDY (`config.read_study`), which lists the cells.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import os
import pathlib
import statistics
from typing import Any

from absl import logging
import ml_collections

from vit_jax_ext import config as configs
from vit_jax_ext.attention import figures, measure
from vit_jax_ext.compare import cost, report
from vit_jax_ext.data.datasets import open_dataset
from vit_jax_ext.errors import UserError
from vit_jax_ext.files import write_json
from vit_jax_ext.models.isotropic import IsotropicTransformer
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.workdir import analysis, checkpoint
from vit_jax_ext.workdir.config import check_workdir
from vit_jax_ext.workdir.metrics import read_metrics

# The papers' questions. From two seeds all three take about 21 minutes on two CPU cores, without the figures.
STUDIES = {name: str(configs.CONFIGS / f"digits_{name}.py") for name in ("fusion", "depth", "boat")}

PROBES = {name: str(configs.CONFIGS / f"probes_{name}.py") for name in ("scales", "twins", "chains")}

# A first guess of the seconds of a training step on two CPU cores, per operation of the forward pass and multiply-add.
STEP = (2e-5, 1.5e-10)


# From which cosine similarity blocks and heads count as similar: `threshold` and `head_threshold` of
# `similarity.measure_similarity`.
Thresholds = Mapping[str, float]


@dataclasses.dataclass
class Run:
  """A cell from one seed, and what it gave: `top1` after the last step, readings of `images_per_second`."""

  name: str
  workdir: str
  config: ml_collections.ConfigDict
  top1: float | None = None
  images_per_second: Sequence[float] = ()
  similarity: dict[str, Any] | None = None

  @property
  def turn(self) -> int:
    """When it is made: the runs of lower numbers first."""
    return self.config.seed

  @property
  def analysis(self) -> str:
    """The folder of what was measured of the run's attention maps."""
    return os.path.join(self.workdir, analysis.FOLDER)

  def read(self, total_steps: int, thresholds: Thresholds) -> None:
    """Reads what the run has left; `top1` only when the last step was saved too."""
    rows = read_metrics(self.workdir)
    self.images_per_second = [row[key] for row in rows if (key := "train/images_per_second") in row]
    last = [row[key] for row in rows if row["step"] == total_steps and (key := "eval/top1") in row]
    if last and checkpoint.latest_step(self.workdir) == total_steps:
      self.top1 = last[-1]
    summary = analysis.read_similarity(self.analysis)
    if summary and all(summary[name] == value for name, value in thresholds.items()):
      self.similarity = summary


@dataclasses.dataclass
class Cell:
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
  runs: list[Run]

  def missing(self) -> list[Run]:
    """Returns the runs that are not finished."""
    return [run for run in self.runs if run.top1 is None or (self.has_maps and run.similarity is None)]

  def prepare(self, run: Run) -> None:
    """Completes what is known of a run only now that it is its turn."""

  def measure(self, run: Run, thresholds: Thresholds) -> None:
    """Measures and writes of a trained run what its training does not."""
    if self.has_maps:
      run.similarity, maps = measure.measure(run.config, run.workdir, **thresholds)
      measure.write(run.analysis, run.similarity, maps)

  def similarity(self) -> dict[str, Any] | None:
    """Returns what was measured of the attention maps, the number of similar blocks as the mean of the runs."""
    summaries = [run.similarity for run in self.runs if run.similarity]
    if not summaries:
      return None
    return summaries[0] | {"similar_blocks": statistics.mean(summary["similar_blocks"] for summary in summaries)}

  def row(self, with_maps: bool) -> list[Any]:
    """Returns the table's row but for the label (see `report.write`)."""
    top1 = [100 * run.top1 for run in self.runs if run.top1 is not None]
    blocks = [run.similarity["similar_blocks"] for run in self.runs if run.similarity]
    rates = [rate for run in self.runs for rate in run.images_per_second]
    return [
      _mean_and_spread(top1),
      *([_mean_and_spread(blocks)] if with_maps else ()),
      _three_digits(self.params / 1e6),
      _three_digits(self.multiply_adds / 1e6),
      round(statistics.median(rates)) if rates else None,
    ]


@dataclasses.dataclass
class Study:
  """A question, its cells by their labels, and from which similarity blocks count as similar."""

  name: str
  title: str
  text: str
  labels: list[str]
  cells: list[Cell]
  thresholds: Thresholds

  def status(self) -> str:
    """Returns what is to be said of runs that are not finished."""
    runs = sum(len(cell.runs) for cell in self.cells)
    missing = sum(len(cell.missing()) for cell in self.cells)
    return f" Not finished: {runs - missing} of {runs} runs are in." if missing else ""

  def follow_up(self) -> None:
    """Adds the cells that the results of the others ask for, once they are all there."""

  def write(self, output: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Writes the table of what is finished, a figure of similar blocks if there are some, and the page.

    Returns:
      The tables, here one, and the paths of all.
    """
    with_maps = any(cell.has_maps for cell in self.cells)
    table = {
      "title": self.title,
      "text": self.text + self.status(),
      "columns": ["model", "top-1, %", *(["similar blocks"] if with_maps else ()), "parameters, M", "multiply-adds, M",
                  "training, images/s"],
      "rows": [[label, *cell.row(with_maps)] for label, cell in zip(self.labels, self.cells, strict=True)],
    }  # fmt: skip
    folder = os.path.join(output, report.STUDIES)
    paths = [write_json(folder, f"{self.name}.json", table)]
    if points := [point for cell in self.cells if (point := cell.similarity())]:
      figure = figures.similar_blocks_against_depth(points)
      paths.append(figures.save(folder, f"{self.name}.png", figure))
    return [table], [*paths, report.write(output)]


def find_studies(name: str) -> dict[str, str]:
  """Returns name -> config file of the studies that are meant: one of STUDIES or PROBES, all STUDIES, or a file.

  Raises:
    UserError: an unknown name.
  """
  if name == "all":
    return STUDIES
  known = STUDIES | PROBES
  if name in known:
    return {name: known[name]}
  path = name.partition(":")[0]
  if path.endswith(".py"):
    return {pathlib.Path(path).stem: name}
  names = [*known, "all"]
  nearest = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names)
  raise UserError(f"study {name!r} is unknown; did you mean {nearest}? Or give a config file that has a STUDY, FILE.py")


def read_study(
  name: str, spec: str, overrides: Sequence[str], seeds: int, folder: str, thresholds: Thresholds
) -> Study:
  """Returns a study with what its runs have left in `folder`.

  Raises:
    UserError: what could not be trained.
  """
  logging.info("study %s: building its models", name)
  title, labels = configs.read_study(spec)
  cells, settings, seen = [], {}, {}
  for argument, label in labels.items():
    config = configs.load_config(f"{spec}:{argument}")
    configs.override(config, overrides)
    configs.check(config)
    twin = seen.setdefault(config.to_json_best_effort(sort_keys=True), label)
    if twin != label:
      raise UserError(f"study {name}: {twin!r} and {label!r} do not differ with --config."
                      f"{' --config.'.join(overrides)}; leave out what the study varies")  # fmt: skip
    cell, tested = _read_cell(f"{name}, {label}", config, seeds, os.path.join(folder, argument.replace(",", "_")),
                              thresholds)  # fmt: skip
    cells.append(cell)
    settings[f"{config.dataset.name}, {cell.total_steps} steps of {config.batch_size} images, tested on {tested}"] = 1
  text = [*settings, f"mean ± sample standard deviation of {seeds} seeds" if seeds > 1 else "one seed"]
  if any(cell.has_maps for cell in cells):
    text.append(
      f"similar blocks: those whose maps have a cosine of {thresholds['threshold']} or more with the next block's"
    )
  text = "; ".join(text)
  return Study(name, title, f"{text[0].upper()}{text[1:]}.", list(labels.values()), cells, thresholds)


def _read_cell(
  name: str, config: ml_collections.ConfigDict, seeds: int, folder: str, thresholds: Thresholds
) -> tuple[Cell, int]:
  """Returns a cell with what its runs have left in `folder`, and the number of images that it is tested on."""
  cell, tested = describe_cell(config)
  for seed in range(config.seed, config.seed + seeds):
    run = Run(f"{name}, seed {seed}", os.path.join(folder, f"seed_{seed}"), with_values(config, seed=seed))
    find_run(run, cell, thresholds)
    cell.runs.append(run)
  return cell, tested


def with_values(config: ml_collections.ConfigDict, seed: int, **optimizer: float) -> ml_collections.ConfigDict:
  """Returns a config with another seed and other values of `optimizer`."""
  config = config.copy_and_resolve_references()
  config.seed = seed
  config.optimizer.update(optimizer)
  return config


def find_run(run: Run, cell: Cell, thresholds: Thresholds) -> None:
  """Reads what a run has left in its workdir.

  Raises:
    UserError: a run of another config is there.
  """
  check_workdir(run.workdir, run.config, option="output", may_be_longer=False)  # a run in two parts is another one
  run.read(cell.total_steps, thresholds)


def describe_cell(config: ml_collections.ConfigDict) -> tuple[Cell, int]:
  """Returns a cell of which no run is known yet, and the number of images that it is tested on."""
  dataset = open_dataset(config.dataset.name, config.dataset.data_dir)
  if dataset.multi_label:
    raise UserError(f"dataset {dataset.name} has several labels an image; choose another, for studies compare top-1")
  tested = dataset.num_examples(config.dataset.eval_split)
  experiment = Experiment(config, len(dataset.class_names), dataset.num_examples(config.dataset.train_split))
  forward = cost.trace_forward(experiment.model)
  adds, operations = sum(cost.module_costs(forward).values()), cost.count_operations(forward.jaxpr)
  cell = Cell(
    params=cost.count_params(experiment.model),
    multiply_adds=adds,
    operations=operations,
    has_maps=isinstance(experiment.model, IsotropicTransformer),
    total_steps=experiment.total_steps,
    step_seconds=STEP[0] * operations + STEP[1] * adds * config.batch_size,
    runs=[],
  )
  return cell, tested


def _mean_and_spread(values: Sequence[float]) -> list[float] | float | None:
  if len(values) > 1:
    return [statistics.mean(values), statistics.stdev(values)]
  return round(values[0], 2) if values else None


def _three_digits(value: float) -> float:
  return float(f"{value:.3g}")
