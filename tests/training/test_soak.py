"""Twenty random moments at which training is killed; run with `pytest -m slow tests/training/test_soak.py -s`."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import main
from tests.training.test_train import read_metrics, weights
from vit_jax_ext.workdir import checkpoint
from vit_jax_ext.workdir.config import read_workdir_config

KILLS = 20
OPTIONS = [
  "--config.model.overrides.image_size=8", "--config.model.overrides.patch_size=(2,4)",
  "--config.model.overrides.embed_dim=(8,16)", "--config.model.overrides.num_heads=(2,2)",
  "--config.model.overrides.depth=((1,1),)", "--config.model.overrides.mlp_ratio=(1,1)",
  "--config.total_steps=3000", "--config.eval_every_steps=300", "--config.log_every_steps=15",
  "--config.checkpoint.every_steps=15",
]  # fmt: skip


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path, data_dir):
  """Kill -9 and SIGTERM while it imports, compiles, trains, evaluates, saves; final weights are bitwise the same."""
  moments = random.Random(0)

  def start(folder):
    command = [sys.executable, "main.py", f"--workdir={folder}", f"--config.dataset.data_dir={data_dir}", *OPTIONS]
    return subprocess.Popen(command, cwd=os.path.dirname(main.__file__), stderr=subprocess.PIPE, text=True)

  whole, killed = tmp_path / "whole", tmp_path / "killed"
  began = time.monotonic()
  assert start(whole).communicate() and checkpoint.latest_step(str(whole)) == 3000
  print(f"\nuninterrupted: {time.monotonic() - began:.0f} s")
  before, survived = 0, 0
  for i in range(KILLS):
    process, seconds = start(killed), moments.uniform(1, 20)
    notice = moments.choice([signal.SIGKILL, signal.SIGTERM])
    time.sleep(seconds)
    process.send_signal(notice)
    sent = time.monotonic()
    error = process.communicate()[1]
    step, damaged = checkpoint.inspect(str(killed))
    print(f"{i + 1:2} after {seconds:4.1f} s {notice.name}: status {process.returncode}, ended in "
          f"{time.monotonic() - sent:.1f} s, step {before} -> {step}, damaged {damaged}")  # fmt: skip
    assert not damaged and step >= before and "Traceback" not in error
    assert process.returncode in ((-notice, 0) if notice == signal.SIGKILL else (75, 0)), error
    before, survived = step, survived + (process.returncode == 0)
  process = start(killed)
  assert process.communicate() and process.returncode == 0
  print(f"{KILLS - survived} kills; then to the end")

  assert not (killed / "damaged").exists() and not list(killed.rglob("*tmp*"))
  assert checkpoint.inspect(str(killed)) == checkpoint.inspect(str(whole)) == (3000, [])
  config = read_workdir_config(str(whole))
  for ema in (False, True):
    jax.tree.map(np.testing.assert_array_equal, weights(config, killed, ema=ema), weights(config, whole, ema=ema))
  numbers = [
    [{key: value for key, value in row.items() if "second" not in key} for row in read_metrics(folder)]
    for folder in (killed, whole)
  ]
  assert numbers[0] == numbers[1]
  assert survived == 0, "too few steps for so many kills: the last ones hit nothing"
