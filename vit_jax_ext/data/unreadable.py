"""Going on after an image that cannot be read, without losing which one it was."""

from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
import numpy as np
import tensorflow as tf

from vit_jax_ext.data.datasets import Dataset
from vit_jax_ext.errors import UserError


def map_or_flag(fn: Callable[[Any], Any]) -> Callable[[Any], tuple[tf.Tensor, Any]]:
  """Returns a function of examples, a nest of tensors (n, ...), to what `fn` makes of each, and where it did not fail.

  Errors are caught by a dataset inside it. One per image costs a fifth of the throughput, so n is to be some dozens.

  Args:
    fn: example -> nest of tensors of static shape.

  Returns:
    examples -> (ok, results); ok is bool (n,), and the results (n, ...) hold zeros, a black image, where it is False.
  """

  def map_group(examples):
    size = tf.shape(tf.nest.flatten(examples)[0], tf.int64)[0]

    def map_one(i):
      return i, fn(tf.nest.map_structure(lambda x: x[i], examples))

    results = tf.data.Dataset.range(size).map(map_one).ignore_errors().batch(size)
    nothing = tf.nest.map_structure(lambda x: tf.zeros([0, *x.shape[1:]], x.dtype), results.element_spec)
    found = results.concatenate(tf.data.Dataset.from_tensors(nothing)).take(1).get_single_element()
    index, result = found[0], found[1]

    def scatter(x):
      return tf.scatter_nd(index[:, None], x, tf.concat([size[None], tf.shape(x, tf.int64)[1:]], axis=0))

    ok = scatter(tf.ones_like(index)) > 0
    return ok, tf.cond(tf.reduce_all(ok), lambda: result, lambda: tf.nest.map_structure(scatter, result))

  return map_group


def unreadable_dataset(dataset: Dataset, error: tf.errors.OpError) -> UserError:
  """Returns what a user shall know of an error that is not one image's."""
  why = " ".join(error.message.split())[-240:]  # the cause comes last
  return UserError(f"dataset {dataset.name!r} cannot be read: {why}; check its files")


AHEAD = 2  # batches; more of them, as tf.data would take, fill the memory and help nobody


class Unreadable:
  """Watches for images that cannot be decoded: names each in the log, and ends the run when there are too many.

  Args:
    dataset, split: what is read.
    share: of the split's images, beyond which it ends.
  """

  def __init__(self, dataset: Dataset, split: str, share: float):
    self._dataset, self._split, self._share = dataset, split, share
    self._names: dict[int, str] = {}

  def watch(self, batches: tf.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches.

    Raises:
      UserError: too many images of them are unreadable, all of a batch, or the dataset itself is.
    """
    try:
      for batch in batches.prefetch(AHEAD).as_numpy_iterator():
        for i in np.flatnonzero(~batch["readable"]):
          self._note(batch["index"][i], batch["name"][i].decode())
        yield batch
    except tf.errors.OpError as error:
      raise unreadable_dataset(self._dataset, error) from None

  def _note(self, index: int, name: str) -> None:
    if index in self._names:
      return
    self._names[index] = name or f"number {index} of {self._split}"
    logging.warning("image %s cannot be decoded; it is left out", self._names[index])
    if len(self._names) > self._share * self._dataset.num_examples(self._split):
      raise self.too_many()

  def too_many(self) -> UserError:
    """Returns what ends the run."""
    names = list(self._names.values())
    rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return UserError(
      f"{len(names)} of {self._dataset.num_examples(self._split)} images of {self._dataset.name}/{self._split} cannot "
      f"be decoded: {', '.join(names[:20])}{rest}; mend them, or raise --config.dataset.max_unreadable"
    )
