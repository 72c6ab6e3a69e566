"""The config of a run: saved, read back, and never exchanged for another."""

import json
import os

import ml_collections
import pytest

from configs import digits
import vit_jax_ext as vx
from vit_jax_ext import config as configs
from vit_jax_ext.workdir.config import check_workdir, claim_workdir, default_workdir, read_workdir_config


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


def test_a_key_that_did_not_exist_then_has_its_default(config, tmp_path):
  claim_workdir(str(tmp_path), config)
  saved = json.loads((tmp_path / "config.json").read_text())
  del saved["ema_decay"], saved["dataset"]["max_unreadable"]
  (tmp_path / "config.json").write_text(json.dumps(saved))
  assert read_workdir_config(str(tmp_path)).ema_decay == 0.0
  assert read_workdir_config(str(tmp_path)).dataset.max_unreadable == 0.01
  with pytest.raises(vx.UserError, match=r"config.ema_decay=0.0, this run has 0.99"):
    check_workdir(str(tmp_path), config)


def test_bad_workdirs(config, tmp_path):
  with pytest.raises(vx.UserError, match=r"holds no run"):
    read_workdir_config(str(tmp_path))
  for content in ("{", "[]", "3", '"text"', "null", "{}", '{"seed": 1}', '{"mesh": [1], "model": {"name": "vit_16b"}}'):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(vx.UserError, match=r"config\.json is damaged \(.*; restore it") as error:
      read_workdir_config(str(tmp_path))
    assert "\n" not in str(error.value)
  (tmp_path / "file").write_text("")
  with pytest.raises(vx.UserError, match=r"file holds no run"):
    read_workdir_config(str(tmp_path / "file"))
  for function in (claim_workdir, check_workdir):
    with pytest.raises(vx.UserError, match=r"file is a file.*choose another --workdir"):
      function(str(tmp_path / "file"), config)
  with pytest.raises(vx.UserError, match=r"cannot be written"):
    claim_workdir(str(tmp_path / "file" / "run"), config)
  os.makedirs(tmp_path / "other" / "checkpoints")
  with pytest.raises(vx.UserError, match=r"without a config.json"):
    claim_workdir(str(tmp_path / "other"), config)
