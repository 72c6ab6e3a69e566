"""Checkpoints of a run; the only user of orbax."""

from collections.abc import Iterator
import concurrent.futures
import contextlib
import json
import os
import time
from typing import Any

from absl import logging
from etils import epath
from flax import nnx
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vit_jax_ext.errors import UserError
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.workdir import digests
from vit_jax_ext.workdir.disk import writing

BEST_METRICS = ("eval/top1", "eval/map")  # by which the best checkpoint is known, whichever a run has
SUMS = "sums"  # item of a checkpoint

# Parts of a checkpoint by name, each of which can be read alone: "model" and, where there are averages, "ema", both
# {"params", "stats"}; and whatever else a training needs to go on. Orbax refuses empty ones.
Items = dict[str, Any]


class Checkpoints(ocp.CheckpointManager):
  """The checkpoints of a run, which are saved beside the training."""

  def __init__(self, folder: epath.Path, options: ocp.CheckpointManagerOptions):
    super().__init__(folder, options=options)
    self._outdated = folder / options.todelete_subdir if options.todelete_subdir else None
    self._thread, self._started = concurrent.futures.ThreadPoolExecutor(1), None

  def start(self, step: int, items: Items, metrics: dict[str, float] | None, sums: dict[str, Any]) -> None:
    """Begins to save, once the one before is saved; the items may change when this returns.

    Before it returns orbax works longer than it takes to copy a small model, so with one process a thread calls it.
    """
    self._finish()

    def save(items):
      self._delete_outdated()
      args = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()},
                                   **{SUMS: ocp.args.JsonSave(sums)})  # fmt: skip
      self.save(step, args=args, metrics=metrics, force=True)

    if jax.process_count() == 1:  # copied, for on a CPU device_get gives views of what the next step overwrites
      self._started = self._thread.submit(save, jax.tree.map(np.array, jax.device_get(items)))
    else:
      save(items)

  def close(self) -> None:
    try:
      self._finish()
    finally:
      self._thread.shutdown()
      super().close()
      self._delete_outdated()
      if self._outdated and self._outdated.exists() and not jax.process_index():
        self._outdated.rmdir()

  def _delete_outdated(self) -> None:
    if self._outdated and self._outdated.exists() and not jax.process_index():
      for checkpoint in self._outdated.iterdir():
        checkpoint.rmtree()

  def _finish(self) -> None:
    started, self._started = self._started, None
    if started:
      started.result()

  def reached_preemption(self, step: int) -> bool:
    """Leaves that to the training: asked with other numbers in between, JAX would lose the common step."""
    return False


@contextlib.contextmanager
def open_checkpoints(workdir: str, *, keep_last: int = 1, read_only: bool = False) -> Iterator[Checkpoints]:
  """Opens the checkpoints of a run; saves asynchronously, keeps the last `keep_last` and the best, see BEST_METRICS.

  Raises:
    RunError: they cannot be written, when the last one has to be complete at the latest.
  """
  folder = epath.Path(workdir).absolute() / "checkpoints"

  def write_digests():  # orbax calls this when all files are written, and commits the checkpoint after it
    if not jax.process_index():
      steps = (path for path in folder.iterdir() if path.name.partition(".")[0].isdecimal())
      digests.write(max(steps, key=lambda path: int(path.name.partition(".")[0])))  # STEP.SUFFIX until then

  best = checkpoint_managers.BestN(get_metric_fn=_best_metric, n=1, keep_checkpoints_without_metrics=False)
  options = ocp.CheckpointManagerOptions(
    best_fn=_best_metric,
    preservation_policy=checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(keep_last), best]),
    read_only=read_only,
    cleanup_tmp_directories=not read_only,
    # Out of the way first: killed while it deletes, a run would leave half a checkpoint where whole ones belong.
    todelete_subdir=None if read_only else "../outdated",
    async_options=ocp.options.AsyncOptions(post_finalization_callback=write_digests),
  )
  with writing(workdir):
    checkpoints = Checkpoints(folder, options)
  try:
    yield checkpoints
  finally:
    with writing(workdir):
      checkpoints.close()


def _best_metric(metrics: dict[str, float]) -> float:
  return next(metrics[name] for name in BEST_METRICS if name in metrics)


def _folder(workdir: str, step: int) -> epath.Path:
  return epath.Path(workdir).expanduser().absolute() / "checkpoints" / str(step)


def _complete_steps(workdir: str) -> list[int]:
  folder = epath.Path(workdir) / "checkpoints"
  return ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []


def inspect(workdir: str) -> tuple[int, list[int]]:
  """Reads all complete checkpoints of a run and compares them with their digests; logs a line for each damaged one.

  Returns:
    The newest undamaged step, 0 if there are no checkpoints; and the damaged steps.

  Raises:
    UserError: all are damaged.
  """
  steps = _complete_steps(workdir)
  damaged = {step: why for step in steps if (why := digests.damage(_folder(workdir, step)))}
  step = max(set(steps) - set(damaged), default=0)
  for bad, why in damaged.items():
    logging.warning("checkpoint %s is damaged: %s", _folder(workdir, bad), why)
  if damaged and not step:
    raise UserError(
      f"all checkpoints in {workdir} are damaged ({', '.join(map(str, sorted(damaged)))}); restore one, or train anew "
      "in another workdir"
    )
  return step, sorted(damaged)


def set_aside(workdir: str, steps: list[int]) -> None:
  """Moves checkpoints to the folder `damaged`, for whoever wants to look into them; their steps are trained again."""
  for step in steps:
    target = epath.Path(workdir) / "damaged" / f"{step}-{time.strftime('%Y%m%dT%H%M%S')}"
    with writing(workdir):
      target.parent.mkdir(exist_ok=True)
      _folder(workdir, step).rename(target)
    logging.warning("it is now %s", target)


def save(
  checkpoints: Checkpoints,
  step: int,
  items: Items,
  metrics: dict[str, float] | None,
  sums: dict[str, Any] | None = None,
) -> None:
  """Starts saving `items`, with the `metrics` of this step's evaluation if any; returns once they may change.

  Args:
    checkpoints: open.
    step: of the training.
    items: see `Items`.
    metrics: None where it was not evaluated.
    sums: of the training metrics since the last log line, see `metrics.Means`.
  """
  with writing(os.fspath(checkpoints.directory.parent)):
    checkpoints.start(step, items, metrics, json.loads(json.dumps(sums or {})))


def read_sums(workdir: str, step: int) -> dict[str, Any]:
  """Returns the sums that were saved at `step`; none by a run of before, or at step 0."""
  path = _folder(workdir, step) / SUMS / "metadata"
  return json.loads(path.read_text()) if path.exists() else {}


def add_metrics(checkpoints: Checkpoints, step: int, metrics: dict[str, float]) -> None:
  """Adds the `metrics` of an evaluation to a checkpoint that was saved without."""
  folder = checkpoints.directory / str(step)
  with (
    writing(os.fspath(checkpoints.directory.parent)),
    ocp.Checkpointer(ocp.JsonCheckpointHandler("metrics")) as writer,
  ):
    writer.save(folder / "metrics", args=ocp.args.JsonSave(metrics))
    if not jax.process_index():
      digests.write(folder)
  checkpoints.reload()


def restore(workdir: str, step: int, like: Items) -> Items:
  """Returns what was saved at `step`, in the shapes, dtypes and shardings of `like` (ShapeDtypeStructs).

  Raises:
    UserError: the model's shapes are others.
  """
  check_shapes(workdir, step, like["model"])
  items = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    return dict(reader.restore(_folder(workdir, step), args=ocp.args.Composite(**items)))


def restore_weights(workdir: str, model: nnx.Module, shardings: Any, *, ema: bool) -> tuple[int, dict[str, Any]]:
  """Returns the step and {"params", "stats"} of a run's best checkpoint, or of its last when none was evaluated.

  Args:
    workdir: the run's.
    model: the abstract model.
    shardings: where the arrays go, one for all or a tree like the weights.
    ema: the averaged weights instead of the raw ones.

  Raises:
    UserError: there is no undamaged checkpoint, or its shapes are not the model's.
  """
  step = _best_step(workdir)
  _, params, stats = split_model(model)
  check_shapes(workdir, step, {"params": params, "stats": stats})
  like = abstract({"params": params, "stats": stats}, shardings)
  with ocp.StandardCheckpointer() as reader:
    return step, reader.restore(_folder(workdir, step) / ("ema" if ema else "model"), like)


def latest_step(workdir: str) -> int:
  """Returns the step of a run's newest complete and undamaged checkpoint, 0 if there is none."""
  return inspect(workdir)[0]


def _best_step(workdir: str) -> int:
  """Returns a run's step with the best score that is undamaged, or the last one when none was evaluated."""
  rank = {}
  for step in _complete_steps(workdir):
    scores = _folder(workdir, step) / "metrics" / "metrics"
    try:
      rank[step] = _best_metric(json.loads(scores.read_text())) if scores.exists() else -1.0
    except (ValueError, TypeError, StopIteration):
      rank[step] = -1.0  # its digest will not fit
  for step in sorted(rank, key=lambda step: (rank[step], step), reverse=True):
    if why := digests.damage(_folder(workdir, step)):
      logging.warning("checkpoint %s is damaged: %s; the next best is taken", _folder(workdir, step), why)
    else:
      return step
  kind = "undamaged" if rank else "complete"
  raise UserError(f"workdir {workdir} holds no {kind} checkpoint; train there first")


def find_weights(folder: str) -> tuple[int, str, epath.Path] | None:
  """Returns the step of weights, "ema" where there are averaged ones, else "model", and where they lie.

  Args:
    folder: a workdir (its best checkpoint is taken, or its last when none was evaluated) or one of its checkpoints,
      workdir/checkpoints/STEP; local or in a bucket.

  Returns:
    None if it is no such folder.

  Raises:
    UserError: there is no complete checkpoint, or it is damaged.
  """
  if folder.startswith(("http://", "https://", "hf://")):
    return None
  path = epath.Path(folder).expanduser().absolute()
  if (path / "checkpoints").is_dir():
    path = _folder(os.fspath(path), _best_step(os.fspath(path)))
  elif (path / "model").is_dir() and (why := digests.damage(path)):
    raise UserError(f"checkpoint {path} is damaged: {why}; choose another one in {path.parent}")
  item = "ema" if (path / "ema").is_dir() else "model"
  return (int(path.name), item, path / item) if (path / item).is_dir() else None


def read_weights(folder: str) -> tuple[int, str, dict[tuple, np.ndarray]] | None:
  """Reads weights as they were saved, averaged ones where there are some, whatever model they belong to.

  Args:
    folder: see `find_weights`.

  Returns:
    The step, "ema" or "model", and the NumPy arrays by their path in the model; None if it is no such folder.

  Raises:
    UserError: there is no complete checkpoint, or it is damaged.
  """
  if (found := find_weights(folder)) is None:
    return None
  step, item, path = found
  try:
    with ocp.PyTreeCheckpointer() as reader:
      as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree
      )
      tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
  except Exception as error:  # orbax and its storage raise whatever they stumble over
    why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    checkpoint = path.parent
    raise UserError(f"checkpoint {checkpoint} is damaged ({why}); choose another one in {checkpoint.parent}") from None
  leaves = (leaf for part in tree.values() for leaf in jax.tree_util.tree_leaves_with_path(part))
  return step, item, {tuple(entry.key for entry in keys): array for keys, array in leaves}


def check_shapes(workdir: str, step: int, weights: dict[str, Any]) -> None:
  """Checks a checkpoint's weights against abstract ones without reading them.

  Raises:
    UserError: they differ; names the first that does.
  """
  path = _folder(workdir, step) / "model"
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
