"""The numbers of a run: metrics.jsonl, one object per line."""

import json
import os

FILE = "metrics.jsonl"


def read_metrics(workdir: str) -> list[dict[str, float]]:
  """Returns the lines of a run's metrics.jsonl, each a step and its values; none if there is no such file."""
  path = os.path.join(workdir, FILE)
  if not os.path.exists(path):
    return []
  with open(path) as file:
    return [json.loads(line) for line in file if line.endswith("\n")]  # a killed run may leave half a line
