"""The time that devices wait for images, of steps whose length is known."""

import logging
import threading
import time

import jax
import pytest

from vit_jax_ext.training import waiting

STEP = 0.2  # seconds


@pytest.fixture(autouse=True)
def events_are_results(monkeypatch):
  monkeypatch.setattr(jax, "block_until_ready", lambda event: event.wait())


def step():
  """Returns at once what is ready after STEP seconds, like the loss of a step."""
  ended = threading.Event()
  threading.Timer(STEP, ended.set).start()
  return ended


@pytest.mark.parametrize(("input_seconds", "waits"), [(0.05, 0.0), (0.5, 0.3)])
def test_devices_wait_from_the_end_of_a_step_to_the_next_batch(input_seconds, waits):
  """Not for images that come while they work."""
  wait = waiting.InputWait()
  for _ in range(4):
    time.sleep(input_seconds)
    wait.came()
    wait.started(step())
  time.sleep(5 * STEP)
  assert abs(wait.seconds() - 3 * waits) < 0.3
  assert wait.seconds() == 0


def test_what_lies_between_is_left_out():
  wait = waiting.InputWait()
  wait.started(step())
  wait.pause()
  time.sleep(2 * STEP)
  wait.came()
  wait.started(step())
  assert wait.seconds() == 0


def test_it_is_told_once_and_not_on_cpus(caplog, monkeypatch):
  wait = waiting.InputWait()
  wait.tell(0.3)
  assert not caplog.messages
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  caplog.set_level(logging.WARNING)
  for share in (0.04, 0.3, 0.4):
    wait.tell(share)
  (message,) = caplog.messages
  assert "30%" in message and "dct_scaling" in message
