"""metrics.jsonl: written by a run that goes on, read by whoever looks at it."""

import numpy as np
import pytest

from vit_jax_ext.workdir.metrics import read_metrics
from vit_jax_ext.workdir.writers import JsonlWriter


def test_metrics_after_the_last_checkpoint_are_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 2, "a": 1}\n{"step": 4, "a": 2}\n{"step": 6, "a"')
  writer = JsonlWriter(str(tmp_path), first_step=3)
  writer.write_scalars(4, {"a": np.float32(3)})
  writer.close()
  assert read_metrics(tmp_path) == [{"step": 2, "a": 1}, {"step": 4, "a": 3.0}]


@pytest.mark.parametrize(
  "bad", ["{", "[]", "3", "null", '{"a": 1}', '{"step": "x"}', "\x00\x00", "[" * 5000, '{"step": 4,, "a": 2}']
)
def test_a_damaged_line_is_left_out_and_named(bad, tmp_path, caplog):
  good = '{"step": 2, "a": 1}\n', '{"step": 6, "a": 3}\n'
  (tmp_path / "metrics.jsonl").write_text(f"{good[0]}{bad}\n{good[1]}")
  assert read_metrics(tmp_path) == [{"step": 2, "a": 1}, {"step": 6, "a": 3}]
  assert f"{tmp_path}/metrics.jsonl: line 2 is damaged and left out" in caplog.text
  JsonlWriter(str(tmp_path), first_step=6).close()
  assert (tmp_path / "metrics.jsonl").read_text() == "".join(good)


def test_bytes_that_are_no_text(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'\xff\xfe\n{"step": 2}\n')
  assert read_metrics(tmp_path) == [{"step": 2}]
