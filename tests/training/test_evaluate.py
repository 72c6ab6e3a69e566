"""Exact evaluation against plain NumPy."""

from flax import nnx
import jax
import numpy as np
import pytest

from vit_jax_ext.data import datasets, input_pipeline
from vit_jax_ext.models import registry
from vit_jax_ext.training import sharding
from vit_jax_ext.training.evaluate import SplitEvaluator
from vit_jax_ext.training.train_step import normalize, split_model


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
  np.testing.assert_allclose(ours["loss"], -np.mean(log_probabilities[np.arange(360), labels]), rtol=1e-5)
