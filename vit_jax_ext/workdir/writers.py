"""Where a run's numbers go: TensorBoard, metrics.jsonl, and a tracker where the config asks for one."""

from collections.abc import Iterator
import contextlib
import json
import math
import os

from absl import logging
from clu import asynclib, metric_writers
import jax
import ml_collections

from vit_jax_ext import config as configs
from vit_jax_ext.errors import UserError
from vit_jax_ext.files import write_json
from vit_jax_ext.workdir import trackers
from vit_jax_ext.workdir.disk import writing
from vit_jax_ext.workdir.metrics import FILE, read_metrics

TRACKED = "tracker.json"


class JsonlWriter(metric_writers.LoggingWriter):
  """A clu writer that appends scalars to `metrics.jsonl`, one object per line: step, then the values.

  Damaged lines are dropped, and those of steps after `first_step`, left by a run that went on past its last checkpoint:
  they are about to be written again.
  """

  def __init__(self, workdir: str, first_step: int):
    super().__init__()
    path = os.path.join(workdir, FILE)
    kept = [row for row in read_metrics(workdir) if row["step"] <= first_step]
    with open(path + ".tmp", "w") as file:
      file.writelines(json.dumps(row) + "\n" for row in kept)
    os.replace(path + ".tmp", path)
    self._file = open(path, "a")  # noqa: SIM115

  def write_scalars(self, step, scalars):
    scalars = {key: value for key, value in scalars.items() if math.isfinite(value)}  # JSON has no other numbers
    self._file.write(json.dumps({"step": step} | {key: float(value) for key, value in scalars.items()}) + "\n")
    self._file.flush()

  def write_hparams(self, hparams):
    """The config is saved beside, in config.json."""

  def flush(self):
    self._file.flush()

  def close(self):
    self._file.close()


class TrackerWriter(metric_writers.LoggingWriter):
  """A clu writer to the tracker that `config.tracker` names, which sends each value once.

  The workdir's `tracker.json` keeps the tracker's run, and for each name the last step that was sent. A run that goes
  on is the same one there, steps that are trained again are not sent again, and what did not get through is sent by
  the next start, for all lines of metrics.jsonl are written first. A tracker that fails does not stop the training.

  Raises:
    UserError: it is not installed, or does not start.
  """

  def __init__(self, workdir: str, config: ml_collections.ConfigDict):
    super().__init__()
    self._workdir, self._name, self.finished = workdir, config.tracker, False
    self._saved = self._read()
    run, self._sent = self._saved.get(self._name, (None, {}))
    self._tracker = trackers.open_tracker(self._name, workdir, configs.flatten(configs.saved(config)), run)
    self._keep(self._sent)
    logging.info("%s: run %s, %s", self._name, self._tracker.run, self._tracker.place)

  def _read(self) -> dict[str, list]:
    path = os.path.join(self._workdir, TRACKED)
    try:
      with open(path, encoding="utf-8") as file:
        saved = json.load(file)
      if not all(isinstance(run, str) and isinstance(sent, dict) for run, sent in saved.values()):
        raise ValueError("no runs of trackers")
      return saved
    except FileNotFoundError:
      return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
      raise UserError(f"{path} is damaged ({error}); restore it, or remove it for a new run in the tracker") from None

  def _keep(self, sent: dict[str, int]) -> None:
    self._sent = sent
    write_json(self._workdir, TRACKED, self._saved | {self._name: (self._tracker.run, sent)}, option="workdir")

  def write_scalars(self, step, scalars):
    if not self._tracker:
      return
    before = self._sent
    try:
      new = {name: float(value) for name, value in scalars.items() if step > before.get(name, -1)}
      if new := {name: value for name, value in new.items() if math.isfinite(value)}:
        self._keep(before | dict.fromkeys(new, step))  # first: who is killed between the two sends nothing twice
        self._tracker.log(step, new)
    except Exception as error:
      self._keep(before)
      self._fail(error)

  def _fail(self, error: Exception) -> None:
    logging.warning(
      "%s fails (%s); the training goes on without it, and its next start sends what is missing there",
      self._name, trackers.reason(error),
    )  # fmt: skip
    self._tracker = None

  def flush(self):
    """Trackers send when they like."""

  def close(self):
    try:
      if self._tracker:
        self._tracker.close(self.finished)
    except Exception as error:
      self._fail(error)


@contextlib.contextmanager
def open_writer(
  workdir: str, first_step: int, config: ml_collections.ConfigDict
) -> Iterator[metric_writers.MetricWriter]:
  """Opens the writer of TensorBoard files, metrics.jsonl and the tracker's run; writes in the background.

  Of several processes one writes.

  Raises:
    RunError: the files cannot be written.
    UserError: the tracker is not installed, or does not start.
  """
  if jax.process_index():
    yield metric_writers.MultiWriter([])
    return
  with writing(workdir):
    files = metric_writers.SummaryWriter(workdir), JsonlWriter(workdir, first_step)
  writers = [metric_writers.AsyncWriter(writer) for writer in files]
  if config.tracker:
    tracker = TrackerWriter(workdir, config)
    writers.append(metric_writers.AsyncWriter(tracker))
    for row in read_metrics(workdir):
      writers[-1].write_scalars(row.pop("step"), row)
  writer = metric_writers.MultiWriter(writers)
  try:
    with writing(workdir, asynclib.AsyncError):
      yield writer
    if config.tracker:
      tracker.finished = True
  finally:
    with writing(workdir):
      writer.close()
