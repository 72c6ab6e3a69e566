"""The embedded dataset and the batches made of it."""

import collections
import io

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import sklearn.datasets
import tensorflow as tf

import vit_jax_ext as vx
from vit_jax_ext.data import datasets, input_pipeline, preprocess


@pytest.fixture(scope="module")
def dataset(data_dir):
  return datasets.open_dataset("digits", data_dir)


def decoded(dataset, split):
  """Yields a split's examples with the image as an array, by Pillow."""
  for _, example in dataset.examples(split).as_numpy_iterator():
    yield {"image": np.asarray(PIL.Image.open(io.BytesIO(example["image"])))[..., None], "label": example["label"]}


def train_batches(dataset, count, **kw):
  options = (
    dict(batch_size=50, image_size=(8, 8), seed=0, first_step=0, shuffle_buffer=10_000, shift=0.0, scale=0.0) | kw
  )
  options["total_steps"] = options["first_step"] + count
  batches = list(input_pipeline.train_batches(dataset, "train", **options))
  assert len(batches) == count
  return batches


def test_digits_is_scikit_learns_data_split_in_equal_shares(dataset):
  source = sklearn.datasets.load_digits()
  expected = collections.Counter(
    (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
    for image, label in zip(source.images, source.target, strict=True)
  )
  found, shares = collections.Counter(), {}
  for split, size in (("train", 1437), ("test", 360)):
    examples = list(decoded(dataset, split))
    assert len(examples) == dataset.num_examples(split) == size
    found.update((example["image"].tobytes(), int(example["label"])) for example in examples)
    shares[split] = np.bincount([example["label"] for example in examples]) / size
  assert found == expected
  np.testing.assert_allclose(shares["train"], shares["test"], atol=0.003)


def test_an_epoch_holds_every_image_once(dataset):
  batches = train_batches(dataset, 60)
  images = [image.tobytes() for batch in batches for image in batch["image"]]
  everything = collections.Counter(e["image"].repeat(3, -1).tobytes() for e in decoded(dataset, "train"))
  for epoch in (0, 1):
    assert collections.Counter(images[epoch * 1437 : (epoch + 1) * 1437]) == everything
  assert images[:1437] != images[1437:2874]
  assert batches[0]["image"].dtype == np.uint8
  assert batches[0]["label"].dtype == np.int32


@pytest.mark.parametrize("first_step", [1, 28, 29, 70])
def test_starting_late_continues_exactly(dataset, first_step):
  kw = dict(shift=0.1, scale=0.2, image_size=(16, 16))
  whole = train_batches(dataset, first_step + 3, **kw)[first_step:]
  late = train_batches(dataset, 3, first_step=first_step, **kw)
  for a, b in zip(whole, late, strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])


def test_seeds_change_order_and_augmentation(dataset):
  first, same, other = (train_batches(dataset, 1, seed=seed, shift=0.2)[0]["image"] for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, same)
  assert not np.array_equal(first, other)


@pytest.mark.parametrize("batch_size", [7, 360, 500])
def test_evaluation_pads_and_masks(dataset, batch_size):
  batches = list(input_pipeline.eval_batches(dataset, "test", batch_size=batch_size, image_size=(8, 8), crop=1.0))
  assert {batch["image"].shape for batch in batches} == {(batch_size, 8, 8, 3)}
  images = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
  labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
  expected = list(decoded(dataset, "test"))
  np.testing.assert_array_equal(images, np.stack([e["image"] for e in expected]).repeat(3, axis=-1))
  np.testing.assert_array_equal(labels, [e["label"] for e in expected])


def test_shift_and_scale_equal_scipy():
  """Against scipy's affine transform with the same draws."""
  image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
  for index in range(5):
    seed = tf.constant([3, index], tf.int64)
    ours = preprocess.random_shift_and_scale(tf.constant(image), seed, shift=0.2, scale=0.3).numpy()
    dy, dx, zoom = tf.random.stateless_uniform((3,), seed, -1.0, 1.0).numpy() * [0.2 * 20, 0.2 * 30, 0.3] + [0, 0, 1]
    centre = np.array([9.5, 14.5])
    offset = centre - (centre + np.array([dy, dx])) / zoom
    theirs = np.stack(
      [
        scipy.ndimage.affine_transform(
          np.pad(image[..., c].astype(float), 1), [1 / zoom, 1 / zoom], offset - 1 / zoom + 1, order=1,
          output_shape=(22, 32),
        )[1:-1, 1:-1]
        for c in range(3)
      ],
      axis=-1,
    )  # fmt: skip
    assert np.abs(ours.astype(float) - theirs).max() < 1.0


def test_evaluation_resize_equals_pillow():
  pillow = pytest.importorskip("PIL.Image")
  image = sklearn.datasets.load_sample_image("china.jpg")  # 427 x 640
  ours = preprocess.resize_and_center_crop(tf.constant(image), (224, 224), crop=0.875).numpy()
  height, width = 256, round(640 * 256 / 427)
  theirs = pillow.fromarray(image).resize((width, height), pillow.BICUBIC)
  left, top = (width - 224) // 2, (height - 224) // 2
  theirs = np.asarray(theirs.crop((left, top, left + 224, top + 224)))
  assert np.abs(ours.astype(float) - theirs).mean() < 1


@pytest.mark.parametrize(
  ("name", "words"),
  [("no_such_dataset", ["no_such_dataset", "data_dir"]), ("imagenet2012", ["imagenet2012", "not prepared"]),
   ("glue", ["glue"])],
)  # fmt: skip
def test_bad_datasets(name, words, data_dir):
  with pytest.raises(vx.UserError) as error:
    datasets.open_dataset(name, data_dir)
  assert all(word in str(error.value) for word in words)


def test_bad_split(dataset):
  with pytest.raises(vx.UserError, match=r"validation.*test, train"):
    dataset.num_examples("validation")


def test_unreadable_images(tmp_path):
  (tmp_path / "text.png").write_text("no image")
  with pytest.raises(vx.UserError, match=r"text.png cannot be decoded"):
    input_pipeline.read_image(str(tmp_path / "text.png"), (8, 8), 1.0)
  with pytest.raises(vx.UserError, match=r"none.png does not exist"):
    input_pipeline.read_image(str(tmp_path / "none.png"), (8, 8), 1.0)
