"""What a run tells of itself: used from another directory, without its dataset, and by what is made of its weights."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

import main
from tests.command_line import execute
import vit_jax_ext as vx
from vit_jax_ext.pretrained import read_description
from vit_jax_ext.workdir import description

TINY = [
  "--config=configs/digits.py:vit", "--config.model.overrides.image_size=8", "--config.model.overrides.patch_size=4",
  "--config.model.overrides.embed_dim=8", "--config.model.overrides.num_heads=2", "--config.model.overrides.depth=1",
  "--config.dataset.eval_split=train", "--config.batch_size=8", "--config.total_steps=3",
  "--config.optimizer.warmup_steps=1", "--config.ema_decay=0",
]  # fmt: skip


def write_image(path, seed):
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run on a folder that was named by a relative path, and is gone since; some images."""
  root = tmp_path_factory.mktemp("pets")
  for i, name in enumerate(("cat", "dog", "eel")):
    for j in range(4):
      write_image(root / "pets" / name / f"{j}.png", 4 * i + j)
  for j in range(40):
    write_image(root / "new" / f"{j:02}.png", 100 + j)
  here = os.getcwd()
  os.chdir(root)
  os.symlink(os.path.join(here, "configs"), root / "configs")
  try:
    assert execute("--workdir=run", "--config.dataset.name=./pets", *TINY) == 0
  finally:
    os.chdir(here)
  shutil.copytree(root / "pets", root / "kept")
  shutil.rmtree(root / "pets")
  return root


def test_what_is_kept(trained):
  about = description.read(str(trained / "run"))
  assert about["class_names"] == ["cat", "dog", "eel"] and about["num_classes"] == 3
  assert (about["image_size"], about["crop"], about["mean"]) == ([8, 8], 1.0, [0.5, 0.5, 0.5])
  (start,) = about["starts"]
  assert start["step"] == 0 and "--workdir=run" in start["command"]
  assert set(start["versions"]) == {"vit_jax_ext", "jax", "flax", "optax", "python"}
  assert len(start["commit"].rstrip("+")) == 40
  assert json.loads((trained / "run" / "config.json").read_text())["dataset"]["name"] == str(trained / "pets")


def test_predict_elsewhere_without_the_dataset(trained, tmp_path, run, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (trained / "new" / "broken.jpg").write_bytes(b"no image")
  try:
    status, _, err = run("predict", trained / "new", f"--workdir={trained / 'run'}", "--output=x.csv", "--top=2")
  finally:
    (trained / "new" / "broken.jpg").unlink()
  assert status == 0 and "broken.jpg cannot be decoded" in err and "1 of 41 images are left out" in err
  rows = [*csv.DictReader((tmp_path / "x.csv").open())]
  assert len(rows) == 40 and set(rows[0]) == {"image", "class_1", "probability_1", "class_2", "probability_2"}
  assert {row["class_1"] for row in rows} <= {"cat", "dog", "eel"}
  assert [row["image"] for row in rows] == [str(trained / "new" / f"{j:02}.png") for j in range(40)]
  assert run("predict", f"{trained}/new/0*.png", f"--workdir={trained / 'run'}", "--output=y")[0] == 0
  predictions = json.loads((tmp_path / "y" / "predictions.json").read_text())
  assert len(predictions) == 10 and next(iter(predictions[0]["classes"])) == rows[0]["class_1"]
  np.testing.assert_allclose(max(predictions[3]["classes"].values()), float(rows[3]["probability_1"]), rtol=1e-5)


def test_prediction_needs_no_tensorflow(trained):
  code = (
    "import sys; sys.modules.update(tensorflow=None, tensorflow_datasets=None); "
    "from vit_jax_ext.command_line import main; sys.exit(main())"
  )
  command = [sys.executable, "-c", code, "predict", str(trained / "new" / "00.png"), f"--workdir={trained / 'run'}"]
  done = subprocess.run(command, cwd=os.path.dirname(main.__file__), capture_output=True, text=True)
  assert done.returncode == 0 and "cat" in done.stdout, done.stderr


@pytest.mark.parametrize("command", ["convert", "export"])
def test_what_is_made_of_it_tells_the_same(command, trained, tmp_path, run):
  run_dir = trained / "run"
  if command == "convert":
    made = tmp_path / "x.safetensors"
    assert run("convert", made, f"--workdir={run_dir}")[0] == 0
  else:
    made = tmp_path / "x" / "vit_16b.safetensors"
    assert run("export", f"--workdir={run_dir}", f"--output={tmp_path / 'x'}")[0] == 0
    assert json.loads((tmp_path / "x" / "vit_16b.json").read_text())["class_names"] == ["cat", "dog", "eel"]
  about, kept = read_description(made), description.read(str(run_dir))
  assert {key: about[key] for key in kept if key != "starts"} == {key: kept[key] for key in kept if key != "starts"}
  # Without restating the model, its options or its classes.
  status, out, err = run("predict", trained / "new" / "00.png", f"--config.pretrained={made}")
  expected = run("predict", trained / "new" / "00.png", f"--workdir={run_dir}")[1]
  assert (status, out) == (0, expected), err
  (model, info), (expected, _) = vx.load_run(made), vx.load_run(run_dir)
  images = vx.preprocess(trained / "new" / "00.png", info)
  np.testing.assert_array_equal(model(images)[0], expected(images)[0])
  assert run("convert", made, tmp_path / "again.safetensors")[0] == 0
  assert read_description(tmp_path / "again.safetensors")["class_names"] == ["cat", "dog", "eel"]


def test_fine_tuning_takes_the_runs_architecture(trained, tmp_path, run):
  data = f"--config.dataset.name={trained / 'kept'}"
  args = ["--config=configs/finetune.py:vit_16b,digits", data, f"--config.pretrained={trained / 'run'}",
          "--config.dataset.eval_split=train", "--config.total_steps=2", "--config.batch_size=8"]  # fmt: skip
  status, _, err = run(*args, f"--workdir={tmp_path / 'x'}")
  assert status == 0 and "as the weights" in err and "embed_dim=8" in err
  saved = json.loads((tmp_path / "x" / "config.json").read_text())["model"]["overrides"]
  assert (saved["embed_dim"], saved["depth"]) == (8, 1)
  status, _, err = run(*args, "--config.model.name=vit_24b", f"--workdir={tmp_path / 'y'}")
  assert status == 2 and "are those of vit_16b" in err and err.count("\n") == 1


def test_other_classes_are_refused(trained, tmp_path, run):
  shutil.copytree(trained / "kept", tmp_path / "pets")
  shutil.copytree(trained / "run", tmp_path / "run")
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["dataset"]["name"] = str(tmp_path / "pets")
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  place = f"--workdir={tmp_path / 'run'}"
  assert run("evaluate", place)[0] == 0
  write_image(tmp_path / "pets" / "ant" / "0.png", 1)
  for args in (["evaluate", place], [*TINY, place, f"--config.dataset.name={tmp_path / 'pets'}"]):
    status, _, err = run(*args)
    assert status == 2 and "4 in place of 3, with ant" in err and "Traceback" not in err
  shutil.rmtree(tmp_path / "pets" / "ant")
  (tmp_path / "pets" / "dog").rename(tmp_path / "pets" / "hog")
  status, _, err = run("evaluate", place)
  assert status == 2 and "without dog and with hog" in err


def test_a_model_that_does_not_fit_the_checkpoint(trained, run):
  for key, value in (("embed_dim", 16), ("depth", 2), ("image_size", 16)):
    args = f"--workdir={trained / 'run'}", f"--config.model.overrides.{key}={value}"
    status, _, err = run("predict", trained / "new" / "00.png", *args)
    assert (status, err.count("\n")) == (2, 1) and "of shape" in err


@pytest.mark.parametrize("metadata", [None, {"vit_jax_ext": "[]"}, {"vit_jax_ext": '{"model": "vit_16b"}'}])
def test_a_file_that_does_not_tell_its_model(metadata, trained, tmp_path, run):
  safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors", metadata)
  with pytest.raises(vx.UserError, match="do not tell their model"):
    vx.load_run(tmp_path / "x.safetensors")
  status, _, err = run("predict", trained / "new" / "00.png", f"--config.pretrained={tmp_path / 'x.safetensors'}")
  assert status == 2 and "are not those of this crossvit_tiny_224" in err


@pytest.mark.parametrize("content", ["", "[]", "3", '{"class_names": 3}'])
def test_a_damaged_description(content, trained, tmp_path, run):
  shutil.copytree(trained / "run", tmp_path / "run")
  (tmp_path / "run" / "run.json").write_text(content)
  status, _, err = run("predict", trained / "new" / "00.png", f"--workdir={tmp_path / 'run'}")
  assert (status, err.count("\n")) == (2, 1) and "run.json is damaged" in err
