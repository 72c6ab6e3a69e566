"""What ends a run before its last step: the machine is taken away, the loss is not finite."""

import signal
import threading

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import optax

from vit_jax_ext.errors import Preempted, RunError

MOST_SKIPPED = 100  # steps in a row


class Preemption:
  """Notices SIGTERM, by which clusters announce that they take a machine away. Use as a context manager.

  Ctrl-C is an exception again meanwhile, so that what is being saved is finished.

  Of several processes one may get the signal; all learn of it at the same call of `check`, so that they can save
  together. They therefore have to call it equally often.
  """

  def __init__(self):
    self._noticed, self._calls = threading.Event(), 0

  def __enter__(self) -> "Preemption":
    # With several processes JAX has its own handler. A signal's handler can be set in the main thread alone.
    self._here = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    if self._here:
      handlers = {signal.SIGTERM: lambda *_: self._noticed.set(), signal.SIGINT: signal.default_int_handler}
      self._previous = {notice: signal.signal(notice, handler) for notice, handler in handlers.items()}
    return self

  def __exit__(self, *exception) -> None:
    if self._here:
      for notice, handler in self._previous.items():
        signal.signal(notice, handler)

  def check(self) -> None:
    """Raises Preempted if the signal has come."""
    self._calls += 1
    if self._noticed.is_set() or multihost_utils.reached_preemption_sync_point(self._calls):
      raise Preempted


class FiniteWatch:
  """Looks for losses and gradients that are not finite, some steps late: the host waits for no step on their account.

  Args:
    schedule: the learning rate, for the message.
    skip: go on, for `make_train_step(skip_nonfinite=True)` has left such updates out; end after MOST_SKIPPED in a row.
  """

  def __init__(self, schedule: optax.Schedule, *, skip: bool):
    self._schedule, self._skip = schedule, skip
    self._unseen, self._in_a_row = [], 0

  def add(self, step: int, measured: dict[str, jax.Array]) -> None:
    """Takes the metrics of a step, which may still be running."""
    self._unseen.append((step, measured["loss"], measured["grad_norm"]))

  def check(self) -> None:
    """Looks at the steps that were added since the last call; waits for them.

    Raises:
      RunError: one was not finite; with `skip`, too many were.
    """
    unseen, self._unseen = jax.device_get(self._unseen), []
    for step, loss, grad_norm in unseen:
      if np.isfinite(loss) and np.isfinite(grad_norm):
        self._in_a_row = 0
        continue
      what = f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}, learning rate {self._schedule(step - 1):g}"
      self._in_a_row += 1
      if not self._skip:
        raise RunError(
          f"loss or gradients are not finite at {what}; nothing of it was saved. Continue without such updates, "
          "--config.skip_nonfinite=True, or lower --config.optimizer.learning_rate in another --workdir"
        )
      if self._in_a_row == MOST_SKIPPED:
        raise RunError(
          f"{MOST_SKIPPED} updates in a row are not finite, the last at {what}; lower --config.optimizer.learning_rate "
          "in another --workdir"
        )
      logging.warning("update left out, loss or gradients are not finite at %s", what)
