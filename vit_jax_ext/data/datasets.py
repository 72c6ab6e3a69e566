"""Image classification datasets: what TFDS knows, and folders of images by class, both as encoded examples."""

import abc
from collections.abc import Sequence
import hashlib
import os
import pathlib

import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax_ext.data import digits
from vit_jax_ext.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp")


class Dataset(abc.ABC):
  """Splits of encoded images with class labels, in a fixed order.

  Attributes:
    name: what the user calls it.
    class_names: names of the classes; labels are their indices.
  """

  name: str
  class_names: Sequence[str]

  @abc.abstractmethod
  def num_examples(self, split: str) -> int:
    """Returns the size of a split, e.g. "train" or "train[:90%]".

    Raises:
      UserError: the split does not exist.
    """

  @abc.abstractmethod
  def _read(self, split: str, share: int, shares: int) -> tf.data.Dataset:
    """Returns {"image": encoded bytes, "label": int64} of one share."""

  def examples(self, split: str, share: int = 0, shares: int = 1) -> tf.data.Dataset:
    """Returns (index in the split, {"image": encoded bytes, "label": int64}) of one of `shares` equal shares.

    Shares hold each example once; the first ones are larger by one where the division leaves a rest.
    """
    size, rest = divmod(self.num_examples(split), shares)
    return self._read(split, share, shares).enumerate(share * size + min(share, rest))


class TfdsDataset(Dataset):
  """A prepared TFDS dataset with the features `image` and `label`."""

  def __init__(self, name: str, builder: tfds.core.DatasetBuilder):
    self.name, self._builder = name, builder
    self.class_names = builder.info.features["label"].names

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
    return dataset.map(lambda example: {key: example[key] for key in ("image", "label")})


class FolderDataset(Dataset):
  """A folder SPLIT/CLASS/image.jpg, or CLASS/image.jpg, which is the split "train" as a whole.

  The order is that of the names' hashes: "train[:90%]" and "train[90%:]" both hold all classes.
  """

  def __init__(self, name: str):
    self.name = name
    root = pathlib.Path(name).expanduser()
    files = [path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES]
    parts = {path: path.relative_to(root).parts for path in files}
    depths = {len(p) for p in parts.values()}
    if depths not in ({2}, {3}):
      raise UserError(f"dataset {name} is neither CLASS/image.jpg nor SPLIT/CLASS/image.jpg with images "
                      f"{', '.join(SUFFIXES)}; move the files")  # fmt: skip
    self.class_names = sorted({p[-2] for p in parts.values()})
    labels = {class_name: i for i, class_name in enumerate(self.class_names)}
    self._splits: dict[str, list[tuple[str, int]]] = {}
    for path in sorted(files, key=lambda path: hashlib.sha256("/".join(parts[path]).encode()).digest()):
      split = parts[path][0] if depths == {3} else "train"
      self._splits.setdefault(split, []).append((str(path), labels[parts[path][-2]]))

  def _select(self, split: str) -> list[tuple[str, int]]:
    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[len(files)], num_bytes=0)
             for name, files in self._splits.items()}  # fmt: skip
    try:
      instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (KeyError, ValueError, AssertionError):
      raise _unknown_split(self.name, split, self._splits) from None
    return [file for part in instructions for file in self._splits[part.splitname][part.from_ : part.to]]

  def num_examples(self, split: str) -> int:
    return len(self._select(split))

  def _read(self, split: str, share: int, shares: int) -> tf.data.Dataset:
    files = self._select(split)
    size, rest = divmod(len(files), shares)
    start = share * size + min(share, rest)
    paths, labels = zip(*files[start : start + size + (share < rest)], strict=True)
    dataset = tf.data.Dataset.from_tensor_slices((list(paths), list(labels)))
    return dataset.map(lambda path, label: {"image": tf.io.read_file(path), "label": tf.cast(label, tf.int64)})


def _unknown_split(name: str, split: str, splits: Sequence[str]) -> UserError:
  return UserError(f"dataset {name!r} has no split {split!r}; it has {', '.join(sorted(splits))}")


def open_dataset(name: str, data_dir: str | None) -> Dataset:
  """Opens a dataset; prepares the embedded `digits` on first use.

  Args:
    name: a TFDS name, e.g. "digits" or "imagenet2012:5.1.0"; or a folder, written with a slash, e.g. "./flowers".
    data_dir: where prepared TFDS datasets lie; None for TFDS's own default.

  Raises:
    UserError: an unknown or unprepared dataset, or one without images and class labels.
  """
  if name.startswith(("/", "./", "../", "~")) or (os.sep in name and os.path.isdir(name)):
    if not os.path.isdir(os.path.expanduser(name)):
      raise UserError(f"dataset {name} does not exist; give a folder of images by class, or the name of a TFDS dataset")
    return FolderDataset(name)
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
  elif not builder.info.splits:
    raise UserError(
      f"dataset {name!r} is not prepared in {builder.data_dir}; prepare it there, or set --config.dataset.data_dir"
    )
  for feature, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
    if feature not in builder.info.features or not isinstance(builder.info.features[feature], kind):
      raise UserError(
        f"dataset {name!r} has no {feature!r} of type {kind.__name__}; choose an image classification one"
      )
  return TfdsDataset(name, builder)
