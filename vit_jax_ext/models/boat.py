"""BOAT: attention inside windows of the image and inside clusters of the feature space, on Swin and on CSWin.

Yu, Zhao, Li, Yu: BOAT: Bilateral Local Attention Vision Transformer, BMVC 2022, arXiv 2201.13027. The code that
released the weights is mahaoyuHKU/pytorch-boat (MIT); attribute names follow its state dict. Written anew.

A bilateral block adds feature-space local attention (FSLA) between the image-space attention (ISLA) of Swin or CSWin
and the MLP. FSLA groups the tokens of an image, for each head, into clusters of equal size by their queries, and each
token attends within its cluster.

Two differences from the released code, which works at 224 pixels only: any image size that divides; and a single
cluster has no sibling, so no overlap, where the released CSWin variant borrows keys from the neighbouring image of the
batch in its last stage. An image's output never depends on the rest of its batch here.
"""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import fused_clustering, fused_clusters, layers
from vit_jax_ext.models.attention import softmax_attention, split_heads, weigh, widest
from vit_jax_ext.models.cswin import CSWin, CSWinBlock
from vit_jax_ext.models.dropout import drop, keep_factors
from vit_jax_ext.models.fused_windows import Windows
from vit_jax_ext.models.layers import Linear
from vit_jax_ext.models.pyramid import Grid, LayerNorm
from vit_jax_ext.models.swin import Swin, SwinBlock

SHARPNESS = 100  # of the soft assignment: softmax(100 * cosine)


def cluster_levels(tokens: int, cluster_size: int = 49) -> int:
  """Returns how often `tokens` are halved: the most that leaves `cluster_size` or more, in clusters exactly equal.

  That is floor(log2(tokens // cluster_size)), as in the released code, unless an odd number stops the halving before:
  49 tokens a cluster at 224 pixels, 64 at 256, 72 at 384, 70 at 320x448.
  """
  even = (tokens & -tokens).bit_length() - 1  # the power of two in `tokens`
  return min(even, max(tokens // cluster_size, 1).bit_length() - 1)


def _normalise(x: jax.Array) -> jax.Array:
  """Scales the last axis to length 1; zeros stay zeros."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# The order hangs on the cosines, and is sensitive: no bfloat16 or TensorFloat-32 products.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def permute(arrays: list[jax.Array], order: jax.Array, place: jax.Array) -> list[jax.Array]:
  """Brings the tokens of arrays into order, for each head those of its own.

  Args:
    arrays: (B, tokens, C), the heads side by side.
    order: the token at each place, (B, heads, tokens).
    place: the place of each token, its inverse; given in turns they bring tokens back.
  """
  order = order.swapaxes(1, 2)[..., None]
  return [
    jnp.take_along_axis(split_heads(x, order.shape[2]), order, axis=1, mode="promise_in_bounds").reshape(x.shape)
    for x in arrays
  ]


# The gradient of a permutation is the inverse one; JAX would add up rows that do not meet.
permute.defvjp(
  lambda arrays, order, place: (permute(arrays, order, place), (order, place)),
  lambda indices, g: (permute(g, *reversed(indices)), None, None),
)


def balanced_clusters(features: jax.Array, levels: int, iterations: int = 2) -> tuple[jax.Array, jax.Array]:
  """Balanced hierarchical clustering (section 3.2): halves every group of tokens, `levels` times.

  For each group of n tokens x, in its current order:
    1. centroids c_0, c_1 = the means of the first and of the second n / 2 tokens, scaled to length 1;
    2. `iterations` times: cosines s_k = <x, c_k> / |x|, weights w = softmax(100 s) over the two centroids, then
       c_k = sum w_k x over the tokens, scaled to length 1;
    3. with the cosines to the last centroids, order the tokens by r = (s_0 + 1) / (s_1 + 1), ascending, and cut in the
       middle: n / 2 tokens on each side, whatever the features. The order within a half starts the next level.

  Args:
    features: (..., tokens, features); leading axes are independent of each other. No gradient flows through.
    levels: number of halvings; 2**levels divides the number of tokens.
    iterations: rounds of step 2.

  Returns:
    order: (..., tokens) int, a permutation: cluster after cluster; clusters 2i and 2i + 1 are siblings.
    clusters: (..., tokens) int, the cluster of each token, all of the same size.
  """
  x = jax.lax.stop_gradient(features).astype(widest(features.dtype))
  *batch, tokens, dim = x.shape
  order, norm = jnp.broadcast_to(jnp.arange(tokens), (*batch, tokens)), jnp.linalg.norm(x, axis=-1)
  norm = jnp.maximum(norm, 1e-12)
  for level in range(levels):
    # Only the order goes from level to level; the features stay where they are.
    groups = jnp.take_along_axis(x, order[..., None], axis=-2).reshape(*batch, 2**level, -1, dim)
    half = groups.shape[-2] // 2
    order, norm = (a.reshape(groups.shape[:-1]) for a in (order, norm))

    def cosines(centroids, groups=groups, norm=norm):
      return _einsum("...kd,...nd->...kn", _normalise(centroids), groups) / norm[..., None, :]

    first = jnp.arange(2 * half) < half
    weights = jnp.broadcast_to(jnp.stack([first, ~first]).astype(x.dtype), (*groups.shape[:-2], 2, 2 * half))
    cosine = cosines(_einsum("...kn,...nd->...kd", weights, groups) / half)
    for _ in range(iterations):
      weights = jax.nn.sigmoid(SHARPNESS * (cosine - cosine[..., ::-1, :]))  # softmax over two
      cosine = cosines(_einsum("...kn,...nd->...kd", weights, groups))
    ratio = (cosine[..., 0, :] + 1) / (cosine[..., 1, :] + 1)
    _, order, norm = (a.reshape(*batch, tokens) for a in jax.lax.sort((ratio, order, norm), num_keys=1))
  return order, jnp.argsort(order, axis=-1) // (tokens >> levels)


def kmeans_clusters(features: jax.Array, num_clusters: int, iterations: int = 2) -> jax.Array:
  """K-means on the sphere, the unbalanced alternative of the paper's ablation: returns the cluster of each token.

  Starts from the means of `num_clusters` equal runs of tokens; each of the `iterations` assigns every token to the
  centroid of largest cosine and takes the clusters' means, scaled to length 1. Shapes as in `balanced_clusters`.
  """
  *batch, _, dim = features.shape
  x = jax.lax.stop_gradient(features).astype(widest(features.dtype))
  centroids = _normalise(x.reshape(*batch, num_clusters, -1, dim).mean(axis=-2))
  for _ in range(iterations):
    nearest = _einsum("...nd,...kd->...nk", x, centroids).argmax(axis=-1)
    centroids = _normalise(_einsum("...nk,...nd->...kd", jax.nn.one_hot(nearest, num_clusters, dtype=x.dtype), x))
  return _einsum("...nd,...kd->...nk", x, centroids).argmax(axis=-1)


def add_overlap(groups: jax.Array, overlap: int) -> jax.Array:
  """Lends each cluster its sibling's nearest tokens: (..., clusters, n, C) to (..., clusters, n + overlap, C).

  In the order of `balanced_clusters` siblings meet at the cut: the first cluster of a pair gets the first tokens of the
  second, the second the last of the first.
  """
  *batch, clusters, size, dim = groups.shape
  pairs = groups.reshape(*batch, clusters // 2, 2 * size, dim)
  pairs = jnp.stack([pairs[..., : size + overlap, :], pairs[..., size - overlap :, :]], axis=-3)
  return pairs.reshape(*batch, clusters, size + overlap, dim)


def overlap_mask(size: int, overlap: int) -> np.ndarray:
  """Returns what `add_overlap` says of a pair of clusters as a mask, 0 or -inf, (2 * size, 2 * size)."""
  query, key = np.indices((2 * size, 2 * size))
  seen = np.where(query < size, key < size + overlap, key >= size - overlap)
  return np.where(seen, 0, -np.inf).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class BilateralOptions:
  """The options of BOAT, see the arguments of `Boat`."""

  local_attention: str
  clustering: str
  overlap: int
  iterations: int
  cluster_size: int

  def __post_init__(self):
    for name, choices in (("local_attention", ("both", "image", "feature")), ("clustering", ("balanced", "kmeans"))):
      if getattr(self, name) not in choices:
        raise UserError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
    for name, least in (("overlap", 0), ("iterations", 0), ("cluster_size", 1)):
      if getattr(self, name) < least:
        raise UserError(f"{name} {getattr(self, name)} is too small; give {least} or more")


class FeatureAttention(layers.MultiHeadAttention):
  """Feature-space local attention, FSLA (section 3.2): each head attends inside its own clusters of queries.

  The position term `get_v` is a depthwise convolution of the values over the whole image.

  Args:
    grid: (rows, columns) of tokens.
    scale: of the attention logits.
    options: how to cluster.
  """

  def __init__(
    self,
    dim: int,
    num_heads: int,
    grid: Grid,
    scale: float,
    options: BilateralOptions,
    attn_drop_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    **kw,
  ):
    super().__init__(dim, num_heads, attn_drop_rate, proj_drop_rate)
    self.grid, self.scale, self.options = grid, scale, options
    self.levels = cluster_levels(math.prod(grid), options.cluster_size)
    self.qkv = layers.PackedQKV(dim, **kw)
    self.proj = Linear(dim, dim, **kw)
    self.get_v = layers.DepthwiseConv(dim, **kw)

  def attend_balanced(self, q, k, v, rngs: nnx.Rngs | None) -> tuple[jax.Array, jax.Array]:
    """Attention inside equal clusters, of tokens laid side by side; linear in their number."""
    batch, tokens, dim = q.shape
    if not self.levels:
      return self.attend(q, k, v, rngs)[0] + self.positions(v), jnp.zeros((batch, self.num_heads, tokens), int)
    size = tokens >> self.levels
    overlap = min(self.options.overlap, size)
    # Pairs of clusters as they lie in memory, though a quarter of a map or more is masked.
    windows, width = Windows((tokens // (2 * size), 2 * size), (1, 2 * size)), dim // self.num_heads
    pairs = jax.ShapeDtypeStruct((batch, windows.number, 2 * size, dim), q.dtype)
    if self.is_fused(pairs, pairs, rngs) and fused_clusters.fits(q, windows, width, self.grid):
      order, place = fused_clustering.cluster_order(
        jax.lax.stop_gradient(q), self.num_heads, self.levels, self.options.iterations, SHARPNESS
      )
      mask, taps = overlap_mask(size, overlap), self.get_v.taps()
      shape = (windows, width, self.scale, self.grid)
      y = fused_clusters.attend_clusters(q, k, v, order, place, mask, taps, *shape)
      return y, place // size
    heads = split_heads(q, self.num_heads).swapaxes(1, 2)
    order, _ = balanced_clusters(heads, self.levels, self.options.iterations)
    place = jnp.argsort(order, axis=-1)
    q, *others = (x.reshape(batch, -1, size, dim) for x in permute([q, k, v], order, place))
    y, _ = self.attend(q, *(add_overlap(x, overlap) for x in others), rngs)
    (y,) = permute([y.reshape(batch, tokens, dim)], place, order)
    return y + self.positions(v), place // size

  def attend_kmeans(self, q, k, v, rngs: nnx.Rngs | None) -> tuple[jax.Array, jax.Array]:
    """Attention inside unequal clusters. Any may hold all tokens, so each is padded to all, and masked: quadratic."""
    clusters = kmeans_clusters(split_heads(q, self.num_heads).swapaxes(1, 2), 2**self.levels, self.options.iterations)
    mask = jnp.where(clusters[..., :, None] == clusters[..., None, :], 0, -jnp.inf)
    attn = softmax_attention(q, k, num_heads=self.num_heads, scale=self.scale, bias=mask)
    return weigh(drop(self.attn_drop, attn, rngs), v) + self.positions(v), clusters

  def attend_clusters(self, q, k, v, rngs: nnx.Rngs | None) -> tuple[jax.Array, jax.Array]:
    """Attention inside clusters with the position term, (B, N, C), and the cluster of each token for each head,
    (B, heads, N) int.
    """
    return (self.attend_balanced if self.options.clustering == "balanced" else self.attend_kmeans)(q, k, v, rngs)

  def positions(self, v: jax.Array) -> jax.Array:
    """Returns the position term, (B, N, C)."""
    return self.get_v(v.reshape(v.shape[0], *self.grid, -1)).reshape(v.shape)

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the new tokens (B, N, C) and the clusters."""
    q, k, v = self.qkv(x)
    y, clusters = self.attend_clusters(q, k, v, rngs)
    return drop(self.proj_drop, self.proj(y), rngs), clusters

  def add_to(self, x, norm: LayerNorm, rngs: nnx.Rngs | None, drop_path: nnx.Dropout | None = None):
    """Returns x + self(norm(x)), with stochastic depth if there is any, and the clusters."""
    fused = layers.projections_are_fused(x, self.qkv, rngs, self.proj_drop)
    if self.implementation == "reference" or not fused:
      y, clusters = self(norm(x), rngs)
      return x + (y if drop_path is None else drop(drop_path, y, rngs)), clusters
    x, (qkv,) = self.qkv.after_norm(x, norm)
    y, clusters = self.attend_clusters(*qkv, rngs)
    return self.proj.add_to(x, [[y]], keep_factors(drop_path, x, rngs)), clusters


class BoatSwinBlock(SwinBlock):
  """Swin's block with feature-space attention `attnC`, which has no stochastic depth in the released code."""

  def __init__(self, options: BilateralOptions, dim: int, num_heads: int, grid: Grid, *args, **kw):
    super().__init__(dim, num_heads, grid, *args, **kw)
    self.options = options
    drop_rates = (self.attn.attn_drop.rate, self.attn.proj_drop.rate)
    if options.local_attention == "feature":
      del self.norm1, self.attn
    self.norm4 = LayerNorm(dim, **kw)
    self.attnC = FeatureAttention(dim, num_heads, grid, (dim // num_heads) ** -0.5, options, *drop_rates, **kw)

  def attend(self, x, rngs):
    if self.options.local_attention == "both":
      x, _ = super().attend(x, rngs)
    x, clusters = self.attnC.add_to(x, self.norm4, rngs)
    return x, {"attnC.clusters": clusters}


class BoatCSWinBlock(CSWinBlock):
  """CSWin's block with feature-space attention `content_attn`, with stochastic depth and logits not scaled.

  The released weights were trained with scale 1, by a slip of an argument, and need it.
  """

  def __init__(self, options: BilateralOptions, dim: int, num_heads: int, grid: Grid, *args, **kw):
    super().__init__(dim, num_heads, grid, *args, **kw)
    self.options = options
    drop_rates = (self.attns[0].attn_drop.rate, self.mlp.drop.rate)
    if options.local_attention == "feature":
      del self.norm1, self.qkv, self.attns, self.proj
    self.norm3 = LayerNorm(dim, **kw)
    self.content_attn = FeatureAttention(dim, num_heads, grid, 1.0, options, *drop_rates, **kw)

  def attend(self, x, rngs):
    if self.options.local_attention == "both":
      x, _ = super().attend(x, rngs)
    x, clusters = self.content_attn.add_to(x, self.norm3, rngs, self.drop_path)
    return x, {"content_attn.clusters": clusters}


class Boat(nnx.Module):
  """What BOAT adds to a pyramid of stages.

  Args:
    local_attention: "both" for bilateral blocks among image-space ones as in the paper's models, "image" for
      image-space attention alone (the plain Swin or CSWin), "feature" for feature-space attention alone: in every
      block, in place of image-space attention.
    clustering: "balanced" or "kmeans", which is unbalanced, quadratic in the tokens and has no overlap.
    overlap: tokens that each cluster borrows from its sibling as keys and values; 0 for none.
    iterations: refinements of the centroids.
    cluster_size: the least number of tokens in a cluster (`cluster_levels`).
    **kw: arguments of Swin or CSWin.

  The models' `out` has in addition `layers.{i}.blocks.{j}.attnC.clusters` (on Swin) or
  `stage{i + 1}.{j}.content_attn.clusters` (on CSWin), (B, heads, N) int: the cluster of each token.
  """

  def __init__(
    self,
    *,
    local_attention: str = "both",
    clustering: str = "balanced",
    overlap: int = 20,
    iterations: int = 2,
    cluster_size: int = 49,
    **kw,
  ):
    self.options = BilateralOptions(local_attention, clustering, overlap, iterations, cluster_size)
    super().__init__(**kw)

  def make_block(self, stage: int, index: int):
    mode = self.options.local_attention
    if mode == "image" or (mode == "both" and not self.is_bilateral(stage, index)):
      return super().make_block(stage, index)
    return functools.partial(self.bilateral_block, self.options)


class BoatSwin(Boat, Swin):
  """BOAT on Swin; the blocks whose windows shift are bilateral, so none of the last stage."""

  bilateral_block = BoatSwinBlock

  def is_bilateral(self, stage: int, index: int) -> bool:
    """Whether the block has both attentions."""
    return index % 2 == 1 and stage < len(self.depths) - 1


class BoatCSWin(Boat, CSWin):
  """BOAT on CSWin; every other block is bilateral, from the first of each stage."""

  bilateral_block = BoatCSWinBlock

  def is_bilateral(self, stage: int, index: int) -> bool:
    """Whether the block has both attentions."""
    return index % 2 == 0
