"""Cropping, resizing and jitter against Pillow and torchvision's rules; unreadable images."""

import io
import math

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest
import sklearn.datasets
import tensorflow as tf

from vit_jax_ext.data import preprocess, unreadable

CHINA = PIL.Image.fromarray(sklearn.datasets.load_sample_image("china.jpg"))  # 640 x 427


def encode(image, kind="JPEG", **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def seed(*numbers):
  return tf.constant(numbers, tf.int64)


def difference(a, b):
  return np.abs(np.asarray(a, float) - np.asarray(b, float))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 64), (600, 700), (100, 900), (427, 640), (1, 1)])
def test_resize_equals_pillow(interpolation, size):
  ours = preprocess.resize(tf.constant(np.asarray(CHINA)), size, interpolation)
  theirs = CHINA.resize(size[::-1], getattr(PIL.Image, interpolation.upper()))
  error = difference(ours, theirs)
  assert ours.dtype == tf.uint8
  assert error.mean() < 0.3
  assert error.max() <= 10  # Pillow rounds and clips between the two directions


def box_of_numpy(shape, rng, scale, ratio):
  """Torchvision's RandomResizedCrop.get_params."""
  height, width = shape
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
  if width / height < min(ratio):
    w, h = width, round(width / min(ratio))
  elif width / height > max(ratio):
    w, h = round(height * max(ratio)), height
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("shape", [(375, 500), (500, 120), (40, 200), (7, 5)])
def test_boxes_are_distributed_as_torchvisions(shape):
  count, scale, ratio = 4000, (0.08, 1.0), (3 / 4, 4 / 3)
  draws = tf.random.stateless_uniform((count, 4, 11), (0, 1))
  ours = tf.vectorized_map(lambda d: preprocess.random_box(tf.constant(shape), d, scale, ratio), draws).numpy()
  rng = np.random.default_rng(0)
  theirs = np.array([box_of_numpy(shape, rng, scale, ratio) for _ in range(count)])
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
  np.testing.assert_array_equal(ours, box_of_numpy(shape, np.random.default_rng(0), (1.0, 1.0), (1.3, 4 / 3)))


def crop(encoded, index=0, size=(48, 56), **options):
  return preprocess.random_resized_crop(tf.constant(encoded), size, seed(0, index), **options).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_resized_crop_equals_pillow(interpolation):
  encoded = encode(CHINA, quality=90)
  decoded = PIL.Image.open(io.BytesIO(encoded))
  for index in range(4):
    draws = preprocess.uniform(seed(0, index), preprocess.Stream.CROP, (4, 11))
    top, left, height, width = preprocess.random_box(
      tf.constant([427, 640]), draws, (0.08, 1.0), (3 / 4, 4 / 3)
    ).numpy()  # fmt: skip
    box = (left, top, left + width, top + height)
    theirs = decoded.resize((56, 48), getattr(PIL.Image, interpolation.upper()), box=box)
    assert difference(crop(encoded, index, interpolation=interpolation), theirs).mean() < 0.5


ODD = {
  "PNG": encode(CHINA, "PNG"),  # ImageNet has one under the name of a JPEG; the name is nowhere looked at
  "PNG with transparency": encode(CHINA.convert("RGBA"), "PNG"),
  "palette": encode(CHINA.quantize(256), "PNG"),
  "grey JPEG": encode(CHINA.convert("L"), quality=95),
  "grey PNG": encode(CHINA.convert("L"), "PNG"),
  "CMYK JPEG": encode(CHINA.convert("CMYK"), quality=95),
  "progressive JPEG": encode(CHINA, quality=95, progressive=True),
  "BMP": encode(CHINA, "BMP"),
  "GIF": encode(CHINA, "GIF"),
  "bytes after the JPEG": encode(CHINA, quality=95) + b"\0" * 10,
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_formats(kind):
  """Decoded and cropped as if the same pixels had come in an ordinary file."""
  theirs = PIL.Image.open(io.BytesIO(ODD[kind])).convert("RGB")
  ours = preprocess.decode(tf.constant(ODD[kind])).numpy()
  assert ours.shape == (427, 640, 3)
  assert difference(ours, theirs).mean() < 0.5
  for index in range(2):
    assert difference(crop(ODD[kind], index), crop(encode(theirs, "PNG"), index)).mean() < 0.5


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


def test_flip_mirrors_half_of_the_images():
  image = tf.constant(np.asarray(CHINA.resize((9, 7))))
  flipped = 0
  for index in range(200):
    result = preprocess.random_flip(image, seed(0, index), 0.5).numpy()
    mirrored = np.array_equal(result, image.numpy()[:, ::-1])
    assert mirrored or np.array_equal(result, image)
    flipped += mirrored
  assert 70 < flipped < 130


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


GOOD = encode(CHINA.resize((120, 90)))
BAD = {
  "empty": b"",
  "text": b"no image",
  "header only": GOOD[:20],
  "cut in the middle": GOOD[: len(GOOD) // 2],
  "cut by ten bytes": GOOD[:-10],
  "cut with an end marker in a comment": GOOD[:2] + b"\xff\xfe\x00\x04\xff\xd9" + GOOD[2:-40],
  "cut PNG": encode(CHINA.resize((120, 90)), "PNG")[:-200],
  "header damaged": GOOD[:160] + b"\0" * 40 + GOOD[200:],
}


def flagged(files, batch_size, **options):
  dataset = tf.data.Dataset.from_tensor_slices((np.arange(len(files)), {"image": files}))

  def fn(example):
    image = preprocess.random_resized_crop(example["image"], (16, 16), seed(0, 0), scale=(0.08, 0.1))
    return {"image": image, "one": tf.constant(1)}

  return list(unreadable.map_or_flag(dataset, fn, batch_size, **options).as_numpy_iterator())


@pytest.mark.parametrize("count", [1, 31, 32, 70])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_exactly_the_unreadable_are_flagged_in_order(count, batch_size):
  rng = np.random.default_rng(count)
  bad = rng.uniform(size=count) < 0.3
  files = [list(BAD.values())[rng.integers(len(BAD))] if b else GOOD for b in bad]
  batches = flagged(files, batch_size)
  index, ok, result = (np.concatenate(x) for x in zip(*[(i, o, r["image"]) for i, o, r in batches], strict=True))
  assert [len(i) for i, _, _ in batches] == [batch_size] * (count // batch_size) + [count % batch_size] * (
    count % batch_size > 0
  )
  np.testing.assert_array_equal(index, np.arange(count))
  np.testing.assert_array_equal(ok, ~bad)
  assert (result[bad] == 0).all()
  expected = preprocess.random_resized_crop(tf.constant(GOOD), (16, 16), seed(0, 0), scale=(0.08, 0.1)).numpy()
  assert (result[ok] == expected).all()
  np.testing.assert_array_equal(np.concatenate([r["one"] for _, _, r in batches]), ok)


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_of_unreadable_is_flagged(kind):
  ((_, ok, _),) = flagged([GOOD, BAD[kind], GOOD], 3)
  assert ok.tolist() == [True, False, True]


def test_nothing_readable():
  ((index, ok, result),) = flagged([b"", b""], 2)
  assert index.tolist() == [0, 1]
  assert not ok.any()
  assert result["image"].shape == (2, 16, 16, 3)


def test_errors_of_the_dataset_itself_are_raised():
  broken = tf.data.Dataset.range(3).map(lambda i: (i, tf.debugging.check_numerics(1 / tf.cast(i - 1, tf.float32), "x")))
  with pytest.raises(tf.errors.InvalidArgumentError):
    list(unreadable.map_or_flag(broken, lambda x: x, 2))
