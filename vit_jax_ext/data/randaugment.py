"""RandAugment as timm defines it for Pillow images (Cubuk et al. 2020, arXiv 1909.13719), with Pillow's own arithmetic.

Every operation takes and returns uint8 (height, width, 3) of static shape. They are written for XLA, which fuses each
into a loop or two and is what makes them fast; `rand_augment` compiles them.
"""

import functools
import math
import re
from typing import NamedTuple

import tensorflow as tf

from vit_jax_ext.data import preprocess
from vit_jax_ext.errors import UserError


class Policy(NamedTuple):
  """What a name like `rand-m9-mstd0.5-inc1` says."""

  magnitude: float  # mean
  std: float  # of the magnitude
  layers: int  # operations drawn per image


def parse(name: str) -> Policy:
  """Reads timm's name of a policy: `rand`, then `m` magnitude, `mstd` its deviation, `n` layers, `inc1`, in any order.

  Raises:
    UserError: another text, or one without `inc1`: only the operations that grow with the magnitude are here.
  """
  head, *sections = name.split("-")
  found = [re.fullmatch(r"(m|mstd)(\d+\.?\d*)|(n)(\d+)|(inc)(1)", section) for section in sections]
  if head != "rand" or "inc1" not in sections or not all(found):
    raise UserError(
      f"augmentation {name!r} is unknown; write rand-m9-mstd0.5-inc1, with other numbers after m (magnitude), "
      f"mstd (its deviation) and n (operations per image, 2 if left out)"
    )
  numbers = {key: float(number) for match in found for key, number in [filter(None, match.groups())]}
  return Policy(numbers.get("m", 10.0), numbers.get("mstd", 0.0), int(numbers.get("n", 2)))


def rand_augment(
  image: tf.Tensor, seed: tf.Tensor, policy: Policy, fill: tuple[int, int, int], interpolation: str
) -> tf.Tensor:
  """Applies `policy.layers` operations, each drawn from fifteen and left out with probability 1/2.

  Args:
    image: uint8 (height, width, 3) of static shape.
    seed: int64 (2,).
    policy: see `parse`.
    fill: colour of what comes in from outside; timm takes the dataset's mean.
    interpolation: of the geometric operations, "bilinear", "bicubic" or, drawn for each, "random".
  """
  draws = preprocess.uniform(seed, preprocess.Stream.RAND_AUGMENT, (policy.layers, 5))
  layer = tf.function(
    functools.partial(_layer, policy=policy, fill=fill, interpolation=interpolation), autograph=False, jit_compile=True
  )
  if MODE == "calls":
    for i in range(policy.layers):
      image = layer(image, draws[i])
    return image
  layers = tf.function(
    functools.partial(_layers, policy=policy, fill=fill, interpolation=interpolation), autograph=False, jit_compile=True
  )
  return layers(image, draws)


MODE = "calls"


def _layers(image, draws, policy, fill, interpolation):
  for i in range(policy.layers):
    image = _layer(image, draws[i], policy, fill, interpolation)
  return image


def _layer(image, draws, policy, fill, interpolation):
  operation = tf.where(draws[1] < 0.5, tf.cast(draws[0] * 15, tf.int32), 15)
  level = tf.clip_by_value(policy.magnitude + policy.std * tf.math.ndtri(draws[2]), 0.0, 10.0) / 10
  sign = tf.where(draws[3] < 0.5, -1.0, 1.0)
  bicubic = draws[4] < 0.5
  return _apply(image, operation, level, sign, bicubic, fill, interpolation)


def _apply(image, operation, level, sign, bicubic, fill, interpolation):
  signed = sign * level
  factor = tf.maximum(1 + 0.9 * signed, 0.1)

  def geometric(function, argument):
    if interpolation == "random":
      return lambda: tf.cond(
        bicubic, lambda: function(image, argument, fill, "bicubic"), lambda: function(image, argument, fill, "bilinear")
      )
    return lambda: function(image, argument, fill, interpolation)

  branches = [
    lambda: auto_contrast(image),
    lambda: equalize(image),
    lambda: invert(image),
    geometric(rotate, 30 * signed),
    lambda: posterize(image, 4 - tf.cast(4 * level, tf.int32)),
    lambda: solarize(image, 256 - tf.cast(256 * level, tf.int32)),
    lambda: solarize_add(image, tf.cast(110 * level, tf.int32)),
    lambda: color(image, factor),
    lambda: contrast(image, factor),
    lambda: brightness(image, factor),
    lambda: sharpness(image, factor),
    geometric(shear_x, 0.3 * signed),
    geometric(shear_y, 0.3 * signed),
    geometric(translate_x, 0.45 * signed),
    geometric(translate_y, 0.45 * signed),
  ]
  return tf.switch_case(operation, branches, default=lambda: image)


def color_jitter(image: tf.Tensor, seed: tf.Tensor, strength: float) -> tf.Tensor:
  """Changes brightness, contrast and saturation in random order, each by a factor from [1 - strength, 1 + strength]."""
  draws = preprocess.uniform(seed, preprocess.Stream.COLOR_JITTER, (2, 3))
  factors, order = 1 + strength * (2 * draws[0] - 1), tf.argsort(draws[1])
  for i in range(3):
    image = tf.switch_case(
      order[i], [functools.partial(change, image, factors[i]) for change in (brightness, contrast, color)]
    )
  return image


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
  """Stretches every channel to the whole range 0 to 255."""
  rows = tf.reshape(image, (image.shape[0], -1))  # XLA vectorises along rows, not along three channels
  low = tf.reduce_min(tf.reshape(tf.reduce_min(rows, axis=0), (-1, 3)), axis=0)
  high = tf.reduce_max(tf.reshape(tf.reduce_max(rows, axis=0), (-1, 3)), axis=0)
  low, high = tf.cast(low, tf.float64)[:, None], tf.cast(high, tf.float64)[:, None]
  levels, scale = tf.range(256, dtype=tf.float64), 255 / tf.maximum(high - low, 1)
  table = tf.where(high > low, tf.clip_by_value(levels * scale - low * scale, 0, 255), levels)
  return _look_up(image, tf.cast(table, tf.uint8))


def equalize(image: tf.Tensor) -> tf.Tensor:
  """Makes the histogram of every channel as flat as a table of levels can."""
  # Integers all of them, but XLA divides by step once per pixel, which is faster with floats.
  histogram, levels = _histogram(image), tf.range(256, dtype=tf.float32)
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
  """Adds `amount` to the levels below 128."""
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
  flat = tf.reshape(image, (height, width * 3))  # XLA vectorises along rows, not along three channels
  padded = tf.cast(tf.pad(flat, [[1, 1], [3, 3]]), tf.int16)
  rows = padded[:-2] + padded[1:-1] + padded[2:]
  total = rows[:, :-6] + rows[:, 3:-3] + rows[:, 6:] + 4 * tf.cast(flat, tf.int16)
  smooth = tf.floor(tf.cast(total, tf.float32) / 13 + 0.5)
  y, x = tf.range(height)[:, None], tf.range(width * 3)
  inner = (y > 0) & (y < height - 1) & (x >= 3) & (x < width * 3 - 3)
  return tf.reshape(_blend(tf.where(inner, smooth, tf.cast(flat, tf.float32)), flat, factor), image.shape)


def rotate(image: tf.Tensor, degrees: tf.Tensor, fill: tuple[int, int, int], interpolation: str) -> tf.Tensor:
  """Rotates counter-clockwise about the centre."""
  height, width, _ = image.shape
  cos, sin = tf.cos(degrees * (math.pi / 180)), tf.sin(degrees * (math.pi / 180))
  y, x = _centers(height)[:, None] - height / 2, _centers(width) - width / 2
  return _resample(image, (cos - 1) * x - sin * y, sin * x + (cos - 1) * y, fill, interpolation)


def shear_x(image: tf.Tensor, factor: tf.Tensor, fill: tuple[int, int, int], interpolation: str) -> tf.Tensor:
  """Moves every row to the left by `factor` times its distance from the top."""
  return _resample(image, factor * _centers(image.shape[0])[:, None], None, fill, interpolation)


def shear_y(image: tf.Tensor, factor: tf.Tensor, fill: tuple[int, int, int], interpolation: str) -> tf.Tensor:
  """Moves every column up by `factor` times its distance from the left."""
  return _resample(image, None, factor * _centers(image.shape[1])[None], fill, interpolation)


def translate_x(image: tf.Tensor, share: tf.Tensor, fill: tuple[int, int, int], interpolation: str) -> tf.Tensor:
  """Moves the picture to the left by a share of its width."""
  return _resample(image, tf.reshape(share * image.shape[1], (1, 1)), None, fill, interpolation)


def translate_y(image: tf.Tensor, share: tf.Tensor, fill: tuple[int, int, int], interpolation: str) -> tf.Tensor:
  """Moves the picture up by a share of its height."""
  return _resample(image, None, tf.reshape(share * image.shape[0], (1, 1)), fill, interpolation)


def _histogram(image):
  """Returns how often each channel has each level, float32 (3, 256)."""
  # tf.math.bincount computes the number of bins; inside a branch XLA wants it constant.
  channels = [tf.reshape(tf.cast(image[..., c], tf.int32), [-1]) for c in range(3)]
  return tf.stack([tf.raw_ops.DenseBincount(input=c, size=256, weights=tf.zeros(0, tf.float32)) for c in channels])


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
  blended = degenerate + factor * (tf.cast(image, tf.float32) - degenerate)
  return tf.cast(tf.clip_by_value(blended, 0, 255), tf.uint8)


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
  # Pillow rounds down, in double precision; in ours a level that rounding pushed below an integer must not lose one.
  value = tf.cast(tf.clip_by_value(value + 1e-3, 0, 255), tf.uint8)
  return tf.where(inside[..., None], value, tf.constant(fill, tf.uint8))
