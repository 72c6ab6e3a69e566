"""Dataset split -> batches of this host -> global arrays on the devices.

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

from vit_jax_ext.data import preprocess
from vit_jax_ext.data.datasets import Dataset
from vit_jax_ext.errors import UserError

Batch = dict[str, Any]  # image (B, H, W, 3) uint8, label (B,) int32; in evaluation also mask (B,) bool

tf.config.set_visible_devices([], "GPU")  # the accelerators belong to JAX


def train_batches(
  dataset: Dataset,
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
    dataset: where the images are from.
    split: its training split.
    batch_size: images per batch on this host.
    image_size: (height, width) of the batches' images.
    seed: of order and augmentation.
    first_step: batches that an earlier run has used.
    total_steps: batches of the whole training. An endless dataset would keep working, and delay the end by seconds.
    shuffle_buffer: examples among which the next one is drawn.
    shift, scale: see `preprocess.random_shift_and_scale`.
  """
  examples = dataset.examples(split, jax.process_index(), jax.process_count())
  per_epoch = examples.cardinality().numpy()
  first_epoch, used = divmod(first_step * batch_size, per_epoch)

  def epoch_examples(epoch):
    epoch_seed = seed * 2**32 + epoch
    order = examples.shuffle(min(shuffle_buffer, per_epoch), seed=epoch_seed, reshuffle_each_iteration=False)
    return order.map(lambda index, example: (tf.stack([epoch_seed, index]), example))

  def preprocess_example(example_seed, example):
    image = preprocess.decode(example["image"])
    image = preprocess.resize_and_center_crop(image, image_size, crop=1.0)
    image = preprocess.random_shift_and_scale(image, example_seed, shift, scale)
    return {"image": image, "label": example["label"]}

  epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
  images = epochs.flat_map(epoch_examples).skip(used).map(preprocess_example, num_parallel_calls=tf.data.AUTOTUNE)
  batches = images.batch(batch_size, drop_remainder=True).take(total_steps - first_step)
  return batches.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def eval_batches(
  dataset: Dataset, split: str, *, batch_size: int, image_size: tuple[int, int], crop: float
) -> Iterator[Batch]:
  """Yields this host's share of a split once, as full batches whose `mask` is False on padding.

  Every host yields the same number of batches.
  """
  hosts, host = jax.process_count(), jax.process_index()

  def preprocess_example(_, example):
    image = preprocess.resize_and_center_crop(preprocess.decode(example["image"]), image_size, crop)
    return {"image": image, "label": example["label"], "mask": True}

  images = dataset.examples(split, host, hosts).map(preprocess_example, num_parallel_calls=tf.data.AUTOTUNE)
  batches = images.batch(batch_size).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
  nothing = {key: np.zeros((0, *spec.shape), spec.dtype.as_numpy_dtype) for key, spec in images.element_spec.items()}
  largest_share = -(-dataset.num_examples(split) // hosts)
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
