"""The DeepViT paper's figures, drawn from what `similarity.measure_similarity` returns. Needs matplotlib."""

from collections.abc import Mapping
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
import numpy as np

Summary = Mapping[str, Any]  # see similarity.summarize


def save_similarity_against_depth(summary: Summary, path: Path) -> None:
  """Figure 3a: share of vectors alike in block p and its k-th neighbour, and their mean similarity, over p."""
  figure = Figure(figsize=(10, 4), layout="constrained")
  left, right = figure.subplots(1, 2, sharex=True)
  for k, ratios in summary["ratio"].items():
    left.plot(range(1, len(ratios) + 1), ratios, marker="o", label=f"block p + {k}")
    means = summary["similarity"][k]
    right.plot(range(1, len(means) + 1), means, marker="o", label=f"block p + {k}")
  right.axhline(summary["threshold"], color="grey", linestyle="--", label=f"threshold {summary['threshold']}")
  left.set(xlabel="block p", ylabel=f"share of vectors with similarity of at least {summary['threshold']}", ylim=(0, 1))
  right.set(xlabel="block p", ylabel="mean cosine similarity of attention maps", ylim=(None, 1.02))
  right.legend(title="compared with")
  figure.suptitle(f"{summary['similar_blocks']} of {summary['blocks']} blocks are similar to the next one")
  figure.savefig(path, dpi=150)


def save_similar_blocks_against_depth(summaries: Mapping[str, Summary], path: Path) -> None:
  """Figure 3b: share of similar blocks over depth, a line per family, e.g. {"ViT 12": ..., "DeepViT 12": ...}.

  The family is the label up to its last space.
  """
  figure = Figure(figsize=(6, 4), layout="constrained")
  axes = figure.subplots()
  families: dict[str, list[tuple[int, float]]] = {}
  for label, summary in summaries.items():
    point = (summary["blocks"], summary["similar_blocks"] / summary["blocks"])
    families.setdefault(label.rpartition(" ")[0] or label, []).append(point)
  for family, points in families.items():
    axes.plot(*zip(*sorted(points), strict=True), marker="o", label=family)
  axes.set(xlabel="blocks of the model", ylabel="share of blocks similar to the next one", ylim=(-0.02, 1.02))
  axes.legend()
  figure.savefig(path, dpi=150)


def save_head_similarity(summary: Summary, path: Path) -> None:
  """Figure 3c: cosine similarity between the heads of the last block, a heat map."""
  figure = Figure(figsize=(5, 4), layout="constrained")
  axes = figure.subplots()
  image = axes.imshow(summary["head_similarity"][-1], vmin=0, vmax=1, cmap="Blues")
  figure.colorbar(image, label="mean cosine similarity")
  ratio = summary["head_ratio"][-1]
  axes.set(
    xlabel="head", ylabel="head", title=f"block {summary['blocks']}: {ratio:.0%} at {summary['head_threshold']}+"
  )
  figure.savefig(path, dpi=150)


def save_attention_maps(maps: np.ndarray, path: Path) -> None:
  """Draws a heat map per block of (L, T, T) maps, averaged over heads and images; each is scaled to its own maximum."""
  columns = min(8, len(maps))
  rows = math.ceil(len(maps) / columns)
  figure = Figure(figsize=(1.6 * columns, 1.8 * rows), layout="constrained")
  for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
    axes.axis("off")
    if i < len(maps):
      axes.imshow(maps[i], vmin=0, vmax=maps[i].max(), cmap="Blues")
      axes.set_title(f"block {i + 1}", fontsize=8)
  figure.suptitle("mean attention: queries down, keys across, class token first")
  figure.savefig(path, dpi=150)
