"""How far gradients in bfloat16 are from those in float32: for thin models of four families, tensor by tensor.

Run: python tests/benchmarks/precision.py [--images=N] [--all]
Prints for each model the tensors whose gradients differ most, relative to their own length; --all prints every tensor.
"""

import argparse

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import sklearn.datasets

import vit_jax_ext as vx
from vit_jax_ext.models.functional import normalize, split_model
from vit_jax_ext.training.losses import smoothed_cross_entropy

# The published widths and heads, fewer blocks.
THIN = {
  "deit_small_patch16_224": dict(depth=4, image_size=112),
  "crossvit_9_dagger_224": dict(depth=((1, 2),), image_size=120),
  "deepvit_16b": dict(depth=4, image_size=112),
  "boat_swin_tiny": dict(depths=(2, 2, 2), num_heads=(3, 6, 12), image_size=112),
}


def gradients(name: str, overrides: dict, dtype: str, images: np.ndarray, labels: np.ndarray) -> tuple[float, dict]:
  """Returns the loss of a training step, and the gradient of every parameter by name."""
  create = jax.jit(lambda: split_model(vx.create_model(name, rngs=nnx.Rngs(0), num_classes=10, **overrides))[1:])
  params, stats = create()
  model = nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0), num_classes=10, dtype=dtype, **overrides))
  graphdef, _, _ = split_model(model)

  @jax.jit
  def loss_and_gradients(params):
    def loss(params):
      logits, _ = nnx.merge(graphdef, params, stats)(images, train=True)
      return smoothed_cross_entropy(logits, labels, 0.1).mean()

    return jax.value_and_grad(loss)(params)

  value, grads = loss_and_gradients(params)
  names = jax.tree_util.tree_leaves_with_path(grads)
  return float(value), {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(g) for path, g in names}


def crops(number: int, side: int) -> np.ndarray:
  """Returns parts of two photographs, uint8 (number, side, side, 3)."""
  photographs = sklearn.datasets.load_sample_images().images
  corners = np.random.default_rng(0).integers(0, np.array(photographs[0].shape[:2]) - side, (number, 2))
  return np.stack([photographs[i % 2][y : y + side, x : x + side] for i, (y, x) in enumerate(corners)])


def errors(name: str, overrides: dict, number: int) -> tuple[float, dict[str, float]]:
  """Returns the difference of the losses, and of each tensor's gradient relative to its length in float32.

  Gradients that are zero but for rounding are left out: biases of keys under softmax, biases in front of BatchNorm.
  """
  images = normalize(jnp.asarray(crops(number, overrides["image_size"])), (0.5,) * 3, (0.25,) * 3)
  labels = jnp.asarray(np.random.default_rng(1).integers(0, 10, number))
  exact_loss, exact = gradients(name, overrides, "float32", images, labels)
  loss, ours = gradients(name, overrides, "bfloat16", images, labels)
  lengths = {key: float(np.linalg.norm(gradient)) for key, gradient in exact.items()}
  real = [key for key in exact if not key.endswith(("wk.bias", "reatten_matrix.bias"))]
  return loss - exact_loss, {key: float(np.linalg.norm(ours[key] - exact[key])) / lengths[key] for key in real}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--images", type=int, default=32)
  parser.add_argument("--all", action="store_true")
  args = parser.parse_args()
  table = rich.table.Table("model", "loss off by", "tensors", "above 2%", "largest", "of")
  for name, overrides in THIN.items():
    loss, found = errors(name, overrides, args.images)
    worst = sorted(found, key=found.get, reverse=True)
    above = sum(error > 0.02 for error in found.values())
    for i, key in enumerate(worst if args.all else worst[:5]):
      first = (name, f"{loss:+.1e}", str(len(found)), str(above)) if not i else ("",) * 4
      table.add_row(*first, f"{found[key]:.2%}", key)
  rich.console.Console(width=140).print(table)


if __name__ == "__main__":
  main()
