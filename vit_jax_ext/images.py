"""Image files for prediction, without TensorFlow: which there are, and what evaluation would see of them."""

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
  """Returns an image file as evaluation sees it, uint8 (height, width, 3); see `data.preprocess`, which it equals.

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
  shape = image.size[::-1]
  whole = [math.floor(side / crop) for side in image_size]
  fitting = int(np.argmax([side / old for side, old in zip(whole, shape, strict=True)]))
  height, width = (whole[fitting] * side // shape[fitting] for side in shape)
  top, left = (round((side - part) / 2) for side, part in zip((height, width), image_size, strict=True))
  resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
  return np.asarray(resized.crop((left, top, left + image_size[1], top + image_size[0])))
