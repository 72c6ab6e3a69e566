"""RandAugment and colour jitter against Pillow, whose arithmetic timm's definition inherits."""

import functools

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest
import sklearn.datasets
import tensorflow as tf

import vit_jax_ext as vx
from vit_jax_ext.data import pillow, preprocess, randaugment

FILL = (124, 116, 104)
RESAMPLE = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


@pytest.fixture(scope="module")
def photographs():
  china, flower = (sklearn.datasets.load_sample_image(name) for name in ("china.jpg", "flower.jpg"))
  dark = np.random.default_rng(0).integers(30, 90, (48, 40, 3), dtype=np.uint8)
  return [china[100:160, 200:280], flower[200:264, 300:348], dark, np.full((20, 30, 3), 77, np.uint8)]


def enhance(kind):
  return lambda image, factor: kind(image).enhance(factor)


def solarize_add(image, amount):
  return image.point([min(255, level + amount) if level < 128 else level for level in range(256)] * 3)


PHOTOMETRIC = {
  "auto_contrast": (lambda image: ImageOps.autocontrast(image), [()]),
  "equalize": (lambda image: ImageOps.equalize(image), [()]),
  "invert": (lambda image: ImageOps.invert(image), [()]),
  "posterize": (ImageOps.posterize, [(bits,) for bits in (1, 2, 4, 8)]),
  "solarize": (ImageOps.solarize, [(threshold,) for threshold in (0, 26, 128, 256)]),
  "solarize_add": (solarize_add, [(amount,) for amount in (0, 50, 99, 110)]),
  "color": (enhance(ImageEnhance.Color), [(f,) for f in (0.1, 0.19, 1.0, 1.81, 1.9)]),
  "contrast": (enhance(ImageEnhance.Contrast), [(f,) for f in (0.1, 0.19, 1.0, 1.81, 1.9)]),
  "brightness": (enhance(ImageEnhance.Brightness), [(f,) for f in (0.1, 0.19, 1.0, 1.81, 1.9)]),
  "sharpness": (enhance(ImageEnhance.Sharpness), [(f,) for f in (0.1, 0.19, 1.0, 1.81, 1.9)]),
}


def tensor(argument):
  return tf.constant(argument, tf.float32 if isinstance(argument, float) else tf.int32)


@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_photometric_operations_equal_pillows(photographs, name):
  theirs, arguments = PHOTOMETRIC[name]
  for image in photographs:
    for argument in arguments:
      ours = getattr(pillow, name)(tf.constant(image), *map(tensor, argument)).numpy()
      expected = np.asarray(theirs(Image.fromarray(image), *argument))
      assert ours.dtype == np.uint8
      difference = np.abs(ours.astype(int) - expected)
      assert difference.mean() < 0.01 and difference.max() <= 1, (argument, difference.mean(), difference.max())


def affine(image, matrix, resample):
  return image.transform(image.size, Image.AFFINE, matrix, RESAMPLE[resample], fillcolor=FILL)


GEOMETRIC = {
  "rotate": (lambda image, x, r: image.rotate(x, RESAMPLE[r], fillcolor=FILL), (3.0, 27.0, 30.0)),
  "shear_x": (lambda image, x, r: affine(image, (1, x, 0, 0, 1, 0), r), (0.05, 0.27, 0.3)),
  "shear_y": (lambda image, x, r: affine(image, (1, 0, 0, x, 1, 0), r), (0.05, 0.27, 0.3)),
  "translate_x": (lambda image, x, r: affine(image, (1, 0, x * image.width, 0, 1, 0), r), (0.1, 0.405, 0.45)),
  "translate_y": (lambda image, x, r: affine(image, (1, 0, 0, 0, 1, x * image.height), r), (0.1, 0.405, 0.45)),
}


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_equal_pillows(photographs, name, resample):
  theirs, arguments = GEOMETRIC[name]
  for image in photographs:
    for argument in (sign * argument for argument in arguments for sign in (1, -1)):
      ours = getattr(pillow, name)(tf.constant(image), tensor(argument), FILL, resample).numpy()
      expected = np.asarray(theirs(Image.fromarray(image), argument, resample))
      difference = np.abs(ours.astype(int) - expected)
      assert difference.mean() < 0.5, (argument, difference.mean())


@pytest.fixture(scope="module")
def augment(photographs):
  """The recipe's policy on one photograph, compiled once."""
  image, policy = tf.constant(photographs[0]), randaugment.parse("rand-m9-mstd0.5-inc1")
  return tf.function(lambda seed: randaugment.rand_augment(image, seed, policy, FILL, "random"))


def test_the_policy_draws_from_the_seed_alone(augment):
  first, again, other = (augment(tf.constant(seed, tf.int64)).numpy() for seed in ((1, 4), (1, 4), (1, 5)))
  np.testing.assert_array_equal(first, again)
  assert {augment(tf.constant((2, i), tf.int64)).numpy().tobytes() for i in range(20)} != {first.tobytes()}
  assert other.shape == first.shape


def test_a_quarter_of_the_images_stays_as_it_is(augment, photographs):
  """Two operations, each left out with probability 1/2; some of the others do nothing."""
  kept = [np.array_equal(augment(tf.constant((7, i), tf.int64)), photographs[0]) for i in range(400)]
  assert 0.18 < np.mean(kept) < 0.33  # 0.25, and operations that do nothing


def test_magnitudes_are_timms():
  """Each operation at magnitude 9 of 10 without deviation, seen through what it does to a ramp of greys."""
  ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
  image = Image.fromarray(ramp)
  candidates = {"none": ramp}
  for name, argument in dict(posterize=1, solarize=256 - 230, solarize_add=99).items():
    candidates[name] = np.asarray(PHOTOMETRIC[name][0](image, argument))
  for name in ("color", "contrast", "brightness", "sharpness"):
    for sign in (1, -1):
      candidates[f"{name}{sign}"] = np.asarray(PHOTOMETRIC[name][0](image, 1 + sign * 0.81))
  for name, argument in dict(rotate=27, shear_x=0.27, shear_y=0.27, translate_x=0.405, translate_y=0.405).items():
    for sign in (1, -1):
      candidates[f"{name}{sign}"] = np.asarray(GEOMETRIC[name][0](image, sign * argument, "bilinear"))
  for name in ("auto_contrast", "equalize", "invert"):
    candidates[name] = np.asarray(PHOTOMETRIC[name][0](image))

  policy = randaugment.parse("rand-m9-mstd0-n1-inc1")
  augment = tf.function(lambda seed: randaugment.rand_augment(tf.constant(ramp), seed, policy, FILL, "bilinear"))
  found = set()
  for i in range(400):
    result = augment(tf.constant((3, i), tf.int64)).numpy().astype(int)
    distances = {name: np.abs(result - candidate).mean() for name, candidate in candidates.items()}
    nearest = min(distances, key=distances.get)
    assert distances[nearest] < 0.7, (i, distances)
    found.add(nearest)
  # These hardly change a ramp of all greys.
  same = {"auto_contrast", "equalize", "color1", "color-1", "sharpness1", "sharpness-1"}
  assert found | same >= set(candidates)


@pytest.mark.parametrize("name", ["rand", "rand-m9", "augmix-m3-inc1", "rand-m9-inc1-x3", "rand-m9-mstd-inc1"])
def test_unknown_policies(name):
  with pytest.raises(vx.UserError, match=r"rand-m9-mstd0\.5-inc1"):
    randaugment.parse(name)


def test_color_jitter_is_three_enhancements_in_some_order(photographs):
  image = photographs[0]
  orders = set()
  for i in range(12):
    seed = tf.constant((5, i), tf.int64)
    ours = preprocess.color_jitter(tf.constant(image), seed, 0.4).numpy()
    draws = preprocess.uniform(seed, preprocess.Stream.COLOR_JITTER, (2, 3)).numpy()
    order = np.argsort(draws[0])
    factors = (0.6 + 0.8 * draws[1])[order]
    expected = Image.fromarray(image)
    for factor, which in zip(factors, order, strict=True):
      kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
      expected = kind(expected).enhance(float(factor))
    orders.add(tuple(order))
    assert np.abs(ours.astype(int) - np.asarray(expected)).mean() < 0.5
  assert len(orders) > 2


def test_operations_know_nothing_of_the_rest(photographs):
  """In one graph, several images one after another, as the pipeline does it."""
  policy = randaugment.parse("rand-m9-mstd0.5-inc1")
  apply = functools.partial(randaugment.rand_augment, policy=policy, fill=FILL, interpolation="bicubic")
  images = tf.data.Dataset.from_tensor_slices(np.stack([photographs[0]] * 8)).enumerate()
  found = images.map(lambda i, image: apply(image, tf.stack([tf.constant(9, tf.int64), i])), num_parallel_calls=2)
  for i, ours in enumerate(found.as_numpy_iterator()):
    alone = apply(tf.constant(photographs[0]), tf.constant((9, i), tf.int64)).numpy()
    assert np.abs(ours.astype(int) - alone).mean() < 0.01  # another program may round another way
