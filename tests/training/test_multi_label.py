"""Images of several labels: loss and scores against torch and plain NumPy, and a run from its folder to predictions."""

import csv
import json
import os
import shutil
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import finetune
import main
from tests import shapes
from tests.command_line import execute
import vit_jax_ext as vx
from vit_jax_ext.compare import results, runs
from vit_jax_ext.console import Progress
from vit_jax_ext.data import datasets, input_pipeline
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import normalize, split_model
from vit_jax_ext.pretrained import read_description
from vit_jax_ext.training import mixup, sharding
from vit_jax_ext.training.evaluate import SplitEvaluator
from vit_jax_ext.training.losses import binary_cross_entropy
from vit_jax_ext.training.multi_label import Ranking
from vit_jax_ext.training.train import train
from vit_jax_ext.workdir import checkpoint, description
from vit_jax_ext.workdir.config import read_workdir_config

TINY = dict(
  image_size=(64, 32), patch_size=(8, 16), embed_dim=(16, 32), num_heads=(2, 2), depth=((1, 1),), mlp_ratio=(2, 2)
)


def random_ranking(images=200, classes=5, seed=0):
  """Logits of which many are equal; the last class has no image."""
  rng = np.random.default_rng(seed)
  labels = rng.random((images, classes)) < 0.2
  labels[:, -1] = False
  return Ranking(np.round(rng.standard_normal((images, classes)) + labels, 1).astype(np.float32), labels, 0.0)


def average_precision(labels, logits):
  """The sum over the distinct scores of precision times the gain of recall; no interpolation."""
  total, recall = 0.0, 0.0
  for score in np.unique(logits)[::-1]:
    chosen = logits >= score
    gained = labels[chosen].sum() / labels.sum()
    total += labels[chosen].mean() * (gained - recall)
    recall = gained
  return total


def f1(labels, chosen):
  return 2 * (labels & chosen).sum() / (labels.sum() + chosen.sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_equal_torchs(smoothing):
  rng = np.random.default_rng(0)
  logits, labels = rng.standard_normal((6, 9)) * 5, rng.random((6, 9)) < 0.3
  targets = torch.from_numpy(labels * (1 - smoothing) + 0.5 * smoothing)  # timm's, of several labels
  theirs = torch.from_numpy(logits).requires_grad_()
  loss = torch.nn.BCEWithLogitsLoss()(theirs, targets)
  loss.backward()
  with jax.enable_x64(True):
    ours, gradient = jax.value_and_grad(lambda x: binary_cross_entropy(x, labels, smoothing).mean())(jnp.array(logits))
  np.testing.assert_allclose(ours, loss.item(), rtol=1e-12)
  np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-9, atol=1e-15)


def test_large_logits_are_finite():
  logits = jnp.array([[1e4, -1e4]], jnp.bfloat16)
  loss = binary_cross_entropy(logits, jnp.array([[True, False]]))
  assert loss.dtype == jnp.float32 and loss[0] == 0


def test_labels_are_mixed_as_one_hot_classes_are():
  rng = np.random.default_rng(0)
  images, classes = jnp.asarray(rng.standard_normal((8, 12, 6, 3)), jnp.float32), jnp.asarray(rng.integers(0, 5, 8))
  options = dict(num_classes=5, mixup=0.8, cutmix=1.0, mixing_batch=4)
  of_classes = mixup.augment(jax.random.key(0), images, classes, **options)
  of_labels = mixup.augment(jax.random.key(0), images, jax.nn.one_hot(classes, 5, dtype=bool), **options)
  for one, other in zip(of_classes, of_labels, strict=True):
    np.testing.assert_array_equal(one, other)


def test_average_precision_equals_numpy():
  ranking = random_ranking()
  found = ranking.average_precisions()
  expected = [average_precision(ranking.labels[:, i], ranking.logits[:, i]) for i in range(4)]
  np.testing.assert_allclose(found[:4], expected, rtol=1e-12)
  assert np.isnan(found[4])  # and is left out
  np.testing.assert_allclose(ranking.scores()["map"], np.mean(expected), rtol=1e-12)


def test_thresholds_have_the_largest_f1():
  ranking = random_ranking()
  thresholds = ranking.best_thresholds()
  probabilities = 1 / (1 + np.exp(-ranking.logits.astype(np.float64)))
  described = ranking.describe_classes("abcde", thresholds)
  for i, threshold in enumerate(thresholds[:4]):
    labels = ranking.labels[:, i]
    best = max(f1(labels, probabilities[:, i] >= other) for other in probabilities[:, i])
    np.testing.assert_allclose(f1(labels, probabilities[:, i] >= threshold), best)
    np.testing.assert_allclose(described[i]["f1"], best)
    assert np.abs(probabilities[:, i] - threshold).min() > 1e-3  # between those that it parts
  assert thresholds[4] == 0.5
  assert (described[4]["images"], described[4]["average_precision"]) == (0, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("shapes")
  shapes.write(root / "train", 240, seed=0)
  shapes.write(root / "val", 50, seed=1)
  return root


def make_config(folder, **values):
  config = finetune.get_config(f"crossvit_tiny_224,{folder}")
  config.model.overrides.update(TINY)
  config.dataset.crop, config.pretrained = 1.0, None
  config.update({"batch_size": 32, "total_steps": 160, "eval_every_steps": 80, "ema_decay": 0.9} | values)
  config.optimizer.update(learning_rate=1e-2, warmup_steps=min(10, config.total_steps // 2))
  return config


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  return workdir, train(make_config(folder), str(workdir))


def test_the_config_follows_from_the_folder(folder):
  config = make_config(folder)
  assert (config.label_smoothing, config.dataset.eval_split) == (0.0, "val")
  assert finetune.get_config("crossvit_tiny_224,digits").label_smoothing == 0.1


def test_it_learns_the_shapes(trained):
  workdir, results = trained
  assert results["eval/map"] > 0.95 and results["eval_ema/map"] > 0.95
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert {key for key in rows[-1] if key.startswith("eval")} == {
    "eval/loss",
    "eval/map",
    "eval_ema/loss",
    "eval_ema/map",
  }
  assert "train/top1" not in rows[0] and "train/loss" in rows[0]
  about = description.read(str(workdir))
  assert about["multi_label"] is True and about["class_names"] == sorted(shapes.LABELS)


def test_the_best_checkpoint_is_that_of_the_best_map(trained):
  workdir, _ = trained
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  best = max((row["eval/map"], row["step"]) for row in rows if "eval/map" in row)[1]
  assert checkpoint.find_weights(str(workdir))[0] == best


def test_evaluation_is_exact_over_padded_batches(trained, folder):
  """50 images in batches of 32 on eight devices, against one batch on one."""
  workdir, _ = trained
  config = read_workdir_config(str(workdir))
  dataset = datasets.open_dataset(str(folder), None)
  model = registry.create_model(config.model.name, num_classes=3, rngs=nnx.Rngs(3), **config.model.overrides)
  _, params, stats = split_model(model)
  mesh = sharding.make_mesh(config.mesh)
  everywhere = sharding.replicated(mesh)
  evaluator = SplitEvaluator(config, dataset, model, mesh)
  ours = evaluator(jax.device_put(params, everywhere), jax.device_put(stats, everywhere))
  assert evaluator.counted == 50
  (whole,) = input_pipeline.eval_batches(dataset, "val", batch_size=50, image_size=(64, 32), crop=1.0)
  variant = registry.get_variant(config.model.name)
  logits = np.asarray(model(normalize(whole["image"], variant.mean, variant.std))[0], np.float64)
  labels = whole["label"]
  np.testing.assert_allclose(ours["loss"], np.mean(np.logaddexp(0, np.where(labels, -logits, logits))), rtol=1e-5)
  expected = np.mean([average_precision(labels[:, i], logits[:, i]) for i in range(3)])
  np.testing.assert_allclose(ours["map"], expected, rtol=1e-9)


def test_evaluate_keeps_thresholds_that_predict_takes(trained, folder, tmp_path, run):
  workdir = tmp_path / "run"
  shutil.copytree(trained[0], workdir)
  place, images = f"--workdir={workdir}", folder / "val" / "images"
  status, _, err = run("predict", images / "0.png", place)
  assert status == 0 and "no thresholds were found for these weights, 0.5 is taken" in err
  status, out, _ = run("evaluate", place, f"--output={tmp_path / 'out'}")
  assert status == 0 and "eval, by label" in out and "green triangle" in out
  evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
  rows = evaluation["classes"]["eval"]
  assert [row["name"] for row in rows] == sorted(shapes.LABELS) and evaluation["images"] == 50
  np.testing.assert_allclose(evaluation["eval/map"], np.mean([row["average_precision"] for row in rows]))
  about = description.read(str(workdir))
  assert about["thresholds"]["split"] == "val" and len(about["starts"]) == 1
  assert description.thresholds(about, evaluation["step"]) == [row["threshold"] for row in rows]
  assert description.thresholds(about, evaluation["step"] + 1) is None

  status, out, err = run("predict", images, place, f"--output={tmp_path / 'out'}")
  assert status == 0 and "thresholds" not in err
  predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
  truth = dict(csv.reader((folder / "val" / "labels.csv").open()))
  named = {os.path.relpath(p["image"], folder / "val"): set(p["classes"]) for p in predictions}
  for row in rows:  # predict counts what evaluate has counted
    hits = sum(row["name"] in labels and row["name"] in truth[name].split(";") for name, labels in named.items())
    assert hits == round(row["recall"] * row["images"])
  lines = [*csv.reader((tmp_path / "out" / "predictions.csv").open())]
  assert [len(line) for line in lines[1:]] == [1 + 2 * len(p["classes"]) for p in predictions]
  empty = next(p for p in predictions if not p["classes"])
  assert f"{empty['image']}\n  no label is above its threshold" in out
  status, out, _ = run("predict", images / "0.png", place, "--top=3")
  assert status == 0 and out.count("%") == 3

  # Another split is told with these thresholds, and leaves them.
  assert run("evaluate", place, "--config.dataset.eval_split=train", f"--output={tmp_path / 'other'}")[0] == 0
  other = json.loads((tmp_path / "other" / "evaluation.json").read_text())["classes"]["eval"]
  assert [row["threshold"] for row in other] == [row["threshold"] for row in rows]
  assert description.read(str(workdir)) == about
  # A start that has nothing to do leaves them too.
  train(make_config(folder), str(workdir))
  assert description.read(str(workdir))["thresholds"] == about["thresholds"]


def named(printed):
  """Returns the labels that `predict` prints with their probabilities."""
  return {line.split("%  ")[1] for line in printed.splitlines() if "%  " in line}


def test_what_is_made_of_it_tells_labels_and_thresholds(trained, folder, tmp_path, run):
  """The averaged weights', which are converted."""
  workdir = tmp_path / "run"
  shutil.copytree(trained[0], workdir)
  image = folder / "val" / "images" / "2.png"
  assert run("evaluate", f"--workdir={workdir}")[0] == 0
  assert run("convert", tmp_path / "x.safetensors", f"--workdir={workdir}")[0] == 0
  assert run("convert", tmp_path / "x.safetensors", tmp_path / "y.safetensors")[0] == 0
  assert run("export", f"--workdir={workdir}", f"--output={tmp_path / 'e'}")[0] == 0
  thresholds = description.read(str(workdir))["thresholds"]
  model, about = vx.load_run(workdir)
  assert about["thresholds"] == thresholds["eval_ema"] and about["multi_label"]
  assert model.image_size == (64, 32)
  probabilities = jax.nn.sigmoid(model(vx.preprocess(image, about))[0][0]).tolist()
  labels = zip(about["class_names"], probabilities, about["thresholds"], strict=True)
  above = {name for name, probability, threshold in labels if probability >= threshold}
  files = tmp_path / "x.safetensors", tmp_path / "y.safetensors", tmp_path / "e" / "crossvit_tiny_224.safetensors"
  for made in files:
    about = read_description(made)
    assert about["multi_label"] and about["thresholds"] == thresholds["eval_ema"]
    status, out, err = run("predict", image, f"--config.pretrained={made}")
    assert status == 0 and "thresholds" not in err and named(out) == above, out + err
  code = "import sys; sys.modules.update(tensorflow=None, tensorflow_datasets=None); import main; main.run()"
  command = [sys.executable, "-c", code, "predict", str(image), f"--workdir={workdir}"]
  done = subprocess.run(command, cwd=os.path.dirname(main.__file__), capture_output=True, text=True)
  assert done.returncode == 0 and named(done.stdout) == above, done.stderr


def test_thresholds_of_a_run_in_use_are_told_and_not_kept(trained, tmp_path, run, monkeypatch):
  workdir = tmp_path / "run"
  shutil.copytree(trained[0], workdir)
  (workdir / "lock.json").write_text("{}")  # of another one, which lives
  monkeypatch.setattr("vit_jax_ext.workdir.lock._lives", lambda *_: True)
  status, out, err = run("evaluate", f"--workdir={workdir}")
  assert status == 0 and "eval, by label" in out and "the thresholds are not kept in the run" in err
  assert "thresholds" not in description.read(str(workdir))


def test_an_interrupted_run_ends_bitwise_as_the_whole_one(folder, tmp_path):
  """With mixing, erasing and smoothing of labels; stopped between two checkpoints."""
  config = make_config(folder, total_steps=6, eval_every_steps=6, label_smoothing=0.1)
  config.checkpoint.every_steps = 2
  config.augment.update(mixup=0.8, cutmix=1.0, erasing=0.25)

  class Stopped(Progress):
    def step(self, now):
      if now == 5:
        raise InterruptedError

  with pytest.raises(InterruptedError):
    train(config, str(tmp_path / "run"), Stopped)
  assert checkpoint.latest_step(str(tmp_path / "run")) == 4
  resumed, whole = train(config, str(tmp_path / "run")), train(config, str(tmp_path / "whole"))
  assert resumed == whole
  ours, theirs = (checkpoint.read_weights(str(tmp_path / name))[2] for name in ("run", "whole"))
  for path, array in theirs.items():
    np.testing.assert_array_equal(ours[path], array)


def test_other_labels_end_a_run_that_goes_on(folder, trained, tmp_path, run):
  root, workdir = tmp_path / "shapes", tmp_path / "run"
  shutil.copytree(folder, root)
  shutil.copytree(trained[0], workdir)
  config = json.loads((workdir / "config.json").read_text())
  config["dataset"]["name"] = str(root)
  (workdir / "config.json").write_text(json.dumps(config))
  text = (root / "train" / "labels.csv").read_text()
  (root / "train" / "labels.csv").write_text(text.replace("red square", "red box"))
  (root / "val" / "labels.csv").unlink()
  status, _, err = run("evaluate", f"--workdir={workdir}")
  assert status == 2 and "not in val; each split has one" in err
  shutil.copy(folder / "val" / "labels.csv", root / "val")
  status, _, err = run("evaluate", f"--workdir={workdir}")
  assert status == 2 and "4 in place of 3, with red box" in err
  # Folders of the same names in place of labels.csv.
  shutil.rmtree(root)
  for i, name in enumerate(shapes.LABELS):
    for split in ("train", "val"):
      shapes.draw(root / split / name / "0.png", [name], np.random.default_rng(i))
  status, _, err = run("evaluate", f"--workdir={workdir}")
  assert status == 2 and "has one class an image, and the weights know labels.csv" in err and err.count("\n") == 1


def test_a_comparison_has_its_map(trained):
  run = runs.read_run(str(trained[0]))
  assert run["scores"]["eval/map"] == max(value for _, value in run["curves"]["eval/map"])
  (column,) = (column for column in results.COLUMNS if column.key == "eval_map")
  assert column({"eval_map": 0.9714}) == "97.14"


def test_studies_refuse_it(folder, tmp_path, run):
  status, _, err = run("study", "configs/digits_fusion.py", f"--config.dataset.name={folder}", f"--output={tmp_path}")
  assert status == 2 and "studies compare top-1" in err


def test_attention_of_it_is_analyzed(folder, tmp_path):
  args = ["--config=configs/digits.py:vit", f"--config.dataset.name={folder}", "--config.dataset.eval_split=val",
          "--config.model.overrides.image_size=(32,16)", "--config.model.overrides.patch_size=8",
          "--config.model.overrides.embed_dim=8", "--config.model.overrides.num_heads=2",
          "--config.model.overrides.depth=2", "--config.total_steps=2", "--config.optimizer.warmup_steps=1",
          f"--workdir={tmp_path / 'run'}"]  # fmt: skip
  assert execute(*args) == 0
  assert execute("analyze", f"--workdir={tmp_path / 'run'}") == 0
  assert 0 <= json.loads((tmp_path / "run" / "analysis" / "similarity.json").read_text())["top1"] <= 1
