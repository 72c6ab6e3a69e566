"""What would end an expensive job in its first hour, found out in seconds."""

from collections.abc import Callable, Iterator
import os
import tempfile

import jax
import ml_collections
import psutil

from vit_jax_ext.data import input_pipeline
from vit_jax_ext.data.datasets import Dataset, open_dataset
from vit_jax_ext.errors import UserError
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.pretrained import load_pretrained
from vit_jax_ext.training import accelerators
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.training.sharding import axis_sizes, bytes_per_device
from vit_jax_ext.training.train_step import activation_bytes
from vit_jax_ext.workdir import checkpoint
from vit_jax_ext.workdir.config import check_workdir


def examine(config: ml_collections.ConfigDict, workdir: str) -> Iterator[tuple[str, bool, str]]:
  """Yields (name, whether it is well, finding) for devices, dataset, model and mesh, memory, weights and workdir.

  Nothing is trained, compiled or written.
  """
  for name, check in _checks(config, workdir):
    try:
      yield name, True, check()
    except UserError as error:
      yield name, False, str(error)


def _checks(config: ml_collections.ConfigDict, workdir: str) -> Iterator[tuple[str, Callable[[], str]]]:
  """Yields (name, function that returns a finding or raises UserError), without what needs one that failed."""
  found = {}

  def devices():
    if remark := accelerators.unused():
      raise UserError(remark)
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} host(s)"

  def dataset():
    found["dataset"] = open_dataset(config.dataset.name, config.dataset.data_dir)
    return _check_dataset(config, found["dataset"])

  def experiment():
    dataset = found["dataset"]
    examples = dataset.num_examples(config.dataset.train_split)
    found["experiment"] = Experiment(config, len(dataset.class_names), examples)
    mesh = found["experiment"].mesh
    return (
      f"{config.model.name} on mesh {', '.join(f'{axis}={size}' for axis, size in axis_sizes(mesh).items())}; "
      f"{found['experiment'].total_steps:,} steps of {config.batch_size} images"
    )

  yield "devices", devices
  yield "dataset", dataset
  if "dataset" in found:
    yield "model", experiment
  if "experiment" in found:
    yield "memory", lambda: _check_memory(config, found["experiment"])
    if config.pretrained:
      yield "pretrained", lambda: str(load_pretrained(found["experiment"].model, config.pretrained))
  yield "workdir", lambda: _check_workdir(config, workdir, found.get("experiment"))


def _check_dataset(config: ml_collections.ConfigDict, dataset: Dataset) -> str:
  sizes = {split: dataset.num_examples(split) for split in (config.dataset.train_split, config.dataset.eval_split)}
  for split in sizes:  # decodes a few, so that data that is not there or is no images is found
    next(input_pipeline.eval_batches(dataset, split, batch_size=4, image_size=(32, 32), crop=1.0))
  listed = ", ".join(f"{split} {size:,}" for split, size in sizes.items())
  return f"{dataset.name}: {len(dataset.class_names)} classes; {listed}"


def _check_memory(config: ml_collections.ConfigDict, experiment: Experiment) -> str:
  device = jax.local_devices()[0]
  limit = (device.memory_stats() or {}).get("bytes_limit")
  if limit is None:  # devices that are parts of the host share its memory
    limit = psutil.virtual_memory().available // jax.local_device_count()
  state = jax.eval_shape(experiment.init)
  size = bytes_per_device(state, experiment.places)
  gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
  parts = experiment.mesh.size // experiment.mesh.shape["model"]
  batch = config.batch_size // parts // config.optimizer.accumulation_steps
  activations = 0 if config.linear_probe else activation_bytes(experiment.model, batch)
  needed = size + gradients + activations
  gib = {name: f"{value / 2**30:.2f}" for name, value in
         dict(needed=needed, size=size, gradients=gradients, activations=activations, limit=limit).items()}  # fmt: skip
  finding = (
    f"about {gib['needed']} GiB of {gib['limit']} per device: state {gib['size']}, gradients {gib['gradients']}, "
    f"activations of {batch} images {gib['activations']}"
  )
  if needed > limit:
    raise UserError(f"{finding}; set --config.optimizer.accumulation_steps, --config.model.overrides.remat=True or a "
                    "smaller --config.batch_size")  # fmt: skip
  return finding


def _check_workdir(config: ml_collections.ConfigDict, workdir: str, experiment: Experiment | None) -> str:
  check_workdir(workdir, config)
  folder = os.path.abspath(workdir)
  while not os.path.isdir(folder):
    folder = os.path.dirname(folder)
  try:
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise UserError(f"workdir {workdir} cannot be written: {error.strerror}; choose another --workdir") from None
  step = checkpoint.latest_step(workdir)
  if not step:
    return f"{workdir} can be written; the run would begin at step 0"
  if experiment:
    _, params, stats = split_model(experiment.model)
    checkpoint.check_shapes(workdir, step, {"params": params, "stats": stats})
  return f"{workdir} can be written; the run would continue at step {step}"
