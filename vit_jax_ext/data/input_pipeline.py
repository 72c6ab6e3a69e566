"""TFDS split -> batches of this host -> global arrays on the devices.

Order and augmentation depend on (seed, epoch, index in the split) alone, so a run can start at any step: what earlier
steps saw is skipped undecoded.
"""

import collections
from collections.abc import Iterator
import itertools
from typing import Any

import jax
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax_ext.data import digits, preprocess
from vit_jax_ext.errors import UserError

Batch = dict[str, Any]  # image (B, H, W, 3) uint8, label (B,) int32; in evaluation also mask (B,) bool

tf.config.set_visible_devices([], "GPU")  # the accelerators belong to JAX


def load_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Returns the builder of a prepared image classification dataset; prepares the embedded `digits` on first use.

  Args:
    name: a TFDS name, e.g. "digits" or "imagenet2012:5.1.0".
    data_dir: where prepared datasets lie; None for TFDS's own default.

  Raises:
    UserError: an unknown or unprepared dataset, or one without images and class labels.
  """
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    raise UserError(
      f"dataset {name!r} is unknown to TFDS; see https://www.tensorflow.org/datasets/catalog for names, "
      f"or set --config.dataset.data_dir to the folder that holds it"
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
  return builder


def num_examples(builder: tfds.core.DatasetBuilder, split: str) -> int:
  """Returns the size of a split.

  Raises:
    UserError: the split does not exist.
  """
  try:
    return builder.info.splits[split].num_examples
  except (KeyError, ValueError):
    raise UserError(
      f"dataset {builder.name!r} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}"
    ) from None


def _read(builder: tfds.core.DatasetBuilder, split: Any) -> tf.data.Dataset:
  """Returns the undecoded examples of a split in their order on disk."""
  return builder.as_dataset(
    split=split,
    shuffle_files=False,
    decoders={"image": tfds.decode.SkipDecoding()},
    read_config=tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1),
  )


def train_batches(
  builder: tfds.core.DatasetBuilder,
  split: str,
  *,
  batch_size: int,
  image_size: tuple[int, int],
  seed: int,
  first_step: int,
  total_steps: int,
  shuffle_buffer: int,
  shift: float,
  scale: float,
) -> Iterator[Batch]:
  """Yields this host's batches of the steps after `first_step`; epochs follow each other without a gap.

  Args:
    builder: a prepared dataset.
    split: its training split.
    batch_size: images per batch on this host.
    image_size: (height, width) of the batches' images.
    seed: of order and augmentation.
    first_step: batches that an earlier run has used.
    total_steps: batches of the whole training. An endless dataset would keep working, and delay the end by seconds.
    shuffle_buffer: examples among which the next one is drawn.
    shift, scale: see `preprocess.random_shift_and_scale`.
  """
  share = tfds.even_splits(split, jax.process_count(), drop_remainder=True)[jax.process_index()]
  examples = _read(builder, share).enumerate()
  per_epoch = num_examples(builder, split) // jax.process_count()
  first_epoch, used = divmod(first_step * batch_size, per_epoch)

  def epoch_examples(epoch):
    epoch_seed = seed * 2**32 + epoch
    order = examples.shuffle(min(shuffle_buffer, per_epoch), seed=epoch_seed, reshuffle_each_iteration=False)
    return order.map(lambda index, example: (tf.stack([epoch_seed, index]), example))

  def preprocess_example(example_seed, example):
    image = preprocess.decode(example["image"])
    image = preprocess.resize_and_center_crop(image, image_size, crop=1.0)
    image = preprocess.random_shift_and_scale(image, example_seed, shift, scale)
    return {"image": image, "label": tf.cast(example["label"], tf.int32)}

  epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
  dataset = epochs.flat_map(epoch_examples).skip(used).map(preprocess_example, num_parallel_calls=tf.data.AUTOTUNE)
  dataset = dataset.batch(batch_size, drop_remainder=True).take(total_steps - first_step)
  return dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def eval_batches(
  builder: tfds.core.DatasetBuilder, split: str, *, batch_size: int, image_size: tuple[int, int], crop: float
) -> Iterator[Batch]:
  """Yields this host's share of a split once, as full batches whose `mask` is False on padding.

  Every host yields the same number of batches.
  """
  hosts, host = jax.process_count(), jax.process_index()

  def preprocess_example(example):
    image = preprocess.resize_and_center_crop(preprocess.decode(example["image"]), image_size, crop)
    return {"image": image, "label": tf.cast(example["label"], tf.int32), "mask": True}

  dataset = _read(builder, tfds.even_splits(split, hosts, drop_remainder=False)[host])
  dataset = dataset.map(preprocess_example, num_parallel_calls=tf.data.AUTOTUNE).batch(batch_size)
  batches = dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
  nothing = {
    "image": np.zeros((0, *image_size, 3), np.uint8), "label": np.zeros(0, np.int32), "mask": np.zeros(0, bool)
  }  # fmt: skip
  largest_share = -(-num_examples(builder, split) // hosts)
  for _ in range(-(-largest_share // batch_size)):
    batch = next(batches, nothing)
    missing = batch_size - len(batch["label"])
    yield {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()}


def prefetch_to_devices(batches: Iterator[Batch], sharding: jax.sharding.Sharding, size: int = 2) -> Iterator[Batch]:
  """Turns the hosts' batches into global arrays, `size` of them ahead of their use."""
  batches = (
    {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()} for batch in batches
  )
  queue = collections.deque(itertools.islice(batches, size))
  while queue:
    yield queue.popleft()
    queue.extend(itertools.islice(batches, 1))


def read_image(path: str, image_size: tuple[int, int], crop: float) -> np.ndarray:
  """Returns an image file as evaluation sees it, uint8 (height, width, 3).

  Raises:
    UserError: the file is missing or no image.
  """
  try:
    return preprocess.resize_and_center_crop(preprocess.decode(tf.io.read_file(path)), image_size, crop).numpy()
  except tf.errors.NotFoundError:
    raise UserError(f"image {path} does not exist; check the path") from None
  except tf.errors.OpError:
    raise UserError(f"image {path} cannot be decoded; give a JPEG, PNG, GIF or BMP file") from None
