"""A picture of BOAT's two kinds of locality: the windows of the image beside the clusters of the feature space."""

from collections.abc import Mapping, Sequence
import os

from flax import nnx
import jax
from matplotlib import colormaps
from matplotlib.figure import Figure
import ml_collections
import numpy as np

from vit_jax_ext.attention import figures
from vit_jax_ext.errors import UserError
from vit_jax_ext.images import read_image
from vit_jax_ext.models import registry
from vit_jax_ext.models.boat import Boat, FeatureAttention
from vit_jax_ext.models.cswin import StripeAttention
from vit_jax_ext.models.functional import normalize, split_model
from vit_jax_ext.models.swin import WindowAttention
from vit_jax_ext.training.weights import load_weights, read_classes


def draw_clusters(
  config: ml_collections.ConfigDict,
  workdir: str | None,
  image: str,
  *,
  block: str | None,
  heads: Sequence[int] | None,
  output: str,
) -> str:
  """Draws an image's clusters in heads of one block of a BOAT model, beside the windows of its image-space attention.

  Args:
    config: the experiment's: which model, how to crop the image.
    workdir: the run's, whose best checkpoint is used; None for the weights of `config.pretrained`, or random ones.
    image: an image file.
    block: a block with feature-space attention, named as in `out`, e.g. "layers.0.blocks.1"; None for the first.
    heads: which of the block's; None for the first three.
    output: folder for clusters.png.

  Returns:
    The path of the picture.

  Raises:
    UserError: no BOAT model, an unknown block or head, an unreadable image, no checkpoint, an unwritable folder.
  """
  variant = registry.get_variant(config.model.name)
  if not issubclass(variant.model, Boat):
    boats = (name for name in registry.list_models() if issubclass(registry.VARIANTS[name].model, Boat))
    raise UserError(f"model {config.model.name} has no clusters in feature space; choose one of {', '.join(boats)}")
  spec, num_classes = config.model, 0
  if workdir:
    num_classes = len(read_classes(config, workdir)["class_names"])
  model = registry.abstract_model(spec, num_classes)
  block, attention = _find(model, block)
  heads = range(min(3, attention.num_heads)) if heads is None else heads
  for head in heads:
    if not 0 <= head < attention.num_heads:
      raise UserError(f"head {head} does not exist; block {block} has heads 0 to {attention.num_heads - 1}")
  crop = config.dataset.crop or variant.crop_at(model.image_size)
  pixels = read_image(image, model.image_size, crop)

  trained = workdir or config.pretrained
  if trained:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    origin, _, weights = load_weights(config, workdir, model, here)
    origin = os.path.basename(origin)
    graphdef, _, _ = split_model(model)
  else:
    weights, origin = config.seed, "random weights"

  @jax.jit
  def assign(weights, images):
    if trained:
      model = nnx.merge(graphdef, weights["params"], weights["stats"])
    else:  # made in here, where XLA leaves out what lies behind the block
      rngs = nnx.Rngs(jax.random.key(weights))
      model = registry.create_model(spec.name, num_classes=0, rngs=rngs, **spec.overrides)
    _, out = model(normalize(images, variant.mean, variant.std))
    return _assignments(out)[block][0]

  clusters = np.asarray(assign(weights, pixels[None]))[list(heads)].reshape(-1, *attention.grid)
  figure = picture(
    pixels,
    image_windows(model, block)
    | {f"head {head}, {labels.max() + 1} clusters": labels for head, labels in zip(heads, clusters, strict=True)},
  )
  figure.suptitle(f"{spec.name} ({origin}), block {block}: patches of one colour attend to each other")
  return figures.save(output, "clusters.png", figure)


def _assignments(out: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the clusters (B, heads, tokens) by block."""
  return {key.rsplit(".", 2)[0]: value for key, value in out.items() if key.endswith(".clusters")}


def _find(model: Boat, block: str | None) -> tuple[str, FeatureAttention]:
  """Returns the name of a block, and its feature-space attention.

  Raises:
    UserError: the model has none, or not in that block.
  """
  images = jax.ShapeDtypeStruct((1, *model.image_size, 3), np.float32)
  blocks = list(_assignments(jax.eval_shape(lambda model, x: model(x)[1], model, images)))
  if not blocks:
    raise UserError("the model has no feature-space attention; set config.model.overrides.local_attention to both")
  block = block or blocks[0]
  if block not in blocks:
    raise UserError(f"block {block} has no feature-space attention; choose one of {', '.join(blocks)}")
  return block, next(_modules(model, block, FeatureAttention))


def _modules(model: nnx.Module, block: str, kind: type[nnx.Module]):
  """Yields the modules of a kind in a block."""
  for path, module in nnx.iter_modules(model):
    if isinstance(module, kind) and ".".join(map(str, path)).startswith(f"{block}."):
      yield module


def image_windows(model: Boat, block: str) -> dict[str, np.ndarray]:
  """Returns what a block's image-space attention groups, (rows, columns) int by a name; nothing if it has none."""
  windows = {}
  for attention in _modules(model, block, WindowAttention):
    labels = window_labels(attention.grid, attention.window, attention.shift)
    kind = "shifted windows" if any(attention.shift) else "windows"
    windows[f"{labels.max() + 1} {kind}" if labels.any() else "one window"] = labels
  for attention in _modules(model, block, StripeAttention):
    labels = window_labels(attention.grid, attention.stripe, (0, 0))
    kind = "columns" if attention.stripe[0] == attention.grid[0] else "rows"
    windows[f"{labels.max() + 1} {kind}, half of the heads" if labels.any() else "one window"] = labels
  return windows


def window_labels(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
  """Returns the window of each token, (rows, columns) int; shifted ones are cut at the border of the image."""
  row, column = ((np.arange(side) - by) // size for side, size, by in zip(grid, window, shift, strict=True))
  row, column = row - row.min(), column - column.min()
  return row[:, None] * (column.max() + 1) + column


def picture(image: np.ndarray, labels: Mapping[str, np.ndarray]) -> Figure:
  """Draws an image, and beside it once for each labelling its patches in the colours of their labels.

  Args:
    image: uint8 (height, width, 3).
    labels: title -> (rows, columns) int.
  """
  height, width = image.shape[:2]
  columns = 1 + len(labels)
  figure = Figure(figsize=(3.2 * columns, 3.2 * height / width + 0.7), layout="constrained")
  axes = figure.subplots(1, columns)
  for ax, title, content in zip(
    axes, ["image", *labels], [image, *(tint(image, label) for label in labels.values())], strict=True
  ):
    ax.imshow(content)
    ax.set_title(title)
    ax.axis("off")
  return figure


def tint(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns the image in grey, (height, width, 3) in [0, 1], with its patches in the colours of their labels.

  Neighbouring numbers, such as those of sibling clusters, have similar colours. Groups are outlined where that does
  not hide them.
  """
  (height, width), (rows, columns) = image.shape[:2], labels.shape
  colours = colormaps["turbo"]((labels + 0.5) / (labels.max() + 1))[..., :3]
  labels, colours = (x.repeat(height // rows, axis=0).repeat(width // columns, axis=1) for x in (labels, colours))
  tinted = colours * (0.3 + 0.7 * image.mean(axis=-1, keepdims=True) / 255)
  border = np.zeros((height, width), bool)
  border[1:] |= labels[1:] != labels[:-1]
  border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
  if border.mean() < 0.12:
    tinted[border] = 0
  return tinted
