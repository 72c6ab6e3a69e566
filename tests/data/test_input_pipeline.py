"""The embedded dataset and the batches made of it."""

import collections
import io
import itertools

import jax
import numpy as np
import PIL.Image
import psutil
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


PLAIN = dict(crop_scale=(), interpolation="bicubic", flip=0.0, randaugment="", color_jitter=0.0)
RECIPE = dict(crop_scale=(0.08, 1.0), interpolation="random", flip=0.5, randaugment="rand-m9-mstd0.5-inc1",
              color_jitter=0.4)  # fmt: skip


def train_batches(dataset, count, *, augment=PLAIN, shift=0.0, scale=0.0, image_size=(8, 8), **kw):
  options = dict(batch_size=50, seed=0, first_step=0, shuffle_buffer=10_000) | kw
  options = dict(rows=range(options["batch_size"])) | options
  options["total_steps"] = options["first_step"] + count
  augmentation = input_pipeline.train_augmentation(augment, image_size, (0.5, 0.5, 0.5), shift, scale)
  batches = list(input_pipeline.train_batches(dataset, "train", image_size=image_size, augment=augmentation, **options))
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


@pytest.mark.parametrize(
  ("first_step", "options"),
  [
    (1, dict(shift=0.1, scale=0.2)),
    (29, dict(shift=0.1, scale=0.2)),
    (70, dict(augment=PLAIN | dict(crop_scale=(0.1, 1), flip=0.5))),
    (31, dict(augment=PLAIN | dict(crop_scale=(0.1, 1), flip=0.5), repeats=3)),
    (30, dict(augment=RECIPE)),
  ],
)
def test_starting_late_continues_exactly(dataset, first_step, options):
  options = dict(image_size=(16, 16)) | options
  whole = train_batches(dataset, first_step + 3, **options)[first_step:]
  late = train_batches(dataset, 3, first_step=first_step, **options)
  for a, b in zip(whole, late, strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])


class Numbered(datasets.Dataset):
  """Images that are labelled with their index."""

  name, version, class_names = "numbered", "1", ("",)

  def __init__(self, size, any_order=True):
    self._size, self._any_order = size, any_order

  def num_examples(self, split):
    return self._size

  def lookup(self, split):
    noise = tf.io.encode_png(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))

    def find(indices):
      return {"image": tf.fill(tf.shape(indices), noise), "label": tf.cast(indices, tf.int32),
              "name": tf.fill(tf.shape(indices), "")}  # fmt: skip

    return find if self._any_order else None

  def examples(self, split, share=0, shares=1):
    lookup = Numbered(self._size).lookup(split)
    indices = tf.data.Dataset.range(*self._bounds(split, share, shares))
    return indices.map(lambda index: (index, {key: value[0] for key, value in lookup(index[None]).items()}))


def on_hosts(hosts, monkeypatch, batch_size, make):
  """Yields what `make` returns on each of the hosts, from the rows that are its own."""
  monkeypatch.setattr(jax, "process_count", lambda: hosts)
  for host in range(hosts):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    yield make(np.arange(batch_size).reshape(hosts, -1)[host])
  monkeypatch.undo()


IN_ANY_ORDER = pytest.mark.parametrize("any_order", [True, False], ids=["permuted", "buffered"])


def epoch_of_ra_sampler(size, replicas, batch_size, rng):
  """RASampler and a loader with drop_last: each replica's indices, (steps, batch_size).

  It leaves out what is more than a multiple of 256, so it counts as we do where the whole batch is such a one.
  """
  indices = np.repeat(rng.permutation(size), 3)
  per_replica = -(-3 * size // replicas)
  indices = np.append(indices, indices[: per_replica * replicas - len(indices)])
  selected = size // 256 * 256 // replicas
  steps = selected // batch_size
  return [indices[r::replicas][:selected][: steps * batch_size].reshape(steps, batch_size) for r in range(replicas)]


@IN_ANY_ORDER
@pytest.mark.parametrize(
  ("size", "hosts", "batch_size"), [(1437, 1, 256), (1437, 2, 128), (1437, 3, 256), (1000, 4, 64), (256, 1, 256)]
)
def test_repeated_augmentation_counts_as_ra_sampler(size, hosts, batch_size, any_order, monkeypatch):
  rng, chosen = np.random.default_rng(0), []
  whole = hosts * batch_size
  steps = size // whole

  def make(rows):
    return train_batches(Numbered(size, any_order), 3 * steps, batch_size=whole, rows=rows, repeats=3)

  ours = list(on_hosts(hosts, monkeypatch, whole, make))
  for epoch in range(3):
    theirs = epoch_of_ra_sampler(size, hosts, batch_size, rng)
    assert len(theirs[0]) == steps
    labels = [np.stack([batch["label"] for batch in batches[epoch * steps :][:steps]]) for batches in ours]
    assert [x.shape for x in labels] == [x.shape for x in theirs]
    counts = np.bincount(np.ravel(labels), minlength=size)
    expected = np.bincount(np.ravel(theirs), minlength=size)
    assert counts.sum() == expected.sum()
    # Every host's copies fill its batches up to two.
    assert counts.max() == 3 and (np.isin(counts, (1, 2))).sum() <= 2 * hosts
    assert abs((counts > 0).sum() - (expected > 0).sum()) <= 2 * hosts
    chosen.append(counts > 0)
    order = [list(dict.fromkeys(x.ravel().tolist())) for x in labels]
    assert all(x != sorted(x) for x in order)
  share = np.mean(chosen)
  for first, second in itertools.combinations(chosen, 2):  # independent draws: three standard deviations
    assert abs((first & second).mean() - share**2) < 3 * share * (1 - share) / np.sqrt(size)


@IN_ANY_ORDER
def test_epochs_of_repeated_augmentation_reach_all_images_alike(any_order):
  """Also with a buffer that does not hold the split."""
  size, epochs = 300, 60
  batches = train_batches(
    Numbered(size, any_order), 3 * epochs, batch_size=96, repeats=3, shuffle_buffer=10, image_size=(2, 2)
  )
  counts = np.bincount(np.ravel([batch["label"] for batch in batches]), minlength=size)
  assert counts.sum() == epochs * 288
  drawn = counts / 3  # binomial, of 60 draws of a share of 0.32
  assert abs(drawn.std() - np.sqrt(60 * 0.32 * 0.68)) < 0.7
  assert drawn.min() > 4 and drawn.max() < 36
  assert abs(np.corrcoef(np.arange(size), drawn)[0, 1]) < 0.2


@IN_ANY_ORDER
@pytest.mark.parametrize(("batch_size", "hosts"), [(48, 1), (100, 2)])
def test_repeated_augmentation_continues_exactly_from_any_step(batch_size, hosts, any_order, monkeypatch):
  options = dict(batch_size=batch_size, repeats=3, augment=PLAIN | dict(crop_scale=(0.1, 1)))
  steps = 2 * (200 // batch_size) + 1  # the third epoch begins

  def check(rows):
    whole = train_batches(Numbered(200, any_order), steps, rows=rows, **options)
    for first_step in range(1, steps):
      late = train_batches(Numbered(200, any_order), steps - first_step, first_step=first_step, rows=rows, **options)
      for a, b in zip(whole[first_step:], late, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])

  assert len(list(on_hosts(hosts, monkeypatch, batch_size, check))) == hosts


def test_repeated_augmentation_needs_a_batch_of_images():
  with pytest.raises(vx.UserError, match=r"batch_size=1024 is more than the 1000 images of train.*repeats=3"):
    train_batches(Numbered(1000), 1, batch_size=1024, repeats=3)


@IN_ANY_ORDER
def test_copies_lie_in_different_thirds_of_a_batch(any_order):
  """Each with its own augmentation, which the image and the epoch decide."""
  options = dict(batch_size=51, repeats=3, augment=PLAIN | dict(crop_scale=(0.3, 0.6)))
  for batch in train_batches(Numbered(600, any_order), 12, **options):
    labels = batch["label"].reshape(3, 17)
    assert (labels == labels[0]).all() and len(set(labels[0].tolist())) == 17
    thirds = batch["image"].reshape(3, 17, -1).astype(int)
    assert all(np.abs(thirds[i] - thirds[j]).mean() > 5 for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize("options", [{}, dict(repeats=3), dict(batch_size=1437)])
@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_rows_of_a_step_are_the_same_on_any_hosts(hosts, options, dataset, monkeypatch):
  """Also from the middle of an epoch on."""
  options = dict(batch_size=1428, shift=0.2, first_step=1) | options
  if options["batch_size"] % hosts:
    return
  parts = on_hosts(
    hosts, monkeypatch, options["batch_size"], lambda rows: train_batches(dataset, 2, rows=rows, **options)
  )
  parts = list(parts)
  for step, batch in enumerate(train_batches(dataset, 2, **options)):
    for key in ("image", "label"):
      np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), batch[key])


def test_hosts_share_an_epoch_that_is_read_in_order(monkeypatch):
  """Three hosts together see every image once."""
  parts = on_hosts(3, monkeypatch, 600, lambda rows: train_batches(Numbered(600, False), 1, batch_size=600, rows=rows))
  assert sorted(label for (batch,) in parts for label in batch["label"].tolist()) == [*range(600)]


def test_memory_does_not_grow_over_epochs(dataset):
  options = dict(batch_size=479, rows=range(479), seed=0, first_step=0, shuffle_buffer=10_000, total_steps=75,
                 image_size=(24, 24))  # fmt: skip
  augmentation = input_pipeline.train_augmentation(
    PLAIN | dict(crop_scale=(0.1, 1.0), flip=0.5), (24, 24), (0.5, 0.5, 0.5), 0.0, 0.0
  )
  used = []
  for step, _ in enumerate(input_pipeline.train_batches(dataset, "train", augment=augmentation, **options)):
    if step in (14, 74):  # the fifth epoch, and the twenty-fifth
      used.append(psutil.Process().memory_info().rss / 2**20)
  assert used[1] - used[0] < 20, used  # MiB


@pytest.fixture
def broken(tmp_path):
  """Two classes of ten grey images each, of which three cannot be decoded in three ways."""
  for i in range(20):
    folder = tmp_path / "grey" / ("a" if i < 10 else "b")
    folder.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (40, 40), (10 * i + 5,) * 3).save(folder / f"{i:02}.jpg", quality=95)
  whole = (tmp_path / "grey" / "a" / "01.jpg").read_bytes()
  (tmp_path / "grey" / "a" / "00.jpg").write_bytes(whole[: len(whole) // 2])
  (tmp_path / "grey" / "a" / "05.jpg").write_bytes(b"")
  (tmp_path / "grey" / "b" / "15.jpg").write_text("<html>not found</html>")
  return datasets.open_dataset(str(tmp_path / "grey"), None)


BROKEN = {0, 5, 15}


@pytest.mark.parametrize("augment", [PLAIN, PLAIN | dict(crop_scale=(0.5, 1.0))])
def test_unreadable_images_are_replaced_and_named(broken, augment, caplog):
  batches = train_batches(broken, 4, batch_size=10, augment=augment, max_unreadable=0.2)
  for batch in batches:
    greys = batch["image"][:, 4, 4, 0].astype(int) // 10
    np.testing.assert_array_equal(batch["label"], greys >= 10)
    assert not set(greys.tolist()) & BROKEN
  assert len({tuple(greys) for greys in (batch["image"][:, 4, 4, 0] for batch in batches)}) == 4
  named = [record.getMessage() for record in caplog.records if "cannot be decoded" in record.getMessage()]
  assert len(named) == 3  # once each, although two epochs met them
  assert all(any(f"/{i:02}.jpg" in message for message in named) for i in BROKEN)


def test_unreadable_images_are_not_evaluated(broken):
  batches = list(
    input_pipeline.eval_batches(broken, "train", batch_size=8, image_size=(8, 8), crop=1.0, max_unreadable=0.2)
  )
  greys = [grey // 10 for batch in batches for grey in batch["image"][batch["mask"]][:, 4, 4, 0].tolist()]
  assert sorted(greys) == sorted(set(range(20)) - BROKEN)


def test_too_many_unreadable_images_end_the_run(broken):
  with pytest.raises(vx.UserError) as error:
    train_batches(broken, 4, batch_size=10, max_unreadable=0.1)
  assert "3 of 20 images" in str(error.value)
  assert all(f"/{i:02}.jpg" in str(error.value) for i in BROKEN)
  assert "max_unreadable" in str(error.value)


def test_a_file_that_vanishes_is_one_line(broken, tmp_path):
  (tmp_path / "grey" / "a" / "03.jpg").unlink()
  with pytest.raises(vx.UserError, match=r"03\.jpg"):
    train_batches(broken, 4, batch_size=10, max_unreadable=0.5)


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


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (48, 48)])
def test_crops_are_not_squeezed(size):
  """By 3/4 to 4/3 at most, whatever the shape of the model's images: read from an image of its own coordinates."""
  coordinates = np.indices((256, 256))
  image = np.stack([*coordinates, np.zeros((256, 256))], axis=-1).astype(np.uint8)
  file = io.BytesIO()
  PIL.Image.fromarray(image).save(file, "PNG")
  augmentation = input_pipeline.train_augmentation(PLAIN | {"crop_scale": (0.1, 0.3)}, size, (0, 0, 0), 0.0, 0.0)
  stretched = []
  for seed in range(20):
    crop = augmentation(file.getvalue(), tf.constant([0, seed], tf.int64)).numpy().astype(float)
    down, right = crop[-5, 8, 0] - crop[4, 8, 0], crop[8, -5, 1] - crop[8, 4, 1]
    stretched.append(down / (size[0] - 9) / (right / (size[1] - 9)))
  assert 0.7 < min(stretched) < 0.9 and 1.1 < max(stretched) < 1.4
