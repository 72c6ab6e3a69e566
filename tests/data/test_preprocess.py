"""Cropping, resizing and jitter against Pillow and torchvision's rules."""

import functools
import io
import math

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest
import sklearn.datasets
import tensorflow as tf

from vit_jax_ext.data import preprocess

CHINA = PIL.Image.fromarray(sklearn.datasets.load_sample_image("china.jpg"))  # 640 x 427


def encode(image, kind="JPEG", **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def seed(*numbers):
  return tf.constant(numbers, tf.int64)


def difference(a, b):
  return np.abs(np.asarray(a, float) - np.asarray(b, float))


def resized(image, size, interpolation, columns_first=False):
  """In two calls: Pillow 13 takes the columns first where that is faster; all before it, the rows."""
  resample = getattr(PIL.Image, interpolation.upper())
  between = (image.width, size[0]) if columns_first else (size[1], image.height)
  return image.resize(between, resample).resize((size[1], size[0]), resample)


def assert_pillows(ours, theirs):
  """Pillow resizes with weights of 22 bits, TensorFlow with floats: halves are rounded to either side, twice."""
  assert ours.shape == np.shape(theirs)
  assert difference(ours, theirs).mean() < 0.02
  assert difference(ours, theirs).max() <= 3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 64), (600, 700), (100, 900), (427, 640), (1, 1)])
def test_resize_equals_pillow(interpolation, size):
  ours = preprocess.resize(tf.constant(np.asarray(CHINA)), size, interpolation)
  assert ours.dtype == tf.uint8
  assert_pillows(ours, resized(CHINA, size, interpolation))


def sixteen_bits(mode, factor):
  return tf.io.encode_png(np.asarray(CHINA.convert(mode), np.uint16).reshape(427, 640, -1) * factor).numpy()


TRANSPARENT = CHINA.copy()
TRANSPARENT.putalpha(CHINA.convert("L"))
ODD = {
  "JPEG": encode(CHINA, quality=90),
  "JPEG, colours in full": encode(CHINA, quality=90, subsampling=0),
  "progressive JPEG": encode(CHINA, quality=95, progressive=True),
  "grey JPEG": encode(CHINA.convert("L"), quality=95),
  "CMYK JPEG": encode(CHINA.convert("CMYK"), quality=95),
  "CMYK JPEG, colours in part": encode(CHINA.convert("CMYK"), quality=95, subsampling=2),
  "bytes after the JPEG": encode(CHINA, quality=95) + b"\0" * 10,
  "PNG": encode(CHINA, "PNG"),  # ImageNet has one under the name of a JPEG; the name is nowhere looked at
  "grey PNG": encode(CHINA.convert("L"), "PNG"),
  "PNG with transparency": encode(TRANSPARENT, "PNG"),
  "grey PNG with transparency": encode(TRANSPARENT.convert("LA"), "PNG"),
  "palette": encode(CHINA.quantize(256), "PNG"),
  "palette of 16": encode(CHINA.quantize(16), "PNG", bits=4),
  "palette with a transparent colour": encode(CHINA.quantize(256), "PNG", transparency=3),
  "1 bit": encode(CHINA.convert("1"), "PNG"),
  "16 bits": sixteen_bits("RGB", 257),
  "16 bits with transparency": sixteen_bits("RGBA", 257),
  "grey of 16 bits": sixteen_bits("L", 2),  # Pillow cuts off at 255
  "BMP": encode(CHINA, "BMP"),
  "grey BMP": encode(CHINA.convert("L"), "BMP"),
  "GIF": encode(CHINA, "GIF"),
}


def by_pillow(encoded):
  return PIL.Image.open(io.BytesIO(encoded)).convert("RGB")


@pytest.mark.parametrize("kind", ODD)
def test_decoding_equals_pillows(kind):
  np.testing.assert_array_equal(preprocess.decode(tf.constant(ODD[kind])), np.asarray(by_pillow(ODD[kind])))


def evaluated_by_torchvision(image, size, crop):
  """Resize to a whole number of the shorter side, then CenterCrop."""
  whole = [math.floor(side / crop) for side in size]
  if whole[0] * image.width > whole[1] * image.height:
    height, width = whole[0], int(whole[0] * image.width / image.height)
  else:
    height, width = int(whole[1] * image.height / image.width), whole[1]
  top, left = int(round((height - size[0]) / 2)), int(round((width - size[1]) / 2))  # noqa: RUF046
  return resized(image, (height, width), "bicubic").crop((left, top, left + size[1], top + size[0]))


@functools.cache
def evaluation(size, crop):
  return tf.function(lambda encoded: preprocess.resize_and_center_crop(encoded, size, crop), autograph=False)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
  ("side", "crop"), [(224, 0.875), (224, 0.9), (224, 1.0), (240, 0.875), (384, 1.0), (408, 0.875), (408, 1.0)]
)
def test_evaluation_equals_torchvisions_with_pillow(side, crop, kind):
  """As all variants here are evaluated, on every kind of file."""
  theirs = evaluated_by_torchvision(by_pillow(ODD[kind]), (side, side), crop)
  assert_pillows(evaluation((side, side), crop)(tf.constant(ODD[kind])), theirs)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("size", "crop"), [((224, 224), 0.875), ((96, 96), 1.0), ((64, 100), 0.8), ((8, 8), 0.1)])
@pytest.mark.parametrize("shape", [(427, 640), (500, 375), (1600, 1100), (100, 333), (40, 1000), (50, 40), (1, 3)])
def test_evaluation_equals_torchvisions_for_any_shape(shape, size, crop, kind):
  encoded = encode(CHINA.resize(shape), kind)
  theirs = evaluated_by_torchvision(by_pillow(encoded), size, crop)
  assert_pillows(evaluation(size, crop)(tf.constant(encoded)), theirs)


def box_of_torchvision(shape, draw, scale, ratio):
  """RandomResizedCrop.get_params; `draw()` is uniform in [0, 1)."""
  height, width = shape
  for _ in range(10):
    share, aspect, top, left = draw(), draw(), draw(), draw()
    area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
    aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
  if width / height < min(ratio):
    w, h = width, round(width / min(ratio))
  elif width / height > max(ratio):
    w, h = round(height * max(ratio)), height
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


SHAPES = [(375, 500), (500, 120), (40, 200), (7, 5), (1, 40), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_equal_torchvisions_given_the_draws(shape):
  count, limits = 1000, ((0.08, 1.0), (3 / 4, 4 / 3))
  draws = tf.random.stateless_uniform((count, 4, 10), (0, 1))
  ours = tf.vectorized_map(lambda d: preprocess.random_box(tf.constant(shape), d, *limits), draws).numpy()
  draws = [iter(d.T.ravel().tolist()) for d in draws.numpy()]
  theirs = [box_of_torchvision(shape, functools.partial(next, d), *limits) for d in draws]
  assert (ours != theirs).any(axis=1).mean() < 0.005  # halves that single and double precision round to either side


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_boxes_are_distributed_as_torchvisions(shape):
  count, limits = 4000, ((0.08, 1.0), (3 / 4, 4 / 3))

  def box(index):
    draws = preprocess.uniform(tf.stack([tf.zeros((), tf.int64), index]), preprocess.Stream.CROP, (4, 11))
    return preprocess.random_box(tf.constant(shape), draws, *limits)

  ours = next(tf.data.Dataset.range(count).map(box).batch(count).as_numpy_iterator())
  rng = np.random.default_rng(0)
  theirs = np.array([box_of_torchvision(shape, rng.uniform, *limits) for _ in range(count)])
  assert (ours[:, 2:] >= 1).all()
  assert (ours[:, :2] >= 0).all()
  assert (ours[:, :2] + ours[:, 2:] <= shape).all()
  for column in range(4):  # Kolmogorov-Smirnov, at a level of 0.1 %
    edges = np.arange(max(shape) + 1)
    ours_cdf, theirs_cdf = (np.searchsorted(np.sort(x[:, column]), edges, "right") / count for x in (ours, theirs))
    assert np.abs(ours_cdf - theirs_cdf).max() < 1.95 * math.sqrt(2 / count)
  assert np.abs(np.corrcoef(ours.T) - np.corrcoef(theirs.T)).max() < 0.08


@pytest.mark.parametrize("shape", [(10, 100), (100, 10), (1, 7), (1, 1)])
def test_central_box_where_nothing_fits(shape):
  draws = tf.ones((4, 11)) * 0.99  # the whole area at a ratio of 4/3
  ours = preprocess.random_box(tf.constant(shape), draws, (1.0, 1.0), (1.3, 4 / 3)).numpy()
  np.testing.assert_array_equal(ours, box_of_torchvision(shape, lambda: 0.99, (1.0, 1.0), (1.3, 4 / 3)))


def crop(encoded, index=0, size=(48, 56), **options):
  return preprocess.random_resized_crop(tf.constant(encoded), size, seed(0, index), **options).numpy()


def cut_by_pillow(encoded, index):
  """Returns the part of an image of 640x427 that `crop` takes."""
  draws = preprocess.uniform(seed(0, index), preprocess.Stream.CROP, (4, 11))
  top, left, height, width = preprocess.random_box(tf.constant([427, 640]), draws, (0.08, 1.0), (3 / 4, 4 / 3)).numpy()
  return by_pillow(encoded).crop((left, top, left + width, top + height))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ODD)
def test_random_resized_crop_equals_pillow(kind, interpolation):
  for index in range(4):
    theirs = resized(cut_by_pillow(ODD[kind], index), (48, 56), interpolation, columns_first=True)
    assert_pillows(crop(ODD[kind], index, interpolation=interpolation), theirs)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_crops_are_nearly_those_with_rows_first(interpolation):
  """As Pillow resized until version 12, and mostly does: the order moves what is rounded in between."""
  encoded, levels = encode(CHINA), []
  for index in range(8):
    ours = crop(encoded, index, (224, 224), interpolation=interpolation)
    levels.append(difference(ours, resized(cut_by_pillow(encoded, index), (224, 224), interpolation)))
  print(f"{interpolation}: {np.mean(levels):.3f} levels on average, at most {np.max(levels):.0f}")
  assert np.mean(levels) < 0.25


@pytest.mark.parametrize("side", [500, 1100, 2300])
def test_scaled_while_decoding_is_nearly_the_same(side):
  """Of crops that are 2, 4 and 8 times as large as what is made of them; others are the very same."""
  encoded, levels = encode(CHINA.resize((side, side * 2 // 3), PIL.Image.BICUBIC), quality=90), []
  for index in range(8):
    plain, scaled = (crop(encoded, index, scale=(0.6, 1.0), dct_scaling=on) for on in (False, True))
    levels.append(difference(plain, scaled).mean())
    small = crop(encoded, index, (700, 800), scale=(0.1, 0.3)), crop(encoded, index, (700, 800), dct_scaling=True,
                                                                     scale=(0.1, 0.3))  # fmt: skip
    np.testing.assert_array_equal(*small)
  print(f"{side} pixels: {np.mean(levels):.2f} levels on average")
  assert 0 < np.mean(levels) < 2


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_tiny_images(size, kind):
  image = CHINA.crop((0, 0, *size))
  for index in range(5):
    assert crop(encode(image, kind), index).shape == (48, 56, 3)


def test_seeds_decide():
  encoded = encode(CHINA)
  results = [crop(encoded, index, interpolation="random") for index in (0, 0, 1, 2)]
  np.testing.assert_array_equal(results[0], results[1])
  assert not np.array_equal(results[0], results[2])
  assert not np.array_equal(results[2], results[3])


def test_random_interpolation_is_one_of_both():
  encoded, found = encode(CHINA), set()
  for index in range(12):
    either = {kind: crop(encoded, index, interpolation=kind) for kind in ("bilinear", "bicubic")}
    result = crop(encoded, index, interpolation="random")
    found |= {kind for kind, image in either.items() if np.array_equal(image, result)}
  assert found == {"bilinear", "bicubic"}


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_flip_mirrors_its_share_of_the_images(probability):
  image = tf.constant(np.asarray(CHINA.resize((9, 7))))
  flipped = 0
  for index in range(200):
    result = preprocess.random_flip(image, seed(0, index), probability).numpy()
    mirrored = np.array_equal(result, image.numpy()[:, ::-1])
    assert mirrored or np.array_equal(result, image)
    flipped += mirrored
  assert abs(flipped / 200 - probability) < 0.15 * (0 < probability < 1) + 1e-9


def test_color_jitter_equals_torchvisions_with_pillow():
  """The same operations of Pillow, in the order and with the factors of the draws."""
  image = CHINA.resize((40, 30))
  operations = [PIL.ImageEnhance.Brightness, PIL.ImageEnhance.Contrast, PIL.ImageEnhance.Color]
  orders = set()
  for index in range(20):
    draws = preprocess.uniform(seed(0, index), preprocess.Stream.COLOR_JITTER, (2, 3)).numpy()
    order = tuple(np.argsort(draws[0]).tolist())
    orders.add(order)
    theirs = image
    for operation in order:
      factor = 0.6 + 0.8 * float(draws[1][operation])
      theirs = operations[operation](theirs).enhance(factor)
    ours = preprocess.color_jitter(tf.constant(np.asarray(image)), seed(0, index), 0.4)
    assert difference(ours, theirs).mean() < 0.05
  assert len(orders) == 6


def test_transforms_draw_independently_from_one_seed():
  draws = [preprocess.uniform(seed(0, index), stream, (3,)) for index in range(300) for stream in preprocess.Stream]
  draws = np.array(draws).reshape(300, -1)
  assert np.abs(np.corrcoef(draws.T) - np.eye(draws.shape[1])).max() < 0.25
  assert len(np.unique(draws[:, ::3])) > 0.99 * draws[:, ::3].size
