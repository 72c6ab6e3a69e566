"""What a training run has left in its workdir: accuracy, calibration, curves, and figures that `analyze` drew."""

import os
from typing import Any

from vit_jax_ext.errors import UserError
from vit_jax_ext.files import data_address
from vit_jax_ext.workdir import analysis, checkpoint
from vit_jax_ext.workdir.config import read_workdir_config
from vit_jax_ext.workdir.metrics import read_metrics

CURVES = ("train/loss", "eval/loss", "eval/top1", "eval_ema/top1", "eval/map", "eval_ema/map", "eval/ece")
POINTS = 200  # of a curve, at most
FIGURES = ("attention_maps.png", "clusters.png")
FIGURE_BYTES = 400_000  # of a figure, at most


def read_run(workdir: str) -> dict[str, Any]:
  """Returns what a run was and gave; loads the weights for their number of classes, but does not evaluate.

  Returns:
    workdir, model ({"name", "overrides"}), dataset, seed, batch_size, num_classes; step, of the best checkpoint;
    scores, of that step, by their names in metrics.jsonl; curves, [[step, value], ...] by name; similarity, what
    `analyze` has written, or None; figures, PNG files as data addresses by file name.

  Raises:
    UserError: the folder holds no run, or no complete checkpoint.
  """
  config = read_workdir_config(workdir)
  saved = checkpoint.read_weights(workdir)
  if saved is None:
    raise UserError(f"workdir {workdir} holds no complete checkpoint; train there first")
  step, _, arrays = saved
  rows = read_metrics(workdir)
  return {
    "workdir": workdir,
    "model": config.model.to_dict(),
    "dataset": config.dataset.name,
    "seed": config.seed,
    "batch_size": config.batch_size,
    "num_classes": next(len(a) for path, a in arrays.items() if path[0] == "head" and path[-1] == "bias"),
    "step": step,
    "scores": {key: value for row in rows if row["step"] == step for key, value in row.items() if "eval" in key},
    "curves": {name: _thin([[row["step"], row[name]] for row in rows if name in row]) for name in CURVES},
    **_read_analysis(workdir),
  }


def _thin(points: list) -> list:
  """Leaves out points evenly, not the last."""
  stride = -(-len(points) // POINTS)
  return points[::-1][::stride][::-1] if points else points


def _read_analysis(workdir: str) -> dict[str, Any]:
  """Reads the folder that `analyze` wrote for this run alone, or for it among several in the folder above."""
  parent, name = os.path.split(os.path.abspath(workdir))
  similarity, figures = None, {}
  for folder in (os.path.join(workdir, analysis.FOLDER), os.path.join(parent, analysis.FOLDER, name)):
    similarity = similarity or analysis.read_similarity(folder)
    for figure in FIGURES:
      path = os.path.join(folder, figure)
      if figure not in figures and os.path.exists(path) and os.path.getsize(path) <= FIGURE_BYTES:
        figures[figure] = data_address(path)
  return {"similarity": similarity, "figures": figures}
