"""Trackers get what metrics.jsonl gets, each value once, in one run, however often the training is stopped.

What they hold is read back from MLflow by its client, and from the files of Weights & Biases by a reader of their own.
"""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import jax
import pytest

import vit_jax_ext as vx
from vit_jax_ext.training import doctor
from vit_jax_ext.training.train import train
from vit_jax_ext.workdir import trackers
from vit_jax_ext.workdir.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]


class Recorder:
  """A tracker that keeps what it gets, for the processes of one test; it can be told to fail."""

  runs: dict = {}  # noqa: RUF012
  finished: list = []  # noqa: RUF012
  fails_at = None

  def __init__(self, workdir, config, run):
    if self.fails_at == "start":
      raise ConnectionError("no route to\nhost")
    assert config["model.name"] == "crossvit_tiny_224"
    self.run, self.place = run or f"run{len(self.runs)}", "here"
    self.runs.setdefault(self.run, [])

  def log(self, step, scalars):
    if step == self.fails_at:
      raise ConnectionError("gone")
    self.runs[self.run] += [(step, name, value) for name, value in scalars.items()]

  def close(self, finished):
    self.finished.append(finished)
    if self.fails_at == "end":
      raise ConnectionError("gone")


@pytest.fixture
def recorder(monkeypatch, tiny_config):
  monkeypatch.setitem(trackers.TRACKERS, "wandb", Recorder)
  monkeypatch.setattr(trackers, "check_installed", lambda name: f"{name} is installed")
  for name, value in {"runs": {}, "finished": [], "fails_at": None}.items():
    monkeypatch.setattr(Recorder, name, value)
  tiny_config.tracker = "wandb"
  return Recorder


def told(workdir):
  """Returns (step, name, value) of all that metrics.jsonl has."""
  return [(row["step"], name, value) for row in read_metrics(workdir) for name, value in row.items() if name != "step"]


def without_speed(rows):
  return sorted(row for row in rows if row[1] != "train/images_per_second")


def stopped_behind_its_last_checkpoint(config, workdir):
  """Trains to the end of 6 steps as if the process had been killed behind the checkpoint of step 4, and again."""
  train(config, str(workdir))
  shutil.rmtree(workdir / "checkpoints" / "6")
  train(config, str(workdir))


def test_a_run_that_goes_on_repeats_nothing(tiny_config, recorder, tmp_path):
  stopped_behind_its_last_checkpoint(tiny_config, tmp_path / "a")
  ((run, sent),) = recorder.runs.items()
  assert without_speed(sent) == without_speed(told(tmp_path / "a"))
  assert len({(step, name) for step, name, _ in sent}) == len(sent) and max(sent)[0] == 6
  assert recorder.finished == [True, True]
  assert json.loads((tmp_path / "a" / "tracker.json").read_text())["wandb"][0] == run


def test_one_that_is_asked_for_later_gets_all(tiny_config, recorder, tmp_path):
  tiny_config.tracker = None
  train(tiny_config, str(tmp_path / "a"))
  assert recorder.runs == {} and not (tmp_path / "a" / "tracker.json").exists()
  tiny_config.tracker = "wandb"
  train(tiny_config, str(tmp_path / "a"))
  assert sorted(recorder.runs["run0"]) == sorted(told(tmp_path / "a"))


def test_one_that_fails_does_not_stop_the_training_and_is_made_good(tiny_config, recorder, tmp_path, caplog):
  recorder.fails_at = 3
  results = train(tiny_config, str(tmp_path / "a"))
  assert results["eval/top1"] >= 0 and max(told(tmp_path / "a"))[0] == 6
  assert {step for step, _, _ in recorder.runs["run0"]} == {2} and recorder.finished == []
  assert caplog.text.count("wandb fails (gone); the training goes on without it") == 1
  recorder.fails_at = None
  train(tiny_config, str(tmp_path / "a"))
  assert sorted(recorder.runs["run0"]) == sorted(told(tmp_path / "a")) and recorder.finished == [True]
  recorder.fails_at = "end"
  assert train(tiny_config, str(tmp_path / "a"))["eval/top1"] == results["eval/top1"]


def test_an_ending_that_is_none(tiny_config, recorder, tmp_path, monkeypatch):
  tiny_config.optimizer.learning_rate = 1e30
  with pytest.raises(vx.errors.RunError, match="not finite"):
    train(tiny_config, str(tmp_path / "a"))
  assert recorder.finished == [False]


def test_the_first_process_alone_writes(tiny_config, recorder, tmp_path, monkeypatch):
  from vit_jax_ext.workdir.writers import open_writer

  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with open_writer(str(tmp_path), 0, tiny_config) as writer:
    writer.write_scalars(1, {"a": 1.0})
  assert recorder.runs == {} and [*tmp_path.iterdir()] == []


def test_one_that_does_not_start(tiny_config, recorder, tmp_path):
  recorder.fails_at = "start"
  with pytest.raises(vx.UserError) as error:
    train(tiny_config, str(tmp_path / "a"))
  assert "config.tracker=wandb does not start (no route to host)" in str(error.value)
  assert "vit_jax_ext[wandb]" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"wandb": 3}', '{"wandb": ["x", []]}'])
def test_a_damaged_record_is_refused(content, tiny_config, recorder, tmp_path):
  (tmp_path / "tracker.json").write_text(content)
  with pytest.raises(vx.UserError, match=r"tracker\.json is damaged"):
    train(tiny_config, str(tmp_path))


def test_one_that_is_not_installed(tiny_config, tmp_path, monkeypatch):
  """A folder that has its name is not it; train says so before anything is made, and doctor too."""
  (tmp_path / "wandb").mkdir()
  monkeypatch.setitem(sys.modules, "mlflow", None)
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  for name in ("wandb", "mlflow"):
    tiny_config.tracker = name
    with pytest.raises(vx.UserError, match=rf"{name} is not installed; pip install 'vit_jax_ext\[{name}\]'") as error:
      train(tiny_config, str(tmp_path / "a"))
    assert ("tracker", False, str(error.value)) in [*doctor.examine(tiny_config, str(tmp_path / "a"))]
  assert not (tmp_path / "a").exists()


def test_mlflow(tiny_config, tmp_path, monkeypatch):
  mlflow = pytest.importorskip("mlflow")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
  monkeypatch.chdir(tmp_path)
  tiny_config.tracker = "mlflow"
  stopped_behind_its_last_checkpoint(tiny_config, tmp_path / "a")
  client = mlflow.MlflowClient()
  (run,) = client.search_runs([client.get_experiment_by_name("vit_jax_ext").experiment_id])
  assert (run.info.status, run.info.run_name, run.data.params["batch_size"]) == ("FINISHED", "a", "64")
  rows = [
    (point.step, name, point.value)
    for name in run.data.metrics
    for point in client.get_metric_history(run.info.run_id, name)
  ]
  assert without_speed(rows) == without_speed(told(tmp_path / "a"))
  # The run is not in another store.
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
  mlflow.set_tracking_uri(None)
  with pytest.raises(vx.UserError, match=f"does not start .*{run.info.run_id}"):
    train(tiny_config, str(tmp_path / "a"))


def read_wandb(path):
  """Yields the records of a file of Weights & Biases: 7 bytes of header, then blocks of 32 KiB as LevelDB's log has."""
  from wandb.proto.wandb_internal_pb2 import Record

  data, place, part = path.read_bytes(), 7, b""
  while place + 7 <= len(data):
    if 32768 - place % 32768 < 7:
      place += 32768 - place % 32768
      continue
    length, kind = struct.unpack_from("<HB", data, place + 4)
    part += data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):  # whole, or the last part
      yield Record.FromString(part)
      part = b""


def test_wandb_offline(data_dir, tmp_path):
  """In processes of their own: to import Weights & Biases takes minutes under pytest, seconds elsewhere."""
  pytest.importorskip("wandb")
  options = ["total_steps=6", "log_every_steps=2", "eval_every_steps=3", "checkpoint.every_steps=2", "tracker=wandb",
             "model.overrides.depth=1", "model.overrides.embed_dim=8", "model.overrides.num_heads=2"]  # fmt: skip
  command = [sys.executable, ROOT / "main.py", "--config=configs/digits.py:vit", f"--workdir={tmp_path / 'a'}",
             f"--config.dataset.data_dir={data_dir}", *(f"--config.{option}" for option in options)]  # fmt: skip
  environment = os.environ | {"WANDB_MODE": "offline"}
  for start in (1, 2):
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "wandb: run " in done.stderr, done.stderr
    if start == 1:
      shutil.rmtree(tmp_path / "a" / "checkpoints" / "6")
  rows, runs, steps = [], set(), []
  for path in sorted((tmp_path / "a" / "wandb").glob("offline-run-*/run-*.wandb")):
    for record in read_wandb(path):
      if record.WhichOneof("record_type") == "run":
        runs.add((record.run.run_id, record.run.project, record.run.display_name))
        assert '"vit_16b"' in {item.value_json for item in record.run.config.update}
      if record.WhichOneof("record_type") == "history":
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        steps.append(values["_step"])
        rows += [(values["step"], name, value) for name, value in values.items() if "/" in name]
  assert [run[1:] for run in runs] == [("vit_jax_ext", "a")]
  assert without_speed(rows) == without_speed(told(tmp_path / "a"))
  assert steps == sorted(set(steps))
  assert [path.name for path in tmp_path.iterdir()] == ["a"]
