"""The command line: what a user types, sees and gets as exit status."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import main
from tests.command_line import execute
from vit_jax_ext.compare import cost
from vit_jax_ext.models import registry
from vit_jax_ext.training import sharding
from vit_jax_ext.workdir import checkpoint
from vit_jax_ext.workdir.config import read_workdir_config

TINY = [
  "--config.model.overrides.image_size=8", "--config.model.overrides.patch_size=(2,4)",
  "--config.model.overrides.embed_dim=(8,16)", "--config.model.overrides.num_heads=(2,2)",
  "--config.model.overrides.depth=((1,1),)", "--config.model.overrides.mlp_ratio=(1,1)",
  "--config.optimizer.warmup_steps=2", "--config.total_steps=20", "--config.eval_every_steps=10",
  "--config.log_every_steps=2", "--config.checkpoint.every_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir):
  """A finished tiny run."""
  path = tmp_path_factory.mktemp("cli")
  assert execute(f"--workdir={path}", f"--config.dataset.data_dir={data_dir}", *TINY) == 0
  return path


def test_help_is_readable(run):
  status, out, _ = run("--help")
  assert status == 0
  for command in ("train", "evaluate", "predict", "compare", "--config.KEY=VALUE", "Exit status"):
    assert command in out
  assert max(map(len, out.splitlines())) <= 120
  assert run("predict", "--help")[0] == 0


def test_evaluate_repeats_the_runs_own_numbers(run, workdir, tmp_path):
  status, out, err = run("evaluate", f"--workdir={workdir}", f"--output={tmp_path}")
  assert (status, err) == (0, "")
  scores = json.loads((tmp_path / "evaluation.json").read_text())
  assert f"wrote {tmp_path}/evaluation.json" in out
  assert f"{scores['eval/top1']:.2%}" in out
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  (row,) = [row for row in rows if row["step"] == scores["step"] and "eval/top1" in row]
  assert {key: scores[key] for key in row} == row
  assert scores["weights"] == f"{workdir}, step {scores['step']}"
  assert (scores["dataset"], scores["split"], scores["images"]) == ("digits", "test", 360)


def test_sigterm_before_the_training(tmp_path, data_dir):
  """While libraries are imported nothing is lost; the command says so and ends at once."""
  command = [sys.executable, "main.py", f"--workdir={tmp_path}", f"--config.dataset.data_dir={data_dir}", *TINY]
  process = subprocess.Popen(command, cwd=os.path.dirname(main.__file__), stderr=subprocess.PIPE, text=True)
  time.sleep(2.5)
  process.send_signal(signal.SIGTERM)
  stderr = process.communicate(timeout=60)[1]
  assert process.returncode == 75 and "preempted" in stderr.splitlines()[-1], stderr


def test_smoke_runs_have_a_workdir_of_their_own(run, monkeypatch, tmp_path, data_dir):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  argv = ["--config.smoke=True", f"--config.dataset.data_dir={data_dir}", *TINY[:6]]
  assert run(*argv)[0] == 0
  status, out, _ = run("evaluate", *argv)
  assert status == 0 and f"{tmp_path}/vit_jax_ext/digits-smoke, step 2" in out


def test_predict_names_classes(run, workdir, tmp_path, data_dir):
  examples = list(tfds.as_numpy(tfds.builder("digits", data_dir=data_dir).as_dataset(split="test").take(2)))
  encode = (tf.io.encode_png, tf.io.encode_jpeg)
  paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
  for path, example, encode_image in zip(paths, examples, encode, strict=True):
    path.write_bytes(encode_image(example["image"]).numpy())
  status, out, _ = run("predict", *paths, f"--workdir={workdir}", f"--output={tmp_path}")
  assert status == 0
  predictions = json.loads((tmp_path / "predictions.json").read_text())
  assert [p["image"] for p in predictions] == list(map(str, paths))
  for prediction in predictions:
    assert prediction["image"] in out
    probabilities = list(prediction["classes"].values())
    assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
    assert set(prediction["classes"]) <= set("0123456789")


def test_table_6_is_printed(run, tmp_path):
  status, out, _ = run("compare", "--fusion", f"--output={tmp_path}")
  assert status == 0
  assert all(fusion in out for fusion in cost.TABLE_6)
  assert "26,856,272" in out
  assert len((tmp_path / "cost.csv").read_text().splitlines()) == 6


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--config.model.name=crossvit_15"], ["crossvit_15", "crossvit_15_224"]),
    (["--config.modle.name=x"], ["modle", "model.name"]),
    (["--config=configs/digits.py:resnet"], ["resnet", "crossvit"]),
    (["--config=nothing.py"], ["nothing.py"]),
    (["--config.dataset.name=imagenet2012"], ["imagenet2012", "not prepared"]),
    (["--config.dataset.eval_split=validation"], ["validation", "test, train"]),
    (["--config.model.overrides.image_size=23"], ["23", "4-pixel"]),
    (["--config.model.overrides.dropout=0.1"], ["dropout", "drop_rate"]),
    (["--config.batch_size=3"], ["batch_size 3", "8"]),
    (["--config.mesh.data=3"], ["data=3", "8 device"]),
    (["--config.total_epochs=2"], ["total_steps", "give one"]),
    (["evaluate"], ["holds no run"]),
    (["predict", "image.png"], ["holds no run"]),
    (["compare", "--models=resnet50"], ["resnet50"]),
    (["compare", "--config.model.overrides.depth=2"], ["overrides.depth=2", "leave it out"]),
    (["fly"], ["fly", "choose one of analyze, compare"]),
    (["trian"], ["'trian'", "did you mean train?"]),
    (["studies", "all"], ["'studies'", "did you mean study?"]),
    (["--steps=3"], ["--steps=3"]),
    (["--workdir="], ["--workdir= is empty"]),
    (["compare", "--workdir=x", "--workdir="], ["--workdir= is empty"]),
    (["evaluate", "--output="], ["--output= is empty"]),
    (["--workdir=gs://bucket/run"], ["gs://bucket/run is in a bucket", "mounted"]),
    (["convert", "x.pth"], ["holds no run"]),
  ],
)
def test_mistakes_end_with_one_line_and_status_2(run, args, words, tmp_path, data_dir):
  place = [] if "compare" in args else [f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}"]
  status, out, err = run(*place, *args) if args[0].startswith("--") else run(args[0], *place, *args[1:])
  assert status == 2
  assert out == ""
  line = err.strip().splitlines()[-1]
  assert "error: " in line and all(word in line for word in words), err
  assert "Traceback" not in err
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_unreadable_images_and_foreign_workdirs(run, workdir, tmp_path):
  (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
  for args, word in [
    (["predict", tmp_path / "broken.png"], "broken.png cannot be decoded"),
    (["predict", tmp_path / "none.png"], "none.png does not exist"),
    (["train", "--config.seed=5"], "was made with"),
  ]:
    status, _, err = run(*args, f"--workdir={workdir}")
    assert (status, err.count("\n")) == (2, 1)
    assert word in err
  (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
  status, _, err = run("evaluate", f"--workdir={tmp_path}")
  assert status == 2 and "no complete checkpoint" in err


def test_killed_run_continues_bitwise(workdir, tmp_path, data_dir):
  """SIGTERM, then kill -9, then the same command again; metrics and weights are those of the run that was let be.

  The second and the third start have the programs that the first one compiled.
  """
  command = [
    sys.executable, "main.py", f"--workdir={tmp_path}", f"--config.dataset.data_dir={data_dir}", *TINY,
  ]  # fmt: skip
  environment = os.environ | {"PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
  del environment["JAX_COMPILATION_CACHE_DIR"]

  def complete(step):
    return lambda path: path.name.isdecimal() and int(path.name) >= step

  def start_and_stop(step, notice):
    process = subprocess.Popen(
      command, cwd=os.path.dirname(main.__file__), env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not any(map(complete(step), (tmp_path / "checkpoints").glob("*"))) and process.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    process.send_signal(notice)
    return process.communicate()[1], process.returncode

  stderr, status = start_and_stop(2, signal.SIGTERM)
  assert status == 75
  saved = checkpoint.latest_step(tmp_path)
  assert stderr.splitlines()[-1] == f"preempted at step {saved} of 20; the same command continues from there"
  kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/vit_jax_ext/xla").glob("jit_step-*-cache")}
  assert kept
  assert start_and_stop(saved + 4, signal.SIGKILL)[1] == -signal.SIGKILL
  assert subprocess.run(command, cwd=os.path.dirname(main.__file__), env=environment).returncode == 0
  assert kept == {path: path.stat().st_mtime_ns for path in kept}  # used as they are, and no other
  assert len(list((tmp_path / "cache/vit_jax_ext/xla").glob("jit_step-*"))) == len(kept)

  def numbers(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "train/images_per_second"} for row in rows]

  assert len(numbers(workdir)) == 12
  assert numbers(tmp_path) == numbers(workdir)
  model = registry.abstract_model(read_workdir_config(workdir).model, 10)
  everywhere = sharding.replicated(sharding.make_mesh(dict(data=-1, fsdp=1, model=1)))
  for ema in (False, True):
    a, b = (checkpoint.restore_weights(str(path), model, everywhere, ema=ema) for path in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)
