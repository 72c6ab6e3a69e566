"""Dataset split -> batches of this host -> global arrays on the devices.

Order and augmentation depend on (seed, epoch, index in the split) alone, so a run can start at any step, on any hosts.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import itertools
from typing import Any

import jax
import numpy as np
import tensorflow as tf

from vit_jax_ext.data import preprocess, randaugment
from vit_jax_ext.data.datasets import GROUP, Dataset, Lookup
from vit_jax_ext.data.order import Order
from vit_jax_ext.data.unreadable import Unreadable, map_or_flag, unreadable_dataset
from vit_jax_ext.errors import UserError

# Seeds, int64 (n, 2), indices in the split, int64 (n,), and what `Dataset.lookup` says of them.
Examples = tuple[tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]

Batch = dict[str, Any]  # image (B, H, W, 3) uint8, label (B,) int32 or (B, classes) bool; mask (B,) bool

# Encoded image and seed, int64 (2,), to uint8 (height, width, 3).
Augmentation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def train_augmentation(
  augment: Mapping[str, Any], image_size: tuple[int, int], mean: Sequence[float], shift: float, scale: float
) -> Augmentation:
  """Returns the host's part of the augmentation: geometry and photometry, on uint8; the rest is `mixup.augment`'s.

  Random crops have 3/4 to 4/3 of the results' aspect ratio.

  Args:
    augment: of the config: crop_scale, dct_scaling, interpolation, flip, randaugment, color_jitter.
    image_size: (height, width) of its results.
    mean: colour of what comes in from outside, in [0, 1].
    shift, scale: see `preprocess.random_shift_and_scale`.
  """
  policy = randaugment.parse(augment["randaugment"]) if augment["randaugment"] else None
  fill = tuple(min(255, round(255 * value)) for value in mean)
  aspect = image_size[1] / image_size[0]  # timm has crops of about 1:1 for any size, and so squeezes what is no square

  def apply(encoded, seed):
    if augment["crop_scale"]:
      image = preprocess.random_resized_crop(
        encoded,
        image_size,
        seed,
        scale=augment["crop_scale"],
        ratio=(3 / 4 * aspect, 4 / 3 * aspect),
        interpolation=augment["interpolation"],
        dct_scaling=augment.get("dct_scaling", False),
        flip=augment["flip"],
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
  rows: Sequence[int],
  image_size: tuple[int, int],
  seed: int,
  first_step: int,
  total_steps: int,
  shuffle_buffer: int,
  augment: Augmentation,
  repeats: int = 1,
  max_unreadable: float = 0.0,
) -> Iterator[Batch]:
  """Yields this host's rows of the batches of the steps after `first_step`.

  What a row of a step holds depends on the seed alone, however many hosts there are and wherever the run was resumed:
  see `order.Order`. A dataset that can be read in its own order alone is shuffled in a buffer, a share on each host.

  An image that cannot be decoded is logged, and the one that follows it in the order is taken twice.

  Args:
    dataset: where the images are from.
    split: its training split.
    batch_size: images per batch of all hosts.
    rows: those of this host.
    image_size: (height, width) of the batches' images.
    seed: of order and augmentation.
    first_step: batches that an earlier run has used.
    total_steps: batches of the whole training. An endless dataset would keep working, and delay the end by seconds.
    shuffle_buffer: examples among which the next one is drawn, where the dataset is read in its own order.
    augment: see `train_augmentation`.
    repeats: see `order.Order`.
    max_unreadable: see `Unreadable`.

  Raises:
    UserError: the dataset cannot be read, or too many of its images; augmentation is repeated and a batch is larger
      than the split.
  """
  order = Order(dataset.num_examples(split), batch_size, seed, repeats)
  if not order.per_epoch:
    raise UserError(
      f"config.batch_size={batch_size} is more than the {order.size} images of {split}, whose epochs have whole "
      f"batches with config.augment.repeats={repeats}; give a smaller batch, or 1 repeat"
    )
  decode, lookup = _decode(augment, image_size), dataset.lookup(split)
  if lookup:
    find = _finder(lookup, order)
    groups = _positions(batch_size, np.array(rows), first_step, total_steps).map(find, tf.data.AUTOTUNE)
    load = tf.function(lambda positions: decode(*find(positions)), autograph=False)
  else:
    groups = _read_in_order(dataset, split, order, len(rows), first_step, shuffle_buffer).batch(GROUP)
  batches = groups.map(decode, tf.data.AUTOTUNE).rebatch(len(rows), drop_remainder=True).take(total_steps - first_step)
  unreadable = Unreadable(dataset, split, max_unreadable)

  def following(batch: Batch, step: int, row: int) -> Batch:
    """Returns images that come after one, in the order or else in its batch."""
    if not lookup:
      return {key: np.roll(value, -row, axis=0) for key, value in batch.items()}
    position = step * batch_size + rows[row]
    found = load(tf.range(position + 1, position + 1 + GROUP, dtype=tf.int64))
    return {key: value.numpy() for key, value in found.items()}

  for step, batch in enumerate(unreadable.watch(batches), first_step):
    batch = {key: value if batch["readable"].all() else value.copy() for key, value in batch.items()}
    for row in np.flatnonzero(~batch["readable"]):
      others = following(batch, step, row)
      if not others["readable"].any():
        raise unreadable.too_many()
      for key in ("image", "label"):
        batch[key][row] = others[key][others["readable"].argmax()]
    yield {key: batch[key] for key in ("image", "label")}


def _positions(batch_size: int, rows: np.ndarray, first_step: int, total_steps: int) -> tf.data.Dataset:
  """Returns the places in the training of the images that one host takes, int64 (GROUP,) at a time."""

  def position(number):
    return number // len(rows) * batch_size + tf.gather(tf.constant(rows, tf.int64), number % len(rows))

  return tf.data.Dataset.range(first_step * len(rows), total_steps * len(rows)).batch(GROUP).map(position)


def _finder(lookup: Lookup, order: Order) -> Callable[[tf.Tensor], Examples]:
  """Returns a function of places in the training, int64 (n,), to the examples there."""

  def ordered(positions):
    epochs, indices, copies = order(positions)
    return np.stack([order.seed * 2**32 + epochs, indices * order.repeats + copies], axis=-1), indices

  def find(positions):
    seeds, indices = tf.numpy_function(ordered, [positions], (tf.int64, tf.int64), stateful=False)
    seeds, indices = tf.ensure_shape(seeds, (None, 2)), tf.ensure_shape(indices, (None,))
    return seeds, indices, lookup(indices)

  return find


def _read_in_order(
  dataset: Dataset, split: str, order: Order, batch_size: int, first_step: int, shuffle_buffer: int
) -> tf.data.Dataset:
  """Returns (seed, index, example) of this host's share, `batch_size` for each step, shuffled in a buffer.

  What earlier steps saw of the first epoch is read again, not decoded.
  """
  host, hosts = jax.process_index(), jax.process_count()
  examples = dataset.examples(split, host, hosts)
  share = per_epoch = examples.cardinality().numpy()
  repeats = order.repeats
  if repeats > 1:
    per_epoch = order.per_epoch // order.batch_size * batch_size
  first_epoch, used = divmod(first_step * batch_size, per_epoch)

  def epoch_examples(epoch):
    epoch_seed = order.seed * 2**32 + epoch
    shuffled, size = examples, share
    if repeats > 1:
      # Drawn before the shuffling: its buffer may be smaller than the split, of which an epoch would be the beginning.
      size = -(-per_epoch // repeats)
      drawn = tf.random.experimental.stateless_shuffle(tf.range(share) < size, tf.stack([epoch_seed, -1 - host]))
      shuffled = tf.data.Dataset.zip(examples, tf.data.Dataset.from_tensor_slices(drawn))
      shuffled = shuffled.filter(lambda _, is_drawn: is_drawn).map(lambda example, _: example)
    shuffled = shuffled.shuffle(min(shuffle_buffer, size), seed=epoch_seed, reshuffle_each_iteration=False)

    def copies(indices, group):
      def copy(number):
        seeds = tf.stack([tf.fill(tf.shape(indices), epoch_seed), indices * repeats + number], axis=-1)
        return tf.data.Dataset.from_tensor_slices((seeds, indices, group))

      return tf.data.Dataset.range(repeats).flat_map(copy)

    if repeats == 1:
      return shuffled.map(lambda index, example: (tf.stack([epoch_seed, index]), index, example))
    return shuffled.batch(max(1, batch_size // repeats)).flat_map(copies).take(per_epoch)

  return tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max).flat_map(epoch_examples).skip(used)


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
  decoded = _center_crops(dataset, split, batch_size, image_size, crop)
  batches = Unreadable(dataset, split, max_unreadable).watch(decoded)
  nothing = {
    key: np.zeros((0, *spec.shape[1:]), spec.dtype.as_numpy_dtype) for key, spec in decoded.element_spec.items()
  }
  largest_share = -(-dataset.num_examples(split) // jax.process_count())
  for _ in range(-(-largest_share // batch_size)):
    batch = next(batches, nothing)
    batch = {"image": batch["image"], "label": batch["label"], "mask": batch["readable"]}
    missing = batch_size - len(batch["label"])
    yield {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()}


@functools.lru_cache(maxsize=2)  # a run evaluates the same split again and again, and tracing takes a second
def _center_crops(
  dataset: Dataset, split: str, batch_size: int, image_size: tuple[int, int], crop: float
) -> tf.data.Dataset:
  def center(encoded, _):
    return preprocess.resize_and_center_crop(encoded, image_size, crop)

  examples = dataset.examples(split, jax.process_index(), jax.process_count())
  groups = examples.map(lambda index, example: (tf.stack([0, index]), index, example)).batch(GROUP)
  return groups.map(_decode(center, image_size), tf.data.AUTOTUNE).rebatch(batch_size)


def _decode(augment: Augmentation, image_size: tuple[int, int]) -> Callable[..., dict[str, tf.Tensor]]:
  """Returns a function of Examples to image, label, name, index and readable; what is not readable is black."""
  augmented = map_or_flag(lambda example: augment(*example))

  @tf.autograph.experimental.do_not_convert  # there is nothing to convert, and looking takes longer than tracing
  def decode(seeds, indices, examples):
    readable, images = augmented((examples["image"], seeds))
    known = {"label": examples["label"], "name": examples["name"], "index": indices, "readable": readable}
    return known | {"image": tf.ensure_shape(images, (None, *image_size, 3))}

  return decode


def undecodable(dataset: Dataset, split: str) -> tuple[int, list[str]]:
  """Decodes a sample of a split; returns how many images that are, and the names of those that cannot be.

  Raises:
    UserError: the dataset cannot be read.
  """
  tried, bad = 0, []
  examples = dataset.sample(split).enumerate().batch(GROUP)
  decode = map_or_flag(lambda image: preprocess.resize_and_center_crop(image, (8, 8), 1.0))
  batches = examples.map(lambda index, group: (index, group["name"], decode(group["image"])[0]), tf.data.AUTOTUNE)
  try:
    for indices, names, ok in batches.as_numpy_iterator():
      tried += len(ok)
      bad += [names[i].decode() or f"number {indices[i]} of {split}" for i in np.flatnonzero(~ok)]
  except tf.errors.OpError as error:
    raise unreadable_dataset(dataset, error) from None
  return tried, bad


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
  """Returns which rows of a batch of all hosts lie on this host's devices, int64, ascending."""
  parts = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def prefetch_to_devices(batches: Iterator[Batch], sharding: jax.sharding.Sharding, size: int = 2) -> Iterator[Batch]:
  """Turns the hosts' batches, see `local_rows`, into global arrays, `size` of them ahead of their use."""

  def distribute(value: np.ndarray) -> jax.Array:
    batch_size = len(value) * jax.process_count()
    rows = local_rows(sharding, batch_size)

    def part(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[0].indices(batch_size)
      first = np.searchsorted(rows, start)
      return value[first : first + stop - start]

    return jax.make_array_from_callback((batch_size, *value.shape[1:]), sharding, part)

  batches = ({key: distribute(value) for key, value in batch.items()} for batch in batches)
  queue = collections.deque(itertools.islice(batches, size))
  while queue:
    yield queue.popleft()
    queue.extend(itertools.islice(batches, 1))
