"""Unreadable images are flagged in place, and nothing else is."""

import io

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import tensorflow as tf

from vit_jax_ext.data import preprocess, unreadable

PHOTO = PIL.Image.fromarray(sklearn.datasets.load_sample_image("china.jpg")).resize((120, 90))


def encode(kind):
  file = io.BytesIO()
  PHOTO.save(file, kind)
  return file.getvalue()


SEED = tf.constant([0, 0], tf.int64)
GOOD = encode("JPEG")
BAD = {
  "empty": b"",
  "text": b"no image",
  "header only": GOOD[:20],
  "cut in the middle": GOOD[: len(GOOD) // 2],
  "cut by ten bytes": GOOD[:-10],
  "cut with an end marker in a comment": GOOD[:2] + b"\xff\xfe\x00\x04\xff\xd9" + GOOD[2:-40],
  "cut PNG": encode("PNG")[:-200],
  "header damaged": GOOD[:160] + b"\0" * 40 + GOOD[200:],
}


def flagged(files, batch_size, **options):
  dataset = tf.data.Dataset.from_tensor_slices((np.arange(len(files)), {"image": files})).batch(32)

  def fn(example):
    image = preprocess.random_resized_crop(example["image"], (16, 16), SEED, scale=(0.08, 0.1))
    return {"image": image, "one": tf.constant(1)}

  flag = unreadable.map_or_flag(fn)
  groups = dataset.map(lambda index, group: (index, *flag(group)))
  return list(groups.rebatch(batch_size, **options).as_numpy_iterator())


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
  expected = preprocess.random_resized_crop(tf.constant(GOOD), (16, 16), SEED, scale=(0.08, 0.1)).numpy()
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
