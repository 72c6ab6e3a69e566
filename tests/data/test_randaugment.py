"""Every operation against Pillow at the same magnitude, and the policy against timm's rules."""

import functools
import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest
import scipy.stats
import sklearn.datasets
import tensorflow as tf

import vit_jax_ext as vx
from vit_jax_ext.data import pillow, preprocess, randaugment

FILL = (124, 116, 104)
PHOTOS = [
  PIL.Image.fromarray(sklearn.datasets.load_sample_image("china.jpg")).crop((200, 100, 440, 280)).resize((80, 60)),
  PIL.Image.fromarray(sklearn.datasets.load_sample_image("flower.jpg")).crop((160, 60, 240, 120)),
  PIL.Image.fromarray(np.full((60, 80, 3), (255, 3, 77), np.uint8)),  # flat: every rounding error would show
]


def enhance(kind):
  return lambda image, factor: kind(image).enhance(factor)


def solarize_add(image, amount):
  return image.point([min(255, i + amount) if i < 128 else i for i in range(256)] * 3)


def posterize(image, bits):
  # Pillow 13 refuses the 0 bits, black, that earlier ones took from timm.
  return PIL.ImageOps.posterize(image, bits) if bits else image.point(lambda level: 0)


PHOTOMETRIC = {  # name: (Pillow's operation, arguments)
  "auto_contrast": (PIL.ImageOps.autocontrast, [None]),
  "equalize": (PIL.ImageOps.equalize, [None]),
  "invert": (PIL.ImageOps.invert, [None]),
  "posterize": (posterize, [0, 1, 2, 3, 4, 7, 8]),
  "solarize": (PIL.ImageOps.solarize, [0, 1, 26, 128, 255, 256]),
  "solarize_add": (solarize_add, [0, 33, 99, 110]),
  "color": (enhance(PIL.ImageEnhance.Color), [0.0, 0.1, 0.19, 0.55, 1.0, 1.27, 1.81, 1.9]),
  "contrast": (enhance(PIL.ImageEnhance.Contrast), [0.0, 0.1, 0.19, 0.55, 1.0, 1.27, 1.81, 1.9]),
  "brightness": (enhance(PIL.ImageEnhance.Brightness), [0.0, 0.1, 0.19, 0.55, 1.0, 1.27, 1.81, 1.9]),
  "sharpness": (enhance(PIL.ImageEnhance.Sharpness), [0.0, 0.1, 0.19, 0.55, 1.0, 1.27, 1.81, 1.9]),
}


def affine(*matrix):
  def transform(image, **options):
    return image.transform(image.size, PIL.Image.Transform.AFFINE, matrix, **options)

  return transform


GEOMETRIC = {  # name: argument -> Pillow's operation
  "rotate": lambda degrees: lambda image, **options: image.rotate(degrees, **options),
  "shear_x": lambda factor: affine(1, factor, 0, 0, 1, 0),
  "shear_y": lambda factor: affine(1, 0, 0, factor, 1, 0),
  "translate_x": lambda share: lambda image, **options: affine(1, 0, share * image.width, 0, 1, 0)(image, **options),
  "translate_y": lambda share: lambda image, **options: affine(1, 0, 0, 0, 1, share * image.height)(image, **options),
}
LARGEST = {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45}


@functools.cache
def compiled(name, *static):
  """As `rand_augment` runs them: XLA rounds differently from TensorFlow."""
  operation = getattr(pillow, name)
  return tf.function(lambda image, *arguments: operation(image, *arguments, *static), jit_compile=True, autograph=False)


def difference(a, b):
  return np.abs(np.asarray(a, float) - np.asarray(b, float))


def photometric_pair(name, image, argument):
  """Returns (ours, Pillow's)."""
  arguments = () if argument is None else (argument,)
  ours = compiled(name)(tf.constant(np.asarray(image)), *map(tf.constant, arguments))
  return ours.numpy(), np.asarray(PHOTOMETRIC[name][0](image, *arguments))


@pytest.mark.parametrize("name", PHOTOMETRIC)
@pytest.mark.parametrize("photo", [0, 1, 2])
def test_photometric_operations_equal_pillow(name, photo):
  for argument in PHOTOMETRIC[name][1]:
    ours, theirs = photometric_pair(name, PHOTOS[photo], argument)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, theirs)


IMAGES = hnp.arrays(np.uint8, (6, 7, 3)) | hnp.arrays(np.uint8, (6, 7, 3), elements=st.integers(100, 103))


@pytest.mark.parametrize("name", PHOTOMETRIC)
@settings(max_examples=40, deadline=None)
@given(image=IMAGES, data=st.data())
def test_photometric_operations_equal_pillow_on_any_image(name, image, data):
  argument = data.draw(st.sampled_from(PHOTOMETRIC[name][1]))
  ours, theirs = photometric_pair(name, PIL.Image.fromarray(image), argument)
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", PHOTOMETRIC)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 1)])
def test_photometric_operations_on_tiny_images(name, size):
  image = PHOTOS[0].crop((0, 0, *size))
  ours, theirs = photometric_pair(name, image, PHOTOMETRIC[name][1][-1])
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("photo", [0, 1, 2])
def test_geometric_operations_equal_pillow(name, photo, interpolation):
  image = PHOTOS[photo]
  for share in (-1.0, -0.9, -0.37, 0.0, 0.05, 0.5, 0.9, 1.0):
    argument = share * LARGEST[name]
    ours = compiled(name, FILL, interpolation)(tf.constant(np.asarray(image)), tf.constant(argument))
    options = {"resample": getattr(PIL.Image.Resampling, interpolation.upper()), "fillcolor": FILL}
    theirs = GEOMETRIC[name](argument)(image, **options)
    assert difference(ours, theirs).mean() < 0.1
    assert difference(ours, theirs).max() <= 1


def augmented_by_timm(image, draws, policy, interpolation):
  """Timm's AugmentOp and its tables of arguments, with our draws in place of Python's."""
  for apply, operation, quantile, sign, kind in draws.tolist():
    if apply >= 0.5:
      continue
    normal = scipy.stats.norm(policy.magnitude, policy.std).ppf
    uniform = scipy.stats.uniform(0, policy.magnitude).ppf
    level = min(max((uniform if policy.std == math.inf else normal)(quantile), 0), 10) / 10
    signed = -level if sign < 0.5 else level
    increasing = max(0.1, 1 + 0.9 * signed)
    name = [*PHOTOMETRIC, *GEOMETRIC][int(operation * 15)]
    if name in GEOMETRIC:
      drawn = "bilinear" if kind < 0.5 else "bicubic"
      resample = getattr(PIL.Image.Resampling, (drawn if interpolation == "random" else interpolation).upper())
      image = GEOMETRIC[name](signed * LARGEST[name])(image, resample=resample, fillcolor=FILL)
    else:
      argument = {
        "posterize": (4 - int(level * 4),), "solarize": (256 - min(256, int(level * 256)),),
        "solarize_add": (min(128, int(level * 110)),), "color": (increasing,), "contrast": (increasing,),
        "brightness": (increasing,), "sharpness": (increasing,),
      }.get(name, ())  # fmt: skip
      image = PHOTOMETRIC[name][0](image, *argument)
  return image


@pytest.mark.parametrize(
  ("name", "interpolation"),
  [
    ("rand-m9-mstd0.5-inc1", "bilinear"),
    ("rand-m9-mstd0.5-inc1", "bicubic"),
    ("rand-m9-mstd0.5-inc1", "random"),
    ("rand-m8-mstd101-inc1", "random"),
  ],
)
def test_rand_augment_equals_timm_given_the_draws(name, interpolation):
  policy = randaugment.parse(name)
  image, operations = PHOTOS[0], set()
  for index in range(80):
    seed = tf.constant([7, index], tf.int64)
    draws = preprocess.uniform(seed, preprocess.Stream.RAND_AUGMENT, (2, 5)).numpy()
    operations |= {(int(o * 15), s < 0.5) for a, o, _, s, _ in draws if a < 0.5}
    ours = randaugment.rand_augment(tf.constant(np.asarray(image)), seed, policy, FILL, interpolation)
    theirs = augmented_by_timm(image, draws, policy, interpolation)
    assert difference(ours, theirs).mean() < 0.5, draws
  assert len({operation for operation, _ in operations}) == 15


def magnitude_of_timm(magnitude, std, rng):
  """AugmentOp.__call__, with the meaning that rand_augment_transform gives to `mstd`."""
  std = float("inf") if std > 100 else std
  if std > 0:
    magnitude = rng.uniform(0, magnitude) if std == float("inf") else rng.gauss(magnitude, std)
  return max(0.0, min(magnitude, 10.0))


@pytest.mark.parametrize(
  ("m", "mstd"), [(9, 0.5), (9, 0), (10, 1), (5, 100), (9, 100.5), (9, 101), (4, 1000), (10, 101), (20, 101)]
)
def test_magnitudes_are_distributed_as_timms(m, mstd):
  count, rng = 4000, random.Random(0)
  policy = randaugment.parse(f"rand-m{m}-mstd{mstd}-inc1")
  seeds = (tf.constant((5, index), tf.int64) for index in range(count // 2))
  draws = [preprocess.uniform(seed, preprocess.Stream.RAND_AUGMENT, (2, 5)) for seed in seeds]
  ours = np.sort(randaugment.magnitude(policy, tf.concat(draws, axis=0)[:, 2]))
  theirs = np.sort([magnitude_of_timm(m, mstd, rng) for _ in range(count)])
  edges = np.linspace(0, 10, 2001)  # Kolmogorov-Smirnov, at a level of 0.1 %
  ours_cdf, theirs_cdf = (np.searchsorted(x, edges + 1e-5, "right") / count for x in (ours, theirs))
  assert np.abs(ours_cdf - theirs_cdf).max() < 1.95 * math.sqrt(2 / count)


def test_no_bits_are_black():
  """The largest magnitude leaves Posterize 0 bits, which timm hands on to Pillow: 13 refuses them."""
  image, draws = tf.constant(np.asarray(PHOTOS[0])), np.float32([0, 3.5 / 15, 0.5, 0.5, 0.5])
  black, kept = (
    randaugment._layer(image, draws, randaugment.parse(name), FILL, "bicubic").numpy()
    for name in ("rand-m10-inc1", "rand-m7-inc1")
  )
  assert (black == 0).all()
  np.testing.assert_array_equal(kept, PIL.ImageOps.posterize(PHOTOS[0], 2))


def test_rand_augment_depends_on_the_seed_alone():
  policy = randaugment.parse("rand-m9-mstd0.5-inc1")

  image = tf.constant(np.asarray(PHOTOS[1]))

  def augment(index):
    seed = tf.stack([tf.constant(3, tf.int64), index])
    return randaugment.rand_augment(image, seed, policy, FILL, "bicubic")

  first, again = (list(tf.data.Dataset.range(12).map(augment).as_numpy_iterator()) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  for index in range(12):
    np.testing.assert_array_equal(first[index], augment(tf.constant(index, tf.int64)))
  assert len({x.tobytes() for x in first}) > 5


def test_a_quarter_of_the_images_stays_as_it_is():
  """Two operations, each left out with probability 1/2; some of the others do nothing."""
  policy = randaugment.parse("rand-m9-mstd0.5-inc1")
  image = np.asarray(PHOTOS[0])
  augment = functools.partial(randaugment.rand_augment, tf.constant(image), policy=policy, fill=FILL)
  kept = [np.array_equal(augment(tf.constant((7, i), tf.int64), interpolation="bicubic"), image) for i in range(400)]
  assert 0.18 < np.mean(kept) < 0.33


@pytest.mark.parametrize(
  ("name", "policy"),
  [
    ("rand-m9-mstd0.5-inc1", (9, 0.5, 2)),
    ("rand-n3-m5.5-inc1", (5.5, 0, 3)),
    ("rand-inc1-mstd1-n1", (10, 1, 1)),
    ("rand-m9-mstd100-inc1", (9, 100, 2)),
    ("rand-m9-mstd101-inc1", (9, math.inf, 2)),
  ],
)
def test_policies(name, policy):
  assert randaugment.parse(name) == policy


@pytest.mark.parametrize(
  "name", ["", "rand", "rand-m9-mstd0.5", "rand-m9-inc0", "rand-m9-inc1-x2", "rand-m9-mstd-inc1", "augmix-m3-inc1"]
)
def test_unknown_policies(name):
  with pytest.raises(vx.UserError, match=r"is unknown; write rand-m9-mstd0.5-inc1"):
    randaugment.parse(name)
