"""Image files for prediction, without TensorFlow: which there are, and what evaluation would see of them.

The pixels are those of `data.preprocess.resize_and_center_crop`, all of them: NumPy has its arithmetic, in its order.
"""

from collections.abc import Sequence
import glob
import math
import os
import pathlib

import numpy as np
import PIL.Image

from vit_jax_ext.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")


def is_hidden(path: pathlib.Path) -> bool:
  """Tells whether a file or a folder above it is hidden, as .ipynb_checkpoints is."""
  return any(part.startswith(".") and part not in (".", "..") for part in path.parts)


def find_images(sources: Sequence[str]) -> list[str]:
  """Returns the files that are meant.

  Args:
    sources: files; folders, of which all images count that are not hidden, at any depth; patterns such as 'x/*.jpg';
      and lists, text files (.txt) with one file a line.

  Raises:
    UserError: a source that does not exist, or holds no image.
  """
  found = []
  for source in sources:
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
      below = (file.relative_to(path) for file in path.rglob("*"))
      images = sorted(str(path / file) for file in below if file.suffix.lower() in SUFFIXES and not is_hidden(file))
    elif path.suffix.lower() == ".txt" and path.is_file():
      images = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    elif path.exists() or not glob.has_magic(source):
      images = [source]
    else:
      images = sorted(file for file in glob.glob(os.fspath(path), recursive=True) if os.path.isfile(file))
    if not images:
      raise UserError(f"{source} holds no image ({', '.join(SUFFIXES)}); check the path")
    found += images
  return found


def read_image(path: str, image_size: tuple[int, int], crop: float) -> np.ndarray:
  """Returns an image file as evaluation sees it, uint8 (height, width, 3).

  Raises:
    UserError: the file is missing or no image.
  """
  try:
    with PIL.Image.open(os.path.expanduser(path)) as file:
      image = file.convert("RGB")
  except FileNotFoundError:
    raise UserError(f"image {path} does not exist; check the path") from None
  except Exception:  # Pillow raises whatever it stumbles over
    raise UserError(f"image {path} cannot be decoded; give a JPEG, PNG, GIF, BMP or WebP file") from None
  return resize_and_center_crop(np.asarray(image), image_size, crop)


def resize_and_center_crop(image: np.ndarray, size: tuple[int, int], crop: float) -> np.ndarray:
  """Resizes uint8 (H, W, 3) bicubically so that `size` is the central `crop` share of its shorter side, and cuts."""
  shape, size = np.array(image.shape[:2]), np.array(size)
  whole = np.array([math.floor(side / crop) for side in size])
  fitting = np.argmax(whole / shape)
  resized = whole[fitting] * shape // shape[fitting]
  offset = np.round((resized - size) / 2).astype(int)
  # What the crop is made of, as there: where it begins, the rounding of positions depends on.
  reach = 2 * (shape // resized + 1) + 1
  begin = np.maximum(offset * shape // resized - reach, 0)
  end = np.minimum((offset + size) * shape // resized + reach, shape)
  scale = resized / shape
  start = offset - begin * scale
  image = image[begin[0] : end[0], begin[1] : end[1]].astype(np.float32)
  columns = _resize(image.swapaxes(0, 1), size[1], scale[1], start[1])
  return _resize(columns.swapaxes(0, 1), size[0], scale[0], start[0]).astype(np.uint8)


def _resize(image: np.ndarray, size: int, scale: float, start: float) -> np.ndarray:
  """Returns whole levels, float32 (size, ...), of an image (n, ...) scaled along its first axis, from `start` on.

  TensorFlow's ScaleAndTranslate: Keys' kernel with a = -0.5, as wide as `scale` is small, every operation in float32.
  """
  inverse = np.float32(1) / np.float32(scale)
  width = np.maximum(inverse, np.float32(1))
  centre = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * inverse + inverse * np.float32(start)
  first, last = (
    np.clip(bound.astype(int), 0, len(image) - 1)
    for bound in (np.ceil(centre - 2 * width - np.float32(0.5)), np.floor(centre + 2 * width - np.float32(0.5)))
  )
  index = first[:, None] + np.arange((last - first).max() + 1)
  distance = np.abs((index.astype(np.float32) + np.float32(0.5) - centre[:, None]) * (1 / width))
  near = (1.5 * distance - 2.5) * distance * distance + 1
  far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
  weight = np.where((distance >= 2) | (index > last[:, None]), 0, np.where(distance >= 1, far, near))
  taps = [weight[:, tap] for tap in range(weight.shape[1])]  # summed one after another, as there
  normal = 1 / sum(taps)
  rows = np.minimum(index, len(image) - 1)
  resized = sum((weight * normal)[:, None, None] * image[rows[:, tap]] for tap, weight in enumerate(taps))
  return np.floor(np.clip(resized, 0, 255) + np.float32(0.5))
