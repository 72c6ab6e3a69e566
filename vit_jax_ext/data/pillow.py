"""Pillow's image operations in TensorFlow, with Pillow's arithmetic; timm and torchvision build on them.

Every function takes and returns uint8 (height, width, 3) of static shape. They are written for XLA, which turns each
into a loop or two: call them inside `tf.function(jit_compile=True)` where time matters.
"""

import math

import tensorflow as tf

Color = tuple[int, int, int]


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
  """Stretches every channel to the whole range 0 to 255."""
  rows = tf.reshape(image, (image.shape[0], -1))  # XLA vectorises along rows, not along three channels
  low = tf.reduce_min(tf.reshape(tf.reduce_min(rows, axis=0), (-1, 3)), axis=0)
  high = tf.reduce_max(tf.reshape(tf.reduce_max(rows, axis=0), (-1, 3)), axis=0)
  low, high = tf.cast(low, tf.float64)[:, None], tf.cast(high, tf.float64)[:, None]
  levels, scale = tf.range(256, dtype=tf.float64), 255 / tf.maximum(high - low, 1)
  stretched = _rounded(levels * scale) - _rounded(low * scale)
  table = tf.where(high > low, tf.clip_by_value(stretched, 0, 255), levels)
  return _look_up(image, tf.cast(table, tf.uint8))


def equalize(image: tf.Tensor) -> tf.Tensor:
  """Makes the histogram of every channel as flat as a table of levels can."""
  # tf.math.bincount computes the number of bins; in a branch XLA needs a constant. The numbers below are whole, but
  # XLA evaluates the table once per pixel, and floats divide faster.
  channels = tf.unstack(tf.reshape(tf.cast(image, tf.int32), (-1, 3)), axis=1)
  counts = [tf.raw_ops.DenseBincount(input=c, size=256, weights=tf.zeros(0, tf.float32)) for c in channels]
  histogram, levels = tf.stack(counts), tf.range(256, dtype=tf.float32)
  darker = tf.cumsum(histogram, axis=1, exclusive=True)
  step = tf.floor(tf.reduce_max(tf.where(histogram > 0, darker, 0), axis=1, keepdims=True) / 255)
  table = tf.minimum(tf.floor((tf.floor(step / 2) + darker) / tf.maximum(step, 1)), 255)
  return _look_up(image, tf.cast(tf.where(step > 0, table, levels), tf.uint8))


def invert(image: tf.Tensor) -> tf.Tensor:
  """Turns the picture into its negative."""
  return 255 - image


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
  """Keeps the `bits` (0 to 8) highest of the eight."""
  return tf.bitwise.bitwise_and(image, tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8))


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
  """Inverts the levels from `threshold` (0 to 256) on."""
  return tf.where(tf.cast(image, tf.int32) < threshold, image, 255 - image)


def solarize_add(image: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
  """Adds `amount` to the levels below 128; timm makes it of Pillow's table look-up."""
  level = tf.cast(image, tf.int32)
  return tf.cast(tf.where(level < 128, tf.minimum(level + amount, 255), level), tf.uint8)


def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Changes the saturation: 0 is grey, 1 the image."""
  return _blend(_luminance(image)[..., None], image, factor)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Changes the distance to the mean luminance: 0 is that grey, 1 the image."""
  pixels = image.shape[0] * image.shape[1]
  total = tf.reduce_sum(tf.reduce_sum(_luminance(image), axis=0))  # XLA vectorises two steps, not one
  return _blend((total + pixels // 2) // pixels, image, factor)


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Scales the levels: 0 is black, 1 the image."""
  return _blend(0, image, factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Changes the distance to the smoothed image: 0 is smooth, 1 the image. The border stays as it is."""
  height, width, _ = image.shape
  rows = tf.reshape(image, (height, width * 3))  # XLA vectorises along rows, not along three channels
  padded = tf.cast(tf.pad(rows, [[1, 1], [3, 3]]), tf.int16)
  triples = padded[:-2] + padded[1:-1] + padded[2:]
  total = triples[:, :-6] + triples[:, 3:-3] + triples[:, 6:] + 4 * tf.cast(rows, tf.int16)
  smooth = tf.floor(tf.cast(total, tf.float32) / 13 + 0.5)
  y, x = tf.range(height)[:, None], tf.range(width * 3)
  inner = (y > 0) & (y < height - 1) & (x >= 3) & (x < width * 3 - 3)
  return tf.reshape(_blend(tf.where(inner, smooth, tf.cast(rows, tf.float32)), rows, factor), image.shape)


def rotate(image: tf.Tensor, degrees: tf.Tensor, fill: Color, interpolation: str) -> tf.Tensor:
  """Rotates counter-clockwise about the centre.

  Args (also of the operations below):
    image: uint8 (height, width, 3).
    degrees: the angle; the others have a factor or a share of the image's side, of either sign.
    fill: colour of what comes in from outside.
    interpolation: "bilinear" or "bicubic".
  """
  height, width, _ = image.shape
  cos, sin = tf.cos(degrees * (math.pi / 180)), tf.sin(degrees * (math.pi / 180))
  y, x = _centers(height)[:, None] - height / 2, _centers(width) - width / 2
  return _resample(image, (cos - 1) * x - sin * y, sin * x + (cos - 1) * y, fill, interpolation)


def shear_x(image: tf.Tensor, factor: tf.Tensor, fill: Color, interpolation: str) -> tf.Tensor:
  """Moves every row to the left by `factor` times its distance from the top."""
  return _resample(image, factor * _centers(image.shape[0])[:, None], None, fill, interpolation)


def shear_y(image: tf.Tensor, factor: tf.Tensor, fill: Color, interpolation: str) -> tf.Tensor:
  """Moves every column up by `factor` times its distance from the left."""
  return _resample(image, None, factor * _centers(image.shape[1])[None], fill, interpolation)


def translate_x(image: tf.Tensor, share: tf.Tensor, fill: Color, interpolation: str) -> tf.Tensor:
  """Moves the picture to the left by a share of its width."""
  return _resample(image, tf.reshape(share * image.shape[1], (1, 1)), None, fill, interpolation)


def translate_y(image: tf.Tensor, share: tf.Tensor, fill: Color, interpolation: str) -> tf.Tensor:
  """Moves the picture up by a share of its height."""
  return _resample(image, None, tf.reshape(share * image.shape[0], (1, 1)), fill, interpolation)


def _look_up(image, table):
  """Replaces each level of each channel by its entry in `table`, uint8 (3, 256)."""
  return tf.stack([tf.gather(table[c], tf.cast(image[..., c], tf.int32)) for c in range(3)], axis=-1)


def _luminance(image):
  """ITU-R 601 luma in Pillow's 16-bit fixed point, int32 (height, width)."""
  level = tf.cast(image, tf.int32)
  weighted = level[..., 0] * 19595 + level[..., 1] * 38470 + level[..., 2] * 7471
  return tf.bitwise.right_shift(weighted + 2**15, 16)


def _blend(degenerate, image, factor):
  """Inter- or extrapolates from `degenerate` through `image`; rounds down, as Pillow does."""
  degenerate = tf.cast(degenerate, tf.float32)
  blended = degenerate + _rounded(factor * (tf.cast(image, tf.float32) - degenerate))
  return tf.cast(tf.clip_by_value(blended, 0, 255), tf.uint8)


def _rounded(product):
  """Keeps XLA from fusing a multiplication with the addition that follows: Pillow rounds after each."""
  return tf.minimum(product, 1e9)


def _centers(size):
  """Where the pixels' centres lie, the border being 0."""
  return tf.range(size, dtype=tf.float32) + 0.5


def _taps(index, offset, size, interpolation):
  """The pixels around `index + offset` along one axis: pairs of index and weight, which gets an axis for channels."""
  whole = tf.floor(offset)
  d = (offset - whole)[..., None]
  if interpolation == "bilinear":
    weights = {0: 1 - d, 1: d}
  else:  # Pillow transforms with a = -1, though it resizes with a = -0.5
    weights = {
      -1: d * (-1 + d * (2 - d)), 0: 1 + d * d * (d - 2), 1: d * (1 + d * (1 - d)), 2: d * d * (d - 1)
    }  # fmt: skip
  first = index + tf.cast(whole, tf.int32)
  return [(tf.clip_by_value(first + k, 0, size - 1), weight) for k, weight in weights.items()]


def _resample(image, dx, dy, fill, interpolation):
  """Returns the image at (x + dx, y + dy), `fill` where that is outside; dx and dy broadcast to (height, width)."""
  height, width, _ = image.shape
  x, y = tf.range(width), tf.range(height)[:, None]
  columns, rows, inside = [(x, 1.0)], [(y, 1.0)], tf.ones((height, width), tf.bool)
  if dx is not None:
    columns = _taps(x, dx, width, interpolation)
    position = _centers(width) + dx
    inside &= (position >= 0) & (position < width)
  if dy is not None:
    rows = _taps(y, dy, height, interpolation)
    position = _centers(height)[:, None] + dy
    inside &= (position >= 0) & (position < height)
  pixels = tf.reshape(tf.cast(image, tf.float32), (-1, 3))
  value = sum(
    row_weight * sum(weight * tf.gather(pixels, row * width + column) for column, weight in columns)
    for row, row_weight in rows
  )
  # Pillow rounds down what it computed in double precision; our rounding errors, below 1e-4, must not cost a level.
  value = tf.cast(tf.clip_by_value(value + 1e-4, 0, 255), tf.uint8)
  return tf.where(inside[..., None], value, tf.constant(fill, tf.uint8))
