"""Programs compiled ahead: a training with them has the bits of one that compiles, and what does not fit is left."""

import hashlib
import itertools
import json
import pickle
import types

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from configs import digits
from tests.training.test_train import read_metrics, weights
import vit_jax_ext as vx
from vit_jax_ext.console import Progress
from vit_jax_ext.training import ahead
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.training.train import train

FACTS = 10, 1437  # classes and images of the digits' training split


def new_config(data_dir):
  config = digits.get_config("vit")
  config.model.overrides.update(image_size=8, patch_size=4, embed_dim=8, num_heads=2, depth=1, drop_rate=0.1)
  config.update(batch_size=64, total_steps=5, log_every_steps=1, eval_every_steps=5)
  config.checkpoint.every_steps = 2
  config.optimizer.warmup_steps = 2
  config.mesh.update(data=4, fsdp=2)
  config.dataset.data_dir = data_dir
  return config


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data_dir):
  """Returns a config and the file of its programs."""
  config, path = new_config(data_dir), str(tmp_path_factory.mktemp("ahead") / "step")
  ahead.save(path, Experiment(config, *FACTS), config, *FACTS)
  return config, path


@pytest.fixture
def told(monkeypatch):
  """Returns a list that gets the warnings."""
  lines = []
  logging = types.SimpleNamespace(info=lambda *_: None, warning=lambda text, *values: lines.append(text % values))
  monkeypatch.setattr(ahead, "logging", logging)
  return lines


def test_a_training_has_the_same_bits(saved, tmp_path, compiled, told):
  """On 8 devices; the one with the file is stopped behind a checkpoint, and continued with it."""
  config, path = saved
  results = train(config, str(tmp_path / "as_ever"))
  assert {"jit(init)", "jit(step)"} <= set(compiled)
  compiled.clear()

  class Stop(Exception):
    pass

  class StoppingProgress(Progress):
    def step(self, step):
      if step == 4:
        raise Stop

  with pytest.raises(Stop):
    train(config, str(tmp_path / "ahead"), StoppingProgress, compiled=path)
  assert train(config, str(tmp_path / "ahead"), compiled=path) == results
  assert not {"jit(init)", "jit(step)"} & set(compiled) and not told

  for ema in (False, True):
    (_, a), (_, b) = (weights(config, tmp_path / run, ema=ema) for run in ("as_ever", "ahead"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
  rows = [read_metrics(tmp_path / run) for run in ("as_ever", "ahead")]
  for row in itertools.chain(*rows):
    row.pop("train/images_per_second", None)
  assert rows[0] == rows[1]


@pytest.mark.slow
def test_pretrained_weights(saved, tmp_path, compiled):
  config, path = saved
  train(config, str(tmp_path / "source"))
  config = config.copy_and_resolve_references()
  config.pretrained = str(tmp_path / "source")
  compiled.clear()
  results = train(config, str(tmp_path / "ahead"), compiled=path)
  assert "jit(step)" not in compiled
  assert results == train(config, str(tmp_path / "as_ever"))


def test_programs_that_the_cache_on_disk_has(saved, tmp_path):
  """XLA's for CPUs cannot be serialised again when they come from there, and fail when they are run."""
  config, _ = saved
  for program in ahead.lower(Experiment(config, *FACTS), config.batch_size).values():
    program.compile()
  path = str(tmp_path / "folder" / "step")
  ahead.save(path, Experiment(config, *FACTS), config, *FACTS)
  experiment = Experiment(config, *FACTS)
  init, train_step = ahead.load(path, experiment, config, *FACTS)
  assert train_step is not experiment.train_step
  image = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
  batch = jax.device_put({"image": image, "label": np.arange(64, dtype=np.int32) % 10}, experiment.by_batch)
  expected = experiment.train_step(experiment.init(), batch)
  jax.tree.map(np.testing.assert_array_equal, train_step(init(), batch), expected)


@pytest.mark.parametrize(
  ("change", "facts", "words"),
  [
    (lambda c, m: c.mesh.update(data=8, fsdp=1), FACTS, "mesh data=4, fsdp=2, model=1, this is data=8"),
    (lambda c, m: c.update(batch_size=32), FACTS, "config.batch_size 64, this is 32"),
    (lambda c, m: c.update(seed=1), FACTS, "config.seed 0, this is 1"),
    (lambda c, m: c.model.overrides.update(drop_rate=0.2), FACTS, "config.model.overrides.drop_rate 0.1, this is 0.2"),
    (lambda c, m: None, (11, 1437), "--num-classes 10, this is 11"),
    (lambda c, m: m.setattr(ahead.metadata, "version", lambda package: "0"), FACTS, "this is 0"),
    (lambda c, m: m.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"), FACTS, "XLA_FLAGS"),
    (lambda c, m: m.setattr(ahead.platform, "machine", lambda: "riscv64"), FACTS, "this is riscv64"),
    (lambda c, m: m.setattr(ahead, "_digest", lambda program: "other"), FACTS, "other code"),
    (lambda c, m: m.setattr(ahead.distributed, "all_agree", lambda yes: False), FACTS, "another process"),
  ],
)
def test_what_does_not_fit_is_compiled(saved, told, monkeypatch, data_dir, change, facts, words):
  config = new_config(data_dir)
  change(config, monkeypatch)
  experiment = Experiment(config, *facts)
  assert ahead.load(saved[1], experiment, config, *facts) == (experiment.init, experiment.train_step)
  (line,) = told
  assert line.startswith(f"{saved[1]} is not used") and words in line and "\n" not in line


def test_what_changes_no_program_may_differ(saved, told, data_dir):
  config = new_config(data_dir)
  config.update(log_every_steps=3, eval_every_steps=2, pretrained=True)
  config.checkpoint.every_steps = 1
  ahead.load(saved[1], Experiment(config, *FACTS), config, *FACTS)
  assert not told


def test_any_damage_is_seen(saved, tmp_path, told):
  config, path = saved
  experiment = Experiment(config, *FACTS)
  with open(path, "rb") as file:
    content = file.read()
  damaged = tmp_path / "step"

  def refuse(content):
    damaged.write_bytes(content)
    told.clear()
    assert ahead.load(str(damaged), experiment, config, *FACTS) == (experiment.init, experiment.train_step)
    assert told[0].endswith(("it is damaged", "it was not made by `plan --save`"))

  @settings(max_examples=40, deadline=None)
  @given(st.integers(0, len(content) - 1), st.integers(1, 255), st.booleans())
  def flip_or_cut(position, bits, cut):
    refuse(content[:position] + (b"" if cut else bytes([content[position] ^ bits]) + content[position + 1 :]))

  flip_or_cut()
  refuse(b"")
  refuse(json.dumps({"programs": {}}).encode())


def test_nothing_is_unpickled(saved, told, monkeypatch):
  config, path = saved
  for name in ("load", "loads", "Unpickler"):
    monkeypatch.delattr(pickle, name)
  ahead.load(path, Experiment(config, *FACTS), config, *FACTS)
  assert not told


def test_what_xla_cannot_load(saved, told, tmp_path):
  """A whole file of ours, but XLA does not know its programs."""
  config, path = saved
  experiment = Experiment(config, *FACTS)
  with open(path, "rb") as file:
    _, line, programs = file.read().split(b"\n", 2)
  content = b"\n".join([line, bytes(len(programs))])
  foreign = tmp_path / "step"
  foreign.write_bytes(f"{ahead.KIND} {hashlib.sha256(content).hexdigest()}\n".encode() + content)
  assert ahead.load(str(foreign), experiment, config, *FACTS) == (experiment.init, experiment.train_step)
  assert "does not load" in told[0] and "\n" not in told[0]


def test_a_file_that_is_not_there(run, tmp_path, data_dir):
  status, _, err = run(
    "train", f"--compiled={tmp_path / 'none'}", f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}"
  )
  assert status == 2 and err.count("\n") == 1 and "plan --save" in err
  assert not (tmp_path / "run").exists()
  with pytest.raises(vx.UserError, match="Is a directory"):
    ahead.load(str(tmp_path), None, None, *FACTS)
