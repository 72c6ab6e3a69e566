"""Configs from files, the command line and workdirs."""

import os

import ml_collections
import pytest

from configs import digits
import vit_jax_ext as vx
from vit_jax_ext import config as configs
from vit_jax_ext.workdir.config import claim_workdir, default_workdir, read_workdir_config


@pytest.fixture
def config():
  return digits.get_config()


def test_overrides_keep_types(config):
  configs.override(
    config,
    ["batch_size=32", "optimizer.learning_rate=1", "dataset.name=other", "total_epochs=0.5", "total_steps=None",
     "model.overrides.embed_dim=(8,16)", "model.overrides.remat=true", "model.overrides.fusion=none",
     "optimizer.clip_norm=none"],
  )  # fmt: skip
  assert config.batch_size == 32
  assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
  assert (config.dataset.name, config.total_epochs, config.total_steps) == ("other", 0.5, None)
  assert config.model.overrides.embed_dim == (8, 16)
  assert config.model.overrides.remat is True
  assert config.model.overrides.fusion == "none"
  assert config.optimizer.clip_norm is None


@pytest.mark.parametrize(
  ("assignment", "words"),
  [
    ("batchsize=3", ["batchsize", "batch_size"]),
    ("optimizer.learning_rat=3", ["optimizer.learning_rat", "optimizer.learning_rate"]),
    ("nothing.at.all=3", ["nothing"]),
    ("batch_size.x=3", ["batch_size"]),
    ("batch_size=large", ["batch_size=large", "str", "int"]),
    ("batch_size=2.5", ["batch_size=2.5", "float", "int"]),
    ("batch_size", ["--config.batch_size=VALUE"]),
  ],
)
def test_bad_overrides(config, assignment, words):
  with pytest.raises(vx.UserError) as error:
    configs.override(config, [assignment])
  assert "\n" not in str(error.value)
  assert all(word in str(error.value) for word in words)


def test_files(tmp_path):
  assert configs.load_config(configs.DEFAULT).model.name == "crossvit_tiny_224"
  assert configs.load_config(configs.DEFAULT + ":crossvit") == digits.get_config()
  (tmp_path / "empty.py").write_text("")
  for spec, words in [
    ("configs/none.py", ["configs/none.py does not exist"]),
    (configs.DEFAULT + ":resnet", ["resnet", "crossvit"]),
    (str(tmp_path / "empty.py"), ["get_config"]),
    (configs.__file__.replace("config.py", "../README.md"), ["README.md", "no Python file"]),
  ]:
    with pytest.raises(vx.UserError) as error:
      configs.load_config(spec)
    assert all(word in str(error.value) for word in words)


def test_default_workdir_differs_by_config(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
  assert default_workdir("configs/digits.py") == "/cache/vit_jax_ext/digits"
  assert default_workdir("configs/digits.py:vit") == "/cache/vit_jax_ext/digits-vit"


def test_workdir_keeps_its_config(config, tmp_path):
  workdir = str(tmp_path / "run")
  claim_workdir(workdir, config)
  claim_workdir(workdir, config)
  saved = read_workdir_config(workdir)
  assert isinstance(saved, ml_collections.ConfigDict)
  assert saved.model.overrides.embed_dim == list(config.model.overrides.embed_dim)
  configs.override(config, ["mesh.data=1", "checkpoint.every_steps=7", "log_every_steps=3"])
  claim_workdir(workdir, config)
  config.seed = 1
  with pytest.raises(vx.UserError, match=r"config.seed=0, this run has 1"):
    claim_workdir(workdir, config)


def test_bad_workdirs(config, tmp_path):
  with pytest.raises(vx.UserError, match=r"holds no run"):
    read_workdir_config(str(tmp_path))
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(vx.UserError, match="damaged"):
    read_workdir_config(str(tmp_path))
  (tmp_path / "file").write_text("")
  with pytest.raises(vx.UserError, match=r"cannot be written"):
    claim_workdir(str(tmp_path / "file" / "run"), config)
  os.makedirs(tmp_path / "other" / "checkpoints")
  with pytest.raises(vx.UserError, match=r"without a config.json"):
    claim_workdir(str(tmp_path / "other"), config)
