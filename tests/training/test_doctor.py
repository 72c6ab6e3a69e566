"""The doctor on good and broken set-ups."""

import json

import pytest

import vit_jax_ext as vx
from vit_jax_ext.training.doctor import doctor
from vit_jax_ext.training.train import train


def examine(config, workdir, capsys):
  """Returns the lines by what they are about, and the error if any."""
  try:
    doctor(config, str(workdir))
    error = None
  except vx.UserError as raised:
    error = str(raised)
  lines = capsys.readouterr().out.splitlines()
  return {line.split()[1]: line for line in lines if line.startswith(("ok", "WRONG"))}, error


def test_a_good_set_up(tiny_config, tmp_path, capsys):
  found, error = examine(tiny_config, tmp_path / "new", capsys)
  assert error is None
  assert list(found) == ["dataset", "model", "memory", "workdir"]
  assert all(line.startswith("ok") for line in found.values())
  assert "10 classes; train 1,437, test 360" in found["dataset"]
  assert "8 x cpu" in found["model"] and "6 steps of 64 images" in found["model"]
  assert not (tmp_path / "new").exists()


def test_a_run_that_can_go_on_and_one_that_cannot(tiny_config, tmp_path, capsys):
  tiny_config.total_steps = 3
  train(tiny_config, str(tmp_path))
  capsys.readouterr()
  found, error = examine(tiny_config, tmp_path, capsys)
  assert error is None
  assert "continue at step 3" in found["workdir"]
  tiny_config.model.overrides.embed_dim = (8, 24)
  found, error = examine(tiny_config, tmp_path, capsys)
  assert found["workdir"].startswith("WRONG") and "embed_dim" in found["workdir"]
  # Somebody edits the config by hand to get past that.
  saved = json.loads((tmp_path / "config.json").read_text())
  saved["model"]["overrides"]["embed_dim"] = [8, 24]
  (tmp_path / "config.json").write_text(json.dumps(saved))
  found, error = examine(tiny_config, tmp_path, capsys)
  assert found["workdir"].startswith("WRONG") and "of shape" in found["workdir"]


@pytest.mark.parametrize(
  ("change", "line", "words"),
  [
    (lambda c: c.dataset.update(eval_split="val"), "dataset", "test, train"),
    (lambda c: c.dataset.update(name="imagenet2012"), "dataset", "ILSVRC2012_img_train.tar"),
    (lambda c: c.update(batch_size=3), "model", "batch_size 3"),
    (lambda c: c.mesh.update(data=3), "model", "data=3"),
    (lambda c: c.update(batch_size=2**23), "memory", "accumulation_steps"),
    (lambda c: c.update(pretrained="none.pth"), "pretrained", "do not exist"),
  ],
)
def test_what_is_wrong_is_said(tiny_config, tmp_path, capsys, change, line, words):
  change(tiny_config)
  found, error = examine(tiny_config, tmp_path / "new", capsys)
  assert found[line].startswith("WRONG")
  assert words in found[line]
  assert found["workdir"].startswith("ok")
  assert error.startswith("1 thing")


def test_an_unwritable_workdir(tiny_config, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  found, _ = examine(tiny_config, "/proc/none/run", capsys)
  assert found["workdir"].startswith("WRONG") and "cannot be written" in found["workdir"]
