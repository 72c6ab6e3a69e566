"""Starts and ends the process of a command: `python main.py` and `vit-jax-ext` are this."""

import os
import signal
import sys


def run() -> None:
  """Runs the command line and ends the process with its exit status."""
  signal.signal(signal.SIGINT, leave)  # before the rest is imported
  from vit_jax_ext.command_line import main

  end(main())


def leave(*_) -> None:
  """Ends at once on Ctrl-C: whatever is being imported might swallow an exception, or tell a page about it."""
  os.write(sys.stderr.fileno(), b"interrupted\n")
  os._exit(1)


def end(status: int) -> None:
  """Ends the process without taking it down piece by piece, which threads of libraries do not always survive."""
  from vit_jax_ext.errors import Preempted

  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what was to be done is done
  jax = sys.modules.get("jax")
  if status in (0, Preempted.status) and jax and jax.distributed.is_initialized():
    sys.exit(status)  # the other processes wait for this one's goodbye
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


if __name__ == "__main__":
  run()
