"""The likeliest classes of image files, or their labels, by a trained model."""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import itertools
from typing import Any

from absl import logging
from flax import nnx
import jax
import ml_collections
import numpy as np

from vit_jax_ext.errors import UserError
from vit_jax_ext.images import read_image
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import normalize, split_model
from vit_jax_ext.training import sharding
from vit_jax_ext.training.partition import Layout
from vit_jax_ext.training.weights import DEFAULT_THRESHOLD, load_weights, read_classes
from vit_jax_ext.workdir import description

BATCH_SIZE = 32  # of images that are classified at once
TOP_K = 5  # classes of an image, if nobody says otherwise


def jit_probabilities(
  variant: registry.Variant, model: nnx.Module, layout: Layout, several: bool = False
) -> Callable[[Any, Any, jax.Array], jax.Array]:
  """Returns `(params, stats, images) -> probabilities (B, classes)` of an abstract model, compiled when first called.

  Images are uint8 (B, H, W, 3); every device computes all. With `several` labels of an image each class has a
  probability of its own.
  """
  graphdef, _, _ = split_model(model)

  def probabilities(params, stats, images):
    model = nnx.merge(graphdef, layout.gather(params), stats)
    logits, _ = model(normalize(images, variant.mean, variant.std), train=False)
    return (jax.nn.sigmoid if several else jax.nn.softmax)(logits.astype(np.float32))

  everywhere = sharding.replicated(layout.mesh)
  return jax.jit(
    sharding.traced_on(layout.mesh, probabilities),
    in_shardings=(layout.weights["params"], layout.weights["stats"], everywhere),
    out_shardings=everywhere,
  )


def predict(
  config: ml_collections.ConfigDict, workdir: str | None, paths: Sequence[str], top_k: int | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
  """Returns the likeliest classes of each image, and what is wrong with those that cannot be read.

  Args:
    config: the experiment's.
    workdir: the run's, whose best checkpoint is used; None for the weights of `config.pretrained`.
    paths: image files.
    top_k: how many classes; None for 5, or, where images have several labels, for those above their thresholds, which
      `evaluate` has found or else are `DEFAULT_THRESHOLD`.

  Returns:
    One {"image": path, "classes": {name: probability}} per readable image, likeliest class first; one line for each of
    the others.

  Raises:
    UserError: no image that can be read, or no checkpoint.
  """
  variant = registry.get_variant(config.model.name)
  about = read_classes(config, workdir)
  class_names, several = about["class_names"], about.get("multi_label", False)
  model = registry.abstract_model(config.model, len(class_names))
  crop = config.dataset.crop or variant.crop_at(model.image_size)
  layout = Layout(model, sharding.make_mesh(config.mesh))
  batch_size = min(BATCH_SIZE, len(paths))
  images = _read_images(paths, model.image_size, crop, batch_size)
  first = next(images)
  if not first[0] and len(paths) <= batch_size:  # before the weights are read
    raise UserError(first[2][0])
  _, step, weights = load_weights(config, workdir, model, layout.weights)
  probabilities = jit_probabilities(variant, model, layout, several)
  thresholds, top_k = None, top_k or (None if several else TOP_K)
  if top_k is None:
    thresholds = description.thresholds(about, step)
    if thresholds is None:
      logging.warning("no thresholds were found for these weights, %g is taken; evaluate finds them", DEFAULT_THRESHOLD)
      thresholds = [DEFAULT_THRESHOLD] * len(class_names)

  predictions, unreadable = [], []
  for names, pixels, complaints in itertools.chain([first], images):
    unreadable += complaints
    if names:
      rows = np.asarray(probabilities(weights["params"], weights["stats"], pixels))
      for name, row in zip(names, rows[: len(names)], strict=True):
        best = np.argsort(-row)[:top_k]
        if thresholds:
          best = best[row[best] >= np.array(thresholds)[best]]
        predictions.append({"image": name, "classes": {class_names[i]: float(row[i]) for i in best}})
  if not predictions:
    raise UserError(f"none of {len(paths)} images can be read; the first: {unreadable[0]}")
  return predictions, unreadable


def _read_images(
  paths: Sequence[str], image_size: tuple[int, int], crop: float, batch_size: int
) -> Iterator[tuple[list[str], np.ndarray, list[str]]]:
  """Yields batches: files, their pixels filled up with zeros to the size of a batch, and what is wrong with others."""

  def read(path: str) -> np.ndarray | UserError:
    try:
      return read_image(path, image_size, crop)
    except UserError as error:
      return error

  with concurrent.futures.ThreadPoolExecutor() as pool:
    for start in range(0, len(paths), batch_size):
      part = paths[start : start + batch_size]
      results = [*pool.map(read, part)]
      readable = [(path, result) for path, result in zip(part, results, strict=True) if isinstance(result, np.ndarray)]
      pixels = np.zeros((batch_size, *image_size, 3), np.uint8)
      for row, (_, image) in enumerate(readable):
        pixels[row] = image
      yield [path for path, _ in readable], pixels, [str(result) for result in results if isinstance(result, UserError)]
