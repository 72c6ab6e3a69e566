"""Folders with labels.csv: what counts, what does not, and which line is wrong."""

import os

import numpy as np
import pytest

from tests import shapes
import vit_jax_ext as vx
from vit_jax_ext.data import datasets, input_pipeline
from vit_jax_ext.training.doctor import examine

NAMES = ["a;b", "", "b", "a; b ;c", "c", "a"]  # of six images


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "x"
  rng = np.random.default_rng(0)
  for i in range(len(NAMES)):
    shapes.draw(root / "images" / f"{i}.png", [], rng)
  write(root, *(f"images/{i}.png,{labels}" for i, labels in enumerate(NAMES)))
  return root


def write(root, *lines, header="file,labels"):
  (root / "labels.csv").write_text("\n".join([header, *lines, ""]))


def opened(root):
  return datasets.open_dataset(str(root), None)


def examples(dataset, split="train"):
  found = dataset.examples(split).as_numpy_iterator()
  return {os.path.basename(example["name"].decode()): example["label"].tolist() for _, example in found}


def test_labels_are_multi_hot(folder):
  dataset = opened(folder)
  assert dataset.multi_label and dataset.class_names == ["a", "b", "c"]
  assert examples(dataset) == {f"{i}.png": [name in labels for name in "abc"] for i, labels in enumerate(NAMES)}
  assert dataset.describe("train") == f"{folder}: 3 classes; train 6 (2 of c to 3 of a)"
  assert dataset.remarks == ["without a label, and so an example of none: 1 (images/1.png)"]
  assert input_pipeline.undecodable(dataset, "train") == (6, [])


def test_a_group_without_any_label(folder):
  """Rows of nothing but empty lists still have a column for each class."""
  dataset = opened(folder)
  order = [*examples(dataset)]
  label = dataset.lookup("train")(np.array([order.index("1.png")], np.int64))["label"]
  assert label.numpy().tolist() == [[False, False, False]]


def test_excel_writes_it_so(folder):
  (folder / "labels.csv").write_bytes("file,labels\r\nimages/0.png,é;b\r\n./images//1.png,\r\n".encode("utf-8-sig"))
  dataset = opened(folder)
  assert dataset.class_names == ["b", "é"] and dataset.num_examples("train") == 2


def test_splits_have_their_own(folder, tmp_path):
  (tmp_path / "s").mkdir()
  folder.rename(tmp_path / "s" / "train")
  val = tmp_path / "s" / "val"
  shapes.draw(val / "0.png", [], np.random.default_rng(0))
  write(val, "0.png,b")
  dataset = opened(tmp_path / "s")
  assert dataset.describe("val").endswith("val 1 (0 of c to 1 of b)")
  assert (dataset.num_examples("train"), examples(dataset, "val")) == (6, {"0.png": [False, True, False]})
  assert "val has no image of 2 of 3 classes (a, c)" in dataset.remarks
  (val / "labels.csv").unlink()
  with pytest.raises(vx.UserError, match=r"has labels.csv in train, not in val; each split has one"):
    opened(tmp_path / "s")
  write(tmp_path / "s", "val/0.png,b")
  with pytest.raises(vx.UserError, match=r"labels.csv and train/labels.csv; one in it, or one in each split"):
    opened(tmp_path / "s")


def test_what_is_left_out_is_named(folder):
  rng = np.random.default_rng(0)
  for i in range(6, 40):
    shapes.draw(folder / "images" / f"{i}.png", [], rng)
  (folder / "images" / "x.tiff").touch()
  lines = [f"images/{i}.png,a" for i in range(38)]
  write(folder, *lines, "images/gone.png,a", "images/x.tiff,b")
  dataset = opened(folder)
  assert dataset.num_examples("train") == 38 and dataset.class_names == ["a"]
  assert dataset.remarks == [
    "left out, no such file: 1 (labels.csv line 40: images/gone.png)",
    "left out, .tiff is not decoded here, convert it to PNG or JPEG: 1 (labels.csv line 41: images/x.tiff)",
    "left out, without a line in labels.csv: 2 (images/38.png, images/39.png)",
    "no image has two labels; labels.csv separates them by ;",
  ]


@pytest.mark.parametrize(
  ("lines", "header", "words"),
  [
    (["images/0.png,a"], "image,labels", "labels.csv line 1 has the columns 'image,labels'; give 'file,labels'"),
    (["images/0.png,a,x"], "file,labels,score", "line 1 has the columns 'file,labels,score'"),
    (["images/0.png;a"], "file;labels", "line 1 has the columns 'file;labels'"),
    ([], "", "line 1 has the columns ''"),
    (["images/0.png,a", "images/1.png,a,b"], "file,labels", "line 3 has 3 values in place of 2; separate labels"),
    (["images/0.png"], "file,labels", "line 2 has 1 values in place of 2"),
    (['images/0.png,"a,b"'], "file,labels", "line 2 has the label 'a,b'; separate labels by ';'"),
    (["images/0.png,a|b"], "file,labels", "line 2 has the label 'a|b'"),
    (["images/0.png,a;b;a"], "file,labels", "line 2 has a label twice, 'a;b;a'; leave one out"),
    (["images/0.png,a", "./images/0.png,b"], "file,labels", "line 3 has ./images/0.png, as line 2 has; give all"),
    (["../x/images/0.png,a"], "file,labels", "line 2 has the file '../x/images/0.png'; give one below the folder"),
    (["images/../../x,a"], "file,labels", "line 2 has the file 'images/../../x'"),
    (["/etc/passwd,a"], "file,labels", "line 2 has the file '/etc/passwd'"),
    ([",a"], "file,labels", "line 2 has the file ''"),
    (["images/\0.png,a"], "file,labels", "labels.csv line 2"),
    (['images/0.png,"a'], "file,labels", "is no CSV"),
    (['images/0.png,a', '"' + "x" * 200_000 + '",a'], "file,labels", "is no CSV: field larger than field limit"),
    (["images/0.png,", "images/1.png,;"], "file,labels", "has no image with a label"),
    (["images/7.png,a"], "file,labels", "0 of the images that labels.csv names; left out, no such file: 1"),
    (["images/0.png,a", "images/1.png,b", "x,a"], "file,labels", "has 2 of the images .* line 4: x"),
  ],
)  # fmt: skip
def test_a_wrong_line_is_named(folder, lines, header, words):
  write(folder, *lines, header=header)
  with pytest.raises(vx.UserError, match=words) as error:
    opened(folder)
  assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_another_encoding_is_named(folder):
  (folder / "labels.csv").write_bytes(b"file,labels\nimages/0.png,a\nimages/1.png,caf\xe9\n")
  with pytest.raises(vx.UserError, match=r"labels.csv line 3 is not UTF-8 \(.*\); save it so"):
    opened(folder)


def test_other_labels_are_another_dataset_in_the_same_order(folder):
  before, order = opened(folder).version, [*examples(opened(folder))]
  write(folder, *(f"images/{i}.png,a" for i in range(6)))
  assert opened(folder).version != before and [*examples(opened(folder))] == order


def test_every_label_gives_its_share_to_a_holdout(tmp_path):
  shapes.write(tmp_path, 100, seed=0)
  dataset = opened(tmp_path)
  held, rest = (examples(dataset, f"{which}:20%:0") for which in ("holdout", "rest"))
  assert not held.keys() & rest.keys() and len(held) + len(rest) == 100
  counts, every = np.sum([*held.values()], axis=0), np.sum([*examples(dataset).values()], axis=0)
  assert (counts >= np.round(0.2 * every)).all() and 15 <= len(held) <= 30
  unlabelled = [sum(not any(labels) for labels in part.values()) for part in (held, rest)]
  assert unlabelled[0] == round(0.2 * sum(unlabelled))


def test_other_hosts_learn_all_of_it(folder):
  dataset = opened(folder)
  there = datasets.open_dataset(str(folder), None, lambda make: make())
  assert (there.class_names, there.version, there.remarks) == (dataset.class_names, dataset.version, dataset.remarks)
  assert there.multi_label and examples(there) == examples(dataset)


def test_doctor_knows_the_folder(folder, tiny_config, tmp_path):
  tiny_config.dataset.update(name=str(folder), eval_split="train[50%:]")
  found = {name: (ok, finding) for name, ok, finding in examine(tiny_config, str(tmp_path / "run"))}
  assert found["dataset"][0] and "example of none: 1 (images/1.png)" in found["dataset"][1]
  assert found["model"][0] and found["memory"][0]
  write(folder, "images/0.png,a", "images/0.png,b")
  found = {name: (ok, finding) for name, ok, finding in examine(tiny_config, str(tmp_path / "run"))}
  assert not found["dataset"][0] and "labels.csv line 3" in found["dataset"][1]


def test_a_split_without_any_label_is_refused(folder):
  write(folder, *(f"images/{i}.png," for i in range(5)), "images/5.png,a")
  dataset = opened(folder)
  order = [*examples(dataset)]
  empty = "train[:1]" if order[-1] == "5.png" else "train[-1:]"
  with pytest.raises(vx.UserError, match="has no image with a label"):
    dataset.describe(empty)
