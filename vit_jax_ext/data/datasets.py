"""Image classification datasets as encoded examples: what TFDS knows, folders of images, synthetic ones."""

import abc
import collections
from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
from typing import ClassVar

from absl import logging
from etils import epath
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax_ext.config import is_folder
from vit_jax_ext.data import digits, folders, labels, probes, records
from vit_jax_ext.errors import RunError, UserError

Lookup = Callable[[tf.Tensor], dict[str, tf.Tensor]]  # indices, int64 (n,), to image, label and name

GROUP = 64  # examples that are looked up, and decoded, together
IN_ORDER = (
  "its TFRecord files can be read in their order alone: it is shuffled in a buffer, each host's share for itself, and "
  "resuming reads what was read before; the command prepare, with the same flags, makes files that mend both"
)
IMAGENET_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
SAMPLED = 64  # images that `sample` gives; of a folder it gives more:
SAMPLED_OF_FOLDER, SAMPLED_PER_CLASS = 1000, 3  # in all, or where there are many classes of each


class Dataset(abc.ABC):
  """Splits of encoded images with class labels, in a fixed order.

  Attributes:
    name: what the user calls it.
    version: what tells it from another of this name; a run goes on with the same alone.
    class_names: names of the classes; labels are their indices.
    multi_label: whether an image may have any number of labels, not one class.
    remarks: what is left out and why, and what differs between splits.
  """

  name: str
  version: str
  class_names: Sequence[str]
  multi_label: bool = False
  remarks: Sequence[str] = ()

  @abc.abstractmethod
  def num_examples(self, split: str) -> int:
    """Returns the size of a split, e.g. "train" or "train[:90%]".

    Raises:
      UserError: the split does not exist.
    """

  @abc.abstractmethod
  def lookup(self, split: str) -> Lookup | None:
    """Returns a function of indices, int64 (n,), to their examples; None if they can be read in their order alone.

    An example is `image` encoded bytes; `label` int32, or bool (classes,): which are its labels (`multi_label`), or
    which are valid (ImageNet-ReaL); `name` that of the file, "" if the dataset does not keep it.
    """

  def examples(self, split: str, share: int = 0, shares: int = 1) -> tf.data.Dataset:
    """Returns (index in the split, example) of one of `shares` equal shares, in a fixed order; see `lookup`.

    Shares hold each example once; the first ones are larger by one where the division leaves a rest.
    """
    return self._at(split, tf.data.Dataset.range(*self._bounds(split, share, shares)))

  def describe(self, *splits: str) -> str:
    """Returns the number of classes, of the splits' images and, of a folder, of those of each class, least to most."""
    listed = ", ".join(f"{split} {self.num_examples(split):,}{self._per_class(split)}" for split in splits)
    return f"{self.name}: {len(self.class_names)} classes; {listed}"

  def sample(self, split: str) -> tf.data.Dataset:
    """Returns examples of a split by which one sees whether its images can be decoded; of a folder of every class."""
    return self.examples(split).map(lambda _, example: example).take(SAMPLED)

  def _at(self, split: str, indices: tf.data.Dataset) -> tf.data.Dataset:
    lookup = self.lookup(split)
    return indices.batch(GROUP).map(lambda index: (index, lookup(index)), tf.data.AUTOTUNE).unbatch()

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
    self.name, self._builder, self.version = name, builder, builder.info.full_name
    self._any_order = records.are_there(builder)
    if not self._any_order:
      self.remarks = [IN_ORDER]
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

  def lookup(self, split: str) -> Lookup | None:
    if not self._any_order:
      return None
    spec = {"image": tf.io.FixedLenFeature((), tf.string, "")}
    if "file_name" in self._builder.info.features:
      spec["file_name"] = tf.io.FixedLenFeature((), tf.string, "")
    if self._label == "real_label":
      spec["real_label"] = tf.io.VarLenFeature(tf.int64)
    else:
      spec["label"] = tf.io.FixedLenFeature((), tf.int64, 0)
    find_records = records.lookup(self._builder, split, spec)

    def find(indices):
      found = find_records(indices)
      label = found[self._label]
      if self._label == "real_label":
        label = tf.sparse.to_indicator(label, len(self.class_names))
      else:
        label = tf.cast(label, tf.int32)
      name = tf.where(found["image"] == "", found["record"], found.get("file_name", ""))
      return {"image": found["image"], "label": label, "name": name}

    return find

  def examples(self, split: str, share: int = 0, shares: int = 1) -> tf.data.Dataset:
    if self._any_order:
      return super().examples(split, share, shares)
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

    return dataset.map(select).enumerate(self._bounds(split, share, shares)[0])


class FolderDataset(Dataset):
  """A folder SPLIT/CLASS/image.jpg, or CLASS/image.jpg, which is the split "train" as a whole; or with `labels.FILE`.

  The order is that of the names' hashes: "train[:90%]" and "train[90%:]" both hold all classes. Of every class the same
  share have "rest:10%:0" and "holdout:10%:0", drawn with the seed at the end.
  """

  def __init__(self, name: str, listing: folders.Listing):
    self.name, self._images, self.multi_label = name, listing.images, listing.multi_label
    self.remarks = [*listing.remarks, *folders.compare_splits(self._images)]
    self.class_names = sorted({label for image in self._images for label in image.labels})
    self._indices = {class_name: i for i, class_name in enumerate(self.class_names)}
    self.version = f"{len(self._images):,} images ({listing.fingerprint()})"
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

  def lookup(self, split: str) -> Lookup:
    images = self._select(split)
    paths = tf.constant([image.path for image in images], tf.string)
    label_of = self._multi_hot(images) if self.multi_label else self._class_indices(images)

    def find(indices):
      names = tf.gather(paths, indices)
      return {"image": tf.map_fn(tf.io.read_file, names), "label": label_of(indices), "name": names}

    return find

  def _class_indices(self, images: Sequence[folders.Image]) -> Callable[[tf.Tensor], tf.Tensor]:
    indices = tf.constant([self._indices[image.labels[0]] for image in images], tf.int32)
    return lambda chosen: tf.gather(indices, chosen)

  def _multi_hot(self, images: Sequence[folders.Image]) -> Callable[[tf.Tensor], tf.Tensor]:
    flat = np.array([self._indices[label] for image in images for label in image.labels], np.int64)
    indices = tf.RaggedTensor.from_row_lengths(flat, [len(image.labels) for image in images])
    return lambda chosen: tf.sparse.to_indicator(tf.gather(indices, chosen).to_sparse(), len(self.class_names))

  def sample(self, split: str) -> tf.data.Dataset:
    per_class = max(SAMPLED_PER_CLASS, SAMPLED_OF_FOLDER // len(self.class_names))
    seen, chosen = collections.Counter(), []
    for index, image in enumerate(self._select(split)):
      marks = image.labels or (None,)
      seen.update(marks)
      if any(seen[label] <= per_class for label in marks):
        chosen.append(index)
    chosen = tf.data.Dataset.from_tensor_slices(np.array(chosen, np.int64))
    return self._at(split, chosen).map(lambda _, example: example)

  def _per_class(self, split: str) -> str:
    counts = collections.Counter(dict.fromkeys(self.class_names, 0) if self.multi_label else {})
    counts.update(label for image in self._select(split) for label in image.labels)
    if not any(counts.values()):
      raise UserError(f"split {split!r} of {self.name} has no image with a label; choose another one")
    listed = counts.most_common()
    (most, largest), (least, smallest) = listed[0], listed[-1]
    return f" ({smallest:,} of {least} to {largest:,} of {most})"


class SyntheticDataset(Dataset):
  """What looks like ImageNet to a program: JPEGs of about 375x500 pixels, coloured clouds, of 1000 classes."""

  SIZES: ClassVar = {"train": 64, "validation": 16}

  def __init__(self):
    self.name = self.version = "synthetic"
    self.class_names = [f"class {i}" for i in range(1000)]

  def num_examples(self, split: str) -> int:
    if split not in self.SIZES:
      raise _unknown_split(self.name, split, self.SIZES)
    return self.SIZES[split]

  def lookup(self, split: str) -> Lookup:
    def make(index):
      seed = tf.stack([index, len(split)])
      clouds = tf.random.stateless_uniform((9, 12, 3), seed, -0.2, 1.2)
      size = tf.random.stateless_uniform((2,), seed, 330, 560, tf.int32)
      image = tf.image.convert_image_dtype(tf.image.resize(clouds, size, "bicubic"), tf.uint8, saturate=True)
      return tf.io.encode_jpeg(image)

    def find(indices):
      images = tf.map_fn(make, indices, fn_output_signature=tf.string)
      return {"image": images, "label": tf.cast(indices * 37 % 1000, tf.int32), "name": tf.fill(tf.shape(indices), "")}

    return find


def _unknown_split(name: str, split: str, splits: Sequence[str]) -> UserError:
  return UserError(f"dataset {name!r} has no split {split!r}; it has {', '.join(sorted(splits))}")


def open_dataset(
  name: str, data_dir: str | None, told: Callable[[Callable[[], bytes]], bytes] | None = None
) -> Dataset:
  """Opens a dataset; prepares the embedded `digits` and the generated `probes` on first use.

  Args:
    name: a TFDS name, e.g. "digits" or "imagenet2012:5.1.0"; a folder, written with a slash, e.g. "./flowers", by class
      or with labels.csv; or "synthetic".
    data_dir: where prepared TFDS datasets lie; None for TFDS's own default.
    told: calls a function on one of several hosts, and returns on all what it returned: that one lists and prepares.

  Raises:
    UserError: an unknown or unprepared dataset, or one without images and class labels.
  """
  if is_folder(name):
    if not os.path.isdir(os.path.expanduser(name)):
      raise UserError(f"dataset {name} does not exist; give a folder of images by class, or the name of a TFDS dataset")
    if not told:
      return FolderDataset(name, _scan(name))
    return FolderDataset(name, folders.Listing.unpack(told(lambda: _scan(name).pack())))
  if name == "synthetic":
    return SyntheticDataset()
  told(lambda: _prepare(name, data_dir)) if told else _prepare(name, data_dir)
  return TfdsDataset(name, tfds.builder(name, data_dir=data_dir))


def _scan(name: str) -> folders.Listing:
  return labels.scan(name) if labels.are_there(name) else folders.scan(name)


def convert(name: str, data_dir: str | None, folder: str | None) -> Iterator[tuple[int, int]]:
  """Makes a dataset readable in any order, in place or in a new `folder`; yields bytes done and in all.

  Raises:
    UserError: it is none of TFDS, is unknown or unprepared, or there is too little disk.
    RunError: a file is damaged.
  """
  if is_folder(name) or name == "synthetic":
    raise UserError(f"dataset {name} needs no preparing: its images can be read in any order")
  _prepare(name, data_dir)
  builder = tfds.builder(name, data_dir=data_dir)
  if folder or not records.are_there(builder):
    yield from records.convert(builder, folder)


def _prepare(name: str, data_dir: str | None) -> bytes:
  """Prepares what can be prepared without being asked, and sees to it that a dataset is there; returns nothing."""
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    raise UserError(
      f"dataset {name!r} is unknown to TFDS; see https://www.tensorflow.org/datasets/catalog for names, set "
      f"--config.dataset.data_dir to the folder that holds it, or write a folder of images by class as ./{name}"
    ) from None
  except ValueError:
    dataset, _, variant = name.partition("/")
    variants = tfds.builder_cls(dataset).builder_configs
    if not variant or variant in variants:
      raise
    raise UserError(f"dataset {dataset!r} has no variant {variant!r}; choose one of {', '.join(variants)}") from None
  if isinstance(builder, digits.Digits | probes.Probes):
    if isinstance(builder, digits.Digits):
      tfds.disable_progress_bar()  # half a second of work
    try:
      builder.download_and_prepare()
    except OSError as error:
      raise UserError(f"{name} cannot be prepared in {builder.data_dir}: {error}; give a writable folder with "
                      "--config.dataset.data_dir") from None  # fmt: skip
    if not records.are_there(builder):
      with contextlib.suppress(OSError, RunError, UserError):  # where it cannot be written it is read in its order
        collections.deque(records.convert(builder, None), maxlen=0)
  elif not builder.info.splits and builder.name == "imagenet2012":
    _prepare_imagenet(builder)
  elif not builder.info.splits:
    raise UserError(
      f"dataset {name!r} is not prepared in {builder.data_dir}; prepare it with `tfds build {name}`, or set "
      "--config.dataset.data_dir to the folder that holds it"
    )
  return b""


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
  if "://" not in os.fspath(root):  # array_record has no buckets
    builder.info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD, override=True)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
