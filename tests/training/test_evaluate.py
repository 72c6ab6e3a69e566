"""Exact evaluation against plain NumPy."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_ext.data import datasets, input_pipeline
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import normalize, split_model
from vit_jax_ext.training import sharding
from vit_jax_ext.training.evaluate import SplitEvaluator, evaluate
from vit_jax_ext.training.train_step import make_eval_step


def expected_calibration_error(confidence, hits):
  """Guo et al. 2017, equation 3, bin by bin: 15 bins, open below and closed above."""
  error = 0.0
  for m in range(15):
    in_bin = (confidence > m / 15) & (confidence <= (m + 1) / 15)
    if in_bin.any():
      error += in_bin.mean() * abs(hits[in_bin].mean() - confidence[in_bin].mean())
  return error


class Table(nnx.Module):
  """A model whose logits are written into the first row of the image, to any sharpness."""

  def __call__(self, images, train):
    return 6 * images[:, 0, :, 0], {}


def scores(images, labels, mask, batch_size):
  graphdef, params, stats = split_model(Table())
  step = jax.jit(make_eval_step(graphdef, mean=(0.5,) * 3, std=(0.5,) * 3))
  rows = [slice(i, i + batch_size) for i in range(0, len(images), batch_size)]
  return evaluate(
    step, params, stats, ({"image": images[row], "label": labels[row], "mask": mask[row]} for row in rows)
  )


def random_split(count=96, classes=12):
  """Images that are tables of logits, and those logits."""
  images = np.random.default_rng(0).integers(0, 256, (count, 1, classes, 3), dtype=np.uint8)
  return images, 6 * (images[:, 0, :, 0] / 127.5 - 1)


def test_calibration_error_equals_numpy():
  images, logits = random_split()
  rng = np.random.default_rng(1)
  labels, mask = np.where(rng.random(96) < 0.5, logits.argmax(1), rng.integers(0, 12, 96)), rng.random(96) < 0.8
  probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  hits = logits.argmax(1) == labels
  expected = expected_calibration_error(probabilities.max(1)[mask], hits[mask])
  for batch_size in (96, 32):
    ours = scores(images, labels.astype(np.int32), mask, batch_size)
    np.testing.assert_allclose(ours["ece"], expected, rtol=1e-5)
    np.testing.assert_allclose(ours["top1"], hits[mask].mean())


def test_edges_of_bins():
  """A confidence of exactly 1 belongs to the last bin, of 1 / 15 to the first."""
  images = np.zeros((1, 1, 15, 3), np.uint8)
  alike = scores(images, np.zeros(1, np.int32), np.ones(1, bool), 1)
  np.testing.assert_allclose(alike["ece"], 14 / 15, rtol=1e-6)
  step = jax.jit(make_eval_step(split_model(Table())[0], mean=(0.5,) * 3, std=(0.1,) * 3))
  images[..., 3, :] = 255
  sums = step({}, {}, {"image": jnp.asarray(images), "label": jnp.array([4]), "mask": jnp.ones(1, bool)})
  np.testing.assert_allclose(sums["overconfidence"], np.eye(15)[14], atol=1e-5)


def test_several_valid_labels_equal_numpy():
  """ImageNet-ReaL: a hit is a prediction among the valid labels; images without any do not count."""
  images, logits = random_split()
  rng = np.random.default_rng(2)
  valid, mask = rng.random((96, 12)) < 0.15, rng.random(96) < 0.8
  valid[:5], mask[:5] = False, True
  counted = mask & valid.any(1)
  assert valid.sum(1).max() > 1 and counted.sum() < mask.sum()
  ours = scores(images, valid, mask, 32)

  best = np.argsort(-logits, axis=1)[:, :5]
  hits = np.stack([row[b] for row, b in zip(valid, best, strict=True)])[counted]
  probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  np.testing.assert_allclose(ours["top1"], hits[:, 0].mean())
  np.testing.assert_allclose(ours["top5"], hits.any(1).mean())
  np.testing.assert_allclose(ours["loss"], -np.log((probabilities * valid).sum(1)[counted]).mean(), rtol=1e-5)
  expected = expected_calibration_error(probabilities.max(1)[counted], hits[:, 0])
  np.testing.assert_allclose(ours["ece"], expected, rtol=1e-5)


def test_one_valid_label_equals_a_class_index():
  images, _ = random_split()
  labels, mask = np.random.default_rng(3).integers(0, 12, 96).astype(np.int32), np.ones(96, bool)
  assert scores(images, labels, mask, 32) == scores(images, np.eye(12, dtype=bool)[labels], mask, 32)


@pytest.mark.parametrize("batch_size", [56, 360])
def test_whole_split_equals_numpy(tiny_config, batch_size):
  """360 images in batches of 56, the last one mostly padding, over eight devices."""
  config = tiny_config
  config.batch_size = batch_size
  dataset = datasets.open_dataset("digits", config.dataset.data_dir)
  spec = config.model
  model = registry.create_model(spec.name, num_classes=10, rngs=nnx.Rngs(3), **spec.overrides)
  _, params, stats = split_model(model)
  mesh = sharding.make_mesh(config.mesh)
  everywhere = sharding.replicated(mesh)
  evaluator = SplitEvaluator(config, dataset, model, mesh)
  ours = evaluator(jax.device_put(params, everywhere), jax.device_put(stats, everywhere))

  batches = input_pipeline.eval_batches(dataset, "test", batch_size=360, image_size=(8, 8), crop=1.0)
  whole = next(batches)
  variant = registry.get_variant(spec.name)
  logits = np.asarray(model(normalize(whole["image"], variant.mean, variant.std))[0], np.float64)
  labels = whole["label"]
  log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  ranks = np.sum(logits > logits[np.arange(360), labels][:, None], axis=-1)
  assert ours["top1"] == np.mean(ranks == 0)
  assert ours["top5"] == np.mean(ranks < 5)
  confidence = np.exp(log_probabilities.max(axis=-1))
  np.testing.assert_allclose(ours["ece"], expected_calibration_error(confidence, ranks == 0), rtol=1e-4)
  np.testing.assert_allclose(ours["loss"], -np.mean(log_probabilities[np.arange(360), labels]), rtol=1e-5)
