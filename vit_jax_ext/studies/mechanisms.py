"""What trained models of a probe look at: attention of class tokens, clusters, how alike their blocks attend."""

from collections.abc import Mapping, Sequence
import itertools
import math
import re

from flax import nnx
import jax
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np

from vit_jax_ext.attention.clusters import tint
from vit_jax_ext.attention.similarity import attention_maps, block_similarity
from vit_jax_ext.data import probes
from vit_jax_ext.models.functional import normalize
from vit_jax_ext.training.weights import load_run

COMPARED = 256  # images of the hardest level, of which the similarity is a mean

Looks = Mapping[str, Sequence[np.ndarray]]  # what is looked at in the first image of each level, by a title


def draw(probe: str, workdirs: Mapping[str, str]) -> dict[str, Figure]:
  """Draws what the models have of it, on images that the probe tests with.

  Args:
    probe: its name.
    workdirs: label -> a run of the model.

  Returns:
    attention: CrossViT's class tokens, each over the other branch's patches, in the last fusion, mean of the heads.
    clusters: BOAT's, in the first two heads of its last block with feature-space attention that has the most tokens.
    similarity: the mean cosine of each block's attention maps with the next block's (DeepViT, equation 2).
    Those that no model has are left out.
  """
  levels = [*probes.PROBES[probe].levels]
  images = np.concatenate([probes.generate(probe, f"test_{level}", [0])[0] for level in levels])
  many = probes.generate(probe, f"test_{levels[-1]}", range(COMPARED))[0]
  attention: dict[str, Sequence[np.ndarray]] = {}
  clusters: dict[str, Sequence[np.ndarray]] = {}
  similarity: dict[str, np.ndarray] = {}
  for label, workdir in workdirs.items():
    model, about = load_run(workdir)
    names = _names(model, images)
    fusions = [name for name in names if re.fullmatch(r".*\.fusion\.\d\.attn", name)][-2:]
    clustered = [name for name in names if name.endswith(".clusters")]
    for b, maps in enumerate(_run(model, about, images, fusions)):
      attention[f"{label}, class token {b}"] = _square(maps[:, :, 0, 1:].mean(axis=1))
    if clustered:
      tokens = max(names[name][-1] for name in clustered)
      last = [name for name in clustered if names[name][-1] == tokens][-1]
      (found,) = _run(model, about, images, [last])
      clusters |= {f"{label}, head {head}": _square(found[:, head]) for head in range(min(2, found.shape[1]))}
    blocks = [name for name in names if re.fullmatch(r"blocks\.\d+\.attn", name)]
    if len(blocks) > 1:
      maps = attention_maps(dict(zip(blocks, _run(model, about, many, blocks), strict=True)))
      similarity[label] = np.array([block_similarity(*pair).mean() for pair in itertools.pairwise(maps)])
  figures = {}
  if attention:
    title = "Where CrossViT's class tokens look, from black to white"
    figures["attention"] = _over_images(probe, images, attention, title)
  if clusters:
    tinted = {
      title: [tint(_rgb(image), of_image) for image, of_image in zip(images, labels, strict=True)]
      for title, labels in clusters.items()
    }
    title = "BOAT's clusters: patches of one colour attend to each other"
    figures["clusters"] = _over_images(probe, images, tinted, title)
  if similarity:
    figures["similarity"] = _against_depth(similarity)
  return figures


def _names(model: nnx.Module, images: np.ndarray) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of all that a model computes on the way."""
  abstract = jax.ShapeDtypeStruct(_rgb(images).shape, np.float32)
  return {name: value.shape for name, value in jax.eval_shape(lambda model, x: model(x)[1], model, abstract).items()}


def _run(model: nnx.Module, about: Mapping, images: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
  """Returns what the model computes on the way, by name."""
  if not names:
    return []

  @jax.jit
  def compute(model, images):
    _, out = model(normalize(images, about["mean"], about["std"]))
    return [out[name] for name in names]

  return [np.asarray(value, np.float32) for value in compute(model, _rgb(images))]


def _rgb(images: np.ndarray) -> np.ndarray:
  return np.broadcast_to(images, (*images.shape[:-1], 3))


def _square(tokens: np.ndarray) -> np.ndarray:
  """(images, tokens) to (images, rows, columns)."""
  side = math.isqrt(tokens.shape[-1])
  return tokens.reshape(-1, side, side)


def _over_images(probe: str, images: np.ndarray, columns: Looks, title: str) -> Figure:
  """Draws a row for each level: its image, and what is looked at in it."""
  levels = [*probes.PROBES[probe].levels]
  figure = Figure(figsize=(1.9 * (1 + len(columns)) + 0.6, 2 * len(levels) + 0.8), layout="constrained")
  grid = figure.subplots(len(levels), 1 + len(columns), squeeze=False)
  for i, (row, level) in enumerate(zip(grid, levels, strict=True)):
    for axes, values in zip(row, (_rgb(images[i]), *(column[i] for column in columns.values())), strict=True):
      axes.imshow(values, cmap="gray", interpolation="nearest")
      axes.set(xticks=[], yticks=[])
    row[0].set_ylabel(level, fontsize=11)
  for axes, heading in zip(grid[0], ("image", *columns), strict=True):
    axes.set_title(heading.replace(", ", "\n"), fontsize=9)
  figure.suptitle(title, fontsize=12)
  figure.supylabel(probes.PROBES[probe].turned_by, fontsize=10)
  return figure


def _against_depth(similarity: Mapping[str, np.ndarray]) -> Figure:
  figure = Figure(figsize=(8, 4), layout="constrained")
  axes = figure.subplots()
  for label, values in similarity.items():
    axes.plot(range(1, len(values) + 1), values, marker="o", markersize=4, label=label)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  lowest = min(0.0, *(values.min() for values in similarity.values()))  # maps mixed by re-attention may be opposed
  axes.set(xlabel="block p", ylabel="cosine similarity of its maps with block p + 1's", ylim=(lowest - 0.02, 1.02),
           title="How alike neighbouring blocks attend, at the hardest level")  # fmt: skip
  figure.legend(loc="outside right upper", fontsize=9)
  return figure
