"""The likeliest classes of image files, by a trained model."""

from collections.abc import Sequence

from flax import nnx
import jax
import ml_collections
import numpy as np

from vit_jax_ext.data import input_pipeline
from vit_jax_ext.models import registry
from vit_jax_ext.training import checkpoint, sharding
from vit_jax_ext.training.evaluate import write_json
from vit_jax_ext.training.train_step import normalize, split_model


def predict(config: ml_collections.ConfigDict, workdir: str, paths: Sequence[str], output: str | None) -> list[dict]:
  """Prints and returns the five likeliest classes of each image.

  Args:
    config: the run's.
    workdir: the run's; its best checkpoint is used.
    paths: image files.
    output: folder for predictions.json, if any.

  Returns:
    One {"image": path, "classes": {name: probability}} per path, likeliest class first.

  Raises:
    UserError: an unreadable image, or no checkpoint.
  """
  variant = registry.get_variant(config.model.name)
  label = input_pipeline.load_builder(config.dataset.name, config.dataset.data_dir).info.features["label"]
  model = registry.abstract_model(config.model, label.num_classes)
  crop = config.dataset.crop or variant.crop
  images = np.stack([input_pipeline.read_image(path, model.image_size, crop) for path in paths])

  everywhere = sharding.replicated(sharding.make_mesh(config.mesh))
  _, weights = checkpoint.restore_weights(workdir, model, everywhere, ema=False)
  graphdef, _, _ = split_model(model)

  @jax.jit
  def probabilities(params, stats, images):
    logits, _ = nnx.merge(graphdef, params, stats)(normalize(images, variant.mean, variant.std), train=False)
    return jax.nn.softmax(logits.astype(np.float32))

  predictions = []
  for path, row in zip(paths, np.asarray(probabilities(weights["params"], weights["stats"], images)), strict=True):
    best = np.argsort(-row)[:5]
    predictions.append({"image": path, "classes": {label.int2str(int(i)): float(row[i]) for i in best}})
    print(path)
    for name, probability in predictions[-1]["classes"].items():
      print(f"  {probability:7.2%}  {name}")
  if output:
    write_json(output, "predictions.json", predictions)
  return predictions
