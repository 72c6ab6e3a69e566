"""Random resized crops against torchvision's rule and Pillow's pixels, of every kind of file."""

import io

import numpy as np
from PIL import Image
import pytest
import sklearn.datasets
import tensorflow as tf

from vit_jax_ext.data import preprocess


def seed(i):
  return tf.constant((11, i), tf.int64)


def encoded(image, kind="JPEG", mode="RGB"):
  buffer = io.BytesIO()
  Image.fromarray(image).convert(mode).save(buffer, kind, **({"quality": 98} if kind == "JPEG" else {}))
  return buffer.getvalue()


def torchvision_box(height, width, draws, scale, ratio):
  """RandomResizedCrop.get_params, with the draws given: share, log-aspect, top, left of ten attempts."""
  for share, aspect, top, left in draws.T:
    area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
    aspect = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * aspect)
    w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
  if width / height < ratio[0]:
    w, h = width, round(width / ratio[0])
  elif width / height > ratio[1]:
    w, h = round(height * ratio[1]), height
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (30, 300), (300, 20), (1, 1), (1, 40)])
def test_boxes_are_torchvisions(height, width):
  def box(draws):
    return preprocess.random_box(tf.constant([height, width]), draws, (0.08, 1.0), (3 / 4, 4 / 3))

  differing = 0
  for i in range(200):
    draws = preprocess.uniform(seed(i), preprocess.Stream.CROP, (4, 10))
    expected = torchvision_box(height, width, draws.numpy().astype(np.float64), (0.08, 1.0), (3 / 4, 4 / 3))
    differing += tuple(box(draws).numpy()) != expected
  assert differing <= 2  # where a half is rounded in another precision


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_pixels_are_pillows(method):
  image = sklearn.datasets.load_sample_image("china.jpg")
  content = encoded(image)
  decoded = Image.open(io.BytesIO(content))
  for i in range(4):
    ours = preprocess.random_resized_crop(content, (64, 48), seed(i), scale=(0.08, 1.0), interpolation=method).numpy()
    draws = preprocess.uniform(seed(i), preprocess.Stream.CROP, (4, 11))
    box = preprocess.random_box(tf.constant(image.shape[:2]), draws, (0.08, 1.0), (3 / 4, 4 / 3))
    top, left, height, width = map(int, box)
    resample = Image.BICUBIC if method == "bicubic" else Image.BILINEAR
    expected = decoded.crop((left, top, left + width, top + height)).resize((48, 64), resample)
    assert ours.shape == (64, 48, 3) and ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - np.asarray(expected)).mean() < 1.0


def test_random_interpolation_is_one_of_two():
  content = encoded(sklearn.datasets.load_sample_image("china.jpg"))
  kinds = set()
  for i in range(8):
    ours, bilinear, bicubic = (
      preprocess.random_resized_crop(content, (32, 32), seed(i), scale=(0.08, 1.0), interpolation=kind).numpy()
      for kind in ("random", "bilinear", "bicubic")
    )
    kinds.add("bilinear" if np.array_equal(ours, bilinear) else "bicubic")
    assert np.array_equal(ours, bilinear) or np.array_equal(ours, bicubic)
  assert kinds == {"bilinear", "bicubic"}


KINDS = ["JPEG L", "JPEG CMYK", "PNG RGB", "PNG L", "PNG RGBA", "GIF RGB", "BMP RGB"]


@pytest.mark.parametrize(("kind", "mode"), [kind.split() for kind in KINDS])
def test_all_kinds_of_files(kind, mode):
  image = np.zeros((40, 60, 3), np.uint8) + np.array([200, 90, 30], np.uint8)
  content = encoded(image, kind, mode)
  expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[5, 5]
  ours = preprocess.random_resized_crop(content, (16, 16), seed(0), scale=(0.3, 1.0), interpolation="bicubic").numpy()
  assert np.abs(ours.astype(int) - expected).max() <= 4


def test_flip():
  image = tf.constant(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
  flipped = [np.array_equal(preprocess.random_flip(image, seed(i), 0.5), image[:, ::-1]) for i in range(200)]
  assert 0.35 < np.mean(flipped) < 0.65
  assert all(np.array_equal(preprocess.random_flip(image, seed(i), 0.0), image) for i in range(5))


def test_streams_of_a_seed_are_independent():
  draws = np.array(
    [[preprocess.uniform(seed(i), stream, ()).numpy() for stream in preprocess.Stream] for i in range(300)]
  )
  correlation = np.corrcoef(draws.T)
  assert np.abs(correlation - np.eye(len(correlation))).max() < 0.25
