"""Faults: what a run that ends too early leaves behind, and that nothing of it is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
import main
from tests.training.steps import make_step
from tests.training.test_train import read_metrics, weights
import vit_jax_ext as vx
from vit_jax_ext.console import Progress
from vit_jax_ext.errors import Preempted, RunError
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.training import faults, optimizer
from vit_jax_ext.training.train import train
from vit_jax_ext.training.train_step import TrainState, init_state, make_train_step
from vit_jax_ext.workdir import checkpoint, digests
from vit_jax_ext.workdir.config import check_workdir


@pytest.fixture(scope="module")
def config(data_dir):
  """Twelve steps with three evaluations; checkpoints at 2, 4, 6, 8, 10, 12, of which the last two and the best stay."""
  config = digits.get_config("crossvit")
  config.dataset.data_dir = data_dir
  config.model.overrides.update(
    image_size=8, patch_size=(2, 4), embed_dim=(8, 16), num_heads=(2, 2), depth=((1, 1),), mlp_ratio=(1, 1)
  )
  config.update(batch_size=64, total_steps=12, log_every_steps=2, eval_every_steps=4)
  config.checkpoint.every_steps = 2
  config.optimizer.warmup_steps = 2
  return config


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """The run that nothing befell: (workdir, results)."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, train(config, str(workdir))


@pytest.fixture
def copy(whole, tmp_path):
  """A copy of it, to be damaged."""
  return shutil.copytree(whole[0], tmp_path / "run")


def check_equals_whole(config, workdir, whole):
  """Weights, averages and metrics are bitwise those of the run that nothing befell; no checkpoint is damaged."""
  for ema in (False, True):
    jax.tree.map(np.testing.assert_array_equal, weights(config, workdir, ema=ema), weights(config, whole, ema=ema))

  def numbers(folder):
    return [{key: value for key, value in row.items() if "second" not in key} for row in read_metrics(folder)]

  assert numbers(workdir) == numbers(whole)
  assert checkpoint.inspect(str(workdir)) == (config.total_steps, [])
  assert {path.name for path in workdir.iterdir() if path.is_dir()} <= {"checkpoints", "damaged"}


def files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def zero(path):
  path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [flip, truncate, zero, os.remove])
def test_damage_is_seen_in_every_file(damage, copy):
  """All but orbax's two notes of the commit, without which it reads as well."""
  for path in files(copy / "checkpoints" / "12"):
    content = path.read_bytes()
    damage(path)
    note = path.parent.name == "12" and path.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
    assert checkpoint.inspect(str(copy)) == ((12, []) if note else (10, [12])), path
    path.write_bytes(content)
  assert checkpoint.inspect(str(copy)) == (12, [])
  shutil.rmtree(copy / "checkpoints" / "12")
  (copy / "checkpoints" / "12").mkdir()
  assert checkpoint.inspect(str(copy)) == (10, [12])


def test_training_continues_from_the_one_before(config, copy, whole, caplog):
  largest = max(files(copy / "checkpoints" / "12"), key=lambda path: path.stat().st_size)
  flip(largest)
  content = largest.read_bytes()
  caplog.set_level("WARNING", logger="absl")
  assert train(config, str(copy)) == whole[1]
  assert f"{copy}/checkpoints/12 is damaged: {largest.relative_to(copy / 'checkpoints' / '12')}" in caplog.text
  check_equals_whole(config, copy, whole[0])
  (aside,) = (copy / "damaged").iterdir()
  assert (aside / largest.relative_to(copy / "checkpoints" / "12")).read_bytes() == content  # nothing is deleted


def test_a_file_that_vanishes_while_it_is_read(copy, monkeypatch):
  """Somebody evaluates a run that is still training and puts an old checkpoint out of the way just then."""
  path, digests_of = copy / "checkpoints" / "12", digests._digests

  def vanish(folder):
    shutil.rmtree(path, ignore_errors=True)
    return digests_of(folder)

  monkeypatch.setattr(digests, "_digests", vanish)
  assert "removed" in digests.damage(epath.Path(path))


def test_evaluation_takes_the_next_best(config, copy, caplog):
  scores = {row["step"]: row["eval/top1"] for row in read_metrics(copy) if "eval/top1" in row}
  kept = [int(path.name) for path in (copy / "checkpoints").iterdir()]
  best, *others = sorted((step for step in kept if step in scores), key=lambda step: (scores[step], step))[::-1]
  assert weights(config, copy)[0] == best
  flip(copy / "checkpoints" / str(best) / "metrics" / "metrics")
  assert weights(config, copy)[0] == (others or [max(set(kept) - {best})])[0]
  assert f"checkpoints/{best} is damaged: metrics/metrics" in caplog.text


def test_all_damaged(config, copy):
  for path in (copy / "checkpoints").glob("*/model/_METADATA"):
    truncate(path)
  before = {path: path.read_bytes() for path in files(copy)}
  with pytest.raises(vx.UserError, match=r"all checkpoints in .* are damaged \(.*10, 12\); restore one"):
    train(config, str(copy))
  with pytest.raises(vx.UserError, match="no undamaged checkpoint"):
    weights(config, copy)
  with pytest.raises(vx.UserError, match=r"12 is damaged: model/_METADATA.*choose another"):
    checkpoint.read_weights(str(copy / "checkpoints" / "12"))
  assert {path: path.read_bytes() for path in files(copy)} == before


def test_sigterm_before_an_evaluation(config, whole, tmp_path):
  """It is not waited for, but made up for by the next run, as its checkpoint may be the best."""

  class Terminated(Progress):
    def step(self, now):
      super().step(now)
      if now == 12:
        os.kill(os.getpid(), signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(Preempted, match="preempted at step 12 of 12; the same command continues"):
    train(config, str(tmp_path), Terminated)
  assert signal.getsignal(signal.SIGTERM) == before
  assert checkpoint.latest_step(str(tmp_path)) == 12
  assert train(config, str(tmp_path)) == whole[1]
  check_equals_whole(config, tmp_path, whole[0])


def test_nothing_is_saved_after_a_loss_that_is_not_finite(config, tmp_path):
  hot = config.copy_and_resolve_references()
  hot.optimizer.learning_rate = 1e30
  with pytest.raises(RunError) as error:
    train(hot, str(tmp_path))
  line = re.fullmatch(
    r"loss or gradients are not finite at step (\d+): loss .+, gradient norm .+, learning rate .+e\+\d+; "
    r"nothing of it was saved. .*--config.skip_nonfinite=True.*",
    str(error.value),
  )
  assert checkpoint.latest_step(str(tmp_path)) < int(line[1])
  hot.skip_nonfinite = True
  check_workdir(str(tmp_path), hot)  # which is to say that the run may continue so


def test_an_update_that_is_not_finite_is_left_out():
  """Between two good batches a bad one changes nothing: parameters, statistics, moments, averages."""

  def create_model():
    size = dict(image_size=8, patch_size=4, embed_dim=8, num_heads=2, depth=1, mlp_ratio=1)
    return vx.create_model("deepvit_16b", num_classes=10, rngs=nnx.Rngs(0), **size)

  def spoil(key, images, labels):
    return jnp.where(labels[0] == 9, jnp.nan, images), labels

  tx = optax.adamw(1e-2)
  graphdef = split_model(create_model())[0]
  scale = dict(mean=(0, 0, 0), std=(1, 1, 1))
  step = jax.jit(make_step(graphdef, tx, **scale, ema_decay=0.5, augment=spoil, skip_nonfinite=True))
  images = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8, 3), np.uint8)
  good, bad, last = ({"image": x, "label": np.array([y, 1, 2, 3])} for x, y in zip(images, (0, 9, 4), strict=True))
  after_good, _ = step(init_state(create_model, tx, use_ema=True), good)
  after_bad, measured = step(after_good, bad)
  assert np.isnan(measured["loss"]) and (int(after_good.step), int(after_bad.step)) == (1, 2)
  expected, skipped = step(after_good, last)[0], step(after_bad, last)[0]
  expected.step = skipped.step
  jax.tree.map(np.testing.assert_array_equal, skipped, expected)
  assert not np.array_equal(skipped.params["head"]["kernel"], after_good.params["head"]["kernel"])


def test_the_schedule_counts_an_update_that_is_left_out():
  """The learning rate of a step is that of its number, which the log says too."""
  tx = optimizer.adamw(lambda count: 0.1 * count, weight_decay=0.0, no_decay=(), clip_norm=None)

  def loss(params, stats, batch, key):
    return jnp.sum(params["x"] * batch["slope"]), (stats, {"loss": jnp.sum(params["x"] * batch["slope"])})

  step = jax.jit(make_train_step(loss, tx, seed=0, skip_nonfinite=True))
  params = {"x": jnp.ones(3)}
  state = TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params), {})
  sizes = []
  for slope in (1.0, np.nan, 1.0):
    new, _ = step(state, {"slope": jnp.full(3, slope)})
    sizes.append(float(jnp.abs(new.params["x"] - state.params["x"]).max()))
    state = new
  np.testing.assert_allclose(sizes, [0.0, 0.0, 0.2], atol=1e-5)  # Adam's first steps are of the learning rate's size


def test_endless_skipping_ends():
  watch = faults.FiniteWatch(optax.constant_schedule(0.25), skip=True)
  bad, good = ({"loss": jnp.float32(x), "grad_norm": jnp.float32(1)} for x in (np.nan, 1))
  for step in range(1, 100):
    watch.add(step, bad)
  watch.add(100, good)
  watch.check()
  for step in range(101, 201):
    watch.check()
    watch.add(step, bad)
  with pytest.raises(RunError, match=r"100 updates in a row .* step 200: loss nan, gradient norm 1, .* 0.25;"):
    watch.check()


def run(workdir, config, *, largest_file="unlimited"):
  """Returns `python main.py`'s status and stderr; no file can grow beyond `largest_file` KiB, as on a full disk."""
  overrides = [f"--config.model.overrides.{key}={value}" for key, value in config.model.overrides.items()]
  options = dict(
    batch_size=64, total_steps=12, log_every_steps=2, eval_every_steps=4, **{"checkpoint.every_steps": 2},
    **{"optimizer.warmup_steps": 2, "dataset.data_dir": config.dataset.data_dir},
  )  # fmt: skip
  overrides += [f"--config.{key}={value}" for key, value in options.items()]
  limited = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', ""]
  result = subprocess.run(
    [*limited, sys.executable, "main.py", f"--workdir={workdir}", *overrides],
    cwd=os.path.dirname(main.__file__),
    stderr=subprocess.PIPE,
    text=True,
  )
  return result.returncode, result.stderr


def test_full_disk(config, copy, whole):
  """Writing fails after step 10; the command says so, what is there stays, and it continues when all is well."""
  shutil.rmtree(copy / "checkpoints" / "12")
  before = {path: path.read_bytes() for path in files(copy / "checkpoints")}
  status, stderr = run(copy, config, largest_file=10)
  assert status == 1 and "Traceback" not in stderr, stderr
  assert f"error: workdir {copy} cannot be written (File too large); mend" in stderr.splitlines()[-1]
  assert {path: path.read_bytes() for path in before} == before
  assert checkpoint.inspect(str(copy))[0] == 10
  status, stderr = run(copy, config)
  assert status == 0, stderr
  check_equals_whole(config, copy, whole[0])


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_unwritable_workdir(name, config, tmp_path, whole):
  """What is to be a folder is a file, or the other way round: root may write everything, so permissions cannot tell."""
  shutil.copy(whole[0] / "config.json", tmp_path)
  (tmp_path / "checkpoints").write_text("") if name == "checkpoints" else (tmp_path / name).mkdir()
  with pytest.raises(RunError, match=f"workdir {tmp_path} cannot be written .*; mend the disk"):
    train(config, str(tmp_path))


@pytest.mark.slow
def test_saving_every_50_steps_blocks_less_than_a_twentieth(data_dir, tmp_path, monkeypatch):
  """The default model; from the end of step 1, when all is compiled, to step 251. Wants a machine to itself."""
  blocked, moments, save = [], {}, checkpoint.save

  def timed_save(checkpoints, step, state, results):
    jax.block_until_ready(state)  # the steps that are still running are no cost of saving
    start = time.monotonic()
    save(checkpoints, step, state, results)
    blocked.append(time.monotonic() - start)

  class Watch(Progress):
    def step(self, now):
      moments[now] = time.monotonic()
      if now == 251:
        raise InterruptedError

  config = digits.get_config("crossvit")
  config.dataset.data_dir = data_dir
  config.checkpoint.every_steps = 50
  config.eval_every_steps = 1000
  monkeypatch.setattr(checkpoint, "save", timed_save)
  with pytest.raises(InterruptedError):
    train(config, str(tmp_path), Watch)
  share = sum(blocked) / (moments[251] - moments[2])
  print(f"\n5 saves block {1000 * np.mean(blocked):.0f} ms each, {share:.1%} of {moments[251] - moments[2]:.1f} s")
  assert len(blocked) == 5 and share < 0.05
