"""What `analyze` and `study` print and write: trained models' attention similarity as a table, JSON and figures."""

from collections.abc import Mapping, Sequence
import functools
import os
from typing import Any

from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
import rich.table

from vit_jax_ext import config as configs
from vit_jax_ext.attention import figures, similarity
from vit_jax_ext.data import input_pipeline
from vit_jax_ext.data.datasets import open_dataset
from vit_jax_ext.models import registry
from vit_jax_ext.training.evaluate import load_weights, write_json
from vit_jax_ext.training.train import train
from vit_jax_ext.training.train_step import normalize, split_model

BATCH_SIZE = 16  # the attention maps of all blocks are in memory for this many images


def analyze(
  runs: Mapping[str | None, ml_collections.ConfigDict], output: str | None, *, threshold: float, head_threshold: float
) -> list[dict[str, Any]]:
  """Measures trained models on their evaluation splits; prints a table and writes similarity.json and figures.

  Args:
    runs: workdir -> config; None instead of a workdir for the weights of `config.pretrained`. With several, each model
      gets a folder of its own in `output`, and there is a table.json and a figure that compares them besides.
    output: folder; None for `analysis` in the first workdir, or here.
    threshold, head_threshold: see `similarity.measure_similarity`.

  Returns:
    The table's rows.

  Raises:
    UserError: no checkpoint, a model without attention maps of one size, an impossible threshold.
  """
  workdirs = {workdir and os.path.abspath(workdir): config for workdir, config in runs.items()}
  output = output or os.path.join(next(iter(workdirs)) or "", "analysis")
  summaries = []
  for workdir, config in workdirs.items():
    logging.info("measuring %s", workdir or config.pretrained)
    summary, maps = measure(config, workdir, threshold=threshold, head_threshold=head_threshold)
    summaries.append(summary)
    folder = output if len(runs) == 1 else os.path.join(output, os.path.relpath(workdir, os.path.commonpath(workdirs)))
    write_json(folder, "similarity.json", summary)
    _write_figure(folder, "similarity_against_depth.png", figures.similarity_against_depth(summary))
    _write_figure(folder, "heads_of_last_block.png", figures.heads_of_last_block(summary))
    _write_figure(folder, "attention_maps.png", figures.attention_maps(summary, maps))
  columns = ("model", "blocks", "top1", "similar_blocks", "mean_similarity")
  rows = [{column: summary[column] for column in columns} for summary in summaries]
  _print_table(rows, threshold)
  if len(rows) > 1:
    write_json(output, "table.json", rows)
    _write_figure(output, "similar_blocks.png", figures.similar_blocks_against_depth(summaries))
  return rows


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
    crop=config.dataset.crop or variant.crop,
  )
  summary, maps = similarity.measure_similarity(
    nnx.merge(split_model(model)[0], weights["params"], weights["stats"]),
    batches,
    normalize=functools.partial(normalize, mean=variant.mean, std=variant.std),
    threshold=threshold,
    head_threshold=head_threshold,
  )
  return {"weights": name, "step": step, "model": variant.model.__name__} | summary, maps


def study(
  spec: str, workdir: str, overrides: Sequence[str], output: str | None, *, threshold: float, head_threshold: float
) -> list[dict[str, Any]]:
  """Trains the runs that a config file lists in STUDY, then analyzes them together; started again, it continues.

  Args:
    spec: path of the config file.
    workdir: gets one workdir for each run.
    overrides: KEY=VALUE for every run.
    output: folder; None for `analysis` in the workdir.
    threshold, head_threshold: see `similarity.measure_similarity`.

  Returns:
    The table's rows.
  """
  similarity.check_thresholds(threshold, head_threshold)  # before hours of training
  runs = {}
  for argument in configs.read_study(spec)[1]:
    config = configs.load_config(f"{spec}:{argument}")
    configs.override(config, overrides)
    runs[os.path.join(workdir, argument.replace(",", "_"))] = config
  for folder, config in runs.items():
    logging.info("training %s", folder)
    train(config, folder)
  output = output or os.path.join(workdir, "analysis")
  return analyze(runs, output, threshold=threshold, head_threshold=head_threshold)


def _print_table(rows: Sequence[Mapping[str, Any]], threshold: float) -> None:
  table = rich.table.Table("model", "blocks", "top-1", f"blocks similar to the next ({threshold}+)", "mean similarity")
  for row in rows:
    mean = row["mean_similarity"]
    similar = f"{row['similar_blocks']} of {row['blocks']}"
    table.add_row(
      row["model"], str(row["blocks"]), f"{row['top1']:.2%}", similar, "" if mean is None else f"{mean:.3f}"
    )
  rich.console.Console(width=120).print(table)


def _write_figure(folder: str, name: str, figure) -> None:
  path = os.path.normpath(os.path.join(folder, name))
  figure.savefig(path, dpi=150)
  print(f"wrote {path}")
