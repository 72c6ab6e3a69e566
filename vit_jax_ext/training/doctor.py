"""What would end an expensive job in its first hour, found out in seconds."""

from collections.abc import Callable, Iterator
import os

import jax
import ml_collections

from vit_jax_ext import config as configs
from vit_jax_ext.data import input_pipeline
from vit_jax_ext.data.datasets import Dataset, open_dataset
from vit_jax_ext.errors import UserError
from vit_jax_ext.files import check_new_file, size
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.plan.compile import DoesNotFitError, compile_program
from vit_jax_ext.plan.kinds import Target
from vit_jax_ext.plan.memory import needs
from vit_jax_ext.pretrained import load_pretrained
from vit_jax_ext.training import accelerators
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.training.sharding import axis_sizes, bytes_per_device, limit_at_hand
from vit_jax_ext.training.train_step import activation_bytes
from vit_jax_ext.workdir import checkpoint, lock, trackers
from vit_jax_ext.workdir.config import FILE, check_workdir


def examine(
  config: ml_collections.ConfigDict, workdir: str, target: Target | None = None
) -> Iterator[tuple[str, bool, str]]:
  """Yields (name, whether it is well, finding) for devices, dataset, model, memory, weights, tracker and workdir.

  Nothing is trained or written.

  Args:
    config, workdir: of the run.
    target: devices that it is for; the step is compiled for them. By default those at hand, and nothing is compiled.
  """
  try:
    configs.check(config)
  except UserError as error:  # whatever else would stumble over it
    yield "config", False, str(error)
    return
  for name, check in _checks(config, workdir, target):
    try:
      yield name, True, check()
    except UserError as error:
      yield name, False, str(error)


def _checks(
  config: ml_collections.ConfigDict, workdir: str, target: Target | None
) -> Iterator[tuple[str, Callable[[], str]]]:
  """Yields (name, function that returns a finding or raises UserError), without what needs one that failed."""
  found = {}

  def devices():
    if remark := accelerators.unused():
      raise UserError(remark)
    devices = target.devices if target else jax.devices()
    hosts = len({device.process_index for device in devices})
    return f"{len(devices)} x {devices[0].device_kind}, {hosts} host(s)"

  def dataset():
    found["dataset"] = open_dataset(config.dataset.name, config.dataset.data_dir)
    return _check_dataset(config, found["dataset"])

  def experiment():
    dataset = found["dataset"]
    examples = dataset.num_examples(config.dataset.train_split)
    facts = len(dataset.class_names), examples, dataset.multi_label
    found["experiment"] = Experiment(config, *facts, devices=target.devices if target else None)
    input_pipeline.train_augmentation(config.augment, (32, 32), (0, 0, 0), config.dataset.shift, config.dataset.scale)
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
    yield "memory", lambda: _check_memory(config, found["experiment"], target)
    if config.pretrained:
      yield "pretrained", lambda: str(load_pretrained(found["experiment"].model, config.pretrained))
  if config.tracker:
    yield "tracker", lambda: trackers.check_installed(config.tracker)
  yield "workdir", lambda: _check_workdir(config, workdir, found.get("experiment"))


def _check_dataset(config: ml_collections.ConfigDict, dataset: Dataset) -> str:
  splits = config.dataset.train_split, config.dataset.eval_split
  findings = [dataset.describe(*splits), *dataset.remarks]
  for split in dict.fromkeys(splits):
    decoded, bad = input_pipeline.undecodable(dataset, split)
    allowed = config.dataset.max_unreadable * dataset.num_examples(split)
    if bad:
      rest = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
      findings.append(f"{split}: {len(bad)} of {decoded} that were tried cannot be decoded: {', '.join(bad[:5])}{rest}")
    if len(bad) > allowed or (bad and len(bad) == decoded):
      raise UserError(f"{'; '.join(findings)}; mend them, or raise --config.dataset.max_unreadable")
  return "; ".join(findings)


def _check_memory(config: ml_collections.ConfigDict, experiment: Experiment, target: Target | None) -> str:
  if target:
    return _check_compiled_memory(config, experiment, target)
  limit = limit_at_hand()
  state = jax.eval_shape(experiment.init)
  held = bytes_per_device(state, experiment.places)
  gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
  parts = experiment.mesh.size // experiment.mesh.shape["model"]
  batch = config.batch_size // parts // config.optimizer.accumulation_steps
  activations = 0 if config.linear_probe else activation_bytes(experiment.model, batch)
  needed = held + gradients + activations
  finding = (
    f"about {size(needed)} of {size(limit)} per device: state {size(held)}, gradients {size(gradients)}, "
    f"activations of {batch} images {size(activations)}"
  )
  if needed > limit:
    raise UserError(f"{finding}; set --config.optimizer.accumulation_steps, --config.model.overrides.remat=True or a "
                    "smaller --config.batch_size")  # fmt: skip
  return finding


def _check_compiled_memory(config: ml_collections.ConfigDict, experiment: Experiment, target: Target) -> str:
  try:
    found = needs(compile_program(config, experiment), target)
  except DoesNotFitError as error:
    found = {"total": error.needed, "limit": error.limit}
  parts = ", ".join(f"{name} {size(part)}" for name, part in found.items() if part and name not in ("total", "limit"))
  limit = f" of {size(found['limit'])}" if found["limit"] else ""
  finding = f"{size(found['total'])}{limit} on each device of {target.name}{': ' if parts else ''}{parts}"
  if found["limit"] and found["total"] > found["limit"]:
    raise UserError(f"{finding}; the command plan, with the same flags, says what would make it fit")
  return finding


def _check_workdir(config: ml_collections.ConfigDict, workdir: str, experiment: Experiment | None) -> str:
  check_workdir(workdir, config)
  check_new_file(os.path.join(workdir, FILE), "workdir")
  lock.check(workdir)
  step = checkpoint.latest_step(workdir)
  if not step:
    return f"{workdir} can be written; the run would begin at step 0"
  if experiment:
    _, params, stats = split_model(experiment.model)
    checkpoint.check_shapes(workdir, step, {"params": params, "stats": stats})
  return f"{workdir} can be written; the run would continue at step {step}"
