"""A comparison: what models cost and how fast they are, beside what was published and what runs have reached."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import statistics
from typing import Any

from absl import logging
import jax

from vit_jax_ext.compare import cost, report, results
from vit_jax_ext.compare.benchmark import PROGRAMS, Benchmark, OutOfMemoryError
from vit_jax_ext.compare.runs import read_run
from vit_jax_ext.console import Countdown
from vit_jax_ext.models import registry

# First guesses, on two CPU cores, of seconds per operation of a forward pass that is traced, and compiled, and per
# multiply-add that is computed: for the time left until something was measured.
SECONDS = {"trace": 1e-3, "compile": 2e-3, "time": 2e-11}
WORK = {"forward": 1, "training": 3}  # of the programs, relative to each other
FAMILIES = {"VisionTransformer": "ViT", "BoatSwin": "BOAT-Swin", "BoatCSWin": "BOAT-CSWin"}


@dataclasses.dataclass
class _Trial:
  """A model at one batch size and precision: what is known of it, its programs that work, and their timings."""

  model: dict[str, Any]
  benchmark: Benchmark
  measurement: dict[str, Any]
  programs: list[str] = dataclasses.field(default_factory=lambda: list(PROGRAMS))

  def __str__(self) -> str:
    return "{label}, batch {batch_size}, {dtype}".format(**self.measurement)

  def compiling(self, program: str) -> float:
    """How much work it is, in the unit of SECONDS."""
    return self.model["operations"] * WORK[program]

  def timing(self, program: str) -> float:
    """How much work one round is, in the unit of SECONDS."""
    return self.model["multiply_adds"] * self.benchmark.batch_size * 2 * WORK[program]

  @contextlib.contextmanager
  def attempt(self, program: str) -> Iterator[None]:
    """Lets the others go on where a program does not fit in memory, or fails in XLA."""
    try:
      yield
    except (OutOfMemoryError, jax.errors.JaxRuntimeError) as error:
      exhausted = isinstance(error, OutOfMemoryError) or "RESOURCE_EXHAUSTED" in str(error)
      why = f"{'does not fit in memory' if exhausted else 'failed'}, {' '.join(str(error).split())[:200]}"
      self.measurement["note"] = "; ".join(filter(None, (self.measurement.get("note"), f"{program} {why}")))
      self.programs.remove(program)
      logging.warning("%s: %s is left out, it %s", self, program, why)


def compare(
  models: Sequence[str] | None,
  workdirs: Sequence[str],
  output: str,
  *,
  batch_sizes: Sequence[int] = (8,),
  dtypes: Sequence[str] = ("float32",),
  rounds: int = 5,
) -> dict[str, Any]:
  """Compiles and times models, and writes results.json, results.csv, results.md and report.html.

  All are compiled first, beginning with the quickest to compile; then come rounds in which each is timed once, so that
  what else the machine does hits all alike. The files are written anew after every step: a comparison that is stopped
  leaves what it has found.

  Args:
    models: registered names, as they were published; None for none if there are runs, else for all.
    workdirs: runs, whose models are compared too, with what they have learned.
    output: folder.
    batch_sizes, dtypes: each model is timed at all of them.
    rounds: of timings; the median counts.

  Returns:
    What results.json holds: machine, settings, models, measurements. A measurement that did not fit in memory, or
    failed in XLA, has a `note`.

  Raises:
    UserError: an unknown model or dtype, a workdir without a run, an unwritable folder.
  """
  batch_sizes, dtypes = list(dict.fromkeys(batch_sizes)), list(dict.fromkeys(dtypes))
  models = models or ([] if workdirs else registry.list_models())
  for name in models:
    registry.get_variant(name)
  runs = {label: read_run(workdir) for label, workdir in _labels(workdirs, models).items()}
  described = [_describe(name, {"name": name, "overrides": {}}, 1000) for name in dict.fromkeys(models)]
  described += [_describe(label, run["model"], run["num_classes"], run) for label, run in runs.items()]
  trials = []
  for model in described:
    for batch_size in batch_sizes:
      for dtype in dtypes:
        benchmark = Benchmark(model["model"], model["num_classes"], batch_size, dtype)
        trials.append(_Trial(model, benchmark, {"label": model["label"], "batch_size": batch_size, "dtype": dtype}))
  comparison = {
    "machine": results.describe_machine(),
    "settings": {"batch_sizes": batch_sizes, "dtypes": dtypes, "rounds": rounds, "finished": 0},
    "models": described,
    "measurements": [trial.measurement for trial in trials],
  }

  def save() -> None:
    results.write(comparison, output)
    report.write(output)

  save()
  published = [model for model in described if not model["run"]]
  work = {
    "trace": sum(model["operations"] for model in published),
    "compile": sum(trial.compiling(program) for trial in trials for program in PROGRAMS),
    "time": rounds * sum(trial.timing(program) for trial in trials for program in PROGRAMS),
  }
  with Countdown({kind: (amount, SECONDS[kind]) for kind, amount in work.items()}) as countdown:
    for model in published:
      with countdown.job("trace", model["operations"], f"cost against resolution: {model['label']}"):
        model["resolutions"] = cost.resolution_costs(model["label"])
        model["growth"] = cost.growth(model["resolutions"])
    _compile(trials, rounds, countdown, save)
    for i in range(rounds):
      _time(trials, i, rounds, countdown)
      comparison["settings"]["finished"] = i + 1
      save()
  return comparison


def _labels(workdirs: Sequence[str], models: Sequence[str]) -> dict[str, str]:
  """Returns the workdirs by their names, or where these are not unique by their paths."""
  paths = dict.fromkeys(os.path.abspath(workdir) for workdir in workdirs)
  names = [os.path.basename(path) for path in paths]
  unique = len({*names, *models}) == len(names) + len(set(models))
  return dict(zip(names if unique else paths, paths, strict=True))


def _describe(
  label: str, spec: Mapping[str, Any], num_classes: int, run: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Returns what is known of a model before it is compiled."""
  logging.info("counting the multiply-adds of %s", label)
  variant = registry.get_variant(spec["name"])
  model = registry.abstract_model(spec, num_classes)
  forward = cost.trace_forward(model)
  modules = cost.module_costs(forward)
  adds = sum(modules.values())
  published = variant if run is None else None  # a run's model may be of any size
  return {
    "label": label,
    "model": dict(spec),
    "family": FAMILIES.get(variant.model.__name__, variant.model.__name__),
    "num_classes": num_classes,
    "image_size": model.image_size,
    "params": cost.count_params(model),
    "published_params": published and published.params,
    "multiply_adds": adds,
    "published_multiply_adds": published and published.multiply_adds,
    "deviation": published and cost.deviation(adds, published.multiply_adds),
    "published_top1": published and published.top1,
    "modules": modules,
    "operations": cost.count_operations(forward.jaxpr),
    "run": run,
  }


def _compile(trials: Sequence[_Trial], rounds: int, countdown: Countdown, save: Callable[[], None]) -> None:
  for trial in sorted(trials, key=lambda trial: trial.model["operations"]):
    for program in PROGRAMS:
      with countdown.job("compile", trial.compiling(program), f"compiling {trial}, {program}"), trial.attempt(program):
        trial.benchmark.compile(program)
      if program not in trial.programs:
        countdown.skip("time", trial.timing(program) * rounds)
    trial.measurement |= trial.benchmark.facts
    save()


def _time(trials: Sequence[_Trial], i: int, rounds: int, countdown: Countdown) -> None:
  """Round `i`."""
  for trial in trials:
    for program in tuple(trial.programs):
      what = f"round {i + 1} of {rounds}: {trial}, {program}"
      with countdown.job("time", trial.timing(program), what), trial.attempt(program):
        rates = trial.measurement.setdefault(f"{program}_rates", [])
        rates.append(trial.benchmark.images_per_second(program))
        trial.measurement[f"{program}_images_per_second"] = statistics.median(rates)
      if program not in trial.programs:
        countdown.skip("time", trial.timing(program) * (rounds - i - 1))
