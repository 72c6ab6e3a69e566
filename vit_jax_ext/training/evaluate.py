"""Exact evaluation over a split: every image counts once, padding not at all.

The step is compiled without TensorFlow, too, by `plan`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from absl import logging
from flax import nnx
import jax
import ml_collections
import numpy as np

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.training import distributed, multi_label, sharding
from vit_jax_ext.training.partition import Layout
from vit_jax_ext.training.train_step import Batch, Metrics, make_eval_step, make_multi_label_eval_step
from vit_jax_ext.training.weights import DEFAULT_THRESHOLD, load_weights, read_classes
from vit_jax_ext.workdir import description, lock
from vit_jax_ext.workdir.config import read_workdir_config

if TYPE_CHECKING:
  from vit_jax_ext.data.datasets import Dataset


def evaluate(
  eval_step: Callable[[Any, Any, Batch], Metrics], params: Any, stats: Any, batches: Iterable[Batch]
) -> dict[str, float]:
  """Returns loss (mean cross-entropy), top1 and top5 (shares) and ece over all images of `batches`, and their number.

  ece is the expected calibration error (Guo et al. 2017, equation 3): the mean over the images of the difference, in
  their bin of confidence, between mean confidence and share of hits.

  Args:
    eval_step: the jitted `make_eval_step`.
    params, stats: the weights.
    batches: global batches, see `make_eval_step`.
  """
  sums = [eval_step(params, stats, batch) for batch in batches]  # dispatched without waiting for results
  totals = jax.tree.map(lambda *values: np.sum(values, axis=0, dtype=np.float64), *jax.device_get(sums))
  count, overconfidence = totals.pop("count"), totals.pop("overconfidence")
  scores = {name: float(total / count) for name, total in totals.items()}
  return scores | {"ece": float(np.abs(overconfidence).sum() / count), "images": int(count)}


def jit_eval_step(
  variant: registry.Variant, model: nnx.Module, layout: Layout, several: bool = False
) -> Callable[[Any, Any, Batch], Metrics]:
  """Returns `make_eval_step` of an abstract model over the mesh of its layout, compiled when first called.

  With `several` labels of an image it is `make_multi_label_eval_step`.
  """
  make = make_multi_label_eval_step if several else make_eval_step
  eval_step = make(split_model(model)[0], mean=variant.mean, std=variant.std)
  return jax.jit(
    sharding.traced_on(layout.mesh, lambda params, stats, batch: eval_step(layout.gather(params), stats, batch)),
    in_shardings=(layout.weights["params"], layout.weights["stats"], sharding.batch_sharding(layout.mesh)),
    out_shardings=sharding.replicated(layout.mesh),
  )


class SplitEvaluator:
  """Evaluates weights on the evaluation split of a config; compiles once.

  Attributes:
    layout: where the weights lie.
    counted: images of the last evaluation; those that cannot be decoded, or have no valid label, are not.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    dataset: "Dataset",
    model: nnx.Module,
    mesh: jax.sharding.Mesh,
  ):
    variant = registry.get_variant(config.model.name)
    self.layout, self._by_batch = Layout(model, mesh), sharding.batch_sharding(mesh)
    self._step = jit_eval_step(variant, model, self.layout, dataset.multi_label)
    self._dataset, self._split = dataset, config.dataset.eval_split
    self._options = dict(
      batch_size=config.batch_size // jax.process_count(),
      image_size=model.image_size,
      crop=config.dataset.crop or variant.crop_at(model.image_size),
      max_unreadable=config.dataset.max_unreadable,
    )

  def __call__(self, params: Any, stats: Any, on_batch: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Returns loss, top1, top5 and ece over the whole split; of several labels loss and map.

    Calls `on_batch` before each batch.
    """
    if self._dataset.multi_label:
      return self.rank(params, stats, on_batch).scores()
    scores = evaluate(self._step, params, stats, self._batches(on_batch))
    self.counted = scores.pop("images")
    return scores

  def rank(self, params: Any, stats: Any, on_batch: Callable[[], None] = lambda: None) -> multi_label.Ranking:
    """Returns what the scores of several labels are made of."""
    ranking = multi_label.evaluate(self._step, params, stats, self._batches(on_batch))
    self.counted = len(ranking.labels)
    return ranking

  def _batches(self, on_batch: Callable[[], None]) -> Iterator[Batch]:
    from vit_jax_ext.data import input_pipeline

    def batches():
      for batch in input_pipeline.eval_batches(self._dataset, self._split, **self._options):
        on_batch()
        yield batch

    return input_pipeline.prefetch_to_devices(batches(), self._by_batch)


def evaluate_weights(config: ml_collections.ConfigDict, workdir: str | None) -> dict[str, Any]:
  """Evaluates a run's best checkpoint, raw and averaged, or pretrained weights.

  Args:
    config: the experiment's.
    workdir: the run's; None to evaluate `config.pretrained`.

  Returns:
    weights, what they are in words; their step, None if they are of no run; dataset, split and how many of its images
    counted;
    eval/SCORE and, where there are averages, eval_ema/SCORE for the scores of `evaluate`; of several labels also their
    classes, by "eval" and "eval_ema", see `multi_label.Ranking.describe_classes`.

  The thresholds of several labels are found on the run's own evaluation split, and kept in the run. Elsewhere they are
  those that the weights know.
  """
  from vit_jax_ext.data.datasets import open_dataset

  told = distributed.told_by_first if jax.process_count() > 1 else None
  dataset = open_dataset(config.dataset.name, config.dataset.data_dir, told)
  split = config.dataset.eval_split
  dataset.num_examples(split)  # refused now if there is no such split
  if workdir:
    what = f"dataset {config.dataset.name}"
    description.check_classes(description.read(workdir), dataset.class_names, dataset.multi_label, what)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch_size("batch_size", config.batch_size, mesh)
  model = registry.abstract_model(config.model, len(dataset.class_names))
  evaluator = SplitEvaluator(config, dataset, model, mesh)

  scores, rankings = {}, {}
  for prefix, ema in (("eval", False), ("eval_ema", True)):
    if not ema or (workdir and config.ema_decay):
      name, step, weights = load_weights(config, workdir, model, evaluator.layout.weights, ema=ema)
      if dataset.multi_label:
        rankings[prefix] = evaluator.rank(**weights)
        found = rankings[prefix].scores()
      else:
        found = evaluator(**weights)
      scores |= {f"{prefix}/{score}": value for score, value in found.items()}
  about = {"weights": name, "step": step, "dataset": config.dataset.name, "split": split, "images": evaluator.counted}
  if rankings:
    scores["classes"] = _describe_classes(config, workdir, step, dataset, rankings)
  return about | scores


def _describe_classes(
  config: ml_collections.ConfigDict,
  workdir: str | None,
  step: int | None,
  dataset: "Dataset",
  rankings: dict[str, multi_label.Ranking],
) -> dict[str, list[dict[str, Any]]]:
  """Returns `multi_label.Ranking.describe_classes` of each ranking; keeps their thresholds in a run where it may."""
  data = config.dataset
  own = read_workdir_config(workdir).dataset if workdir else None
  if own and (own.name, own.eval_split) == (data.name, data.eval_split):
    thresholds = {prefix: ranking.best_thresholds() for prefix, ranking in rankings.items()}
    if not jax.process_index():
      try:
        with lock.hold(workdir):
          description.keep_thresholds(workdir, {"step": step, "split": data.eval_split} | thresholds)
      except UserError as error:
        logging.warning("the thresholds are not kept in the run: %s", error)
  else:
    known = read_classes(config, workdir)
    thresholds = {
      prefix: description.thresholds(known, step, ema=prefix == "eval_ema")
      or [DEFAULT_THRESHOLD] * len(dataset.class_names)
      for prefix in rankings
    }
  return {
    prefix: ranking.describe_classes(dataset.class_names, thresholds[prefix]) for prefix, ranking in rankings.items()
  }
