"""Attention similarity of trained models, on the evaluation splits of their runs: JSON and figures."""

from collections.abc import Sequence
import functools
import os
from typing import Any

from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vit_jax_ext.attention import figures, similarity
from vit_jax_ext.data import input_pipeline
from vit_jax_ext.data.datasets import open_dataset
from vit_jax_ext.files import write_json
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import normalize, split_model
from vit_jax_ext.training.weights import load_weights
from vit_jax_ext.workdir import analysis

BATCH_SIZE = 16  # the attention maps of all blocks are in memory for this many images


def analyze(
  models: Sequence[tuple[ml_collections.ConfigDict, str | None]],
  output: str | None,
  *,
  threshold: float,
  head_threshold: float,
) -> tuple[list[dict[str, Any]], list[str]]:
  """Measures trained models on their evaluation splits, and writes similarity.json and figures.

  Args:
    models: pairs of config and workdir; None instead of a workdir for the weights of `config.pretrained`. With several,
      each model gets a folder of its own in `output`, and a table.json and a figure compare them.
    output: folder; None for `analysis` in the first workdir, or here.
    threshold, head_threshold: see `similarity.measure_similarity`.

  Returns:
    What `measure` says of each model, and the paths of all files.

  Raises:
    UserError: no checkpoint, a model without attention maps of one size, an impossible threshold.
  """
  unique = {workdir and os.path.abspath(workdir): config for config, workdir in models}
  output = output or os.path.join(next(iter(unique)) or "", analysis.FOLDER)
  summaries, paths = [], []
  for workdir, config in unique.items():
    logging.info("measuring %s", workdir or config.pretrained)
    summary, maps = measure(config, workdir, threshold=threshold, head_threshold=head_threshold)
    summaries.append(summary)
    folder = output if len(unique) == 1 else os.path.join(output, os.path.relpath(workdir, os.path.commonpath(unique)))
    paths += write(folder, summary, maps)
  if len(summaries) > 1:
    columns = ("model", "blocks", "top1", "similar_blocks", "mean_similarity")
    rows = [{column: summary[column] for column in columns} for summary in summaries]
    paths.append(write_json(output, "table.json", rows))
    paths.append(figures.save(output, "similar_blocks.png", figures.similar_blocks_against_depth(summaries)))
  return summaries, paths


def measure(
  config: ml_collections.ConfigDict, workdir: str | None, *, threshold: float, head_threshold: float
) -> tuple[dict[str, Any], np.ndarray]:
  """Returns `similarity.measure_similarity`; its summary adds weights, step and model."""
  variant = registry.get_variant(config.model.name)
  dataset = open_dataset(config.dataset.name, config.dataset.data_dir)
  model = registry.abstract_model(config.model, len(dataset.class_names))
  # A model without attention maps is refused before anything is loaded.
  images = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
  similarity.attention_maps(jax.eval_shape(lambda model, x: model(x)[1], model, images))
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  name, step, weights = load_weights(config, workdir, model, here)
  batches = input_pipeline.eval_batches(
    dataset,
    config.dataset.eval_split,
    batch_size=BATCH_SIZE,
    image_size=model.image_size,
    crop=config.dataset.crop or variant.crop_at(model.image_size),
  )
  summary, maps = similarity.measure_similarity(
    nnx.merge(split_model(model)[0], weights["params"], weights["stats"]),
    batches,
    normalize=functools.partial(normalize, mean=variant.mean, std=variant.std),
    threshold=threshold,
    head_threshold=head_threshold,
  )
  return {"weights": name, "step": step, "model": variant.model.__name__} | summary, maps


def write(folder: str, summary: dict[str, Any], maps: np.ndarray) -> list[str]:
  """Writes what `measure` returned, and draws it; returns the paths.

  The JSON file comes last: where it is, all is.
  """
  return [
    figures.save(folder, "similarity_against_depth.png", figures.similarity_against_depth(summary)),
    figures.save(folder, "heads_of_last_block.png", figures.heads_of_last_block(summary)),
    figures.save(folder, "attention_maps.png", figures.attention_maps(summary, maps)),
    write_json(folder, analysis.SIMILARITY, summary),
  ]
