"""Image classification datasets as encoded examples: what TFDS knows, folders of images by class, synthetic ones."""

import abc
import collections
from collections.abc import Sequence
import os
from typing import ClassVar

from absl import logging
from etils import epath
import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax_ext.config import is_folder
from vit_jax_ext.data import digits, folders
from vit_jax_ext.errors import UserError

IMAGENET_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
SAMPLED = 64  # images that `sample` gives; of a folder it gives more:
SAMPLED_OF_FOLDER, SAMPLED_PER_CLASS = 1000, 3  # in all, or where there are many classes of each


class Dataset(abc.ABC):
  """Splits of encoded images with class labels, in a fixed order.

  Attributes:
    name: what the user calls it.
    class_names: names of the classes; labels are their indices.
    remarks: what is left out and why, and what differs between splits.
  """

  name: str
  class_names: Sequence[str]
  remarks: Sequence[str] = ()

  @abc.abstractmethod
  def num_examples(self, split: str) -> int:
    """Returns the size of a split, e.g. "train" or "train[:90%]".

    Raises:
      UserError: the split does not exist.
    """

  @abc.abstractmethod
  def _read(self, split: str, share: int, shares: int) -> tf.data.Dataset:
    """Returns {"image", "label", "name"} of one share; see `examples`."""

  def examples(self, split: str, share: int = 0, shares: int = 1) -> tf.data.Dataset:
    """Returns (index in the split, example) of one of `shares` equal shares, in a fixed order.

    Shares hold each example once; the first ones are larger by one where the division leaves a rest. An example is
    `image` encoded bytes; `label` int32, or bool (classes,) where several are valid (ImageNet-ReaL); `name` that of
    the file, "" if the dataset does not keep it.
    """
    return self._read(split, share, shares).enumerate(self._bounds(split, share, shares)[0])

  def describe(self, *splits: str) -> str:
    """Returns the number of classes, of the splits' images and, of a folder, of those of each class, least to most."""
    listed = ", ".join(f"{split} {self.num_examples(split):,}{self._per_class(split)}" for split in splits)
    return f"{self.name}: {len(self.class_names)} classes; {listed}"

  def sample(self, split: str) -> tf.data.Dataset:
    """Returns examples of a split by which one sees whether its images can be decoded; of a folder of every class."""
    return self._read(split, 0, 1).take(SAMPLED)

  def _per_class(self, split: str) -> str:
    return ""

  def _bounds(self, split: str, share: int, shares: int) -> tuple[int, int]:
    """Returns the first index of a share, and the one after its last."""
    size, rest = divmod(self.num_examples(split), shares)
    start = share * size + min(share, rest)
    return start, start + size + (share < rest)


class TfdsDataset(Dataset):
  """A prepared TFDS dataset with `image` and `label`, or ImageNet-ReaL with its lists of labels.

  Raises:
    UserError: it has others.
  """

  def __init__(self, name: str, builder: tfds.core.DatasetBuilder):
    self.name, self._builder = name, builder
    features = dict(builder.info.features.items())
    self._label = "real_label" if "real_label" in features else "label"
    label = features.get(self._label)
    label = label.feature if isinstance(label, tfds.features.Sequence) else label
    for feature, found, kind in (
      ("image", features.get("image"), tfds.features.Image),
      ("label", label, tfds.features.ClassLabel),
    ):
      if not isinstance(found, kind):
        raise UserError(
          f"dataset {name!r} has no {feature!r} of type {kind.__name__}; choose an image classification one"
        )
    self.class_names = label.names

  def num_examples(self, split: str) -> int:
    try:
      return self._builder.info.splits[split].num_examples
    except (KeyError, ValueError):
      raise _unknown_split(self.name, split, self._builder.info.splits) from None

  def _read(self, split: str, share: int, shares: int) -> tf.data.Dataset:
    dataset = self._builder.as_dataset(
      split=tfds.even_splits(split, shares)[share],
      shuffle_files=False,
      decoders={"image": tfds.decode.SkipDecoding()},
      read_config=tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1),
    )

    def select(example):
      label = example[self._label]
      if self._label == "real_label":
        label = tf.reduce_any(tf.one_hot(label, len(self.class_names), True, False, dtype=tf.bool), axis=0)
      else:
        label = tf.cast(label, tf.int32)
      return {"image": example["image"], "label": label, "name": example.get("file_name", "")}

    return dataset.map(select)


class FolderDataset(Dataset):
  """A folder SPLIT/CLASS/image.jpg, or CLASS/image.jpg, which is the split "train" as a whole.

  The order is that of the names' hashes: "train[:90%]" and "train[90%:]" both hold all classes. Of every class the same
  share have "rest:10%:0" and "holdout:10%:0", drawn with the seed at the end.
  """

  def __init__(self, name: str):
    self.name = name
    self._images, self.remarks = folders.scan(name)
    self.remarks += folders.compare_splits(self._images)
    self.class_names = sorted({image.label for image in self._images})
    self._labels = {class_name: i for i, class_name in enumerate(self.class_names)}
    self._splits: dict[str, list[folders.Image]] = {}
    for image in self._images:
      self._splits.setdefault(image.split, []).append(image)

  def _select(self, split: str) -> list[folders.Image]:
    if (held := folders.hold_out(self._splits.get("train", ()), split)) is not None:
      return held
    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[len(files)], num_bytes=0)
             for name, files in self._splits.items()}  # fmt: skip
    try:
      instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (KeyError, ValueError, AssertionError):
      error = _unknown_split(self.name, split, self._splits)
      if "train" in self._splits:
        flags = "--config.dataset.train_split=rest:10%:0 --config.dataset.eval_split=holdout:10%:0"
        error = UserError(f"{error}; or hold out a tenth of each class of train, drawn with seed 0: {flags}")
      raise error from None
    return [image for part in instructions for image in self._splits[part.splitname][part.from_ : part.to]]

  def num_examples(self, split: str) -> int:
    return len(self._select(split))

  def _read(self, split: str, share: int, shares: int) -> tf.data.Dataset:
    start, stop = self._bounds(split, share, shares)
    return self._open(self._select(split)[start:stop])

  def sample(self, split: str) -> tf.data.Dataset:
    per_class = max(SAMPLED_PER_CLASS, SAMPLED_OF_FOLDER // len(self.class_names))
    seen, chosen = collections.Counter(), []
    for image in self._select(split):
      seen[image.label] += 1
      if seen[image.label] <= per_class:
        chosen.append(image)
    return self._open(chosen)

  def _per_class(self, split: str) -> str:
    counts = collections.Counter(image.label for image in self._select(split)).most_common()
    (most, largest), (least, smallest) = counts[0], counts[-1]
    return f" ({smallest:,} of {least} to {largest:,} of {most})"

  def _open(self, images: Sequence[folders.Image]) -> tf.data.Dataset:
    paths, labels = [image.path for image in images], [self._labels[image.label] for image in images]
    dataset = tf.data.Dataset.from_tensor_slices((tf.constant(paths, tf.string), tf.constant(labels, tf.int32)))
    return dataset.map(lambda path, label: {"image": tf.io.read_file(path), "label": label, "name": path})


class SyntheticDataset(Dataset):
  """What looks like ImageNet to a program: JPEGs of about 375x500 pixels, coloured clouds, of 1000 classes."""

  SIZES: ClassVar = {"train": 64, "validation": 16}

  def __init__(self):
    self.name = "synthetic"
    self.class_names = [f"class {i}" for i in range(1000)]

  def num_examples(self, split: str) -> int:
    if split not in self.SIZES:
      raise _unknown_split(self.name, split, self.SIZES)
    return self.SIZES[split]

  def _read(self, split: str, share: int, shares: int) -> tf.data.Dataset:
    def make(index):
      seed = tf.stack([index, len(split)])
      clouds = tf.random.stateless_uniform((9, 12, 3), seed, -0.2, 1.2)
      size = tf.random.stateless_uniform((2,), seed, 330, 560, tf.int32)
      image = tf.image.convert_image_dtype(tf.image.resize(clouds, size, "bicubic"), tf.uint8, saturate=True)
      return {"image": tf.io.encode_jpeg(image), "label": tf.cast(index * 37 % 1000, tf.int32), "name": ""}

    return tf.data.Dataset.range(*self._bounds(split, share, shares)).map(make)


def _unknown_split(name: str, split: str, splits: Sequence[str]) -> UserError:
  return UserError(f"dataset {name!r} has no split {split!r}; it has {', '.join(sorted(splits))}")


def open_dataset(name: str, data_dir: str | None) -> Dataset:
  """Opens a dataset; prepares the embedded `digits` on first use.

  Args:
    name: a TFDS name, e.g. "digits" or "imagenet2012:5.1.0"; a folder, written with a slash, e.g. "./flowers"; or
      "synthetic".
    data_dir: where prepared TFDS datasets lie; None for TFDS's own default.

  Raises:
    UserError: an unknown or unprepared dataset, or one without images and class labels.
  """
  if is_folder(name):
    if not os.path.isdir(os.path.expanduser(name)):
      raise UserError(f"dataset {name} does not exist; give a folder of images by class, or the name of a TFDS dataset")
    return FolderDataset(name)
  if name == "synthetic":
    return SyntheticDataset()
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    raise UserError(
      f"dataset {name!r} is unknown to TFDS; see https://www.tensorflow.org/datasets/catalog for names, set "
      f"--config.dataset.data_dir to the folder that holds it, or write a folder of images by class as ./{name}"
    ) from None
  if isinstance(builder, digits.Digits):
    tfds.disable_progress_bar()  # half a second of work
    try:
      builder.download_and_prepare()
    except OSError as error:
      raise UserError(f"digits cannot be prepared in {builder.data_dir}: {error}; give a writable folder with "
                      "--config.dataset.data_dir") from None  # fmt: skip
  elif not builder.info.splits and builder.name == "imagenet2012":
    _prepare_imagenet(builder)
  elif not builder.info.splits:
    raise UserError(
      f"dataset {name!r} is not prepared in {builder.data_dir}; prepare it with `tfds build {name}`, or set "
      "--config.dataset.data_dir to the folder that holds it"
    )
  return TfdsDataset(name, builder)


def _prepare_imagenet(builder: tfds.core.DatasetBuilder) -> None:
  """Makes the records of ImageNet-1k out of the official archives; TFDS shows its progress.

  Raises:
    UserError: an archive is missing; says which, and where to put it.
  """
  root = epath.Path(builder.data_dir).parent.parent
  manual = root / "downloads" / "manual"
  missing = [tar for tar in IMAGENET_ARCHIVES if not (manual / tar).exists()]
  if missing:
    raise UserError(
      f"dataset 'imagenet2012' is not prepared in {root}; put {' and '.join(missing)} of "
      f"https://image-net.org/download-images into {manual} and start again, or set --config.dataset.data_dir"
    )
  logging.info("preparing imagenet2012 in %s from the archives in %s, which takes hours, once", root, manual)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
