"""report.html: one page that shows a comparison, without network, for laptop and phone, light and dark."""

from collections.abc import Iterable, Mapping, Sequence
import glob
import json
import math
import os
from typing import Any

import jinja2

from vit_jax_ext.compare import charts, cost, results
from vit_jax_ext.compare.charts import Axis, Series
from vit_jax_ext.compare.results import Row, number
from vit_jax_ext.files import data_address, replace, size

FILE = "report.html"
STUDIES = "studies"
LINEAR = 1.02  # growth up to which an architecture counts as linear in the number of pixels

Model = Mapping[str, Any]  # of results["models"]


def write(folder: str) -> str:
  """Writes report.html of what a folder holds, and returns its path.

  That is results.json, and studies/NAME.json, either of which may be missing.

  A study is a JSON object: `title`; `text`, a paragraph; `columns`, headings; `rows`, each a list of texts, numbers,
  [mean, spread] pairs, or null for what is not known. The figures studies/NAME.png and studies/NAME.*.png, if there are
  any, come below.

  Raises:
    UserError: the folder cannot be written.
  """
  comparison = {"machine": {}, "settings": {}, "models": [], "measurements": []}
  path = os.path.join(folder, results.JSON)
  if os.path.exists(path):
    with open(path) as file:
      comparison = json.load(file)
  studies = []
  for path in sorted(glob.glob(os.path.join(folder, STUDIES, "*.json"))):
    with open(path) as file:
      studies.append(json.load(file))
    stem = glob.escape(path.removesuffix(".json"))
    paths = [found for end in (".png", ".*.png") for found in sorted(glob.glob(stem + end))]
    studies[-1]["figures"] = [data_address(found) for found in paths]
  with replace(folder, FILE) as file:
    file.write(render(comparison, studies))
  return os.path.join(folder, FILE)


def render(comparison: Mapping[str, Any], studies: Sequence[Mapping[str, Any]] = ()) -> str:
  """Returns the page."""
  models = comparison["models"]
  table = results.rows(comparison)
  runs = [model for model in models if model["run"]]
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("vit_jax_ext.compare", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
  )
  return environment.get_template("report.html.jinja").render(
    frame={"left": charts.LEFT, "right": charts.WIDTH - charts.RIGHT, "bottom": charts.HEIGHT - charts.BOTTOM,
           "width": charts.WIDTH, "height": charts.HEIGHT, "font": charts.FONT},
    models=models,
    settings=comparison["settings"],
    machine=comparison["machine"],
    findings=findings(models, table),
    columns=results.columns(table),
    table=table,
    setups=len(setups(table)),
    accuracy=list(accuracy_charts(models, table)),
    speed=list(speed_bars(table)),
    resolution=list(resolution_charts(models)),
    linear=[m["label"] for m in models if m.get("growth") and m["growth"] <= LINEAR],
    modules=module_bars(models),
    parts=used_parts(models),
    runs=runs,
    curves=list(training_charts(runs)),
    similarity=list(similarity_charts(runs)),
    figures=[(run["label"], name, data) for run in runs for name, data in run["run"]["figures"].items()],
    studies=studies,
    number=number,
    study_cell=study_cell,
  )  # fmt: skip


def study_cell(cell: Any) -> str:
  """Writes a cell of a study's table (see `write`)."""
  match cell:
    case None:
      return ""
    case str():
      return cell
    case [mean, spread]:
      return mean_and_spread(mean, spread)
  return f"{cell:,}"


def mean_and_spread(mean: float, spread: float) -> str:
  """Writes the spread with two digits, and the mean as precisely."""
  decimals = max(0, 1 - math.floor(math.log10(spread))) if spread else 2
  return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


def css_class(family: str) -> str:
  """Returns the CSS class that stands for a family's colour and marker."""
  return family.lower().replace(" ", "-")


def styled(models: Iterable[Model]) -> list[tuple[Model, dict[str, Any]]]:
  """Returns the models with their colour, and the number of each within its family."""
  seen: dict[str, int] = {}
  pairs = []
  for model in models:
    family = css_class(model["family"])
    pairs.append((model, {"label": model["label"], "family": family, "dash": seen.get(family, 0)}))
    seen[family] = seen.get(family, 0) + 1
  return pairs


def setups(table: Sequence[Row]) -> dict[str, list[Row]]:
  """Returns the rows by batch size and precision."""
  groups: dict[str, list[Row]] = {}
  for row in table:
    groups.setdefault(f"batch {row['batch_size']}, {row['dtype']}", []).append(row)
  return groups


def accuracies(models: Sequence[Model]) -> dict[str, dict[str, float]]:
  """Returns top-1 in percent by label, for each thing that it was measured on; only the like can be compared."""
  groups: dict[str, dict[str, float]] = {}
  for model in models:
    run = model["run"]
    if model["published_top1"] is not None:
      groups.setdefault("published, ImageNet-1k", {})[model["label"]] = model["published_top1"]
    elif run and "eval/top1" in run["scores"]:
      groups.setdefault(f"measured, {run['dataset']}", {})[model["label"]] = 100 * run["scores"]["eval/top1"]
  return groups


def findings(models: Sequence[Model], table: Sequence[Row]) -> list[tuple[str, str, str]]:
  """Returns what stands out, as (question, model, why)."""
  found = []
  several = len(setups(table)) > 1
  for where, top1 in accuracies(models).items():
    best = max(top1, key=top1.get)
    found.append((f"Most accurate ({where})", best, f"{top1[best]:.1f}% top-1"))
  for setup, rows in setups(table).items():
    at = f" ({setup})" if several else ""
    for program, verb in (("forward", "Fastest to run"), ("training", "Fastest to train")):
      timed = [row for row in rows if row[f"{program}_images_per_second"]]
      if len(timed) > 1:
        timed.sort(key=lambda row: -row[f"{program}_images_per_second"])
        fastest, slowest = (row[f"{program}_images_per_second"] for row in (timed[0], timed[-1]))
        why = f"{number(fastest)} images/s, {fastest / slowest:.1f} times as many as {timed[-1]['label']}"
        found.append((f"{verb}{at}", timed[0]["label"], why))
    held = [row for row in rows if row["training_memory"]]
    if len(held) > 1:
      least = min(held, key=lambda row: row["training_memory"])
      found.append((f"Least memory to train{at}", least["label"], size(least["training_memory"])))
    for where, top1 in accuracies(models).items():
      front = undominated({row["label"]: (row["forward_images_per_second"], top1[row["label"]]) for row in rows
                           if row["forward_images_per_second"] and row["label"] in top1})  # fmt: skip
      if len(front) > 1:
        why = f"no other is both faster and more accurate ({where})"
        found.append((f"Worth choosing from{at}", ", ".join(front), why))
  growing = [model for model in models if model.get("growth")]
  if len(growing) > 1:
    least = min(growing, key=lambda model: model["growth"])
    found.append(
      ("Best at large images", least["label"], f"multiply-adds grow as pixels to the power of {least['growth']:.2f}")
    )
  return found


def undominated(points: Mapping[str, tuple[float, float]]) -> list[str]:
  """Returns the names of the points that no other exceeds in both coordinates, by the first one, falling."""
  names = sorted(points, key=lambda name: points[name], reverse=True)
  return [
    name for name in names if not any(all(b > a for a, b in zip(points[name], points[n], strict=True)) for n in names)
  ]


def accuracy_charts(models: Sequence[Model], table: Sequence[Row]) -> Iterable[dict[str, Any]]:
  """Yields top-1 against multiply-adds and against throughput, for each thing that accuracy was measured on."""
  for where, top1 in accuracies(models).items():
    y = Axis(f"top-1, % ({where})")
    styles = {model["label"]: (model, style) for model, style in styled(models) if model["label"] in top1}
    absent = [model["label"] for model in models if model["label"] not in top1 and not model["run"]]
    note = f"No accuracy was published for {', '.join(absent)}." if absent and where.startswith("published") else ""
    series = [Series(**style, points=[(m["multiply_adds"], top1[m["label"]])]) for m, style in styles.values()]
    x = Axis("multiply-adds of one image, G", log=spans_decades(series), text=number_of_giga)
    yield charts.chart("Accuracy against multiply-adds", series, x, y, lines=False, note=note)
    for setup, rows in setups(table).items():
      series = [
        Series(
          **styles[row["label"]][1],
          points=[(row["forward_images_per_second"], top1[row["label"]])],
          spread=[(row["forward_slowest"], row["forward_fastest"])],
        )
        for row in rows
        if row["forward_images_per_second"] and row["label"] in top1
      ]
      if series:
        x = Axis(f"forward pass, images/s ({setup})", log=spans_decades(series))
        yield charts.chart("Accuracy against throughput", series, x, y, lines=False, note=note)


def spans_decades(series: Sequence[Series]) -> bool:
  """Returns whether x differs so much that small values would lie on each other."""
  xs = [x for s in series for x, _ in s.points]
  return max(xs) > 8 * min(xs)


def number_of_giga(value: float) -> str:
  """Writes multiples of 10^9, those below a thousandth in full."""
  return f"{value / 1e9:.3g}"


def speed_bars(table: Sequence[Row]) -> Iterable[dict[str, Any]]:
  """Yields bars of images/s and memory."""
  quantities = (
    ("forward_images_per_second", "Forward pass, images/s", ("forward_slowest", "forward_fastest"), number),
    ("training_images_per_second", "Training, images/s", ("training_slowest", "training_fastest"), number),
    ("training_memory", "Memory of the training step", None, size),
  )
  for setup, rows in setups(table).items():
    for key, title, spread, text in quantities:
      shown = [row for row in rows if row[key]]
      if not shown:
        continue
      longest = max(row[spread[1]] if spread else row[key] for row in shown)
      bars = [
        {
          "label": row["label"],
          "family": css_class(row["family"]),
          "share": row[key] / longest,
          "spread": [row[end] / longest for end in spread] if spread else None,
          "text": text(row[key]),
        }
        for row in shown
      ]
      yield {"title": title, "setup": setup, "bars": bars}


def resolution_charts(models: Sequence[Model]) -> Iterable[dict[str, Any]]:
  """Yields multiply-adds over the number of pixels, in all and per pixel."""
  growing = [(model, style) for model, style in styled(models) if model.get("resolutions")]
  if not growing:
    return
  ticks = {side**2: str(side) for side in cost.RESOLUTIONS if side != 256}  # too near to 224

  def x() -> Axis:
    return Axis("side of the image in pixels, spaced by area", text=lambda area: f"{area**0.5:.0f}", ticks=ticks)

  total, relative = [], []
  for model, style in growing:
    points = [(side**2, adds) for side, adds in model["resolutions"]]
    (area, adds), *_ = points
    total.append(Series(**style, points=points, remark=f"p = {model['growth']:.2f}"))
    relative.append(Series(**style, points=[(a, (n / a) / (adds / area)) for a, n in points]))
  note = "Linear is straight, through the origin. p: multiply-adds grow as pixels to the power of p."
  y = Axis("multiply-adds of one image, G", low=0, text=number_of_giga)
  yield charts.chart("Cost of larger images", total, x(), y, lines=True, note=note)
  y = Axis("multiply-adds per pixel, at the smallest size 1")
  yield charts.chart("Cost per pixel", relative, x(), y, lines=True, level=1, note="Linear is flat.")


def used_parts(models: Sequence[Model]) -> list[tuple[int, str]]:
  """Returns (number, name) of the parts that the models have, those with the most multiply-adds in all first."""
  totals = {part: sum(model["modules"].get(part, 0) for model in models) for part in cost.PARTS}
  return sorted(((i, part) for i, part in enumerate(totals) if totals[part]), key=lambda pair: -totals[pair[1]])


def module_bars(models: Sequence[Model]) -> list[dict[str, Any]]:
  """Returns stacked bars of multiply-adds by part of the model."""
  longest = max((model["multiply_adds"] for model in models), default=1)
  bars = []
  for model in models:
    adds = [(i, part, model["modules"][part]) for i, part in used_parts(models) if part in model["modules"]]
    parts = [{"number": i, "name": part, "share": n / longest, "adds": n} for i, part, n in adds]
    bars.append({"label": model["label"], "total": model["multiply_adds"], "parts": parts})
  return bars


def training_charts(runs: Sequence[Model]) -> Iterable[dict[str, Any]]:
  """Yields loss, accuracy and calibration over the training steps, for each dataset."""
  quantities = (
    ("train/loss", "Training loss", "loss", 1),
    ("eval/top1", "Top-1 during training", "top-1, %", 100),
    ("eval/map", "Mean average precision during training", "mean average precision, %", 100),
    ("eval/ece", "Calibration error during training", "expected calibration error, %", 100),
  )
  for dataset in dict.fromkeys(run["run"]["dataset"] for run in runs):
    for curve, title, label, scale in quantities:
      series = []
      for run, style in styled(runs):
        points = run["run"]["curves"].get(curve)
        if points and run["run"]["dataset"] == dataset:
          series.append(Series(**style, points=[(step, scale * value) for step, value in points]))
      if series:
        y = Axis(label)
        yield charts.chart(f"{title}, {dataset}", series, Axis("step"), y, lines=True)


def similarity_charts(runs: Sequence[Model]) -> Iterable[dict[str, Any]]:
  """Yields how alike the attention maps of neighbouring blocks are (the DeepViT paper's section 3)."""
  series, threshold = [], None
  for run, style in styled(runs):
    similarity = run["run"]["similarity"]
    if similarity and similarity["similarity"].get("1"):
      threshold = similarity["threshold"]
      remark = f"{similarity['similar_blocks']} of {similarity['blocks']} similar"
      series.append(Series(**style, points=list(enumerate(similarity["similarity"]["1"], 1)), remark=remark))
  if series:
    y = Axis("mean cosine similarity", low=0, high=1)
    note = f"The line is at {threshold}, from which blocks count as similar."
    yield charts.chart("Each block beside the next", series, Axis("block"), y, lines=True, level=threshold, note=note)
