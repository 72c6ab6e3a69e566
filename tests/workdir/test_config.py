"""The config of a run: saved, read back, and never exchanged for another."""

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
