"""The loop: what a run leaves behind, and that an interrupted run ends as an uninterrupted one."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from tensorflow.core.util import event_pb2
from tensorflow.python.lib.io import tf_record
import tensorflow_datasets  # noqa: F401  (its import order with tensorflow matters)

import vit_jax_ext as vx
from vit_jax_ext.console import Progress
from vit_jax_ext.models import registry
from vit_jax_ext.training import sharding
from vit_jax_ext.training.experiment import epoch_in_steps, number_of_steps
from vit_jax_ext.training.train import train
from vit_jax_ext.workdir import checkpoint


def weights(config, workdir, *, ema=False):
  model = registry.abstract_model(config.model, 10)
  everywhere = sharding.replicated(sharding.make_mesh(config.mesh))
  return checkpoint.restore_weights(str(workdir), model, everywhere, ema=ema)


def read_metrics(workdir):
  return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
  """A finished run: (config, workdir, results)."""
  from configs import digits

  config = digits.get_config("crossvit")
  config.dataset.data_dir = data_dir
  config.model.overrides.update(
    image_size=8, patch_size=(2, 4), embed_dim=(8, 16), num_heads=(2, 2), depth=((1, 1),), mlp_ratio=(1, 1),
    drop_rate=0.1,
  )  # fmt: skip
  config.update(batch_size=64, total_steps=7, log_every_steps=2, eval_every_steps=3)
  config.checkpoint.every_steps = 2
  config.optimizer.warmup_steps = 2
  workdir = tmp_path_factory.mktemp("finished")
  return config, workdir, train(config, str(workdir))


def test_workdir(finished):
  _, workdir, results = finished
  rows = read_metrics(workdir)
  assert [row["step"] for row in rows] == [2, 3, 4, 6, 6, 7, 7]
  assert {
    "step",
    "train/loss",
    "train/top1",
    "train/grad_norm",
    "train/learning_rate",
    "train/images_per_second",
  } == set(rows[0])
  scores = {f"{prefix}/{name}" for prefix in ("eval", "eval_ema") for name in ("loss", "top1", "top5", "ece")}
  assert set(rows[1]) == {"step"} | scores
  assert {key: rows[-1][key] for key in scores} == results
  assert json.loads((workdir / "config.json").read_text())["batch_size"] == 64
  tags = set()
  for path in workdir.glob("events.out.tfevents.*"):
    for record in tf_record.tf_record_iterator(str(path)):
      tags |= {value.tag for value in event_pb2.Event.FromString(record).summary.value}
  assert {"train/loss", "eval/top1", "eval_ema/top1"} <= tags


def test_training_metrics_are_means_and_the_log_has_one_line_each(finished, tmp_path, caplog):
  """Those of every second step are the means of what a log of every step says."""
  config, workdir, _ = finished
  every = config.copy_and_resolve_references()
  every.log_every_steps = 1
  caplog.set_level("INFO", logger="absl")
  train(every, str(tmp_path / "run"))
  ours, theirs = (
    {row["step"]: row["train/loss"] for row in read_metrics(folder) if "train/loss" in row}
    for folder in (tmp_path / "run", workdir)
  )
  assert theirs[7] == ours[7]
  for step in (2, 4, 6):
    np.testing.assert_allclose(theirs[step], (ours[step - 1] + ours[step]) / 2, rtol=1e-6)
  lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]
  assert sum("images/s" in line for line in lines) == 7 and sum("eval/top1" in line for line in lines) == 2


def test_last_and_best_are_kept(finished):
  _, workdir, _ = finished
  evaluated = {row["step"]: row["eval/top1"] for row in read_metrics(workdir) if "eval/top1" in row}
  with checkpoint.open_checkpoints(str(workdir), read_only=True) as checkpoints:
    kept = set(checkpoints.all_steps())
    assert evaluated[checkpoints.best_step()] == max(evaluated.values())
    assert kept == {6, 7, checkpoints.best_step()}


def test_interrupted_run_ends_bitwise_as_the_whole_one(finished, tmp_path):
  """Stopped after steps 3 and 5 (a checkpoint, and one step past a checkpoint), then continued."""
  config, whole, results = finished

  class Stop(Exception):
    pass

  class StoppingProgress(Progress):
    def step(self, step):
      if step == self.stop_at:
        raise Stop

  for stop_at in (4, 6):
    StoppingProgress.stop_at = stop_at
    with pytest.raises(Stop):
      train(config, str(tmp_path), StoppingProgress)
  assert train(config, str(tmp_path)) == results
  for ema in (False, True):
    (_, a), (_, b) = weights(config, whole, ema=ema), weights(config, tmp_path, ema=ema)
    jax.tree.map(np.testing.assert_array_equal, a, b)

  def without_speed(rows):
    return [{key: value for key, value in row.items() if key != "train/images_per_second"} for row in rows]

  assert without_speed(read_metrics(tmp_path)) == without_speed(read_metrics(whole))


def test_finished_run_is_evaluated_again_and_nothing_changes(finished):
  config, workdir, results = finished
  before = (workdir / "metrics.jsonl").read_text()
  assert train(config, str(workdir)) == results
  assert (workdir / "metrics.jsonl").read_text() == before


def test_another_config_is_refused_and_nothing_overwritten(finished):
  config, workdir, _ = finished
  other = config.copy_and_resolve_references()
  other.optimizer.weight_decay = 0.3
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  with pytest.raises(vx.UserError, match=r"optimizer.weight_decay=0.05, this run has 0.3.*--workdir"):
    train(other, str(workdir))
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_finished_run_goes_on_to_more_steps(finished, tmp_path, caplog):
  config, workdir, _ = finished
  shutil.copytree(workdir, tmp_path / "run")
  longer = config.copy_and_resolve_references()
  longer.total_steps = 9
  caplog.set_level("INFO", logger="absl")
  results = train(longer, str(tmp_path / "run"))
  assert "the run had total_steps=7 and goes on to step 9; the learning rate is now that of 9 steps" in caplog.text
  rows = read_metrics(tmp_path / "run")
  assert [row["step"] for row in rows] == [2, 3, 4, 6, 6, 7, 7, 8, 9, 9] and rows[-1]["eval/top1"] == results[
    "eval/top1"
  ]
  assert json.loads((tmp_path / "run" / "config.json").read_text())["total_steps"] == 9
  assert train(longer, str(tmp_path / "run")) == results
  with pytest.raises(vx.UserError, match=r"was made with config\.total_steps=9, this run has 7"):
    train(config, str(tmp_path / "run"))


@pytest.mark.parametrize(("steps", "epochs", "expected"), [(5, None, 5), (None, 2, 200), (None, 0.5, 50)])
def test_number_of_steps(tiny_config, steps, epochs, expected):
  tiny_config.batch_size = 10
  tiny_config.total_steps, tiny_config.total_epochs = steps, epochs
  assert number_of_steps(tiny_config, 1000) == expected


@pytest.mark.parametrize(("batch_size", "gpus", "steps"), [(4096, 32, 312), (1024, 16, 1251), (512, 16, 2502)])
def test_epochs_of_repeated_augmentation_are_whole_as_deits(tiny_config, batch_size, gpus, steps):
  """RASampler selects a multiple of 256 images, shared among the GPUs; the loader drops the last batch."""
  images = 1_281_167
  tiny_config.batch_size, tiny_config.augment.repeats = batch_size, 3
  tiny_config.total_steps, tiny_config.total_epochs = None, 300
  assert epoch_in_steps(tiny_config, images) == images // 256 * 256 // gpus // (batch_size // gpus) == steps
  assert number_of_steps(tiny_config, images) == 300 * steps


@pytest.mark.parametrize(("steps", "epochs"), [(None, None), (5, 5)])
def test_number_of_steps_is_given_once(tiny_config, steps, epochs):
  tiny_config.total_steps, tiny_config.total_epochs = steps, epochs
  with pytest.raises(vx.UserError, match="give one"):
    number_of_steps(tiny_config, 1000)
