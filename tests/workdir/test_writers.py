"""metrics.jsonl: written by a run that goes on, read by whoever looks at it."""

import numpy as np

from vit_jax_ext.workdir.metrics import read_metrics
from vit_jax_ext.workdir.writers import JsonlWriter


def test_metrics_after_the_last_checkpoint_are_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 2, "a": 1}\n{"step": 4, "a": 2}\n{"step": 6, "a"')
  writer = JsonlWriter(str(tmp_path), first_step=3)
  writer.write_scalars(4, {"a": np.float32(3)})
  writer.close()
  assert read_metrics(tmp_path) == [{"step": 2, "a": 1}, {"step": 4, "a": 3.0}]
