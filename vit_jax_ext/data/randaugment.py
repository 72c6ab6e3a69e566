"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) as timm defines it, by names like `rand-m9-mstd0.5-inc1`."""

import functools
import math
import re
from typing import NamedTuple

import tensorflow as tf

from vit_jax_ext.data import pillow, preprocess
from vit_jax_ext.errors import UserError


class Policy(NamedTuple):
  """What the name says."""

  magnitude: float  # mean
  std: float  # of the magnitude; infinite: it is uniform between 0 and `magnitude`
  layers: int  # operations drawn per image


def parse(name: str) -> Policy:
  """Reads timm's name: `rand`, then in any order `m` magnitude, `mstd` its deviation, `n` layers, and `inc1`.

  A deviation above 100 stands for an infinite one.

  Raises:
    UserError: another text, or one without `inc1`: the operations here all grow with the magnitude.
  """
  head, *sections = name.split("-")
  found = [re.fullmatch(r"(m|mstd)(\d+\.?\d*)|(n)(\d+)|(inc)(1)", section) for section in sections]
  if head != "rand" or "inc1" not in sections or not all(found):
    raise UserError(
      f"augment.randaugment={name} is unknown; write rand-m9-mstd0.5-inc1, with other numbers after m (magnitude) and "
      f"mstd (its deviation), and -n3 for three operations per image in place of two"
    )
  numbers = {key: float(number) for match in found for key, number in [filter(None, match.groups())]}
  std = numbers.get("mstd", 0.0)
  return Policy(numbers.get("m", 10.0), math.inf if std > 100 else std, int(numbers.get("n", 2)))


def rand_augment(
  image: tf.Tensor, seed: tf.Tensor, policy: Policy, fill: pillow.Color, interpolation: str
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
  for layer in range(policy.layers):  # compiled once for all layers; unrolled in one program it takes XLA much longer
    image = _layer(image, draws[layer], policy, fill, interpolation)
  return image


def magnitude(policy: Policy, quantile: tf.Tensor) -> tf.Tensor:
  """Returns the magnitude, 0 to 10, of a draw from [0, 1)."""
  if math.isinf(policy.std):
    drawn = policy.magnitude * quantile
  else:
    drawn = policy.magnitude + policy.std * tf.math.ndtri(tf.maximum(quantile, 1e-6))  # normal, and finite
  return tf.clip_by_value(drawn, 0, 10)


@tf.function(autograph=False, jit_compile=True)
def _layer(image, draws, policy, fill, interpolation):
  """Applies one operation, or none. `draws` (5,) is uniform in [0, 1)."""
  operation = tf.where(draws[0] < 0.5, tf.cast(draws[1] * 15, tf.int32), 15)
  level = magnitude(policy, draws[2]) / 10
  signed = tf.where(draws[3] < 0.5, -level, level)
  factor = tf.maximum(1 + 0.9 * signed, 0.1)

  def geometric(function, argument):
    kinds = {kind: functools.partial(function, image, argument, fill, kind) for kind in ("bilinear", "bicubic")}
    return kinds.get(interpolation, lambda: tf.cond(draws[4] < 0.5, kinds["bilinear"], kinds["bicubic"]))

  return tf.switch_case(
    operation,
    [
      lambda: pillow.auto_contrast(image),
      lambda: pillow.equalize(image),
      lambda: pillow.invert(image),
      lambda: pillow.posterize(image, 4 - tf.cast(level * 4, tf.int32)),
      lambda: pillow.solarize(image, 256 - tf.cast(level * 256, tf.int32)),
      lambda: pillow.solarize_add(image, tf.cast(level * 110, tf.int32)),
      lambda: pillow.color(image, factor),
      lambda: pillow.contrast(image, factor),
      lambda: pillow.brightness(image, factor),
      lambda: pillow.sharpness(image, factor),
      geometric(pillow.rotate, signed * 30),
      geometric(pillow.shear_x, signed * 0.3),
      geometric(pillow.shear_y, signed * 0.3),
      geometric(pillow.translate_x, signed * 0.45),
      geometric(pillow.translate_y, signed * 0.45),
    ],
    default=lambda: image,
  )
