"""The training loop: read top to bottom."""

from collections.abc import Callable, Mapping
import concurrent.futures
import contextlib
import dataclasses
import time

from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections

from vit_jax_ext import config as configs
from vit_jax_ext.console import Progress
from vit_jax_ext.data import input_pipeline
from vit_jax_ext.data.datasets import open_dataset
from vit_jax_ext.errors import Preempted
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.pretrained import load_pretrained
from vit_jax_ext.training import ahead, distributed, faults
from vit_jax_ext.training.evaluate import SplitEvaluator
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.training.train_step import TrainState
from vit_jax_ext.training.waiting import InputWait
from vit_jax_ext.workdir import checkpoint, description, lock, trackers
from vit_jax_ext.workdir.config import claim_workdir
from vit_jax_ext.workdir.metrics import Means
from vit_jax_ext.workdir.writers import open_writer


def _load_pretrained(state: TrainState, graphdef: nnx.GraphDef, source: str | bool) -> TrainState:
  """Returns the state with pretrained weights, averages included, where its own lie."""
  model = nnx.merge(graphdef, state.params, state.stats)
  logging.info("%s", load_pretrained(model, source))
  _, params, stats = split_model(model)
  ema = jax.tree.map(jnp.copy, {"params": params, "stats": stats}) if state.ema else {}
  return dataclasses.replace(state, params=params, stats=stats, ema=ema)


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  new_progress: Callable[[int, int], Progress] = Progress,
  compiled: str | None = None,
) -> dict[str, float]:
  """Trains to the last step, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: see configs/common.py.
    workdir: gets config.json, checkpoints/, metrics.jsonl, TensorBoard files and those of `config.tracker`.
    new_progress: called with the step from which the training goes on and the last one; by default a bar of its own.
    compiled: a file of programs that are taken where they fit, see `ahead.py`.

  Returns:
    The metrics of the last evaluation.

  Raises:
    UserError: whatever does not fit in the config, the dataset or the workdir, in which another process may be writing;
      nothing is then overwritten.
    RunError: the workdir cannot be written any more, or the loss is not finite.
    Preempted: SIGTERM came, and the state is saved.
  """
  configs.check(config)
  if config.tracker:
    trackers.check_installed(config.tracker)
  with contextlib.nullcontext() if jax.process_index() else lock.hold(workdir):
    return _train(config, workdir, new_progress, compiled)


def told(scores: Mapping[str, float]) -> str:
  """Returns scores for a line of the log."""
  return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def _train(
  config: ml_collections.ConfigDict,
  workdir: str,
  new_progress: Callable[[int, int], Progress],
  compiled: str | None,
) -> dict[str, float]:
  # The dataset says how many classes there are and how long an epoch is; nothing is allocated yet.
  data = config.dataset
  dataset = open_dataset(data.name, data.data_dir, distributed.told_by_first if jax.process_count() > 1 else None)
  found = dataset.describe(data.train_split, data.eval_split)  # refused now if there are no such splits
  facts = len(dataset.class_names), dataset.num_examples(data.train_split)
  experiment = Experiment(config, *facts, dataset.multi_label)
  model, total_steps = experiment.model, experiment.total_steps
  init, train_step = experiment.init, experiment.train_step
  augment = input_pipeline.train_augmentation(
    config.augment, model.image_size, experiment.variant.mean, data.shift, data.scale
  )
  if compiled:
    init, train_step = ahead.load(compiled, experiment, config, *facts)

  # The state: newest checkpoint, pretrained weights, or fresh. It is created where it will lie.
  first_step, damaged = checkpoint.inspect(workdir)
  if not first_step:  # before the workdir is claimed, for the weights may not fit
    state = init()
    if config.pretrained:
      state = _load_pretrained(state, split_model(model)[0], config.pretrained)
  with distributed.first_process_first("workdir"):
    was = claim_workdir(workdir, config)
    if not jax.process_index():
      names = dataset.class_names
      about = description.describe(config.model, len(names), names, data.crop, dataset.multi_label)
      description.claim(workdir, about, first_step, data.name, dataset.version)
  if first_step:
    like = checkpoint.abstract(jax.eval_shape(experiment.init), experiment.places)
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
      if not compiled:
        compiling = beside.submit(lambda: ahead.lower_train_step(experiment, config.batch_size).compile())
      state = TrainState.from_checkpoint(checkpoint.restore(workdir, first_step, like.checkpoint_items()))
    if not compiled:
      train_step = compiling.result()
  with distributed.first_process_first("damaged"):  # by now all processes have inspected them
    checkpoint.set_aside(workdir, damaged)

  for line in (found, *dataset.remarks):
    logging.info("%s", line)
  logging.info(
    "%s: %s parameters; step %d of %d, %d images each, on %d device(s); workdir %s",
    config.model.name,
    f"{sum(param.size for param in jax.tree.leaves(state.params)):,}",
    first_step,
    total_steps,
    config.batch_size,
    experiment.mesh.size,
    workdir,
  )

  if was:
    rates = [float(experiment.schedule(step)) for step in (first_step, total_steps - 1)]
    logging.info(
      "the run had %s and goes on to step %d; the learning rate is now that of %d steps, from %.3g to %.3g",
      was, total_steps, total_steps, *rates,
    )  # fmt: skip
  if experiment.layout.remarks():
    logging.info("mesh: %s", experiment.layout.remarks())

  evaluator = SplitEvaluator(config, dataset, model, experiment.mesh)

  def evaluate_state() -> dict[str, float]:
    scores = evaluator(state.params, state.stats, on_batch=preemption.check)
    results = {f"eval/{name}": value for name, value in scores.items()}
    if state.ema:
      scores = evaluator(**state.ema, on_batch=preemption.check)
      results |= {f"eval_ema/{name}": value for name, value in scores.items()}
    return results

  batches = input_pipeline.train_batches(
    dataset,
    data.train_split,
    batch_size=config.batch_size,
    rows=input_pipeline.local_rows(experiment.by_batch, config.batch_size),
    image_size=model.image_size,
    seed=config.seed,
    first_step=first_step,
    total_steps=total_steps,
    shuffle_buffer=data.shuffle_buffer,
    augment=augment,
    repeats=config.augment.repeats,
    max_unreadable=data.max_unreadable,
  )
  batches = input_pipeline.prefetch_to_devices(batches, experiment.by_batch)

  results, saved_step, preemption = {}, first_step, faults.Preemption()
  means, waiting = Means(checkpoint.read_sums(workdir, first_step)), InputWait()
  finite = faults.FiniteWatch(experiment.schedule, skip=config.skip_nonfinite)
  with (
    checkpoint.open_checkpoints(workdir, keep_last=config.checkpoint.keep_last) as checkpoints,
    open_writer(workdir, first_step, config) as writer,
    new_progress(first_step, total_steps) as progress,
    preemption,
  ):
    try:
      due = first_step == total_steps or first_step % config.eval_every_steps == 0
      if first_step and due and checkpoints.metrics(first_step) is None:  # SIGTERM came in the midst of it
        results = evaluate_state()
        writer.write_scalars(first_step, results)
        checkpoint.add_metrics(checkpoints, first_step, results)
      for step, batch in enumerate(batches, first_step + 1):
        preemption.check()
        waiting.came()
        state, measured = train_step(state, batch)
        waiting.started(measured["loss"])
        finite.add(step, measured)
        means.add(measured)
        progress.step(step)
        if step == first_step + 1:
          jax.block_until_ready(measured)  # images/s shall not count the compilation
          waiting.pause()
          clock_step, clock = step, time.monotonic()

        last = step == total_steps
        logged = last or step % config.log_every_steps == 0
        evaluated = last or step % config.eval_every_steps == 0
        saved = evaluated or step % config.checkpoint.every_steps == 0
        if logged or saved:
          finite.check()
        if logged:
          scalars = {f"train/{name}": mean for name, mean in means.take().items()}
          scalars["train/learning_rate"] = float(experiment.schedule(step - 1))
          shown = {}
          if step > clock_step:
            seconds = (time.monotonic() - clock) / (step - clock_step)
            scalars["train/images_per_second"] = config.batch_size / seconds
            waited = waiting.seconds() / (time.monotonic() - clock)
            waiting.tell(waited)
            shown = {"seconds_left": (total_steps - step) * seconds, "input_wait": waited}
          writer.write_scalars(step, scalars)
          progress.log(step, scalars | shown)
        if evaluated:
          results = evaluate_state()
          writer.write_scalars(step, results)
          if not last:  # which the end tells
            logging.info("step %d/%d  %s", step, total_steps, told(results))
        if saved:
          scores = results if evaluated else None
          checkpoint.save(checkpoints, step, state.checkpoint_items(), scores, means.count())
          saved_step = step
        if logged or evaluated:
          waiting.pause()
          clock_step, clock = step, time.monotonic()
      results = results or evaluate_state()
    except Preempted:
      finite.check()
      step = int(state.step)
      if step > saved_step:
        checkpoint.save(checkpoints, step, state.checkpoint_items(), None, means.count())
      raise Preempted(f"preempted at step {step} of {total_steps}; the same command continues from there") from None
  logging.info("finished: %s", told(results))
  return results
