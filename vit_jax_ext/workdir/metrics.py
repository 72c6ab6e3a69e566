"""The numbers of a run: metrics.jsonl, one object per line."""

from collections.abc import Mapping
import json
import math
import os
from typing import Any

from absl import logging
import jax

FILE = "metrics.jsonl"


def read_metrics(workdir: str) -> list[dict[str, float]]:
  """Returns the lines of a run's metrics.jsonl, each a step and its values; none if there is no such file.

  Lines that are damaged are left out, and named in the log; half a last line, as a killed run leaves it, is not.
  """
  path = os.path.join(workdir, FILE)
  if not os.path.exists(path):
    return []
  rows = []
  with open(path, encoding="utf-8", errors="replace") as file:
    for number, line in enumerate(file, 1):
      if not line.endswith("\n"):
        break
      try:
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row["step"], int):
          raise ValueError("no step")
        rows.append(row)
      except (ValueError, KeyError, RecursionError):
        logging.warning("%s: line %d is damaged and left out: %s", path, number, repr(line[:60]))
  return rows


class Means:
  """Means of the training metrics over the steps since the last log line; what is not finite does not count.

  Attributes:
    sums: name -> [sum, number of values]; what a checkpoint keeps, so that a run that goes on has the same means.
  """

  def __init__(self, sums: Mapping[str, Any]):
    self.sums = {name: [*pair] for name, pair in sums.items()}
    self._unseen: list[Mapping[str, jax.Array]] = []

  def add(self, measured: Mapping[str, jax.Array]) -> None:
    """Takes the metrics of a step, which may still be running."""
    self._unseen.append(measured)

  def count(self) -> dict[str, Any]:
    """Returns the sums with all that was added; waits for it."""
    unseen, self._unseen = jax.device_get(self._unseen), []
    for measured in unseen:
      for name, value in measured.items():
        pair = self.sums.setdefault(name, [0.0, 0])
        if math.isfinite(value):
          pair[0], pair[1] = pair[0] + float(value), pair[1] + 1
    return self.sums

  def take(self) -> dict[str, float]:
    """Returns the means, and begins anew."""
    sums, self.sums = self.count(), {}
    return {name: total / number if number else math.nan for name, (total, number) in sums.items()}
