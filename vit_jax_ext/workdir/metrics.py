"""The numbers of a run: metrics.jsonl, one object per line."""

import json
import os

from absl import logging

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
