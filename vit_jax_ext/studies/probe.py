"""A study that is a probe: learning rates chosen on validation data, accuracy against difficulty, and verdicts.

Each model is trained once from each learning rate, with a seed of its own; the one that is best on validation data is
that of all its seeds. A trained model is tested on each difficulty, on images that nothing was chosen by. Where a claim
is supported, the model is trained once more without what it claims something of: its ablations.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import statistics as means
from typing import Any

from absl import logging
import ml_collections

from vit_jax_ext import config as configs
from vit_jax_ext.attention.figures import save
from vit_jax_ext.compare import report
from vit_jax_ext.data.probes import PROBES
from vit_jax_ext.errors import UserError
from vit_jax_ext.files import write_json
from vit_jax_ext.studies import figures, mechanisms, statistics
from vit_jax_ext.studies.study import Cell, Run, Study, Thresholds, describe_cell, find_run, with_values
from vit_jax_ext.training.evaluate import evaluate_weights

SEARCH_SEED = 1000  # after the first one of the study
LEVELS = "levels.json"  # of a run: top-1 by difficulty


class Search(Run):
  """A run that tries a learning rate."""

  turn = -1


@dataclasses.dataclass
class ProbeRun(Run):
  """A run that is tested, and its top-1 by difficulty."""

  levels: Mapping[str, float] | None = None

  def read(self, total_steps: int, thresholds: Thresholds) -> None:
    super().read(total_steps, thresholds)
    path = os.path.join(self.workdir, LEVELS)
    if self.top1 is not None and os.path.exists(path):
      with open(path) as file:
        self.levels = json.load(file)


@dataclasses.dataclass(kw_only=True)
class ProbeCell(Cell):
  """A model: its searches by learning rate, and the levels that its runs are tested on."""

  searches: Mapping[float, Search]
  levels: Sequence[str]

  def rate(self) -> float | None:
    """Returns the learning rate with the best top-1 on validation data, the lowest of equals; None: not known yet."""
    if any(search.top1 is None for search in self.searches.values()):
      return None
    return max(self.searches, key=lambda rate: (self.searches[rate].top1, -rate))

  def missing(self) -> list[Run]:
    return [search for search in self.searches.values() if search.top1 is None] + [
      run for run in self.runs if run.levels is None
    ]

  def prepare(self, run: Run) -> None:
    if isinstance(run, ProbeRun):
      run.config.optimizer.learning_rate = self.rate()
      find_run(run, self, {})

  def measure(self, run: Run, thresholds: Thresholds) -> None:
    if isinstance(run, ProbeRun) and run.levels is None:
      config, found = run.config.copy_and_resolve_references(), {}
      for level in self.levels:
        config.dataset.eval_split = f"test_{level}"
        found[level] = evaluate_weights(config, run.workdir)["eval/top1"]
      write_json(run.workdir, LEVELS, found)
      run.levels = found

  def accuracies(self) -> dict[str, list[float]]:
    """Returns top-1 in percent by level, in the order of the seeds, of the runs that are finished."""
    return {level: [100 * run.levels[level] for run in self.runs if run.levels] for level in self.levels}


@dataclasses.dataclass
class ProbeStudy(Study):
  """A probe.

  Attributes:
    claims: pairs of indices of cells, a model and its baseline.
    read_ablations: index of a model -> label -> its ablation, with what its runs have left.
    ablated: label -> index of the model, of the ablations, whose cells follow the others'.
  """

  probe: str
  claims: Sequence[tuple[int, int]]
  read_ablations: Callable[[int], Mapping[str, ProbeCell]]
  ablated: dict[str, int] = dataclasses.field(default_factory=dict)

  def status(self) -> str:
    searches = sum(len(cell.searches) for cell in self.cells)
    runs = searches + sum(len(cell.runs) for cell in self.cells)
    missing = sum(len(cell.missing()) for cell in self.cells)
    return f" Not finished: {runs - missing} of {runs} runs are in, {searches} of them searches." if missing else ""

  def follow_up(self) -> None:
    """Adds the ablations of each model with a claim that is supported at some level, once all runs are there."""
    if self.status():
      return
    supported = {claim[0] for claim, _, result in self._compare(self.claims) if result.verdict == statistics.SUPPORTED}
    for model in sorted(supported - {*self.ablated.values()}):
      for label, cell in self.read_ablations(model).items():
        self.ablated[label] = model
        self.labels.append(label)
        self.cells.append(cell)

  def write(self, output: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Writes the tables of what is finished and of the verdicts, of ablations too, curves with samples below, the page.

    When all is finished, also what the models of the first seed look at.
    """
    rest = len(self.cells) - len(self.ablated)
    models = dict(zip(self.labels[:rest], self.cells[:rest], strict=True))
    tables = {
      self.name: self._accuracy_table(range(rest), self.title, self.text + self.status()),
      f"{self.name}_verdicts": self._verdict_table(self.claims, "What that says of the claims"),
    }
    if self.ablated:
      text = "What is left of models whose claim is supported without what it is about."
      places = [*sorted({*self.ablated.values()}), *range(rest, len(self.cells))]
      pairs = [(model, rest + i) for i, model in enumerate(self.ablated.values())]
      tables[f"{self.name}_ablations"] = self._accuracy_table(places, "Ablations", text)
      tables[f"{self.name}_ablations_verdicts"] = self._verdict_table(pairs, "What the ablations say")
    tables = {name: table for name, table in tables.items() if table["rows"]}
    folder = os.path.join(output, report.STUDIES)
    for name in {f"{self.name}_ablations", f"{self.name}_ablations_verdicts"} - tables.keys():
      pathlib.Path(folder, f"{name}.json").unlink(missing_ok=True)  # from when fewer seeds supported a claim
    paths = [write_json(folder, f"{name}.json", table) for name, table in tables.items()]
    curves = {label: cell.accuracies() for label, cell in models.items()}
    paths.append(save(folder, f"{self.name}.png", figures.accuracy_against_difficulty(self.probe, curves)))
    if not self.status():
      looks = mechanisms.draw(self.probe, {label: cell.runs[0].workdir for label, cell in models.items()})
      paths += [save(folder, f"{self.name}.{what}.png", figure) for what, figure in looks.items()]
    return [*tables.values()], [*paths, report.write(output)]

  def _accuracy_table(self, places: Sequence[int], title: str, text: str) -> dict[str, Any]:
    rows = []
    for label, cell in ((self.labels[i], self.cells[i]) for i in places):
      costs = [float(f"{count:.3g}") for count in (cell.params / 1e3, cell.multiply_adds / 1e6)]
      rows.append([label, cell.rate(), *costs, *map(mean_and_interval, cell.accuracies().values())])
    levels = (f"{level}, %" for level in PROBES[self.probe].levels)
    columns = ["model", "learning rate", "parameters, K", "multiply-adds, M", *levels]
    return {"title": title, "text": text, "columns": columns, "rows": rows}

  def _verdict_table(self, claims: Sequence[tuple[int, int]], title: str) -> dict[str, Any]:
    rows = []
    for (model, baseline), level, result in self._compare(claims):
      claim = f"{self.labels[model]} above {self.labels[baseline]}"
      interval = "none" if result.interval is None else "{:+.1f} to {:+.1f}".format(*result.interval)
      effect, p = ("" if value is None else f"{value:.2g}" for value in (result.effect, result.p))
      rows.append([claim, level, f"{result.difference:+.1f}", interval, effect, p, result.verdict])
    return {
      "title": title,
      "text": "Of the same seeds, paired t-tests, corrected for their number by Holm's rule at 5%; effect size: mean "
      "difference by its standard deviation. Supported or contradicted: the corrected p is below 5%.",
      "columns": ["claim", PROBES[self.probe].turned_by, "difference, points", "95% interval", "effect size",
                  "corrected p", "verdict"],
      "rows": rows,
    }  # fmt: skip

  def _compare(self, claims: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], str, statistics.Comparison]]:
    """Returns claim, level and what came out, of the seeds that both models have; none before there is one."""
    found = []
    for model, baseline in claims:
      pairs = zip(self.cells[model].runs, self.cells[baseline].runs, strict=True)
      both = [(a.levels, b.levels) for a, b in pairs if a.levels and b.levels]
      for level in self.cells[model].levels:
        values = [[100 * levels[level] for levels in side] for side in zip(*both, strict=True)]
        found.append(((model, baseline), level, values))
    if not all(values for *_, values in found):
      return []
    results = statistics.compare([values for *_, values in found])
    return [(claim, level, result) for (claim, level, _), result in zip(found, results, strict=True)]


def mean_and_interval(values: Sequence[float]) -> str | None:
  """Writes accuracies of seeds as their mean with its 95% interval; one value stands alone."""
  if not values:
    return None
  interval = statistics.interval(values)
  return f"{means.mean(values):.1f}" + ("" if interval is None else " ({:.1f} to {:.1f})".format(*interval))


def read_probe(
  name: str, spec: str, overrides: Sequence[str], seeds: int, folder: str, thresholds: Thresholds
) -> ProbeStudy:
  """Returns a probe's study with what its runs have left in `folder`.

  Raises:
    UserError: what could not be trained, another dataset, or a learning rate that the study would choose itself.
  """
  logging.info("study %s: building its models", name)
  (title, labels), probe = configs.read_study(spec), configs.read_probe(spec)
  if any(override.startswith("optimizer.learning_rate=") for override in overrides):
    raise UserError(f"study {name} chooses config.optimizer.learning_rate itself; leave it out")
  cells, arguments, dataset = [], [*labels], None

  def read(argument: str, config: ml_collections.ConfigDict, label: str, kind: str = "") -> ProbeCell:
    path = os.path.join(folder, f"{argument}{kind}".replace(",", "_").replace(" ", "_"))
    return _read_cell(f"{name}, {label}", config, probe["learning_rates"], dataset, seeds, path)

  def load(argument: str, **model: Any) -> ml_collections.ConfigDict:
    config = configs.load_config(f"{spec}:{argument}")
    config.model.overrides.update(model)
    configs.override(config, overrides)
    config.optimizer.learning_rate = probe["learning_rates"][0]
    configs.check(config)
    return config

  def read_ablations(model: int) -> dict[str, ProbeCell]:
    argument, label = arguments[model], labels[arguments[model]]
    found = probe.get("ablations", {}).get(argument, {})
    return {
      f"{label}, {kind}": read(argument, load(argument, **values), f"{label}, {kind}", f"_{kind}")
      for kind, values in found.items()
    }

  for argument, label in labels.items():
    config = load(argument)
    room, _, dataset = config.dataset.name.partition("/")
    if room != "probes" or dataset not in PROBES:
      raise UserError(
        f"study {name} cannot learn dataset {config.dataset.name!r}; give one of probes/{', '.join(PROBES)}"
      )
    cells.append(read(argument, config, label))
  claims = [(arguments.index(model), arguments.index(baseline)) for model, baseline in probe["claims"]]
  text = (
    f"{config.dataset.name}, {cells[0].total_steps} steps of {config.batch_size} images; learning rate, of "
    f"{', '.join(map(str, probe['learning_rates']))}, by validation; top-1 by {PROBES[dataset].turned_by}, chance "
    f"{100 / len(PROBES[dataset].class_names):.0f}%; "
    + (f"mean and 95% interval over {seeds} seeds." if seeds > 1 else "one seed: no interval.")
  )
  study = ProbeStudy(name, title, text, [*labels.values()], cells, thresholds, dataset, claims, read_ablations)
  study.follow_up()
  return study


def _read_cell(
  name: str, config: ml_collections.ConfigDict, rates: Sequence[float], probe: str, seeds: int, folder: str
) -> ProbeCell:
  """Returns a model with what its runs have left in `folder`."""
  cell, _ = describe_cell(config)
  searches = {}
  for rate in rates:
    tried = with_values(config, config.seed + SEARCH_SEED, learning_rate=rate)
    searches[rate] = Search(f"{name}, learning rate {rate:g}", os.path.join(folder, f"rate_{rate:g}"), tried)
    find_run(searches[rate], cell, {})
  values = vars(cell) | {"has_maps": False}
  cell = ProbeCell(**values, searches=searches, levels=[*PROBES[probe].levels])
  for seed in range(config.seed, config.seed + seeds):
    run = ProbeRun(f"{name}, seed {seed}", os.path.join(folder, f"seed_{seed}"), with_values(config, seed))
    if cell.rate() is not None:
      cell.prepare(run)
    cell.runs.append(run)
  return cell
