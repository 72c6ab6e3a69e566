"""Checkpoints of the train state; the only user of orbax."""

from collections.abc import Iterator
import contextlib
import os
from typing import Any

from etils import epath
from flax import nnx
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vit_jax_ext.errors import UserError
from vit_jax_ext.training.train_step import TrainState, split_model

BEST_METRIC = "eval/top1"


def open_checkpoints(workdir: str, *, keep_last: int = 1, read_only: bool = False) -> ocp.CheckpointManager:
  """Opens the checkpoints of a run; saves asynchronously, keeps the last `keep_last` and the best by eval/top1."""

  def best_metric(metrics):
    return metrics[BEST_METRIC]

  best = checkpoint_managers.BestN(get_metric_fn=best_metric, n=1, keep_checkpoints_without_metrics=False)
  options = ocp.CheckpointManagerOptions(
    best_fn=best_metric,
    preservation_policy=checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(keep_last), best]),
    read_only=read_only,
    cleanup_tmp_directories=not read_only,
  )
  return ocp.CheckpointManager(epath.Path(workdir).absolute() / "checkpoints", options=options)


def _items(state: TrainState) -> dict[str, Any]:
  """Splits a state into parts that can be read alone; orbax refuses empty ones."""
  items = {
    "model": {"params": state.params, "stats": state.stats},
    "ema": state.ema,
    "optimizer": {"step": state.step, "opt_state": state.opt_state},
  }
  return {name: item for name, item in items.items() if jax.tree.leaves(item)}


def save(checkpoints: ocp.CheckpointManager, step: int, state: TrainState, metrics: dict[str, float] | None) -> None:
  """Starts saving `state`, with the `metrics` of this step's evaluation if any; returns once it is off the devices."""
  items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
  checkpoints.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)


def restore(checkpoints: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
  """Returns the state saved at `step`, in the shapes, dtypes and shardings of `like` (ShapeDtypeStructs)."""
  items = {name: ocp.args.StandardRestore(item) for name, item in _items(like).items()}
  restored = checkpoints.restore(step, args=ocp.args.Composite(**items))
  model, optimizer = restored["model"], restored["optimizer"]
  return TrainState(
    optimizer["step"], model["params"], model["stats"], optimizer["opt_state"], restored.get("ema") or {}
  )


def restore_weights(workdir: str, model: nnx.Module, shardings: Any, *, ema: bool) -> tuple[int, dict[str, Any]]:
  """Returns the step and {"params", "stats"} of a run's best checkpoint, or of its last when none was evaluated.

  Args:
    workdir: the run's.
    model: the abstract model.
    shardings: where the arrays go, one for all or a tree like the weights.
    ema: the averaged weights instead of the raw ones.

  Raises:
    UserError: there is no checkpoint.
  """
  with _best_checkpoint(workdir) as (checkpoints, step):
    item = "ema" if ema else "model"
    _, params, stats = split_model(model)
    like = abstract({"params": params, "stats": stats}, shardings)
    return step, checkpoints.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))[item]


def latest_step(workdir: str) -> int:
  """Returns the step of a run's newest complete checkpoint, 0 if there is none."""
  if not (epath.Path(workdir) / "checkpoints").is_dir():
    return 0
  with open_checkpoints(workdir, read_only=True) as checkpoints:
    return checkpoints.latest_step() or 0


@contextlib.contextmanager
def _best_checkpoint(workdir: str) -> Iterator[tuple[ocp.CheckpointManager, int]]:
  """Opens a run's checkpoints and finds the best step, or the last when none was evaluated."""
  if (epath.Path(workdir) / "checkpoints").is_dir():
    with open_checkpoints(workdir, read_only=True) as checkpoints:
      step = checkpoints.best_step()
      step = checkpoints.latest_step() if step is None else step
      if step is not None:
        yield checkpoints, step
        return
  raise UserError(f"workdir {workdir} holds no complete checkpoint; train there first")


def read_weights(folder: str) -> tuple[int, str, dict[tuple, np.ndarray]] | None:
  """Reads weights as they were saved, averaged ones where there are some, whatever model they belong to.

  Args:
    folder: a workdir (its best checkpoint is taken, or its last when none was evaluated) or one of its checkpoints,
      workdir/checkpoints/STEP; local or in a bucket.

  Returns:
    The step, "ema" or "model", and the NumPy arrays by their path in the model; None if it is no such folder.

  Raises:
    UserError: there is no complete checkpoint, or it is damaged.
  """
  if folder.startswith(("http://", "https://")):
    return None
  path = epath.Path(folder).expanduser().absolute()
  if (path / "checkpoints").is_dir():
    with _best_checkpoint(os.fspath(path)) as (_, step):
      path = path / "checkpoints" / str(step)
  item = "ema" if (path / "ema").is_dir() else "model"
  if not (path / item).is_dir():
    return None
  try:
    with ocp.PyTreeCheckpointer() as reader:
      as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path / item).item_metadata.tree
      )
      tree = reader.restore(path / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
  except Exception as error:  # orbax and its storage raise whatever they stumble over
    why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    raise UserError(f"checkpoint {path} is damaged ({why}); choose another one in {path.parent}") from None
  leaves = (leaf for part in tree.values() for leaf in jax.tree_util.tree_leaves_with_path(part))
  return int(path.name), item, {tuple(entry.key for entry in keys): array for keys, array in leaves}


def check_shapes(workdir: str, step: int, weights: dict[str, Any]) -> None:
  """Checks a checkpoint's weights against abstract ones without reading them.

  Raises:
    UserError: they differ; names the first that does.
  """
  path = epath.Path(workdir).absolute() / "checkpoints" / str(step) / "model"
  with ocp.PyTreeCheckpointer() as reader:
    saved = reader.metadata(path).item_metadata.tree
  saved, expected = (
    {
      tuple(str(part.key) for part in keys): tuple(leaf.shape)
      for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (saved, {name: part for name, part in weights.items() if part})
  )
  for name in sorted(saved.keys() | expected.keys()):
    if saved.get(name) != expected.get(name):
      raise UserError(f"checkpoint {path.parent} has {'.'.join(name)} of shape {saved.get(name)}, the model of shape "
                      f"{expected.get(name)}; choose another --workdir")  # fmt: skip


def abstract(tree: Any, shardings: Any) -> Any:
  """Returns the ShapeDtypeStructs of a tree with the places where its arrays shall lie, one for all or a tree."""
  shardings = jax.tree.broadcast(shardings, tree)
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)
