"""Scores of images that have several labels: mean average precision, and a threshold for each class. On the host."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from vit_jax_ext.training.train_step import Batch, Metrics
from vit_jax_ext.training.weights import DEFAULT_THRESHOLD


@dataclasses.dataclass(frozen=True)
class Ranking:
  """What a model says of a split's images, and what is so.

  Attributes:
    logits: (images, classes), float32; NaN is taken for the least.
    labels: (images, classes), bool.
    loss: mean binary cross-entropy.
  """

  logits: np.ndarray
  labels: np.ndarray
  loss: float

  def average_precisions(self) -> np.ndarray:
    """Returns the average precision of each class (classes,), float64; NaN where no image has it."""
    import sklearn.metrics  # slow to import, and other runs do without

    found = np.full(self.labels.shape[1], np.nan)
    for i in np.flatnonzero(self.labels.any(axis=0)):
      found[i] = sklearn.metrics.average_precision_score(self.labels[:, i], self.logits[:, i])
    return found

  def scores(self) -> dict[str, float]:
    """Returns loss, and map: the mean average precision of the classes that an image has."""
    found = self.average_precisions()
    return {"loss": self.loss, "map": float(np.mean(found[~np.isnan(found)])) if self.labels.any() else np.nan}

  def best_thresholds(self) -> list[float]:
    """Returns for each class the probability from which the label gives the largest F1; `DEFAULT_THRESHOLD` of none.

    It lies halfway between the logits that it parts, so that the last bits of a probability do not decide.
    """
    import sklearn.metrics

    found = []
    for logits, labels in zip(self.logits.T, self.labels.T, strict=True):
      if not labels.any():
        found.append(DEFAULT_THRESHOLD)
        continue
      precision, recall, thresholds = sklearn.metrics.precision_recall_curve(labels, logits)
      best = np.argmax(precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-12))
      found.append(_sigmoid(np.mean(thresholds[max(0, best - 1) : best + 1], dtype=np.float64)))
    return found

  def describe_classes(self, class_names: Sequence[str], thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """Returns name, images, average_precision (None of no image), threshold, precision, recall and f1 of each class."""
    predicted = _sigmoid(self.logits.astype(np.float64)) >= np.asarray(thresholds)
    rows = zip(class_names, self.average_precisions(), thresholds, self.labels.T, predicted.T, strict=True)
    described = []
    for name, average, threshold, labels, chosen in rows:
      hits, images, named = (int(np.sum(x)) for x in (labels & chosen, labels, chosen))
      described.append({
        "name": name, "images": images, "average_precision": None if np.isnan(average) else float(average),
        "threshold": float(threshold), "precision": hits / max(1, named), "recall": hits / max(1, images),
        "f1": 2 * hits / max(1, images + named),
      })  # fmt: skip
    return described


def evaluate(
  eval_step: Callable[[Any, Any, Batch], Metrics], params: Any, stats: Any, batches: Iterable[Batch]
) -> Ranking:
  """Returns the ranking of all images of `batches`, as every process gets it.

  Args:
    eval_step: the jitted `make_multi_label_eval_step`, whose results all processes have.
    params, stats: the weights.
    batches: global batches.
  """
  parts = jax.device_get([eval_step(params, stats, batch) for batch in batches])
  logits, labels, loss = (
    np.concatenate([part[name][part["mask"]] for part in parts]) for name in ("logits", "label", "loss")
  )
  least = np.finfo(logits.dtype).min
  return Ranking(np.nan_to_num(logits, nan=least), labels, float(np.mean(loss, dtype=np.float64)))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
  with np.errstate(over="ignore"):
    return 1 / (1 + np.exp(-logits))
