"""The training loop: read top to bottom."""

import contextlib
import dataclasses
import functools
import time

from absl import logging
from clu import parameter_overview
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections

from vit_jax_ext.config import claim_workdir
from vit_jax_ext.console import Progress
from vit_jax_ext.data import input_pipeline
from vit_jax_ext.data.datasets import open_dataset
from vit_jax_ext.errors import UserError
from vit_jax_ext.models import registry
from vit_jax_ext.pretrained import load_pretrained
from vit_jax_ext.training import checkpoint, metrics, mixup, optimizer, sharding
from vit_jax_ext.training.evaluate import SplitEvaluator
from vit_jax_ext.training.losses import attention_cosine_loss
from vit_jax_ext.training.train_step import TrainState, init_state, make_train_step, split_model


def number_of_steps(config: ml_collections.ConfigDict, examples: int) -> int:
  """Returns `total_steps`, or `total_epochs` in steps.

  Raises:
    UserError: neither or both are given.
  """
  if (config.total_steps is None) == (config.total_epochs is None):
    raise UserError(
      f"config.total_steps={config.total_steps} and config.total_epochs={config.total_epochs}: give one of them"
    )
  return config.total_steps or round(config.total_epochs * examples / config.batch_size)


def _load_pretrained(state: TrainState, graphdef: nnx.GraphDef, source: str | bool) -> TrainState:
  """Returns the state with pretrained weights, averages included, where its own lie."""
  model = nnx.merge(graphdef, state.params, state.stats)
  logging.info("%s", load_pretrained(model, source))
  _, params, stats = split_model(model)
  ema = jax.tree.map(jnp.copy, {"params": params, "stats": stats}) if state.ema else {}
  return dataclasses.replace(state, params=params, stats=stats, ema=ema)


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
  """Trains to the last step, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: see configs/common.py.
    workdir: gets config.json, checkpoints/, metrics.jsonl and TensorBoard files.

  Returns:
    The metrics of the last evaluation.

  Raises:
    UserError: whatever does not fit in the config, the dataset or the workdir; nothing is then overwritten.
  """
  # The dataset, which says how many classes there are and how long an epoch is.
  data = config.dataset
  dataset = open_dataset(data.name, data.data_dir)
  num_classes = len(dataset.class_names)
  examples = dataset.num_examples(data.train_split)
  dataset.num_examples(data.eval_split)
  total_steps = number_of_steps(config, examples)

  # The mesh, the model's structure and the optimizer. Nothing is allocated yet.
  mesh = sharding.make_mesh(config.mesh)
  replicated, by_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  sharding.check_batch_size("batch_size", config.batch_size, mesh, config.optimizer.accumulation_steps)
  variant = registry.get_variant(config.model.name)

  def create_model() -> nnx.Module:
    return registry.create_model(
      config.model.name, num_classes=num_classes, rngs=nnx.Rngs(config.seed), **config.model.overrides
    )

  model = nnx.eval_shape(create_model)
  regularizer = config.cosine_regularizer
  if regularizer.weight:  # the training step refuses a model without attention maps, but after the workdir is claimed
    images = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    jax.eval_shape(lambda model, x: attention_cosine_loss(model(x)[1], regularizer.blocks), model, images)
  schedule = optimizer.learning_rate_schedule(
    peak=config.optimizer.learning_rate,
    initial=config.optimizer.initial_learning_rate,
    floor=config.optimizer.final_learning_rate,
    warmup_steps=config.optimizer.warmup_steps,
    total_steps=total_steps,
  )
  tx = optimizer.adamw(
    schedule,
    weight_decay=config.optimizer.weight_decay,
    no_decay=variant.no_decay,
    clip_norm=config.optimizer.clip_norm,
    layer_decay=config.optimizer.layer_decay,
    linear_probe=config.linear_probe,
  )

  # The state: newest checkpoint, pretrained weights, or fresh. It is created where it will lie.
  init = jax.jit(lambda: init_state(create_model, tx, config.ema_decay > 0), out_shardings=replicated)
  first_step = checkpoint.latest_step(workdir)
  if not first_step:  # before the workdir is claimed, for the weights may not fit
    state = init()
    if config.pretrained:
      state = _load_pretrained(state, split_model(model)[0], config.pretrained)
  claim_workdir(workdir, config)
  checkpoints = checkpoint.open_checkpoints(workdir, keep_last=config.checkpoint.keep_last)
  if first_step:
    state = checkpoint.restore(checkpoints, first_step, checkpoint.abstract(jax.eval_shape(init), replicated))

  logging.info(
    "%s: %s parameters; step %d of %d, %d images each, on %d device(s); workdir %s",
    config.model.name,
    f"{parameter_overview.count_parameters(state.params):,}",
    first_step,
    total_steps,
    config.batch_size,
    mesh.size,
    workdir,
  )

  # The compiled step, the evaluation and the batches.
  augment = functools.partial(
    mixup.augment,
    num_classes=num_classes,
    mixup=config.augment.mixup,
    cutmix=config.augment.cutmix,
    switch_probability=config.augment.switch_probability,
    mixing_batch=config.augment.mixing_batch,
    erasing=config.augment.erasing,
    erase_mixed=config.augment.erase_mixed,
  )
  train_step = jax.jit(
    make_train_step(
      split_model(model)[0],
      tx,
      mean=variant.mean,
      std=variant.std,
      seed=config.seed,
      label_smoothing=config.label_smoothing,
      cosine_weight=regularizer.weight,
      cosine_blocks=regularizer.blocks,
      ema_decay=config.ema_decay,
      accumulation_steps=config.optimizer.accumulation_steps,
      linear_probe=config.linear_probe,
      augment=augment,
    ),
    in_shardings=(replicated, by_batch),
    out_shardings=replicated,
    donate_argnums=0,
  )
  evaluator = SplitEvaluator(config, dataset, model, mesh)

  def evaluate_state() -> dict[str, float]:
    results = {f"eval/{name}": value for name, value in evaluator(state.params, state.stats).items()}
    if state.ema:
      results |= {f"eval_ema/{name}": value for name, value in evaluator(**state.ema).items()}
    return results

  batches = input_pipeline.train_batches(
    dataset,
    data.train_split,
    batch_size=config.batch_size // jax.process_count(),
    image_size=model.image_size,
    seed=config.seed,
    first_step=first_step,
    total_steps=total_steps,
    shuffle_buffer=data.shuffle_buffer,
    shift=data.shift,
    scale=data.scale,
  )
  batches = input_pipeline.prefetch_to_devices(batches, by_batch)

  writer = metrics.create_writer(workdir, first_step)
  progress = Progress(first_step, total_steps)
  results = {}
  with checkpoints, contextlib.closing(writer), progress:
    for step, batch in enumerate(batches, first_step + 1):
      state, measured = train_step(state, batch)
      progress.step(step)
      if step == first_step + 1:
        jax.block_until_ready(measured)  # images/s shall not count the compilation
        clock_step, clock = step, time.monotonic()

      last = step == total_steps
      if last or step % config.log_every_steps == 0:
        scalars = {f"train/{name}": value.item() for name, value in jax.device_get(measured).items()}
        scalars["train/learning_rate"] = float(schedule(step - 1))
        if step > clock_step:
          seconds = time.monotonic() - clock
          scalars["train/images_per_second"] = (step - clock_step) * config.batch_size / seconds
        writer.write_scalars(step, scalars)
        progress.log(step, scalars)

      evaluated = last or step % config.eval_every_steps == 0
      if evaluated:
        results = evaluate_state()
        writer.write_scalars(step, results)
      if evaluated or step % config.checkpoint.every_steps == 0:
        checkpoint.save(checkpoints, step, state, results if evaluated else None)
      if evaluated or step % config.log_every_steps == 0:
        clock_step, clock = step, time.monotonic()
  results = results or evaluate_state()
  logging.info("finished: %s", ", ".join(f"{name} {value:.4f}" for name, value in results.items()))
  return results
