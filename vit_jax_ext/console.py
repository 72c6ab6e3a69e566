"""What a person sees while a command runs: log lines, and a live bar on a terminal."""

from collections.abc import Iterator, Mapping
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings

from absl import logging as absl_logging
import rich.console
import rich.progress

CONSOLE = rich.console.Console(stderr=True)
# How lines of libjpeg-turbo begin when it decodes what is damaged.
LIBJPEG = (
  "Corrupt JPEG data", "Premature end of JPEG file", "Invalid JPEG file structure", "Unsupported marker type",
  "Not a JPEG file", "Warning: unknown JFIF revision", "Unknown Adobe color transform", "Inconsistent progression",
  "Invalid SOS parameters", "Bogus ", "Unsupported JPEG", "Invalid component ID",
)  # fmt: skip


class _ConsoleHandler(logging.Handler):
  """Prints our own and clu's records, and everybody's errors but those that are raised too, above the live bar."""

  def emit(self, record: logging.LogRecord) -> None:
    ours = "vit_jax_ext" in record.pathname or "metric_writers" in record.pathname
    raised = "orbax" in record.pathname or "asynclib" in record.pathname
    if ours or (record.levelno >= logging.ERROR and not raised):
      message = f"{time.strftime('%H:%M:%S')} {record.getMessage()}"
      CONSOLE.print(message, soft_wrap=True, markup=False, highlight=False)


def log_to_console() -> None:
  """Sends absl's log to the console, without the libraries' chatter."""
  logger = absl_logging.get_absl_logger()
  logger.handlers[:] = [_ConsoleHandler()]
  logger.propagate = False
  absl_logging.set_verbosity(absl_logging.INFO)
  # What orbax and TensorStore leave behind after an error that they have raised.
  logging.getLogger("asyncio").disabled = True
  sys.unraisablehook = lambda _: None
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def transfer_bar() -> rich.progress.Progress:
  """Returns a bar for bytes, with speed and time left; use as a context manager."""
  return rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.DownloadColumn(),
    rich.progress.TransferSpeedColumn(),
    rich.progress.TimeRemainingColumn(compact=True),
    console=CONSOLE,
    disable=not CONSOLE.is_terminal,
  )


def filter_stderr() -> None:
  """Keeps libjpeg's remarks on damaged images, which it writes past Python, from the console and the log.

  What libraries in C write goes through a process that leaves these out and outlives ours, so that no crash is
  lost. Python's own writing goes where it went; where somebody has turned that elsewhere, nothing is done.
  """
  grep = shutil.which("grep")
  if not grep or sys.stderr is not sys.__stderr__:
    return
  sys.stderr.flush()
  own = os.dup(2)
  command = [grep, "--line-buffered", "--text", "--invert-match", "--extended-regexp", f"^({'|'.join(LIBJPEG)})"]
  # Not in our process group: Ctrl-C shall not end it before us.
  through = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=own, start_new_session=True)
  os.dup2(through.stdin.fileno(), 2)
  through.stdin.close()
  sys.stderr = os.fdopen(own, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)


class Progress:
  """Step, loss, images/s and time left: a live bar on a terminal, plain lines in a log. Use as a context manager."""

  def __init__(self, first_step: int, total_steps: int):
    self._total = total_steps
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("step"),
      rich.progress.MofNCompleteColumn(),
      rich.progress.BarColumn(),
      rich.progress.TextColumn("{task.fields[numbers]}"),
      rich.progress.TimeRemainingColumn(compact=True),
      rich.progress.TextColumn("left"),
      console=CONSOLE,
      disable=not CONSOLE.is_terminal,
    )
    self._task = self._bar.add_task("train", total=total_steps, completed=first_step, numbers="compiling")

  def __enter__(self) -> "Progress":
    self._bar.start()
    return self

  def __exit__(self, *exception) -> None:
    self._bar.stop()

  def step(self, step: int) -> None:
    """Moves the bar."""
    self._bar.update(self._task, completed=step)

  def log(self, step: int, scalars: Mapping[str, float]) -> None:
    """Shows loss, images/s and the share of time that is waited for images; in a log also `seconds_left`, if known."""
    numbers = f"loss {scalars['train/loss']:.4f}  {scalars.get('train/images_per_second', 0):.0f} images/s"
    if "input_wait" in scalars:
      numbers += f"  {scalars['input_wait']:.0%} waiting"
    self._bar.update(self._task, numbers=numbers)
    if not CONSOLE.is_terminal:
      minutes, seconds = divmod(round(scalars.get("seconds_left", 0)), 60)
      left = f"  {minutes}:{seconds:02d} left" if "seconds_left" in scalars else ""
      absl_logging.info("step %d/%d  %s%s", step, self._total, numbers, left)


class Countdown:
  """Jobs of several kinds with the time left: a live bar on a terminal, plain lines in a log. Use as a context manager.

  A job has a weight, and each kind of job its own seconds per weight, learned from those that are done.

  Args:
    work: for each kind the sum of the weights of its jobs, and a first guess of seconds per weight.
  """

  def __init__(self, work: Mapping[str, tuple[float, float]]):
    self._left = {kind: weight for kind, (weight, _) in work.items()}
    self._guess = {kind: guess for kind, (_, guess) in work.items()}
    self._done, self._spent = dict.fromkeys(work, 0.0), dict.fromkeys(work, 0.0)
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.TextColumn("{task.fields[left]} left"),
      console=CONSOLE,
      disable=not CONSOLE.is_terminal,
    )
    self._task = self._bar.add_task("", total=1.0, left="")

  def __enter__(self) -> "Countdown":
    self._bar.start()
    return self

  def __exit__(self, *exception) -> None:
    self._bar.stop()

  @contextlib.contextmanager
  def job(self, kind: str, weight: float, what: str) -> Iterator[None]:
    """Shows `what` while it is being done; counts it as done even if it fails."""
    self.show(what, log=True)
    start = time.monotonic()
    try:
      yield
    finally:
      self.done(kind, weight, time.monotonic() - start)

  def show(self, what: str, *, log: bool) -> None:
    """Shows `what` and the time left on the bar; without a terminal as a line, if it is one for the `log`."""
    spent, left = sum(self._spent.values()), self.seconds_left()
    minutes, seconds = divmod(round(left), 60)
    share = spent / max(spent + left, 1e-9)
    self._bar.update(self._task, description=what, completed=share, left=f"{minutes}:{seconds:02d}")
    if log and not CONSOLE.is_terminal:
      absl_logging.info("%s  (about %d:%02d left)", what, minutes, seconds)

  def done(self, kind: str, weight: float, seconds: float) -> None:
    """Counts a job, or a part of one, as done."""
    self._spent[kind] += seconds
    self._done[kind] += weight
    self._left[kind] -= weight

  def skip(self, kind: str, weight: float) -> None:
    """Takes a job off the list."""
    self._left[kind] -= weight

  def seconds_left(self) -> float:
    """Estimates how long the jobs on the list will take."""
    return sum(
      weight * (self._spent[kind] / self._done[kind] if self._done[kind] else self._guess[kind])
      for kind, weight in self._left.items()
    )
