"""Trackers that a run can have beside TensorBoard and metrics.jsonl: Weights & Biases and MLflow.

Where they are, as whom, offline or not, the environment variables say that their own documentation names.
"""

from collections.abc import Mapping
import importlib.util
import os
import time
from typing import Any, Protocol

from vit_jax_ext.errors import UserError

# For who has not set them: a project of ours, few lines on the console, and no waiting for a server that is gone.
ENVIRONMENT = {
  "WANDB_PROJECT": "vit_jax_ext",
  "WANDB_SILENT": "true",
  "WANDB_CONSOLE": "off",
  "WANDB_FINISH_TIMEOUT": "60",
  "MLFLOW_EXPERIMENT_NAME": "vit_jax_ext",
  "MLFLOW_LOGGING_LEVEL": "WARNING",
  "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
  "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


class Tracker(Protocol):
  """A run in a tracker.

  Attributes:
    run: what the tracker calls it; given again, it goes on.
    place: where one finds it.
  """

  run: str
  place: str

  def __init__(self, workdir: str, config: Mapping[str, Any], run: str | None):
    """Begins a run that is named like the workdir and shows the config, or goes on with `run`."""

  def log(self, step: int, scalars: Mapping[str, float]) -> None:
    """Sends the values of a step; steps may come twice, with other names."""

  def close(self, finished: bool) -> None:
    """Sends what is left, and says whether the training has come to its end."""


class Wandb(Tracker):
  """A run of Weights & Biases; its files lie in the workdir."""

  def __init__(self, workdir, config, run):
    import wandb

    self._run = wandb.init(
      dir=workdir, name=_name(workdir), config=dict(config), id=run, resume="allow", allow_val_change=True
    )
    self._run.define_metric("*", step_metric="step")
    self.run, self.place = self._run.id, self._run.url or self._run.settings.sync_dir

  def log(self, step, scalars):
    # Its own count only rises, and is beyond the last one's when a run goes on.
    self._run.log({"step": step, **scalars}, step=max(step, self._run.step))

  def close(self, finished):
    self._run.finish(exit_code=0 if finished else 1)


class MLflow(Tracker):
  """A run of MLflow."""

  def __init__(self, workdir, config, run):
    import mlflow

    self._client = mlflow.MlflowClient()
    self.place = mlflow.get_tracking_uri()
    if run:
      self._client.update_run(run, status="RUNNING")
    else:
      experiment = mlflow.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"]).experiment_id
      run = self._client.create_run(experiment, run_name=_name(workdir)).info.run_id
      params = [mlflow.entities.Param(key, str(value)) for key, value in config.items()]
      self._client.log_batch(run, params=params)
    self.run = run

  def log(self, step, scalars):
    from mlflow.entities import Metric

    now = round(1000 * time.time())
    self._client.log_batch(self.run, metrics=[Metric(name, value, now, step) for name, value in scalars.items()])

  def close(self, finished):
    self._client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


TRACKERS = {"wandb": Wandb, "mlflow": MLflow}


def check_installed(name: str) -> str:
  """Returns that a tracker is installed.

  Raises:
    UserError: it is not.
  """
  found = importlib.util.find_spec(name)
  if found is None or found.origin is None:  # the latter is a folder of this name, such as wandb leaves behind
    raise UserError(f"config.tracker={name} is not installed; pip install 'vit_jax_ext[{name}]', or leave it out")
  return f"{name} is installed"


def open_tracker(name: str, workdir: str, config: Mapping[str, Any], run: str | None) -> Tracker:
  """Returns a Tracker, see there.

  Raises:
    UserError: it is not installed, or does not start.
  """
  check_installed(name)
  for variable, value in ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  try:
    return TRACKERS[name](workdir, config, run)
  except Exception as error:  # of whatever kind its libraries have
    raise UserError(
      f"config.tracker={name} does not start ({reason(error)}); mend that, pip install 'vit_jax_ext[{name}]' if it is "
      "of another version, or leave it out"
    ) from None


def reason(error: Exception) -> str:
  """Returns the beginning of what an error says, in one line."""
  return " ".join(str(error).split())[:200] or type(error).__name__


def _name(workdir: str) -> str:
  return os.path.basename(os.path.abspath(workdir))
