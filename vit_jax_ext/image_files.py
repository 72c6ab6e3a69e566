"""Image files as evaluation sees them, without TensorFlow, whose import takes longer than a prediction.

The pixels are those of `data.preprocess.resize_and_center_crop`, all of them: NumPy has its arithmetic, in its order.
"""

import math

import numpy as np
import PIL.Image

from vit_jax_ext.errors import UserError

FORMATS = ("JPEG", "PNG", "GIF", "BMP")


def read_image(path: str, image_size: tuple[int, int], crop: float) -> np.ndarray:
  """Returns an image file as evaluation sees it, uint8 (height, width, 3).

  Raises:
    UserError: the file is missing or no image.
  """
  try:
    with PIL.Image.open(path, formats=FORMATS) as image:
      pixels = np.asarray(image.convert("RGB"))
  except FileNotFoundError:
    raise UserError(f"image {path} does not exist; check the path") from None
  except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):  # whatever Pillow stumbles over
    raise UserError(f"image {path} cannot be decoded; give a JPEG, PNG, GIF or BMP file") from None
  return resize_and_center_crop(pixels, image_size, crop)


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
