"""The DeepViT paper's figures, drawn from what `measure.measure` returns."""

from collections.abc import Mapping, Sequence
import math
import os
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
import numpy as np

from vit_jax_ext.files import replace

Summary = Mapping[str, Any]  # see similarity.summarize; besides `model`, the name of its class


def _name(summary: Summary) -> str:
  return f"{summary['model']}, {summary['blocks']} blocks"


def similarity_against_depth(summary: Summary) -> Figure:
  """Figure 3a: how alike block p and its k-th neighbour are, over p: share above the threshold, and the mean."""
  figure = Figure(figsize=(11, 4), layout="constrained")
  left, right = figure.subplots(1, 2, sharex=True)
  for k, ratios in summary["ratio"].items():
    left.plot(range(1, len(ratios) + 1), ratios, marker="o", markersize=3)
    means = summary["similarity"][k]
    right.plot(range(1, len(means) + 1), means, marker="o", markersize=3, label=f"block p + {k}")
  right.axhline(summary["threshold"], color="grey", linestyle="--", label=f"threshold {summary['threshold']}")
  left.set(title="Share of attention vectors that are alike", xlabel="block p", ylim=(-0.02, 1.02),
           ylabel=f"share with cosine similarity ≥ {summary['threshold']}")  # fmt: skip
  left.xaxis.set_major_locator(MaxNLocator(integer=True))
  left.yaxis.set_major_formatter(PercentFormatter(1))
  lowest = min(0, *(min(means) for means in summary["similarity"].values())) if summary["similarity"] else 0
  right.set(title="Mean similarity", xlabel="block p", ylabel="cosine similarity", ylim=(lowest - 0.02, 1.02))
  figure.legend(title="block p compared with", loc="outside right upper")
  figure.suptitle(
    f"Attention maps of {_name(summary)}: {summary['similar_blocks']} are similar to the next one "
    f"(mean ≥ {summary['threshold']})"
  )
  return figure


def similar_blocks_against_depth(summaries: Sequence[Summary]) -> Figure:
  """Figure 3b: share of similar blocks over the number of blocks, a line per class of model."""
  figure = Figure(figsize=(7.5, 4), layout="constrained")
  axes = figure.subplots()
  for model in dict.fromkeys(summary["model"] for summary in summaries):
    points = sorted((s["blocks"], s["similar_blocks"] / s["blocks"]) for s in summaries if s["model"] == model)
    axes.plot(*zip(*points, strict=True), marker="o", label=model)
  axes.set(title="Blocks that attend as the next one does\n"
           f"(mean cosine similarity of their attention maps ≥ {summaries[0]['threshold']})",
           xlabel="blocks of the model", ylabel="share of similar blocks", ylim=(-0.02, 1.02),
           xticks=sorted({s["blocks"] for s in summaries}))  # fmt: skip
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  figure.legend(loc="outside right upper")
  return figure


def heads_of_last_block(summary: Summary) -> Figure:
  """Figure 3c: cosine similarity between the heads of the last block, a heat map."""
  figure = Figure(figsize=(5.5, 4.5), layout="constrained")
  axes = figure.subplots()
  ticks = range(summary["heads"])
  image = axes.imshow(summary["head_similarity"][-1], vmin=-1, vmax=1, cmap="RdBu_r")
  figure.colorbar(image, label="mean cosine similarity of attention maps")
  axes.set(xlabel="head", ylabel="head", xticks=ticks, yticks=ticks, xticklabels=[i + 1 for i in ticks],
           yticklabels=[i + 1 for i in ticks],
           title=f"Heads of the last block of {_name(summary)}\n{summary['head_ratio'][-1]:.0%} of the pairs' "
           f"attention vectors reach {summary['head_threshold']}")  # fmt: skip
  return figure


def attention_maps(summary: Summary, maps: np.ndarray) -> Figure:
  """Draws a heat map per block of (L, T, T) maps averaged over heads and images, each in its own range of colours."""
  columns = min(8, len(maps))
  rows = math.ceil(len(maps) / columns)
  figure = Figure(figsize=(1.5 * columns + 0.5, 1.7 * rows + 0.8), layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False)
  for i, axes in enumerate(grid.flat):
    axes.set(xticks=[], yticks=[])
    if i >= len(maps):
      axes.axis("off")
      continue
    low, high = np.min(maps[i]), np.max(maps[i])
    image = axes.imshow(maps[i], vmin=low, vmax=high, cmap="viridis")
    axes.set_title(f"block {i + 1}\n{low:.2g} to {high:.2g}", fontsize=7)
  colorbar = figure.colorbar(image, ax=grid, ticks=[low, high], shrink=0.6)
  colorbar.ax.set_yticklabels(["lowest of\nthe block", "highest of\nthe block"], fontsize=7)
  figure.suptitle(f"Attention of {_name(summary)}, mean of {summary['heads']} heads and {summary['images']} images")
  figure.supxlabel("key token (class token first, the patches last, row by row)", fontsize=8)
  figure.supylabel("query token", fontsize=8)
  return figure


def save(folder: str, name: str, figure: Figure) -> str:
  """Writes a figure into a folder and returns its path.

  Raises:
    UserError: the folder cannot be written.
  """
  with replace(folder, name, binary=True) as file:
    figure.savefig(file, dpi=150, format="png")
  return os.path.join(folder, name)
