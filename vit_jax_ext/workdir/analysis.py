"""What was measured of a run's attention maps: a folder of figures and one JSON file."""

import json
import os
from typing import Any

FOLDER, SIMILARITY = "analysis", "similarity.json"


def read_similarity(folder: str) -> dict[str, Any] | None:
  """Returns what is in such a folder, see `attention.similarity.summarize`; None if there is nothing."""
  path = os.path.join(folder, SIMILARITY)
  if not os.path.exists(path):
    return None
  with open(path) as file:
    return json.load(file)
