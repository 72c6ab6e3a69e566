"""Random moments at which training is killed: nothing is lost, and the status tells the truth.

The long form: `pytest -m slow tests/training/test_soak.py -s`.
"""

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

OPTIONS = [
  "--config.model.overrides.image_size=8", "--config.model.overrides.patch_size=(2,4)",
  "--config.model.overrides.embed_dim=(8,16)", "--config.model.overrides.num_heads=(2,2)",
  "--config.model.overrides.depth=((1,1),)", "--config.model.overrides.mlp_ratio=(1,1)",
]  # fmt: skip
LONG = ["--config.eval_every_steps=300", "--config.log_every_steps=15", "--config.checkpoint.every_steps=15"]
SHORT = ["--config.eval_every_steps=100", "--config.log_every_steps=10", "--config.checkpoint.every_steps=10"]
BOTH = (signal.SIGKILL, signal.SIGTERM)
BEFORE_ALL = 1.0  # seconds in which Python itself starts, and SIGTERM ends it as any program


@pytest.mark.parametrize(
  ("kills", "notices", "steps", "options"),
  [
    pytest.param(20, BOTH, 3000, LONG, marks=pytest.mark.slow),
    pytest.param(50, (signal.SIGKILL,), 6000, LONG, marks=pytest.mark.slow),
    (3, BOTH, 200, SHORT),
  ],
)
def test_kills_change_nothing(kills, notices, steps, options, tmp_path, data_dir):
  """Kill -9 and SIGTERM while it imports, compiles, trains, evaluates, saves; final weights are bitwise the same."""
  moments = random.Random(0)

  def start(folder):
    command = [sys.executable, "main.py", f"--workdir={folder}", f"--config.dataset.data_dir={data_dir}",
               f"--config.total_steps={steps}", *OPTIONS, *options]  # fmt: skip
    return subprocess.Popen(command, cwd=os.path.dirname(main.__file__), stderr=subprocess.PIPE, text=True)

  whole, killed = tmp_path / "whole", tmp_path / "killed"
  began = time.monotonic()
  assert start(whole).communicate() and checkpoint.latest_step(str(whole)) == steps
  undisturbed = time.monotonic() - began
  print(f"\nuninterrupted: {undisturbed:.0f} s")
  before = 0
  for i in range(kills):
    # Early ones hit the start; the late ones leave enough of the run that none of them finds it finished.
    seconds = moments.uniform(0.1, 0.9 if i % 2 else 0.5) * undisturbed * (steps - before) / steps
    process, notice = start(killed), moments.choice(notices)
    time.sleep(seconds)
    running = process.poll() is None
    process.send_signal(notice)
    sent = time.monotonic()
    error = process.communicate()[1]
    step, damaged = checkpoint.inspect(str(killed))
    print(f"{i + 1:2} after {seconds:4.1f} s {notice.name}: status {process.returncode}, ended in "
          f"{time.monotonic() - sent:.1f} s, step {before} -> {step}, damaged {damaged}")  # fmt: skip
    assert not damaged and step >= before and "Traceback" not in error
    if process.returncode == 0:
      assert step == steps, "it was not finished, and said so"
    elif notice == signal.SIGTERM and running:
      assert process.returncode == 75 or (process.returncode == -notice and seconds < BEFORE_ALL), error
    else:
      assert process.returncode == -notice
    before = step
  process = start(killed)
  assert process.communicate() and process.returncode == 0

  assert not (killed / "damaged").exists() and not list(killed.rglob("*tmp*"))
  assert checkpoint.inspect(str(killed)) == checkpoint.inspect(str(whole)) == (steps, [])
  config = read_workdir_config(str(whole))
  for ema in (False, True):
    jax.tree.map(np.testing.assert_array_equal, weights(config, killed, ema=ema), weights(config, whole, ema=ema))
  numbers = [
    [{key: value for key, value in row.items() if "second" not in key} for row in read_metrics(folder)]
    for folder in (killed, whole)
  ]
  assert numbers[0] == numbers[1]


@pytest.mark.parametrize("seconds", [0.15, 0.4, 0.8])
def test_ctrl_c_in_the_first_second(seconds, tmp_path, data_dir):
  command = [sys.executable, "main.py", f"--workdir={tmp_path}", f"--config.dataset.data_dir={data_dir}", *OPTIONS]
  process = subprocess.Popen(command, cwd=os.path.dirname(main.__file__), stderr=subprocess.PIPE, text=True)
  time.sleep(seconds)
  process.send_signal(signal.SIGINT)
  error = process.communicate(timeout=30)[1]
  assert process.returncode == 1 and error.splitlines()[-1].startswith("interrupted") and "Traceback" not in error
