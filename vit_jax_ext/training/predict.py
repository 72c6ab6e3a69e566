"""The likeliest classes of image files, by a trained model."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
import jax
import ml_collections
import numpy as np

from vit_jax_ext.data import input_pipeline
from vit_jax_ext.data.datasets import open_dataset
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import normalize, split_model
from vit_jax_ext.training import sharding
from vit_jax_ext.training.evaluate import load_weights
from vit_jax_ext.training.partition import Layout


def jit_probabilities(
  variant: registry.Variant, model: nnx.Module, layout: Layout
) -> Callable[[Any, Any, jax.Array], jax.Array]:
  """Returns `(params, stats, images) -> probabilities (B, classes)` of an abstract model, compiled when first called.

  Images are uint8 (B, H, W, 3); every device computes all.
  """
  graphdef, _, _ = split_model(model)

  def probabilities(params, stats, images):
    model = nnx.merge(graphdef, layout.gather(params), stats)
    logits, _ = model(normalize(images, variant.mean, variant.std), train=False)
    return jax.nn.softmax(logits.astype(np.float32))

  everywhere = sharding.replicated(layout.mesh)
  return jax.jit(
    sharding.traced_on(layout.mesh, probabilities),
    in_shardings=(layout.weights["params"], layout.weights["stats"], everywhere),
    out_shardings=everywhere,
  )


def predict(config: ml_collections.ConfigDict, workdir: str | None, paths: Sequence[str]) -> list[dict]:
  """Returns the five likeliest classes of each image.

  Args:
    config: the experiment's.
    workdir: the run's, whose best checkpoint is used; None for the weights of `config.pretrained`.
    paths: image files.

  Returns:
    One {"image": path, "classes": {name: probability}} per path, likeliest class first.

  Raises:
    UserError: an unreadable image, or no checkpoint.
  """
  variant = registry.get_variant(config.model.name)
  class_names = open_dataset(config.dataset.name, config.dataset.data_dir).class_names
  model = registry.abstract_model(config.model, len(class_names))
  crop = config.dataset.crop or variant.crop_at(model.image_size)
  images = np.stack([input_pipeline.read_image(path, model.image_size, crop) for path in paths])

  layout = Layout(model, sharding.make_mesh(config.mesh))
  _, _, weights = load_weights(config, workdir, model, layout.weights)
  probabilities = jit_probabilities(variant, model, layout)

  predictions = []
  for path, row in zip(paths, np.asarray(probabilities(weights["params"], weights["stats"], images)), strict=True):
    best = np.argsort(-row)[:5]
    predictions.append({"image": path, "classes": {class_names[i]: float(row[i]) for i in best}})
  return predictions
