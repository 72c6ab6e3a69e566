"""Configs from files and the command line."""

import pytest

from configs import digits
import vit_jax_ext as vx
from vit_jax_ext import config as configs


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
