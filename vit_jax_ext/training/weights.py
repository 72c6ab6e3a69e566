"""Trained weights and their classes, of a run or of a file; no TensorFlow, as long as they tell their classes."""

import os
from typing import Any

from absl import logging
from flax import nnx
import jax
import ml_collections

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.pretrained import load_pretrained, read_description
from vit_jax_ext.workdir import checkpoint, description
from vit_jax_ext.workdir.config import read_workdir_config

DEFAULT_THRESHOLD = 0.5  # probability from which an image has a label, where `evaluate` has found none


def load_weights(
  config: ml_collections.ConfigDict,
  workdir: str | None,
  model: nnx.Module,
  shardings: Any,
  *,
  ema: bool = False,
) -> tuple[str, int | None, dict[str, Any]]:
  """Returns what the weights are, in words; the step of a run that they are from; and {"params", "stats"}.

  Args:
    config: the experiment's.
    workdir: a run's, whose best checkpoint is taken; None for the weights of `config.pretrained`.
    model: the abstract model.
    shardings: where the arrays go, one for all or a tree like the weights.
    ema: a run's averaged weights instead of the raw ones.

  Raises:
    UserError: no checkpoint, or pretrained weights that do not fit, be it only for another number of classes.
  """
  if workdir:
    step, weights = checkpoint.restore_weights(workdir, model, shardings, ema=ema)
    return f"{workdir}, step {step}", step, weights
  report = load_pretrained(model, config.pretrained, keep_classifier=True)
  logging.info("%s", report)
  _, params, stats = split_model(model)
  return report.source, None, jax.device_put({"params": params, "stats": stats}, shardings)


def load_run(source: str | os.PathLike, *, ema: bool | None = None) -> tuple[nnx.Module, dict[str, Any]]:
  """Returns the model of a run with the weights of its best checkpoint, on the first device, and what the run is.

  Args:
    source: its workdir, or a .safetensors file that `convert` or `export` made of one or of other weights.
    ema: its averaged weights, or not; None: where there are some. A file has one kind.

  Returns:
    The model, and the description: class_names, multi_label, image_size, mean, std, crop (so `preprocess` takes it);
    of several labels `thresholds`, the weights'. Of a run also starts, each with dataset, command, versions, ..., and
    `step` and `ema`, the weights'.

  Raises:
    UserError: there is no run, no checkpoint, or it has no averages; a file that does not tell its model.
  """
  workdir = os.fspath(source)
  if os.path.isfile(workdir):
    return _load_file(workdir)
  config = read_workdir_config(workdir)
  ema = config.ema_decay > 0 if ema is None else ema
  if ema and not config.ema_decay:
    raise UserError(f"run {workdir} has no averaged weights, config.ema_decay is 0; leave out ema")
  about = read_classes(config, workdir)
  model = registry.abstract_model(config.model, len(about["class_names"]))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  step, weights = checkpoint.restore_weights(workdir, model, place, ema=ema)
  nnx.update(model, weights["params"], weights["stats"])
  thresholds = description.thresholds(about, step, ema=ema)
  return model, about | {"thresholds": thresholds, "step": step, "ema": ema, "interpolation": "bicubic"}


def _load_file(path: str) -> tuple[nnx.Module, dict[str, Any]]:
  about = read_description(path)
  if about is None:
    raise UserError(f"weights {path} do not tell their model; create it, and fill it with load_pretrained")
  spec = {"name": about["model"], "overrides": about["overrides"]}
  model = registry.create_model(spec["name"], num_classes=about["num_classes"], rngs=nnx.Rngs(0), **spec["overrides"])
  load_pretrained(model, path, keep_classifier=True)
  return model, about | {"interpolation": "bicubic"}


def read_classes(config: ml_collections.ConfigDict, workdir: str | None) -> dict[str, Any]:
  """Returns what weights tell of themselves, see `description.describe`, with the names of their classes for certain.

  They are those of the run or of the file's metadata; of other weights, and of runs that did not keep them, class_names
  and multi_label are those of the config's dataset today.

  Args:
    config, workdir: see `load_weights`.
  """
  about = (description.read(workdir) if workdir else read_description(config.pretrained)) or {}
  if about.get("class_names"):
    return about
  from vit_jax_ext.data.datasets import open_dataset  # and with it TensorFlow, which all others can do without

  dataset = open_dataset(config.dataset.name, config.dataset.data_dir)
  return about | {"class_names": [*dataset.class_names], "multi_label": dataset.multi_label}
