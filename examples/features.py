"""Which images are alike? The nearest neighbours of each by a model's pooled features, drawn as a picture.

Run: python examples/features.py --weights=True
Without images of yours: 12 pieces of the two photographs that scikit-learn carries. Without --weights the model is an
untrained one, whose features tell little but colours. --weights takes whatever vx.load_pretrained does: True for what
was published, a file, a run's folder, hf://OWNER/NAME.
"""

import argparse

from flax import nnx
import jax
from matplotlib.figure import Figure
import numpy as np
import PIL.Image

import vit_jax_ext as vx

ROWS, COLUMNS = 2, 3  # of the pieces of a photograph


def sample_pieces() -> list[np.ndarray]:
  """Returns the pieces of both photographs, those of the first one first, uint8 (height, width, 3)."""
  from sklearn.datasets import load_sample_images

  return [
    piece
    for photograph in load_sample_images().images
    for strip in np.array_split(photograph, ROWS)
    for piece in np.array_split(strip, COLUMNS, axis=1)
  ]


def pooled_features(name: str, weights: str | bool | None, images: list, **options) -> np.ndarray:
  """Returns the features of images, float32 (N, channels), each of length 1."""
  model = vx.create_model(name, num_classes=0, rngs=nnx.Rngs(0), **options)
  if weights:
    print(vx.load_pretrained(model, weights))
  features, _ = jax.jit(lambda images: model(images, train=False))(vx.preprocess(images, model))
  return np.asarray(features / np.linalg.norm(features, axis=-1, keepdims=True), np.float32)


def nearest(features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns for each image the others that are most alike, int (N, count), and their cosine similarities."""
  similarity = features @ features.T
  np.fill_diagonal(similarity, -np.inf)  # nobody is his own neighbour
  neighbours = np.argsort(-similarity, axis=-1)[:, :count]
  return neighbours, np.take_along_axis(similarity, neighbours, axis=-1)


def draw(images: list, neighbours: np.ndarray, similarity: np.ndarray, path: str) -> None:
  """Draws each image at the left, and its neighbours beside it."""
  rows, columns = neighbours.shape
  figure = Figure((1.6 * (columns + 1), 1.3 * rows), layout="constrained")
  for row, axes in enumerate(figure.subplots(rows, columns + 1, squeeze=False)):
    for axis in axes:
      axis.set_axis_off()
    axes[0].imshow(images[row])
    for axis, neighbour, cosine in zip(axes[1:], neighbours[row], similarity[row], strict=True):
      axis.imshow(images[neighbour])
      axis.set_title(f"{cosine:.3f}", fontsize=8)
  figure.savefig(path, dpi=120)


def main() -> None:
  """Draws the neighbours of the command line's images."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="deit_tiny_patch16_224", help="one of vx.list_models() (default: %(default)s)")
  parser.add_argument("--weights", help="where trained ones are, see above")
  parser.add_argument("--output", default="neighbours.png", help="the picture (default: %(default)s)")
  parser.add_argument("images", nargs="*", metavar="IMAGE", help="files (default: pieces of photographs)")
  args = parser.parse_args()
  try:
    images = [np.asarray(PIL.Image.open(path).convert("RGB")) for path in args.images] or sample_pieces()
    features = pooled_features(args.model, args.weights == "True" or args.weights, images)
  except (vx.UserError, OSError) as error:
    raise SystemExit(f"error: {error}") from None
  draw(images, *nearest(features, min(4, len(images) - 1)), args.output)
  print(f"wrote {args.output}")


if __name__ == "__main__":
  main()
