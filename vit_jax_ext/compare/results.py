"""The files of a comparison: results.json holds everything; results.csv and results.md its table, for people."""

from collections.abc import Callable, Mapping, Sequence
import csv
import dataclasses
import datetime
import importlib.metadata
import os
import platform
from typing import Any

import humanize
import jax

from vit_jax_ext.files import replace, size, write_json

FILES = JSON, CSV, MARKDOWN = "results.json", "results.csv", "results.md"
Row = Mapping[str, Any]


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the table: for each measurement what is known of its model and what was measured.

  Units: bytes, seconds, images/s, published_top1 in percent, scores of runs as shares.
  """
  models = {model["label"]: model for model in results["models"]}
  table = []
  for measurement in results["measurements"]:
    model = models[measurement["label"]]
    run = model["run"] or {}
    scores = run.get("scores", {})
    row = {
      "label": model["label"],
      "model": model["model"]["name"],
      "family": model["family"],
      "image_size": "x".join(map(str, dict.fromkeys(model["image_size"]))),
      "batch_size": measurement["batch_size"],
      "dtype": measurement["dtype"],
    }
    keys = ("params", "published_params", "multiply_adds", "published_multiply_adds", "deviation", "published_top1")
    row |= {key: model[key] for key in keys}
    row["growth"] = model.get("growth")
    row["compiled_multiply_adds"] = measurement.get("compiled_multiply_adds")
    for program in ("forward", "training"):
      rates = measurement.get(f"{program}_rates", ())
      row |= {f"{program}_{key}": measurement.get(f"{program}_{key}") for key in (
        "images_per_second", "memory", "activations", "compile_seconds")}  # fmt: skip
      row |= {f"{program}_slowest": min(rates, default=None), f"{program}_fastest": max(rates, default=None)}
    seconds = [row[f"{program}_compile_seconds"] for program in ("forward", "training")]
    row["compile_seconds"] = None if None in seconds else sum(seconds)
    row |= {key: run.get(key) for key in ("workdir", "dataset", "step")}
    keys = ("eval/top1", "eval/map", "eval/ece", "eval_ema/top1", "eval_ema/map", "eval_ema/ece")
    row |= {key.replace("/", "_"): scores.get(key) for key in keys}
    table.append(row | {"note": measurement.get("note")})
  return table


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of the table as people see it.

  Attributes:
    key: of the row's value, by which the table is sorted.
    heading: with the unit.
    text: of a row, where the value is there.
    meaning: in a sentence.
  """

  key: str
  heading: str
  text: Callable[[Row], str]
  meaning: str

  def __call__(self, row: Row) -> str:
    return "" if row[self.key] is None else self.text(row)


def number(value: float) -> str:
  """Writes three significant digits, of whole numbers all."""
  return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _rate(program: str) -> Callable[[Row], str]:
  def text(row: Row) -> str:
    median, slowest, fastest = (row[f"{program}_{key}"] for key in ("images_per_second", "slowest", "fastest"))
    return f"{number(median)} ({number(slowest)} to {number(fastest)})"

  return text


def _percent(key: str) -> Callable[[Row], str]:
  return lambda row: f"{100 * row[key]:.2f}"


def _metric(key: str) -> Callable[[Row], str]:
  return lambda row: humanize.metric(row[key])


def _size(key: str) -> Callable[[Row], str]:
  return lambda row: size(row[key])


COLUMNS = (
  Column("label", "model", lambda row: row["label"], "Registered name, or folder of the run."),
  Column("batch_size", "batch", lambda row: str(row["batch_size"]), "Images at once."),
  Column("dtype", "precision", lambda row: row["dtype"], "Of the computation; parameters are float32."),
  Column("image_size", "pixels", lambda row: row["image_size"], "Side of the images."),
  Column("published_top1", "accuracy, %", lambda row: f"{row['published_top1']:.1f}", "Published, on ImageNet-1k."),
  Column("eval_top1", "measured, %", _percent("eval_top1"), "Top-1 of the run's best checkpoint on its own dataset."),
  Column("eval_map", "mAP, %", _percent("eval_map"), "Mean average precision, where images have several labels."),
  Column("params", "params, M", lambda row: f"{row['params'] / 1e6:.2f}", "Parameters, counted."),
  Column("multiply_adds", "multiply-adds", _metric("multiply_adds"),
         "Of one image, counted from matrix products and convolutions, as the papers do."),
  Column("published_multiply_adds", "published, G", lambda row: _published(row), "Multiply-adds in the paper."),
  Column("compiled_multiply_adds", "compiled", _metric("compiled_multiply_adds"),
         "Half of the operations that XLA counts in the compiled program, elementwise ones included."),
  Column("growth", "growth", lambda row: f"{row['growth']:.2f}",
         "The p in multiply-adds ~ pixels ** p, from 224 to 512 pixels a side; 1 is linear."),
  Column("forward_images_per_second", "forward, images/s", _rate("forward"), "Median, slowest and fastest round."),
  Column("training_images_per_second", "training, images/s", _rate("training"), "Median, slowest and fastest round."),
  Column("forward_memory", "forward, memory", _size("forward_memory"), "Peak memory of the compiled forward pass."),
  Column("training_memory", "training, memory", _size("training_memory"), "Peak memory of the compiled training step."),
  Column("training_activations", "activations", _size("training_activations"),
         "Of the peak in training, what is neither parameter, nor moment, nor image."),
  Column("compile_seconds", "compile, s", lambda row: f"{row['compile_seconds']:.0f}", "To trace and compile both."),
  Column("note", "note", lambda row: row["note"], "Why something is missing."),
)  # fmt: skip


def _published(row: Row) -> str:
  text = f"{row['published_multiply_adds']:.1f}"
  return f"{text} ({row['deviation']})" if row["deviation"] else text


def columns(table: Sequence[Row]) -> list[Column]:
  """Returns the columns in which a table has anything; batch and precision only where they differ."""

  def tells(column: Column) -> bool:
    values = {row[column.key] for row in table} - {None}
    return len(values) > (1 if column.key in ("batch_size", "dtype") else 0)

  return [column for column in COLUMNS if tells(column)]


def describe_machine() -> dict[str, str]:
  """Returns what a measurement depends on: processor, device, versions, flags; and the date."""
  packages = ("jax", "jaxlib", "flax", "numpy")
  versions = [
    f"Python {platform.python_version()}",
    *(f"{name} {importlib.metadata.version(name)}" for name in packages),
  ]
  device = jax.local_devices()[0]
  return {
    "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    "processor": f"{_processor()}, {os.cpu_count()} cores",
    "device": " ".join(dict.fromkeys((device.platform, device.device_kind))),
    "system": platform.platform(),
    "versions": ", ".join(versions),
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").strip() or "none",
  }


def _processor() -> str:
  """Returns the processor's name, where the system tells it."""
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as file:
      for line in file:
        if line.startswith("model name"):
          return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def write_csv(folder: str, name: str, table: Sequence[Row]) -> None:
  """Writes rows of the same keys."""
  with replace(folder, name) as file:
    writer = csv.DictWriter(file, table[0])
    writer.writeheader()
    writer.writerows(table)


def write(results: Mapping[str, Any], folder: str) -> None:
  """Writes results.json, results.csv and results.md."""
  write_json(folder, JSON, results)
  table = rows(results)
  write_csv(folder, CSV, table)
  shown = columns(table)
  with replace(folder, MARKDOWN) as file:
    for cells in ([c.heading for c in shown], ["---"] * len(shown), *([c(row) for c in shown] for row in table)):
      file.write(f"| {' | '.join(cells)} |\n")
    file.write("\n" + "".join(f"- {c.heading}: {c.meaning}\n" for c in shown))
    file.write("\n" + "".join(f"- {key}: {value}\n" for key, value in results["machine"].items()))
