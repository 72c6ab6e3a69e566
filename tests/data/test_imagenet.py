"""The real TFDS builder of ImageNet, from small archives of synthetic images; its relatives, as prepared."""

import io
import json
import tarfile

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

import vit_jax_ext as vx
from vit_jax_ext.data import datasets, input_pipeline

SYNSETS = ("n01440764", "n01739381", "n02105855")  # tench, vine snake, Shetland sheepdog
CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"  # what these two images of ImageNet are


def encode(colour, mode="RGB", kind="JPEG"):
  buffer = io.BytesIO()
  image = PIL.Image.new("RGB", (40, 30), colour)
  image.convert(mode).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
  return buffer.getvalue()


def add(archive, name, content):
  info = tarfile.TarInfo(name)
  info.size = len(content)
  archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
  """A folder with the official archives as users put them there: three classes of four images, and five to validate."""
  root = tmp_path_factory.mktemp("imagenet")
  manual = root / "downloads" / "manual"
  manual.mkdir(parents=True)
  with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as train:
    for i, synset in enumerate(SYNSETS):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode="w") as archive:
        for j in range(3):
          add(archive, f"{synset}_{j}.JPEG", encode((80 * i, 40, 60 * j)))
        if synset in CMYK:
          add(archive, CMYK, encode((250, 20, 20), mode="CMYK"))
        if synset in PNG:
          add(archive, PNG, encode((20, 250, 20), kind="PNG"))
      add(train, f"{synset}.tar", inner.getvalue())
  with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as archive:
    for i in range(5):
      add(archive, f"ILSVRC2012_val_{i + 1:08d}.JPEG", encode((50 * i, 0, 0)))
  return root


@pytest.fixture(scope="module")
def imagenet(imagenet_dir):
  return datasets.open_dataset("imagenet2012", str(imagenet_dir))


def test_prepared_from_the_archives(imagenet):
  assert len(imagenet.class_names) == 1000
  assert imagenet.num_examples("train") == 11
  assert imagenet.num_examples("validation") == 5
  found = {example["name"].decode(): example for _, example in imagenet.examples("train").as_numpy_iterator()}
  assert set(found) >= {CMYK, PNG, "n01440764_0.JPEG"}
  for name, example in found.items():
    assert imagenet.class_names[example["label"]] == name.partition("_")[0]


def test_odd_images_have_their_colours(imagenet):
  batch = next(input_pipeline.eval_batches(imagenet, "train", batch_size=16, image_size=(8, 8), crop=1.0))
  names = [example["name"].decode() for _, example in imagenet.examples("train").as_numpy_iterator()]
  for name, colour in ((CMYK, (250, 20, 20)), (PNG, (20, 250, 20))):
    assert np.abs(batch["image"][names.index(name), 4, 4].astype(int) - colour).max() < 12


@pytest.mark.parametrize("missing", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_a_missing_archive_is_named_with_its_place(tmp_path, missing):
  manual = tmp_path / "downloads" / "manual"
  manual.mkdir(parents=True)
  for name in {"ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"} - {missing}:
    (manual / name).touch()
  with pytest.raises(vx.UserError) as error:
    datasets.open_dataset("imagenet2012", str(tmp_path))
  assert f"put {missing} of" in str(error.value)
  assert str(manual) in str(error.value)
  assert "\n" not in str(error.value)


def prepare(root, name, config, version, features, split, examples):
  """Writes a prepared dataset as TFDS's own builder would, which needs the network for two of them."""
  builder = tfds.dataset_builders.store_as_tfds_dataset(
    name=name, config=config, version=version, data_dir=root, features=features,
    split_datasets={split: list(enumerate(examples))},
  )  # fmt: skip
  assert builder.info.splits[split].num_examples == len(examples)


def test_imagenet_v2(tmp_path):
  features = tfds.builder("imagenet_v2/matched-frequency", data_dir=tmp_path).info.features
  examples = [{"image": encode((9, 9, 9)), "label": i, "file_name": f"{i}/a.jpeg"} for i in (0, 999)]
  version = str(tfds.builder("imagenet_v2/matched-frequency", data_dir=tmp_path).version)
  prepare(tmp_path, "imagenet_v2", "matched-frequency", version, features, "test", examples)
  dataset = datasets.open_dataset("imagenet_v2/matched-frequency", str(tmp_path))
  found = [(example["name"], example["label"]) for _, example in dataset.examples("test").as_numpy_iterator()]
  assert sorted(found) == [(b"0/a.jpeg", 0), (b"999/a.jpeg", 999)]


def test_imagenet_real_has_several_labels(tmp_path):
  builder = tfds.builder("imagenet2012_real", data_dir=tmp_path)
  labels = [[3, 5], [], [999]]
  examples = [
    {"image": encode((9, 9, 9)), "original_label": 0, "real_label": real, "file_name": f"{i}.JPEG"}
    for i, real in enumerate(labels)
  ]
  prepare(tmp_path, "imagenet2012_real", None, str(builder.version), builder.info.features, "validation", examples)
  dataset = datasets.open_dataset("imagenet2012_real", str(tmp_path))
  found = {
    e["name"].decode(): np.flatnonzero(e["label"]).tolist()
    for _, e in dataset.examples("validation").as_numpy_iterator()
  }
  assert found == {f"{i}.JPEG": real for i, real in enumerate(labels)}
  batch = next(input_pipeline.eval_batches(dataset, "validation", batch_size=4, image_size=(8, 8), crop=1.0))
  assert batch["label"].shape == (4, 1000) and batch["label"].dtype == bool
  assert batch["label"].sum() == 3
  assert json.dumps(batch["mask"].tolist()) == "[true, true, true, false]"
