"""A model for use elsewhere, as a StableHLO program and as the authors' safetensors.

The program holds its weights and takes uint8 images, which it normalises itself: mean and standard deviation belong to
the weights, and differ between families. It takes any number of images, on CPU, CUDA and TPU.
"""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.errors import UserError
from vit_jax_ext.files import replace, write_json
from vit_jax_ext.models import functional, registry
from vit_jax_ext.pretrained import (
  aspect_of,
  count_classes,
  fill,
  load_pretrained,
  read_source,
  redescribe,
  save_pretrained,
)

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # of logits computed twice, relative to the largest


@dataclasses.dataclass(frozen=True)
class Export:
  """What `export` has written.

  Attributes:
    paths: of the program, of the weights and of the description.
    source: of the weights, in words.
    difference: the largest between the logits of program and weights, both loaded back.
  """

  paths: list[str]
  source: str
  difference: float


def export(spec: Mapping[str, Any], weights: Any, output: str, *, crop: float | None = None) -> Export:
  """Writes NAME.stablehlo, NAME.safetensors and NAME.json, which describes them, and checks the first two.

  Both are loaded back from their files, and must give the same logits.

  Args:
    spec: `name` and `overrides` of the model, as in config.model.
    weights: see `load_pretrained`; of a workdir the best checkpoint is taken, averaged weights where it has some. None
      for random weights.
    output: folder.
    crop: share of a side that evaluation sees; None for what was published at the model's size.

  Raises:
    UserError: an unknown model, files that exist, weights that do not fit, an unwritable folder.
    RuntimeError: the logits differ.
  """
  registry.get_variant(spec["name"])
  paths = {kind: pathlib.Path(output) / f"{spec['name']}.{kind}" for kind in ("stablehlo", "safetensors", "json")}
  for path in paths.values():
    if path.exists():
      raise UserError(f"{path} exists and is not overwritten; choose another --output")

  model, num_classes, source = _load(spec, weights)
  program = to_stablehlo(model)
  with replace(output, paths["stablehlo"].name, binary=True) as file:
    file.write(program.serialize())
  about = redescribe(weights, source, spec, num_classes, crop)
  save_pretrained(model, paths["safetensors"], about)
  write_json(output, paths["json"].name, about | _describe(model, program, source, about["crop"]))
  difference = compare_logits(paths["stablehlo"], paths["safetensors"], spec, num_classes)
  return Export([str(path) for path in paths.values()], source, difference)


def _load(spec: Mapping[str, Any], source: Any) -> tuple[nnx.Module, int, str]:
  """Returns the model, its number of classes, and what its weights are; None as source means random ones."""
  if source is None:
    return registry.create_model(spec["name"], rngs=nnx.Rngs(0), **spec["overrides"]), 1000, "random weights"
  weights, where = read_source(source, spec["name"], lambda: registry.abstract_model(spec, 0))
  num_classes = count_classes(weights)
  model = registry.abstract_model(spec, num_classes)
  fill(model, weights, where, aspect=aspect_of(source))
  return model, num_classes, where


def predictor(model: nnx.Module) -> Callable[[jax.Array], jax.Array]:
  """Returns a function: uint8 images (B, H, W, 3) to logits (B, classes), or to pooled features without a head."""
  variant = registry.get_variant(model.variant)
  graphdef, params, stats = functional.split_model(model)

  def predict(images: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params, stats)(functional.normalize(images, variant.mean, variant.std))[0]

  return predict


def to_stablehlo(model: nnx.Module) -> jax.export.Exported:
  """Returns `predictor` as a StableHLO program for any number of images, on PLATFORMS."""
  (batch,) = jax.export.symbolic_shape("batch")
  images = jax.ShapeDtypeStruct((batch, *model.image_size, 3), jnp.uint8)
  return jax.export.export(jax.jit(predictor(model)), platforms=PLATFORMS)(images)


def _describe(model: nnx.Module, program: jax.export.Exported, source: str, crop: float) -> dict[str, Any]:
  height, width = model.image_size
  (logits,) = program.out_avals
  return {
    "weights": source,
    "input": {"dtype": "uint8", "shape": ["batch", height, width, 3], "channels": "RGB"},
    "preparation": f"resize bicubically, antialiased, so that {height}x{width} is the central {crop:g}; cut that out",
    "normalisation": "inside",
    "output": {"dtype": str(logits.dtype), "shape": ["batch", logits.shape[1]]},
    "platforms": PLATFORMS,
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
