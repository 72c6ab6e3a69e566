"""Where a run's numbers go: TensorBoard and metrics.jsonl."""

from collections.abc import Iterator
import contextlib
import json
import math
import os

from clu import asynclib, metric_writers
import jax

from vit_jax_ext.workdir.disk import writing
from vit_jax_ext.workdir.metrics import FILE, read_metrics


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


@contextlib.contextmanager
def open_writer(workdir: str, first_step: int) -> Iterator[metric_writers.MetricWriter]:
  """Opens the writer of TensorBoard files and metrics.jsonl; writes in the background.

  Of several processes one writes.

  Raises:
    RunError: the files cannot be written.
  """
  if jax.process_index():
    yield metric_writers.MultiWriter([])
    return
  with writing(workdir):
    writer = metric_writers.AsyncMultiWriter([metric_writers.SummaryWriter(workdir), JsonlWriter(workdir, first_step)])
  try:
    with writing(workdir, asynclib.AsyncError):
      yield writer
  finally:
    with writing(workdir):
      writer.close()
