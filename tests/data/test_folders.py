"""Folders as people have them: what counts is used, what does not is named."""

import collections
import os

import numpy as np
import PIL.Image
import pytest

import vit_jax_ext as vx
from vit_jax_ext.data import datasets
from vit_jax_ext.training.doctor import examine
from vit_jax_ext.training.train import train


def write(path, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture
def messy(tmp_path):
  """Two classes of 12 and 20 images in train, one of them in val; and everything that lies about in folders."""
  root = tmp_path / "pets"
  for i in range(32):
    write(root / "train" / ("cat" if i < 12 else "dog") / f"{i}.{'webp' if i % 4 else 'png'}", i)
  write(root / "val" / "cat" / "0.png", 40)
  write(root / "train" / ".ipynb_checkpoints" / "0-checkpoint.png")
  write(root / "train" / "dog" / ".thumb.png")
  write(root / "train" / "dog" / "more" / "deep.png")
  write(root / "train" / "dog" / "x.tiff")
  (root / "train" / "eel").mkdir()
  (root / "train" / "dog" / "notes.txt").write_text("no image")
  os.symlink("/nowhere/at/all.png", root / "train" / "dog" / "gone.png")
  os.symlink(root, root / "train" / "dog" / "loop")
  return root


def remarks(dataset):
  return "\n".join(dataset.remarks)


def test_what_counts_and_what_does_not(messy):
  dataset = datasets.open_dataset(str(messy), None)
  assert dataset.class_names == ["cat", "dog"]
  assert (
    dataset.describe("train", "val")
    == f"{messy}: 2 classes; train 32 (12 of cat to 20 of dog), val 1 (1 of cat to 1 of cat)"
  )
  for line in (
    "left out, hidden: 2 (train/.ipynb_checkpoints, train/dog/.thumb.png)",
    "left out, links to nothing: 1 (train/dog/gone.png)",
    "left out, no images: 1 (train/dog/notes.txt)",
    "left out, .tiff is not decoded here, convert it to PNG or JPEG: 1 (train/dog/x.tiff)",
    "left out, at another depth than the others: 1 (train/dog/more/deep.png)",
    "left out, classes without an image: 1 (train/eel)",
    "val has no image of 1 of 2 classes (dog)",
  ):
    assert line in dataset.remarks, remarks(dataset)
  assert len(dataset.remarks) == 7


def test_every_file_that_counts_is_decoded(messy):
  dataset = datasets.open_dataset(str(messy), None)
  names = {os.path.basename(example["name"].decode()) for _, example in dataset.examples("train").as_numpy_iterator()}
  assert len(names) == 32 and sum(name.endswith("webp") for name in names) == 24


def test_too_many_at_another_depth(messy):
  for i in range(9):
    write(messy / "train" / f"{i}.png")
  with pytest.raises(vx.UserError, match=r"train/.* is 2 deep, and 10 are not: train/.*and 7 more; move them"):
    datasets.open_dataset(str(messy), None)


@pytest.mark.parametrize("files", [[], ["x.tif"], ["a/x.tif", "a/y.txt"], [".hidden/a/x.png"]])
def test_no_image_at_all(files, tmp_path):
  for name in files:
    write(tmp_path / name) if name.endswith("png") else (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  with pytest.raises(vx.UserError, match="neither CLASS/image") as error:
    datasets.open_dataset(str(tmp_path), None)
  assert all(name.partition("/")[0] in str(error.value) for name in files)


def test_links_to_folders_are_followed(messy, tmp_path):
  (tmp_path / "linked").mkdir()
  (messy / "train" / "dog" / "loop").unlink()
  for name in ("cat", "dog"):
    os.symlink(messy / "train" / name, tmp_path / "linked" / name)
  dataset = datasets.open_dataset(str(tmp_path / "linked"), None)
  assert dataset.class_names == ["cat", "dog"] and dataset.num_examples("train") == 32


@pytest.mark.parametrize("percent", [1, 10, 25, 50])
def test_a_stratified_holdout_by_seed(percent, messy, tmp_path):
  root = str(messy / "train")
  (messy / "train" / "dog" / "more" / "deep.png").unlink()
  dataset = datasets.open_dataset(root, None)
  parts = {}
  for seed in (0, 1):
    held, rest = (
      [(e["name"], int(e["label"])) for _, e in dataset.examples(f"{which}:{percent}%:{seed}").as_numpy_iterator()]
      for which in ("holdout", "rest")
    )
    assert len({*held, *rest}) == len(held) + len(rest) == 32
    counts = collections.Counter(label for _, label in held)
    assert counts == {0: max(1, round(0.12 * percent)), 1: max(1, round(0.2 * percent))}
    parts[seed] = held
  assert parts[0] != parts[1]
  with pytest.raises(vx.UserError, match=r"'validation'; it has train; or hold out .*eval_split=holdout:10%:0"):
    dataset.num_examples("validation")


def test_doctor_and_train_tell_it(messy, tiny_config, tmp_path, caplog):
  config = tiny_config
  config.dataset.update(name=str(messy), eval_split="val")
  config.batch_size, config.total_steps, config.optimizer.warmup_steps = 8, 1, 0
  (messy / "train" / "cat" / "0.png").write_bytes(b"corrupt")
  found = {name: (ok, finding) for name, ok, finding in examine(config, str(tmp_path / "run"))}
  ok, finding = found["dataset"]
  assert not ok and "train: 1 of 32 that were tried cannot be decoded" in finding and "cat/0.png" in finding, finding
  for words in ("2 classes", "12 of cat to 20 of dog", "gone.png", ".tiff is not decoded", "val has no image of"):
    assert words in finding
  config.dataset.max_unreadable = 0.5
  caplog.set_level("INFO", logger="absl")
  train(config, str(tmp_path / "run"))
  for words in ("12 of cat to 20 of dog", "gone.png", "val has no image of"):
    assert words in caplog.text


def test_one_class_is_nothing_to_tell_apart(messy, tiny_config, tmp_path):
  for name in ("dog", "eel"):
    os.rename(messy / "train" / name, messy / f".{name}")
  tiny_config.dataset.update(name=str(messy), eval_split="val")
  with pytest.raises(vx.UserError, match="has 1 class") as error:
    train(tiny_config, str(tmp_path / "run"))
  findings = {name: finding for name, ok, finding in examine(tiny_config, str(tmp_path / "run")) if not ok}
  assert findings == {"model": str(error.value)}


def test_a_corrupt_file_of_every_class_is_found(tmp_path, tiny_config):
  for i in range(40):
    write(tmp_path / "pets" / f"class{i // 4}" / f"{i}.png", i)
  for i in range(0, 40, 4):
    for j in range(2):
      (tmp_path / "pets" / f"class{i // 4}" / f"{i + j}.png").write_bytes(b"corrupt")
  tiny_config.dataset.update(name=str(tmp_path / "pets"), train_split="rest:25%:0", eval_split="holdout:25%:0")
  (finding,) = (finding for name, ok, finding in examine(tiny_config, str(tmp_path / "run")) if not ok)
  assert "cannot be decoded" in finding and "max_unreadable" in finding and "/class" in finding
