"""The doctor on good and broken set-ups."""

import json

import pytest

from vit_jax_ext.training.doctor import examine
from vit_jax_ext.training.train import train


def examined(config, workdir):
  """Returns the findings by what they are about, and what is wrong."""
  found = {name: (healthy, finding) for name, healthy, finding in examine(config, str(workdir))}
  return {name: finding for name, (_, finding) in found.items()}, [name for name, (ok, _) in found.items() if not ok]


def test_a_good_set_up(tiny_config, tmp_path):
  found, wrong = examined(tiny_config, tmp_path / "new")
  assert not wrong
  assert list(found) == ["devices", "dataset", "model", "memory", "workdir"]
  assert found["devices"] == "8 x cpu, 1 host(s)"
  assert "10 classes; train 1,437, test 360" in found["dataset"]
  assert "data=8" in found["model"] and "6 steps of 64 images" in found["model"]
  assert not (tmp_path / "new").exists()


def test_a_run_that_can_go_on_and_one_that_cannot(tiny_config, tmp_path):
  tiny_config.total_steps = 3
  train(tiny_config, str(tmp_path))
  found, wrong = examined(tiny_config, tmp_path)
  assert not wrong
  assert "continue at step 3" in found["workdir"]
  tiny_config.model.overrides.embed_dim = (8, 24)
  found, wrong = examined(tiny_config, tmp_path)
  assert wrong == ["workdir"] and "embed_dim" in found["workdir"]
  # Somebody edits the config by hand to get past that.
  saved = json.loads((tmp_path / "config.json").read_text())
  saved["model"]["overrides"]["embed_dim"] = [8, 24]
  (tmp_path / "config.json").write_text(json.dumps(saved))
  found, wrong = examined(tiny_config, tmp_path)
  assert wrong == ["workdir"] and "of shape" in found["workdir"]


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
def test_what_is_wrong_is_said(tiny_config, tmp_path, change, line, words):
  change(tiny_config)
  found, wrong = examined(tiny_config, tmp_path / "new")
  assert wrong == [line]
  assert words in found[line]


def test_an_unwritable_workdir(tiny_config, tmp_path):
  (tmp_path / "file").write_text("")
  found, wrong = examined(tiny_config, "/proc/none/run")
  assert wrong == ["workdir"] and "cannot be written" in found["workdir"]


def test_what_a_user_sees(tiny_config, tmp_path, run, data_dir):
  place = (f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}")
  status, out, err = run("doctor", *place)
  assert (status, err) == (0, "")
  assert [line.split()[:2] for line in out.splitlines()] == [
    ["ok", name] for name in ("devices", "dataset", "model", "memory", "workdir")
  ]
  status, out, err = run("doctor", "--config.mesh.data=3", *place)
  assert (status, err.count("\n")) == (2, 1) and "1 thing(s) would stop this run" in err
  assert [line.split()[0] for line in out.splitlines()] == ["ok", "ok", "WRONG", "ok"]


def test_memory_of_devices_that_are_not_there(tiny_config, tmp_path, run, data_dir):
  """Compiled, as `plan` does it."""
  place = (f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}")
  status, out, _ = run("doctor", "--devices=cpu:2", *place)
  assert status == 0
  (memory,) = (line for line in out.splitlines() if line.split()[1] == "memory")
  assert "on each device of cpu:2" in memory and "temporaries" in memory and "2 x cpu" in out
