"""How long the devices had nothing to do because the next images were not there."""

import concurrent.futures
import time

from absl import logging
import jax

LOUD = 0.05  # share of the time from which on one is told
REMEDY = (
  "give the hosts more processors, let --config.augment.dct_scaling=True decode less of large images, or ask for less "
  "augmentation"
)


class InputWait:
  """Sums up the times between the end of a step and the arrival of the next one's batch.

  Steps run while the host goes on, so a thread waits for the end of each.
  """

  def __init__(self):
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._ended: concurrent.futures.Future | None = None
    self._gaps: list[tuple[concurrent.futures.Future, float]] = []
    self._told = False

  def came(self) -> None:
    """Notes that a batch is there."""
    if self._ended:
      self._gaps.append((self._ended, time.monotonic()))

  def started(self, result: jax.Array) -> None:
    """Notes that a step with this result has begun."""

    def ended() -> float:
      jax.block_until_ready(result)
      return time.monotonic()

    self._ended = self._pool.submit(ended)

  def pause(self) -> None:
    """Leaves out what lies between the last step and the next: evaluation, writing, or the time of the first batch."""
    self._ended = None

  def seconds(self) -> float:
    """Returns the sum since the last call; the steps have ended."""
    gaps, self._gaps = self._gaps, []
    return sum(max(0.0, came - ended.result()) for ended, came in gaps)

  def tell(self, share: float) -> None:
    """Says once that the devices wait for more than a little of the time; CPUs work on the images themselves."""
    if share > LOUD and not self._told and jax.default_backend() != "cpu":
      self._told = True
      logging.warning("the devices wait for images %.0f%% of the time; %s", 100 * share, REMEDY)
