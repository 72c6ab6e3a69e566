"""Figures of probes: samples with their answers, and accuracy against difficulty."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from vit_jax_ext.data import probes
from vit_jax_ext.studies import statistics


def samples(name: str, columns: int = 6) -> Figure:
  """Draws images of each level with their answers, the edges of tiles in white; below chains the symbols of ends."""
  probe = probes.PROBES[name]
  symbols = probes.SYMBOLS[-1] if name == "chains" else ()
  rows = len(probe.levels) + (len(symbols) > 0)
  figure = Figure(figsize=(1.75 * columns + 0.6, 1.95 * rows + 0.7), layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False)
  for row, level in zip(grid, probe.levels, strict=False):
    images, labels = probes.generate(name, f"test_{level}", range(columns))
    for axes, image, label in zip(row, images, labels, strict=True):
      _draw(axes, image, probe.class_names[label])
    row[0].set_ylabel(level, fontsize=11)
  for axes, symbol, answer in zip(grid[-1], symbols, probe.class_names, strict=False):
    _draw(axes, np.round(255 * symbol).astype(np.uint8), f"end {answer}")
  for axes in grid[-1, len(symbols) :] if len(symbols) else ():
    axes.axis("off")
  figure.suptitle(probe.title, fontsize=12)
  figure.supylabel(probe.turned_by, fontsize=10)
  return figure


def accuracy_against_difficulty(name: str, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
  """Draws top-1 in percent over the levels, with 95% intervals where there are two seeds, above one image of each.

  Args:
    name: of the probe.
    curves: label -> level -> top-1 of each seed.
  """
  probe = probes.PROBES[name]
  levels = [*probe.levels]
  figure = Figure(figsize=(8, 5.6), layout="constrained")
  grid = figure.add_gridspec(2, len(levels), height_ratios=(3, 1))
  axes, below = figure.add_subplot(grid[0, :]), [figure.add_subplot(grid[1, i]) for i in range(len(levels))]
  for i, (label, values) in enumerate(curves.items()):
    if not all(values.values()):
      continue
    means = [float(np.mean(values[level])) for level in levels]
    ends = [statistics.interval(values[level]) or (mean, mean) for level, mean in zip(levels, means, strict=True)]
    errors = np.abs(np.array(ends).T - means)
    x = np.arange(len(levels)) + 0.06 * (i - (len(curves) - 1) / 2)  # beside each other, so that all are seen
    axes.errorbar(x, means, errors, marker="o", markersize=4, capsize=3, label=label)
  chance = 100 / len(probe.class_names)
  axes.axhline(chance, color="grey", linestyle="--", label="chance")
  axes.set(xticks=range(len(levels)), xticklabels=levels, xlabel=probe.turned_by, ylabel="top-1, %", ylim=(0, 103))
  figure.legend(loc="outside right upper", fontsize=9)
  for place, level in zip(below, levels, strict=True):
    images, labels = probes.generate(name, f"test_{level}", [0])
    _draw(place, images[0], f"{level}: {probe.class_names[labels[0]]}")
  return figure


def _draw(axes: Axes, image: np.ndarray, title: str) -> None:
  axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
  for edge in range(probes.TILE, probes.SIDE, probes.TILE) if image.shape == (probes.SIDE, probes.SIDE, 3) else ():
    axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    axes.axvline(edge - 0.5, color="white", linewidth=1.5)
  axes.set(xticks=[], yticks=[])
  axes.set_title(title, fontsize=9)
