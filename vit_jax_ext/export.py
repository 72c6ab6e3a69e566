"""The export command: a model for use elsewhere, as a StableHLO program and as the authors' safetensors.

The program holds its weights and takes uint8 images, which it normalises itself: mean and standard deviation belong to
the weights, and differ between families. It takes any number of images, on CPU, CUDA and TPU.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import ml_collections
import numpy as np

from vit_jax_ext import config as configs
from vit_jax_ext.errors import UserError
from vit_jax_ext.models import registry
from vit_jax_ext.pretrained import load_pretrained, read_source, save_pretrained
from vit_jax_ext.training import train_step

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # of logits computed twice, relative to the largest


def export(name: str | None, workdir: str | None, overrides: Sequence[str], output: str | None) -> float:
  """Writes NAME.stablehlo, NAME.safetensors and NAME.json, which describes them, and checks the first two.

  Both are loaded back from their files, and must give the same logits.

  Args:
    name: the variant; its weights are those of the override `pretrained`, else random ones.
    workdir: a run's instead, whose best checkpoint is taken, averaged weights where it has some.
    overrides: KEY=VALUE of `pretrained` and of model.overrides.
    output: folder.

  Returns:
    The largest difference between the logits.

  Raises:
    UserError: neither or both of `name` and `workdir`, no folder, files that exist, weights that do not fit.
    RuntimeError: the logits differ.
  """
  if bool(name) == bool(workdir):
    raise UserError(f"--model={name} and --workdir={workdir}: give one of them to export")
  if not output:
    raise UserError("an export is written into a folder; give --output=DIR")
  if workdir:
    config = configs.read_workdir_config(workdir)
  else:
    model = {"name": name, "overrides": {}}
    config = ml_collections.ConfigDict({"model": model, "dataset": {"crop": None}, "pretrained": None})
  trained = config.pretrained  # a run may have begun with other weights
  configs.override(config, overrides)
  if workdir and config.pretrained != trained:
    raise UserError(f"--workdir={workdir} and --config.pretrained both name weights; give one of them")
  spec = config.model
  registry.get_variant(spec.name)
  kinds = ("stablehlo", "safetensors", "json")
  paths = {kind: pathlib.Path(output) / f"{spec.name}.{kind}" for kind in kinds}
  for path in paths.values():
    if path.exists():
      raise UserError(f"{path} exists and is not overwritten; choose another --output")

  model, num_classes, source = _load(spec, workdir or config.pretrained)
  program = to_stablehlo(model)
  try:
    os.makedirs(output, exist_ok=True)
    paths["stablehlo"].write_bytes(program.serialize())
    description = _describe(model, program, config, source)
    paths["json"].write_text(json.dumps(description, indent=2) + "\n")
  except OSError as error:
    raise UserError(f"{output} cannot be written: {error.strerror}; choose another --output") from None
  save_pretrained(model, paths["safetensors"])
  for path in paths.values():
    print(f"wrote {path}, {path.stat().st_size / 1e6:,.1f} MB")
  difference = compare_logits(paths["stablehlo"], paths["safetensors"], spec, num_classes)
  print(f"{spec.name}, {source}; loaded back, the two files' logits differ by at most {difference:.2g}")
  return difference


def _load(spec: Mapping[str, Any], source: Any) -> tuple[nnx.Module, int, str]:
  """Returns the model, its number of classes, and what its weights are; None as source means random ones."""
  if source is None:
    return registry.create_model(spec["name"], rngs=nnx.Rngs(0), **spec["overrides"]), 1000, "random weights"
  weights, where = read_source(source, spec["name"])
  num_classes = len(weights.get("head.bias", weights.get("head.0.bias", ())))
  model = registry.abstract_model(spec, num_classes)
  load_pretrained(model, weights)
  return model, num_classes, where


def predictor(model: nnx.Module) -> Callable[[jax.Array], jax.Array]:
  """Returns a function: uint8 images (B, H, W, 3) to logits (B, classes), or to pooled features without a head."""
  variant = registry.get_variant(model.variant)
  graphdef, params, stats = train_step.split_model(model)

  def predict(images: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params, stats)(train_step.normalize(images, variant.mean, variant.std))[0]

  return predict


def to_stablehlo(model: nnx.Module) -> jax.export.Exported:
  """Returns `predictor` as a StableHLO program for any number of images, on PLATFORMS."""
  (batch,) = jax.export.symbolic_shape("batch")
  images = jax.ShapeDtypeStruct((batch, *model.image_size, 3), jnp.uint8)
  return jax.export.export(jax.jit(predictor(model)), platforms=PLATFORMS)(images)


def _describe(
  model: nnx.Module, program: jax.export.Exported, config: ml_collections.ConfigDict, source: str
) -> dict[str, Any]:
  variant = registry.get_variant(config.model.name)
  crop = config.dataset.crop or variant.crop
  height, width = model.image_size
  (logits,) = program.out_avals
  return {
    "model": config.model.name,
    "overrides": config.model.overrides.to_dict(),
    "weights": source,
    "input": {"dtype": "uint8", "shape": ["batch", height, width, 3], "channels": "RGB"},
    "preparation": f"resize bicubically, antialiased, so that {height}x{width} is the central {crop:g}; cut that out",
    "normalisation inside": {"mean": variant.mean, "std": variant.std},
    "output": {"dtype": str(logits.dtype), "shape": ["batch", logits.shape[1]]},
    "platforms": PLATFORMS,
    "jax": jax.__version__,
  }


def compare_logits(program: pathlib.Path, weights: pathlib.Path, spec: Mapping[str, Any], num_classes: int) -> float:
  """Returns the largest difference between the logits of a program, and of the model with weights, from their files.

  On the CPU, where both are computed in the same way.

  Raises:
    RuntimeError: it is more than TOLERANCE, or they are not finite.
  """
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    model = registry.abstract_model(spec, num_classes)
    load_pretrained(model, weights)
    images = np.random.default_rng(0).integers(0, 256, (3, *model.image_size, 3), np.uint8)
    expected = np.asarray(jax.jit(predictor(model))(images))
    logits = np.asarray(jax.export.deserialize(bytearray(program.read_bytes())).call(images))
  difference = np.abs(logits - expected).max()
  if not difference <= TOLERANCE * np.abs(expected).max():
    raise RuntimeError(f"{program} and {weights} give logits that differ by {difference}; do not use them")
  return float(difference)
