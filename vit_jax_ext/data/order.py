"""Which image comes when: it depends on the seed and the place in the training alone, whoever reads it."""

import dataclasses
import functools

import numpy as np


@functools.lru_cache(maxsize=2)  # batches may hold the end of an epoch and the beginning of the next
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
  """Returns a permutation of range(size), int64, drawn anew for each epoch.

  Sorts numbers of Philox 4x64 (Salmon et al. 2011), whose stream NumPy keeps for ever.
  """
  keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
  return np.argsort(keys, kind="stable")


@dataclasses.dataclass(frozen=True)
class Order:
  """The order of a training: epochs that hold every image once and follow each other without a gap.

  With repeated augmentation (Hoffer et al. 2020) an epoch has as many whole batches as without, so it holds a share
  1 / `repeats` of the images, drawn anew for each, as DeiT's RASampler does it; the last one or two of them lack a copy
  if these do not fill the batches. Copies are as far apart as a batch allows, so that hardly one is mixed with another.

  Attributes:
    size: images of the split.
    batch_size: of all hosts.
    seed: of the permutations.
    repeats: how often an image comes in an epoch, differently augmented.
  """

  size: int
  batch_size: int
  seed: int
  repeats: int = 1

  @property
  def per_epoch(self) -> int:
    """Images of an epoch, copies counted."""
    return self.size if self.repeats == 1 else self.size // self.batch_size * self.batch_size

  def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns epoch, index in the split and number of the copy of those images of the training; all int64 (n,)."""
    epochs, places = np.divmod(positions, self.per_epoch)
    copies = np.zeros_like(places)
    if self.repeats > 1:
      group = max(1, self.batch_size // self.repeats)
      blocks, within = np.divmod(places, group * self.repeats)
      drawn = -(-self.per_epoch // self.repeats)
      copies, members = np.divmod(within, np.minimum(group, drawn - blocks * group))
      places = blocks * group + members
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
      indices[epochs == epoch] = permutation(self.size, self.seed, int(epoch))[places[epochs == epoch]]
    return epochs, indices, copies
