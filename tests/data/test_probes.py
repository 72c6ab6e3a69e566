"""Probes: an oracle reads the answers from the images, shortcuts do not; an image hangs on its index alone."""

import functools

import numpy as np
import pytest
import scipy.stats
import sklearn.cluster
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing

import vit_jax_ext as vx
from vit_jax_ext.data import datasets, probes

COUNT = 2000
CASES = [(name, level) for name, probe in probes.PROBES.items() for level in probe.levels]
cases = pytest.mark.parametrize(("name", "level"), CASES)


@functools.cache
def draw(name, level):
  return probes.generate(name, f"test_{level}", range(COUNT))


def tiles(images):
  """Returns (n, 16, 8, 8, 3)."""
  return images.reshape(-1, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(-1, 16, 8, 8, 3)


def read_scales(image):
  """Correlates rows and columns with stripes, and neighbours along both diagonals."""
  image = image[..., 0].astype(float)
  cells = image.reshape(8, 4, 8, 4).mean(axis=(1, 3))
  stripes = np.array([np.where(np.arange(8) % period < period / 2, 1, -1) for period in (2, 4, 8)])
  upright, across = (abs(stripes @ (cells - cells.mean()).mean(axis=axis)).max() for axis in (0, 1))
  fine = (image - cells.repeat(4, axis=0).repeat(4, axis=1)).reshape(8, 4, 8, 4)
  falling = (fine[:, :-1, :, :-1] * fine[:, 1:, :, 1:]).sum()
  rising = (fine[:, :-1, :, 1:] * fine[:, 1:, :, :-1]).sum()
  return 2 * (across > upright) + (rising > falling)


def read_twins(image):
  bars, textures = (part.astype(int) for part in np.split(tiles(image[None])[0], [2], axis=1))
  (white,) = np.flatnonzero((bars == 255).all(axis=(1, 2, 3)))
  (twin,) = (i for i in range(16) if i != white and (textures[i] == textures[white]).all())
  red, green, blue = bars[twin, 0, 0]
  return 3 if min(red, green) > 200 else int(np.argmax([red, green, blue]))


def read_chains(image):
  upper, lower = (part.reshape(16, -1).astype(int) for part in np.split(tiles(image[None])[0], 2, axis=1))
  symbol, seen = lower[np.flatnonzero((upper == 255).all(axis=1))[0]], 0
  while len(found := np.flatnonzero((upper == symbol).all(axis=1))):
    symbol, seen = lower[found[0]], seen + 1
  ends = np.round(255 * probes.SYMBOLS[-1]).reshape(4, -1)
  return np.flatnonzero((ends == symbol).all(axis=1))[0]


@cases
def test_an_oracle_reads_the_answer(name, level):
  images, labels = draw(name, level)
  read = {"scales": read_scales, "twins": read_twins, "chains": read_chains}[name]
  right = np.mean([read(image) == label for image, label in zip(images[:300], labels[:300], strict=True)])
  assert right >= (0.97 if name == "scales" else 1), right  # scales are noisy


def score(features, labels):
  """Returns how many of the second half a linear classifier learned on the first tells, and their number."""
  half = len(labels) // 2
  features = np.asarray(features, float).reshape(len(labels), -1)
  model = sklearn.pipeline.make_pipeline(
    sklearn.preprocessing.StandardScaler(), sklearn.linear_model.LogisticRegression(C=0.01, max_iter=100)
  )
  model.fit(features[:half], labels[:half])
  return int((model.predict(features[half:]) == labels[half:]).sum()), len(labels) - half


def assert_at_chance(features, labels, classes):
  hits, count = score(features, labels)
  low, high = scipy.stats.binomtest(hits, count).proportion_ci(0.999)  # there are dozens of these
  assert low <= 1 / classes <= high, f"{hits} of {count}"


def bag(images, side=8):
  """Returns how many patches an image has of each of 64 kinds, and the mean and spread of its colours."""
  n, grid = len(images), images.shape[1] // side
  patches = images.reshape(n, grid, side, grid, side, -1).swapaxes(2, 3).reshape(n * grid**2, -1) / 255
  kinds = sklearn.cluster.MiniBatchKMeans(64, n_init=1, random_state=0).fit(patches[:8000]).predict(patches)
  counts = np.stack([np.bincount(row, minlength=64) for row in kinds.reshape(n, -1)])
  return np.concatenate([counts, images.mean(axis=(1, 2)), images.std(axis=(1, 2))], axis=1)


@cases
def test_a_linear_model_is_at_chance(name, level):
  images, labels = draw(name, level)
  if name == "scales":
    for fact in np.divmod(labels, 2):
      assert_at_chance(images, fact, 2)
  else:
    assert_at_chance(images[:, ::2, ::2], labels, 4)  # blocks of 2x2 are of one colour


@pytest.mark.parametrize(("name", "level"), [case for case in CASES if case[0] != "scales"])
def test_a_bag_of_patches_is_at_chance(name, level):
  """One step associates two tiles: of that the largest of four linear scores guesses a little, 26 to 31%."""
  images, labels = draw(name, level)
  if (name, level) == ("chains", "1"):
    assert score(bag(images), labels)[0] < 350
  else:
    assert_at_chance(bag(images), labels, 4)


@pytest.mark.parametrize("level", probes.PROBES["scales"].levels)
def test_a_single_scale_tells_one_fact_of_scales(level):
  """Order-free statistics of cells tell the texture alone, means of cells the stripes alone."""
  images, labels = draw("scales", level)
  coarse, fine = np.divmod(labels, 2)
  cells = images[..., 0].reshape(-1, 8, 4, 8, 4).swapaxes(2, 3).reshape(COUNT, 64, 4, 4).astype(float)
  means = cells.mean(axis=(2, 3))
  texture = cells - means[..., None, None]
  diagonals = [
    (texture[..., :-1, :-1] * texture[..., 1:, 1:]).mean(axis=(1, 2, 3)),
    (texture[..., :-1, 1:] * texture[..., 1:, :-1]).mean(axis=(1, 2, 3)),
  ]
  local = np.stack([*diagonals, means.mean(axis=1), means.std(axis=1)], axis=1)
  blurred = means.reshape(-1, 8, 8)
  spread = np.stack([blurred.mean(axis=1), blurred.mean(axis=2)], axis=1)
  products = spread[..., :, None] * spread[..., None, :]  # an even function of the stripes' sign
  assert score(local, fine)[0] > 900
  assert score(products, coarse)[0] > 700
  assert_at_chance(local, coarse, 2)
  assert_at_chance(bag(images, 4), coarse, 2)
  assert_at_chance(products, fine, 2)
  assert_at_chance(blurred, fine, 2)


@pytest.mark.parametrize("level", ["2x3", "3x3", "2x7", "2x11"])
def test_a_window_holds_no_far_twins(level):
  """Of 2x2 tiles: neither their pixels, nor which colours are among them, tell anything."""
  images, labels = draw("twins", level)
  windows = images.reshape(-1, 2, 16, 2, 16, 3).swapaxes(2, 3).reshape(COUNT, 4, -1)
  whites = tiles(images)[:, :, 0, 0].min(axis=2) == 255
  window = whites.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(COUNT, 4, 4).any(axis=2).argmax(axis=1)
  assert_at_chance(windows[np.arange(COUNT), window], labels, 4)
  most = np.stack([(images == np.round(255 * bar)).all(axis=3).sum(axis=(1, 2)) for bar in probes.BARS[1:]], axis=1)
  assert_at_chance(most, labels, 4)
  assert (most.min(axis=1) > 0).all()


@pytest.mark.parametrize("level", ["2", "3"])
def test_one_step_less_of_chains_tells_nothing(level):
  """Who knows the symbols on the way, but not the last link, guesses."""
  images, labels = draw("chains", level)
  found = tiles(images).reshape(COUNT, 16, 2, -1).astype(int)
  ways = []
  for upper, lower in found.swapaxes(1, 2):
    symbol, way = lower[np.flatnonzero((upper == 255).all(axis=1))[0]], []
    for _ in range(int(level) - 1):
      way.append(symbol)
      symbol = lower[np.flatnonzero((upper == symbol).all(axis=1))[0]]
    ways.append(np.concatenate(way))
  assert_at_chance(np.array(ways), labels, 4)


@pytest.mark.parametrize("name", probes.PROBES)
def test_an_image_hangs_on_its_index_alone(name):
  images, labels = probes.generate(name, "train", range(40))
  some, theirs = probes.generate(name, "train", [31, 2])
  np.testing.assert_array_equal(some, images[[31, 2]])
  np.testing.assert_array_equal(theirs, labels[[31, 2]])
  for other in (probes.generate(name, "validation", range(40)), probes.generate(name, "train", range(40), seed=1)):
    assert (other[0] != images).any(axis=(1, 2, 3)).all()
  assert images.dtype == np.uint8 and images.shape[1:3] == (32, 32) and len(np.unique(images, axis=0)) == 40


@cases
def test_classes_are_equally_frequent(name, level):
  counts = np.bincount(draw(name, level)[1], minlength=4)
  assert scipy.stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize(
  ("name", "split", "words"),
  [("chains", "test_9", "difficulty '9' is out of range (steps to follow); choose one of 1, 2, 3"),
   ("chains", "9", "is out of range"), ("rings", "train", "probe 'rings' is unknown; choose one of scales, twins")],
)  # fmt: skip
def test_what_there_is_not(name, split, words):
  with pytest.raises(vx.UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
    probes.generate(name, split, [0])


def test_the_builder(tmp_path, monkeypatch):
  monkeypatch.setattr(probes, "SIZES", {"train": 30, "validation": 20})
  monkeypatch.setattr(probes, "TESTED", 10)
  dataset = datasets.open_dataset("probes/chains", str(tmp_path))
  assert dataset.class_names == ["A", "B", "C", "D"]
  assert [dataset.num_examples(split) for split in ("train", "validation", "test_3")] == [30, 20, 10]
  with pytest.raises(vx.UserError, match="no split 'test_4'; it has test_1, test_2, test_3, train, validation"):
    dataset.num_examples("test_4")
  labels = [int(example["label"]) for _, example in dataset.examples("test_2").as_numpy_iterator()]
  assert sorted(labels) == sorted(probes.generate("chains", "test_2", range(10))[1])
  with pytest.raises(vx.UserError, match="'probes' has no variant 'rings'; choose one of scales, twins, chains"):
    datasets.open_dataset("probes/rings", str(tmp_path))
