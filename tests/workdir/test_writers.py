"""metrics.jsonl: written by a run that goes on, read by whoever looks at it."""

import json
import math

import numpy as np
import pytest

from vit_jax_ext.workdir.metrics import Means, read_metrics
from vit_jax_ext.workdir.writers import JsonlWriter


def test_metrics_after_the_last_checkpoint_are_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 2, "a": 1}\n{"step": 4, "a": 2}\n{"step": 6, "a"')
  writer = JsonlWriter(str(tmp_path), first_step=3)
  writer.write_scalars(4, {"a": np.float32(3)})
  writer.close()
  assert read_metrics(tmp_path) == [{"step": 2, "a": 1}, {"step": 4, "a": 3.0}]


def test_means_go_on_where_they_were_kept():
  """In two parts, through JSON, they are those of the whole; what is not finite does not count."""
  values = [*np.random.default_rng(0).normal(size=7).astype(np.float32).tolist(), math.nan]
  whole, first = Means({}), Means({})
  for value in values:
    whole.add({"loss": np.float32(value)})
  for value in values[:3]:
    first.add({"loss": np.float32(value)})
  second = Means(json.loads(json.dumps(first.count())))
  for value in values[3:]:
    second.add({"loss": np.float32(value)})
  means = whole.take()
  np.testing.assert_allclose(means["loss"], np.mean(values[:7]), rtol=1e-6)
  assert second.take() == means
  assert whole.take() == {}


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
