"""Several processes: how they meet, who is missing, and that they train as one does."""

import concurrent.futures
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import PIL.Image
import pytest

from configs import digits
import main
from tests import shapes
from tests.training.five_steps import five_steps, relative
from tests.training.test_train import weights
import vit_jax_ext as vx
from vit_jax_ext import config as configs
from vit_jax_ext.console import Progress
from vit_jax_ext.errors import Preempted, RunError
from vit_jax_ext.training import distributed
from vit_jax_ext.training.evaluate import evaluate_weights
from vit_jax_ext.training.train import train
from vit_jax_ext.workdir.checkpoint import latest_step
from vit_jax_ext.workdir.config import read_workdir_config

ROOT = os.path.dirname(main.__file__)
TINY = [
  "--config.model.overrides.image_size=8", "--config.model.overrides.patch_size=(2,4)",
  "--config.model.overrides.embed_dim=(8,16)", "--config.model.overrides.num_heads=(2,2)",
  "--config.model.overrides.depth=((1,1),)", "--config.model.overrides.mlp_ratio=(1,1)",
  "--config.optimizer.warmup_steps=1", "--config.total_steps=4", "--config.eval_every_steps=4",
  "--config.log_every_steps=2", "--config.checkpoint.every_steps=2", "--config.ema_decay=0.0",
]  # fmt: skip


@pytest.fixture
def coordinator():
  with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
  return f"localhost:{port}"


def meet(coordinator, processes, ids, **kw):
  """Lets processes meet, as threads; returns what each got: None, or an error."""
  with concurrent.futures.ThreadPoolExecutor(len(ids)) as pool:
    return [pool.submit(distributed.meet, coordinator, processes, i, **kw) for i in ids]


def test_all_come(coordinator):
  assert [future.exception() for future in meet(coordinator, 5, [4, 3, 2, 1, 0], wait=30)] == [None] * 5


def test_everybody_learns_who_is_missing(coordinator):
  came = meet(coordinator, 4, [0, 2], hosts=["a", "b", "c", "d"], wait=2)
  here = socket.gethostname()
  for future in came:
    assert isinstance(future.exception(), RunError)
    assert str(future.exception()) == (
      f"process 1 (b), 3 (d) of 4 did not come within 2 s; there are 0 ({here}), 2 ({here})"
    )


def test_the_first_process_is_missing(coordinator):
  with pytest.raises(RunError, match=f"process 0 did not come within 1 s: no answer at {coordinator}"):
    distributed.meet(coordinator, 2, 1, wait=1)


def test_another_number_of_processes_is_told(coordinator):
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(distributed.meet, coordinator, 2, 0, wait=30)
    other = pool.submit(distributed.meet, coordinator, 3, 1, wait=30)
  for future in (first, other):
    assert "--num-processes=3, process 0 has 2" in str(future.exception())


def test_strangers_are_ignored(coordinator):
  host, port = coordinator.split(":")
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(distributed.meet, coordinator, 2, 0, wait=30)
    for message in (b"GET / HTTP/1.1\r\n", b"\xff\xfe\n", b""):
      while True:
        try:
          with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(message)
          break
        except ConnectionRefusedError:
          pass
    second = pool.submit(distributed.meet, coordinator, 2, 1, wait=30)
  assert (first.exception(), second.exception()) == (None, None)


def test_mistakes_are_told(coordinator, monkeypatch):
  with pytest.raises(vx.UserError, match="HOST:PORT"):
    distributed.meet("localhost", 2, 0, wait=1)
  with pytest.raises(vx.UserError, match="process-id=2 is not one of 2"):
    distributed.join(coordinator, 2, 2)
  with pytest.raises(vx.UserError, match=r"SLURM.*give --coordinator"):
    distributed.join(None, None, None)
  with socket.create_server(("", 0)) as taken, pytest.raises(vx.UserError, match="cannot be used"):
    distributed.meet(f"localhost:{taken.getsockname()[1]}", 2, 0, wait=1)


def test_slurm_says_who_belongs_together(monkeypatch):
  """Nodes as SLURM abbreviates them; the port follows from the job, so that two jobs on a node do not meet."""
  monkeypatch.setenv("SLURM_JOB_ID", "4242")
  monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost,node[01-03]")
  monkeypatch.setenv("SLURM_NTASKS", "4")
  monkeypatch.setenv("SLURM_PROCID", "0")
  monkeypatch.setenv("SLURM_LOCALID", "0")
  with pytest.raises(RunError, match="process 1, 2, 3 of 4 did not come"):
    distributed.join(None, None, None, wait=1)


def start(processes, devices, coordinator, command, *, meanwhile=lambda running: None, status=0):
  """Starts real processes with simulated CPU devices, waits for all and returns their output."""
  flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
  running = [
    subprocess.Popen(
      [sys.executable, *command(coordinator, processes, i)], cwd=ROOT, env=environment, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    for i in range(processes)
  ]  # fmt: skip
  try:
    meanwhile(running)
    outputs = [process.communicate(timeout=540)[0] for process in running]
  finally:
    for process in running:
      process.kill()
  assert [process.returncode for process in running] == [status] * processes, "\n".join(outputs)
  return outputs


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_one_ends_all_within_seconds(bad, coordinator, tmp_path, data_dir):
  """A folder that one host alone cannot read."""

  def command(coordinator, processes, i):
    name = "./nowhere" if i == bad else "digits"
    return ["main.py", "train", f"--coordinator={coordinator}", f"--num-processes={processes}", f"--process-id={i}",
            f"--workdir={tmp_path}", f"--config.dataset.data_dir={data_dir}", f"--config.dataset.name={name}",
            *TINY, "--config.total_steps=100000"]  # fmt: skip

  ends = {}

  def watch(running):
    while len(ends) < len(running):
      for i, process in enumerate(running):
        if process.poll() is not None:
          ends.setdefault(i, (time.monotonic(), process.returncode))
      time.sleep(0.1)
    raise InterruptedError

  with pytest.raises(InterruptedError):
    start(2, 1, coordinator, command, meanwhile=watch)
  assert abs(ends[0][0] - ends[1][0]) < 10
  assert ends[bad][1] == 2 and ends[1 - bad][1] == 1


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_digits_together(processes, coordinator, tmp_path, data_dir, capsys):
  """Each with half of the parameters or less; one of them writes. What four wrote is then evaluated here."""

  def command(coordinator, processes, i):
    return [
      "main.py",
      "train",
      f"--coordinator={coordinator}",
      f"--num-processes={processes}",
      f"--process-id={i}",
      f"--workdir={tmp_path}",
      f"--config.dataset.data_dir={data_dir}",
      "--config.mesh.fsdp=2",
      *TINY,
    ]

  first, *others = start(processes, 4 // processes, coordinator, command)
  assert f"{processes} processes, 4 devices" in first and "finished:" in first
  for other in others:
    assert not any(word in other for word in ("processes,", "step", "finished", "loss"))  # Gloo tells its own there
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [2, 4, 4]
  assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
  assert latest_step(str(tmp_path)) == 4
  if processes == 2:
    return
  config = read_workdir_config(str(tmp_path))
  configs.override(config, ["mesh.data=1", "mesh.fsdp=8"])
  scores = evaluate_weights(config, str(tmp_path))
  for name, value in scores.items():
    np.testing.assert_allclose(rows[-1][name], value, rtol=1e-5)


def test_processes_rank_images_of_several_labels(coordinator, tmp_path):
  """All images of all processes count, in batches that padding fills; as one process evaluates them."""
  for split, count in (("train", 24), ("val", 13)):
    shapes.write(tmp_path / "shapes" / split, count, seed=0)
  options = [f"--workdir={tmp_path / 'run'}", f"--config.dataset.name={tmp_path / 'shapes'}",
             "--config.dataset.eval_split=val", "--config.batch_size=8", *TINY]  # fmt: skip

  def command(coordinator, processes, i):
    together = [f"--coordinator={coordinator}", f"--num-processes={processes}", f"--process-id={i}"]
    return ["main.py", "train", *together, *options]

  start(2, 2, coordinator, command)
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  scores = evaluate_weights(read_workdir_config(str(tmp_path / "run")), str(tmp_path / "run"))
  assert scores["images"] == 13
  for name in ("eval/loss", "eval/map"):
    np.testing.assert_allclose(rows[-1][name], scores[name], rtol=1e-5)


def test_one_process_is_preempted(coordinator, tmp_path, data_dir):
  """SIGTERM to one of two: both save the same step and end with status 75; then one goes on alone, on other devices."""
  options = [f"--workdir={tmp_path}", f"--config.dataset.data_dir={data_dir}", *TINY, "--config.total_steps=100000"]
  options += ["--config.eval_every_steps=100000", "--config.checkpoint.every_steps=100000"]

  def command(coordinator, processes, i):
    return ["main.py", "train", f"--coordinator={coordinator}", f"--num-processes={processes}", f"--process-id={i}",
            *options]  # fmt: skip

  def terminate_one(running):
    deadline = time.monotonic() + 240
    while not ((tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").stat().st_size):
      assert time.monotonic() < deadline
      time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)

  outputs = start(2, 2, coordinator, command, meanwhile=terminate_one, status=75)
  step = latest_step(str(tmp_path))
  for output in outputs:
    assert f"preempted at step {step} of 100000; the same command continues from there" in output

  class Terminated(Progress):
    def step(self, now):
      if now == step + 3:
        os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(Preempted, match=f"step {step + 3} "):
    train(read_workdir_config(str(tmp_path)), str(tmp_path), Terminated)


def test_a_run_of_two_processes_goes_on_in_one(coordinator, tmp_path, data_dir):
  """Killed in the middle of an epoch, with repeated augmentation; its weights are those of one process alone."""
  options = [f"--config.dataset.data_dir={data_dir}", *TINY, "--config.augment.repeats=3", "--config.batch_size=128",
             "--config.total_steps=14", "--config.eval_every_steps=14"]  # fmt: skip
  killed, whole = tmp_path / "killed", tmp_path / "whole"

  def command(coordinator, processes, i):
    together = [f"--coordinator={coordinator}", f"--num-processes={processes}", f"--process-id={i}"]
    return ["main.py", "train", *(together if processes > 1 else []), f"--workdir={killed if processes > 1 else whole}",
            *options]  # fmt: skip

  def kill_both(running):
    deadline = time.monotonic() + 240
    while not (latest_step(str(killed)) or 0) >= 6:
      assert time.monotonic() < deadline
      time.sleep(0.05)
    for process in running:
      process.kill()

  start(2, 2, coordinator, command, meanwhile=kill_both, status=-9)
  step = latest_step(str(killed))
  assert 6 <= step < 14
  start(1, 4, None, lambda *_: ["main.py", "train", f"--workdir={killed}", *options])
  start(1, 4, None, command)
  config = read_workdir_config(str(whole))
  ours, alone = (weights(config, folder, ema=False) for folder in (killed, whole))
  assert relative(alone, ours) < 1e-6


def test_one_host_lists_a_folder_for_all(coordinator, tmp_path):
  """What the others have is what it has found, and its mistakes are theirs."""
  (tmp_path / "pets" / "cat").mkdir(parents=True)
  code = """
import sys
from vit_jax_ext.training import distributed
coordinator, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
distributed.join(coordinator, 2, process)
from vit_jax_ext.data import folders
from vit_jax_ext.errors import UserError
if process:
  folders.scan = None
from vit_jax_ext.data.datasets import open_dataset
try:
  dataset = open_dataset(folder, None, distributed.told_by_first)
  print("found", dataset.class_names, dataset.num_examples("train"), dataset.version, dataset.remarks)
except UserError as error:
  print("found", error)
"""

  def told():
    outputs = start(2, 1, coordinator, lambda at, _, i: ["-c", code, at, str(i), str(tmp_path / "pets")])
    first, second = ([line for line in output.splitlines() if line.startswith("found")] for output in outputs)
    assert first == second and len(first) == 1
    return first[0]

  assert "is neither CLASS/image.jpg nor" in told()
  for i in range(3):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "pets" / "cat" / f"{i}.png")
  (tmp_path / "pets" / "cat" / "notes.txt").write_text("no image")
  assert "['cat'] 3 3 images (" in told()


@pytest.mark.slow
@pytest.mark.parametrize("family", digits.VARIANTS)
def test_two_processes_compute_what_one_does(family, coordinator, tmp_path):
  """Two of four devices each on data=2 x fsdp=2 x model=2, against one device."""

  def command(coordinator, processes, i):
    return ["-m", "tests.training.five_steps", family, coordinator, str(processes), str(i), str(tmp_path / "state")]

  start(2, 4, coordinator, command)
  losses, state = pickle.loads((tmp_path / "state").read_bytes())
  dtype = "float64" if family.startswith("boat") else "float32"
  alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
  with jax.enable_x64(dtype == "float64"):
    _, expected_losses, expected = five_steps(family, alone, dtype=dtype, param_dtype=dtype)
  loss = np.max(np.abs(np.divide(losses, expected_losses) - 1))
  params = relative(expected["params"], state["params"])
  print(f"{family:10} {dtype} 2 processes x 4 devices: loss {loss:.1e} params {params:.1e}")
  assert max(loss, params) < 1e-5
