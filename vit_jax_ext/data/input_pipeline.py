"""Dataset split -> batches of this host -> global arrays on the devices.

Order and augmentation depend on (seed, epoch, index in the split) alone, so a run can start at any step: what earlier
steps saw is skipped undecoded.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import itertools
from typing import Any

import jax
import numpy as np
import tensorflow as tf

from vit_jax_ext.data import preprocess, randaugment
from vit_jax_ext.data.datasets import Dataset
from vit_jax_ext.data.unreadable import Unreadable, map_or_flag, unreadable_dataset
from vit_jax_ext.errors import UserError

Batch = dict[str, Any]  # image (B, H, W, 3) uint8, label (B,) int32; in evaluation also mask (B,) bool

# Encoded image and seed, int64 (2,), to uint8 (height, width, 3).
Augmentation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def train_augmentation(
  augment: Mapping[str, Any], image_size: tuple[int, int], mean: Sequence[float], shift: float, scale: float
) -> Augmentation:
  """Returns the host's part of the augmentation: geometry and photometry, on uint8; the rest is `mixup.augment`'s.

  Args:
    augment: of the config: crop_scale, interpolation, flip, randaugment, color_jitter.
    image_size: (height, width) of its results.
    mean: colour of what comes in from outside, in [0, 1].
    shift, scale: see `preprocess.random_shift_and_scale`.
  """
  policy = randaugment.parse(augment["randaugment"]) if augment["randaugment"] else None
  fill = tuple(min(255, round(255 * value)) for value in mean)

  def apply(encoded, seed):
    if augment["crop_scale"]:
      image = preprocess.random_resized_crop(
        encoded, image_size, seed, scale=augment["crop_scale"], interpolation=augment["interpolation"]
      )
    else:
      image = preprocess.resize_and_center_crop(encoded, image_size, crop=1.0)
    if augment["flip"]:
      image = preprocess.random_flip(image, seed, augment["flip"])
    if policy:
      image = randaugment.rand_augment(image, seed, policy, fill, augment["interpolation"])
    if augment["color_jitter"]:
      image = preprocess.color_jitter(image, seed, augment["color_jitter"])
    if shift or scale:
      image = preprocess.random_shift_and_scale(image, seed, shift, scale)
    return image

  return apply


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
  augment: Augmentation,
  repeats: int = 1,
  max_unreadable: float = 0.0,
) -> Iterator[Batch]:
  """Yields this host's batches of the steps after `first_step`.

  Epochs follow each other without a gap and hold every image once, unless augmentation is repeated: see `repeats`.
  An image that cannot be decoded is logged, and the next readable one of the batch is taken twice.

  Args:
    dataset: where the images are from.
    split: its training split.
    batch_size: images per batch on this host.
    image_size: (height, width) of the batches' images.
    seed: of order and augmentation.
    first_step: batches that an earlier run has used.
    total_steps: batches of the whole training. An endless dataset would keep working, and delay the end by seconds.
    shuffle_buffer: examples among which the next one is drawn.
    augment: see `train_augmentation`.
    repeats: repeated augmentation (Hoffer et al. 2020): how often each image comes, differently augmented. An epoch
      then has as many whole batches as without, so it holds a share 1 / `repeats` of the images, drawn anew for each,
      as DeiT's RASampler does it; the last one or two of them lack a copy if these do not fill the batches. The others
      are read, not decoded. Copies are as far apart as a batch allows, so that hardly one is mixed with another.
    max_unreadable: see `Unreadable`.

  Raises:
    UserError: the dataset cannot be read, or too many of its images; augmentation is repeated and a batch is larger
      than the split.
  """
  host, hosts = jax.process_index(), jax.process_count()
  examples = dataset.examples(split, host, hosts)
  share = per_epoch = examples.cardinality().numpy()
  if repeats > 1:
    in_split = dataset.num_examples(split)
    per_epoch = in_split // (batch_size * hosts) * batch_size
    if not per_epoch:
      raise UserError(
        f"config.batch_size={batch_size * hosts} is more than the {in_split} images of {split}, whose epochs have "
        f"whole batches with config.augment.repeats={repeats}; give a smaller batch, or 1 repeat"
      )
  first_epoch, used = divmod(first_step * batch_size, per_epoch)

  def epoch_examples(epoch):
    epoch_seed = seed * 2**32 + epoch
    order, size = examples, share
    if repeats > 1:
      # Drawn before the shuffling: its buffer may be smaller than the split, of which an epoch would be the beginning.
      size = -(-per_epoch // repeats)
      drawn = tf.random.experimental.stateless_shuffle(tf.range(share) < size, tf.stack([epoch_seed, -1 - host]))
      order = tf.data.Dataset.zip(examples, tf.data.Dataset.from_tensor_slices(drawn))
      order = order.filter(lambda _, is_drawn: is_drawn).map(lambda example, _: example)
    order = order.shuffle(min(shuffle_buffer, size), seed=epoch_seed, reshuffle_each_iteration=False)

    def copies(indices, group):
      def copy(number):
        seeds = tf.stack([tf.fill(tf.shape(indices), epoch_seed), indices * repeats + number], axis=-1)
        return tf.data.Dataset.from_tensor_slices((seeds, indices, group))

      return tf.data.Dataset.range(repeats).flat_map(copy)

    if repeats == 1:
      return order.map(lambda index, example: (tf.stack([epoch_seed, index]), index, example))
    return order.batch(max(1, batch_size // repeats)).flat_map(copies).take(per_epoch)

  epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
  batches = _decode(epochs.flat_map(epoch_examples).skip(used), augment, image_size, batch_size, drop_remainder=True)
  batches = batches.take(total_steps - first_step)
  unreadable = Unreadable(dataset, split, max_unreadable)
  for batch in unreadable.watch(batches):
    readable = np.flatnonzero(batch["readable"])
    chosen = readable[np.searchsorted(readable, np.arange(batch_size)) % len(readable)]
    yield {key: batch[key] if len(readable) == batch_size else batch[key][chosen] for key in ("image", "label")}


def eval_batches(
  dataset: Dataset,
  split: str,
  *,
  batch_size: int,
  image_size: tuple[int, int],
  crop: float,
  max_unreadable: float = 0.0,
) -> Iterator[Batch]:
  """Yields this host's share of a split once, as full batches whose `mask` is False on padding and unreadable images.

  Every host yields the same number of batches.

  Raises:
    UserError: the dataset cannot be read, or too many of its images.
  """
  hosts, host = jax.process_count(), jax.process_index()

  def center(encoded, _):
    return preprocess.resize_and_center_crop(encoded, image_size, crop)

  examples = dataset.examples(split, host, hosts)
  examples = examples.map(lambda index, example: (tf.stack([0, index]), index, example))
  decoded = _decode(examples, center, image_size, batch_size, drop_remainder=False)
  batches = Unreadable(dataset, split, max_unreadable).watch(decoded)
  nothing = {
    key: np.zeros((0, *spec.shape[1:]), spec.dtype.as_numpy_dtype) for key, spec in decoded.element_spec.items()
  }
  largest_share = -(-dataset.num_examples(split) // hosts)
  for _ in range(-(-largest_share // batch_size)):
    batch = next(batches, nothing)
    batch = {"image": batch["image"], "label": batch["label"], "mask": batch["readable"]}
    missing = batch_size - len(batch["label"])
    yield {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()}


def _decode(
  examples: tf.data.Dataset,
  augment: Augmentation,
  image_size: tuple[int, int],
  batch_size: int,
  *,
  drop_remainder: bool,
) -> tf.data.Dataset:
  """Turns (seed, index, example) into batches of image, label, name, index, readable; what is unreadable is black."""

  def split(seed, index, example):
    return {"label": example["label"], "name": example["name"], "index": index}, (example["image"], seed)

  def join(known, readable, image):
    return known | {"readable": readable, "image": tf.ensure_shape(image, (None, *image_size, 3))}

  batches = map_or_flag(
    examples.map(split), lambda example: augment(*example), batch_size, drop_remainder=drop_remainder
  )
  return batches.map(join)


def undecodable(dataset: Dataset, split: str) -> tuple[int, list[str]]:
  """Decodes a sample of a split; returns how many images that are, and the names of those that cannot be.

  Raises:
    UserError: the dataset cannot be read.
  """
  tried, bad = 0, []
  examples = dataset.sample(split).enumerate()
  pairs = examples.map(lambda index, example: ((index, example["name"]), example["image"]))
  batches = map_or_flag(
    pairs, lambda image: preprocess.resize_and_center_crop(image, (8, 8), 1.0), 64, drop_remainder=False
  )
  try:
    for (indices, names), ok, _ in batches.as_numpy_iterator():
      tried += len(ok)
      bad += [names[i].decode() or f"number {indices[i]} of {split}" for i in np.flatnonzero(~ok)]
  except tf.errors.OpError as error:
    raise unreadable_dataset(dataset, error) from None
  return tried, bad


def prefetch_to_devices(batches: Iterator[Batch], sharding: jax.sharding.Sharding, size: int = 2) -> Iterator[Batch]:
  """Turns the hosts' batches into global arrays, `size` of them ahead of their use."""
  batches = (
    {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()} for batch in batches
  )
  queue = collections.deque(itertools.islice(batches, size))
  while queue:
    yield queue.popleft()
    queue.extend(itertools.islice(batches, 1))
