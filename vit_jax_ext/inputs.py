"""What a model sees: images from files or arrays as its evaluation prepares them, and the names of its classes.

No TensorFlow: Pillow decodes, NumPy resizes, to the very pixels of `data.preprocess`.
"""

from collections.abc import Mapping, Sequence
import importlib.resources
import os
from typing import Any

from flax import nnx
import numpy as np

from vit_jax_ext.errors import UserError
from vit_jax_ext.images import read_image, resize_and_center_crop
from vit_jax_ext.models import registry

Images = str | os.PathLike | np.ndarray | Sequence[str | os.PathLike | np.ndarray]


def data_config(model: str | nnx.Module) -> dict[str, Any]:
  """Returns what a model takes: image_size, (height, width); mean, std, of images in [0, 1]; crop; interpolation.

  Args:
    model: one of `list_models()`, at the size that it was published for, or a model of `create_model`.

  Raises:
    UserError: the name is unknown.
  """
  name = model if isinstance(model, str) else model.variant
  variant = registry.get_variant(name)
  image_size = (variant.image_size,) * 2 if isinstance(model, str) else tuple(model.image_size)
  return {
    "image_size": image_size,
    "mean": variant.mean,
    "std": variant.std,
    "crop": variant.crop_at(image_size),
    "interpolation": "bicubic",
  }


def preprocess(images: Images, config: str | nnx.Module | Mapping[str, Any]) -> np.ndarray:
  """Returns what a model is called with, float32 (B, height, width, 3): resized, cropped at the centre, normalised.

  Args:
    images: a file, or an array, uint8 (H, W, 3) or (B, H, W, 3); or a sequence of files and arrays.
    config: a model or its name, or a `data_config`, be it that of a run, see `load_run`.

  Raises:
    UserError: a file that is missing or no image; an array that is none.
  """
  config = config if isinstance(config, Mapping) else data_config(config)
  if isinstance(images, (str, os.PathLike)) or (isinstance(images, np.ndarray) and images.ndim == 3):
    images = [images]
  size = tuple(config["image_size"])
  prepared = [
    _check(image, size, config["crop"]) if isinstance(image, np.ndarray)
    else read_image(os.fspath(image), size, config["crop"])
    for image in images
  ]  # fmt: skip
  mean, std = (255 * np.asarray(config[key], np.float32) for key in ("mean", "std"))
  return (np.stack(prepared).astype(np.float32) - mean) / std


def _check(image: np.ndarray, size: tuple[int, int], crop: float) -> np.ndarray:
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
    raise UserError(f"image of type {image.dtype} and shape {image.shape} is none; give uint8 (height, width, 3)")
  return resize_and_center_crop(image, size, crop)


def class_names(dataset: str = "imagenet", *, synsets: bool = False) -> list[str]:
  """Returns the names of ImageNet-1k's classes, in the order of the logits of all published weights.

  Args:
    dataset: "imagenet"; those of a run are in its description, see `load_run`.
    synsets: WordNet's numbers, such as n01440764, by which the dataset's folders are named.

  Raises:
    UserError: another dataset.
  """
  if dataset not in ("imagenet", "imagenet2012"):
    raise UserError(f"class names of {dataset!r} are not known here; imagenet's are, and load_run tells those of a run")
  lines = importlib.resources.files("vit_jax_ext").joinpath("imagenet_classes.txt").read_text().splitlines()
  return [line.partition(" ")[0 if synsets else 2] for line in lines]
