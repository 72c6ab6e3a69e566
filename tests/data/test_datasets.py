"""Folders of images by class beside TFDS: the same interface, the same batches."""

import collections
import io
import itertools

import numpy as np
import PIL.Image
import pytest

import vit_jax_ext as vx
from vit_jax_ext.data import datasets, input_pipeline


def write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)


@pytest.fixture
def flat(tmp_path):
  """Two classes, cat and dog, of 12 and 8 images, each of one colour; and files that are no images."""
  for i in range(20):
    write(tmp_path / "pets" / ("cat" if i < 12 else "dog") / f"{i}{'.JPG' if i % 2 else '.png'}", 10 * i)
  (tmp_path / "pets" / "cat" / "notes.txt").write_text("no image")
  return str(tmp_path / "pets")


def colours(dataset, split, *share):
  return [
    (index, np.asarray(PIL.Image.open(io.BytesIO(example["image"])))[0, 0, 0], example["label"])
    for index, example in dataset.examples(split, *share).as_numpy_iterator()
  ]


def test_classes_alone(flat):
  dataset = datasets.open_dataset(flat, None)
  assert dataset.class_names == ["cat", "dog"]
  assert dataset.num_examples("train") == 20
  found = colours(dataset, "train")
  assert [index for index, *_ in found] == list(range(20))
  for _, colour, label in found:
    assert label == (colour >= 115)
  assert {round(colour / 10) for _, colour, _ in found} == set(range(20))


def test_slices_hold_all_classes_and_each_image_once(flat):
  dataset = datasets.open_dataset(flat, None)
  parts = [colours(dataset, split) for split in ("train[:70%]", "train[70%:]")]
  assert [len(part) for part in parts] == [14, 6]
  assert all({label for *_, label in part} == {0, 1} for part in parts)
  assert len({colour for part in parts for _, colour, _ in part}) == 20


def test_splits(tmp_path):
  for split, count in (("train", 3), ("val", 2)):
    for i in range(count):
      write(tmp_path / split / f"class{i}" / "a.png", i)
  dataset = datasets.open_dataset(str(tmp_path), None)
  assert dataset.class_names == ["class0", "class1", "class2"]
  assert sorted(label for *_, label in colours(dataset, "val")) == [0, 1]
  with pytest.raises(vx.UserError, match="'test'; it has train, val"):
    dataset.num_examples("test")


@pytest.mark.parametrize("name", ["flat", "digits"])
def test_shares_hold_each_example_once(name, flat, data_dir):
  """Whatever the number of hosts; indices are those of the whole split."""
  dataset = datasets.open_dataset(flat if name == "flat" else "digits", data_dir)
  split = "train" if name == "flat" else "test"
  whole = [(index, example["image"]) for index, example in dataset.examples(split).as_numpy_iterator()]
  for shares in (2, 3, 7):
    parts = [
      [(i, e["image"]) for i, e in dataset.examples(split, s, shares).as_numpy_iterator()] for s in range(shares)
    ]
    assert list(itertools.chain(*parts)) == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_batches_of_a_folder(flat):
  dataset = datasets.open_dataset(flat, None)
  batches = input_pipeline.eval_batches(dataset, "train", batch_size=8, image_size=(4, 4), crop=1.0)
  labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
  assert collections.Counter(labels.tolist()) == {0: 12, 1: 8}


@pytest.mark.parametrize(("path", "words"), [("/no/such/folder", "does not exist"), ("./none", "does not exist")])
def test_missing_folders(path, words):
  with pytest.raises(vx.UserError, match=words):
    datasets.open_dataset(path, None)


def test_folders_that_are_no_dataset(tmp_path):
  with pytest.raises(vx.UserError, match="CLASS/image"):
    datasets.open_dataset(str(tmp_path), None)
  write(tmp_path / "a.png", 0)
  write(tmp_path / "cat" / "a.png", 0)
  with pytest.raises(vx.UserError, match="CLASS/image"):
    datasets.open_dataset(str(tmp_path), None)
