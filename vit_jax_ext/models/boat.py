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

from collections.abc import Callable
import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import layers
from vit_jax_ext.models.attention import split_heads, widest
from vit_jax_ext.models.cswin import CSWin, CSWinBlock
from vit_jax_ext.models.layers import Linear, drop
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


def _tpu_einsum(subscripts: str, a: jax.Array, x: jax.Array) -> jax.Array:
  """`_einsum` of float32 (..., k, m) with bfloat16 features, in one pass of the matrix unit where it takes six.

  Three bfloat16 numbers make up a float32 one; they lie side by side, in the axis k of `a` and of the result.
  """
  if x.dtype != jnp.bfloat16:
    return _einsum(subscripts, a, x)
  parts = []
  for _ in range(3):
    parts.append(jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7))
    a = a - parts[-1]
  parts = jnp.concatenate(parts, axis=-2).astype(x.dtype)
  return sum(jnp.split(jnp.einsum(subscripts, parts, x, preferred_element_type=jnp.float32), 3, axis=-2))


def _gather(x: jax.Array, order: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x, order[..., None], axis=-2)


def _scatter(x: jax.Array, order: jax.Array) -> jax.Array:
  return _gather(x, jnp.argsort(order, axis=-1))


def _one_hot(order: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns the permutation as a matrix (..., token, place); the other way round it would cost three times as much."""
  return (order[..., None, :] == jnp.arange(order.shape[-1])[:, None]).astype(dtype)


def _tpu_gather(x: jax.Array, order: jax.Array) -> jax.Array:
  """`_gather` as a product, which is exact: on TPU several times as fast, though quadratic, and without copies."""
  return _einsum("...tp,...tc->...pc", _one_hot(order, x.dtype), x)


def _tpu_scatter(x: jax.Array, order: jax.Array) -> jax.Array:
  return _einsum("...tp,...pc->...tc", _one_hot(order, x.dtype), x)


def _on_tpu(*, tpu: Callable, default: Callable) -> Callable:
  """Returns the function that is `tpu` where it is compiled for TPU, and `default` elsewhere."""
  return functools.partial(jax.lax.platform_dependent, tpu=tpu, default=default)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array) -> jax.Array:
  """Brings (..., tokens, features) into the order of `order` (..., tokens)."""
  return _on_tpu(tpu=_tpu_gather, default=_gather)(x, order)


@jax.custom_vjp
def unpermute(x: jax.Array, order: jax.Array) -> jax.Array:
  """Inverse of `permute`."""
  return _on_tpu(tpu=_tpu_scatter, default=_scatter)(x, order)


# The gradient of a permutation is the inverse one; JAX would add up rows that do not meet.
permute.defvjp(lambda x, order: (permute(x, order), order), lambda order, g: (unpermute(g, order), None))
unpermute.defvjp(lambda x, order: (unpermute(x, order), order), lambda order, g: (permute(g, order), None))


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
  order = _on_tpu(
    tpu=lambda x: _order(x, levels, iterations, _tpu_gather, _tpu_einsum),
    default=lambda x: _order(x.astype(widest(x.dtype)), levels, iterations, _gather, _einsum),
  )(jax.lax.stop_gradient(features))
  return order, jnp.argsort(order, axis=-1) // (features.shape[-2] >> levels)


def _order(features, levels: int, iterations: int, gather: Callable, einsum: Callable) -> jax.Array:
  """Returns the order of `balanced_clusters`. Only it goes from level to level; the features stay where they are."""
  *batch, tokens, dim = features.shape
  order = jnp.broadcast_to(jnp.arange(tokens), (*batch, tokens))
  norm = jnp.linalg.norm(features.astype(widest(features.dtype)), axis=-1)
  norm = jnp.maximum(norm, 1e-12)
  for level in range(levels):
    x = gather(features, order) if level else features
    x = x.reshape(*batch, 2**level, -1, dim)
    half = x.shape[-2] // 2
    order, norm = (a.reshape(x.shape[:-1]) for a in (order, norm))

    def cosines(centroids, x=x, norm=norm):
      return einsum("...kd,...nd->...kn", _normalise(centroids), x) / norm[..., None, :]

    first = jnp.arange(2 * half) < half
    weights = jnp.broadcast_to(jnp.stack([first, ~first]).astype(norm.dtype), (*x.shape[:-2], 2, 2 * half))
    cosine = cosines(einsum("...kn,...nd->...kd", weights, x) / half)
    for _ in range(iterations):
      weights = jax.nn.sigmoid(SHARPNESS * (cosine - cosine[..., ::-1, :]))  # softmax over two
      cosine = cosines(einsum("...kn,...nd->...kd", weights, x))
    ratio = (cosine[..., 0, :] + 1) / (cosine[..., 1, :] + 1)
    _, order, norm = (a.reshape(*batch, tokens) for a in jax.lax.sort((ratio, order, norm), num_keys=1))
  return order


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
  """Lends each cluster its sibling's nearest tokens: (..., clusters, n, features) to (..., clusters, n + overlap, ...).

  In the order of `balanced_clusters` siblings meet at the cut: the first cluster of a pair gets the first tokens of the
  second, the second the last of the first.
  """
  *batch, clusters, size, dim = groups.shape
  pairs = groups.reshape(*batch, clusters // 2, 2 * size, dim)
  pairs = jnp.stack([pairs[..., : size + overlap, :], pairs[..., size - overlap :, :]], axis=-3)
  return pairs.reshape(*batch, clusters, size + overlap, dim)


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


class FeatureAttention(nnx.Module):
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
    self.num_heads, self.grid, self.scale, self.options = num_heads, grid, scale, options
    self.levels = cluster_levels(math.prod(grid), options.cluster_size)
    self.qkv = layers.PackedQKV(dim, **kw)
    self.proj = Linear(dim, dim, **kw)
    self.get_v = layers.DepthwiseConv(dim, **kw)
    self.attn_drop = nnx.Dropout(attn_drop_rate)
    self.proj_drop = nnx.Dropout(proj_drop_rate)

  def mix(self, q: jax.Array, k: jax.Array, v: jax.Array, rngs: nnx.Rngs | None, mask: jax.Array | None = None):
    """Attention over the last two axes (tokens, head_dim), to the keys where `mask` (..., queries, keys) is true."""
    logits = jnp.einsum("...qd,...kd->...qk", q, k, preferred_element_type=widest(q.dtype))
    attn = jax.nn.softmax(logits * self.scale, axis=-1, where=mask)
    return jnp.einsum("...qk,...kd->...qd", drop(self.attn_drop, attn, rngs).astype(v.dtype), v)

  def attend_balanced(self, q, k, v, rngs: nnx.Rngs | None) -> tuple[jax.Array, jax.Array]:
    """Attention inside equal clusters, of tokens laid side by side; linear in their number."""
    if not self.levels:
      return self.mix(q, k, v, rngs), jnp.zeros(q.shape[:-1], int)
    order, clusters = balanced_clusters(q, self.levels, self.options.iterations)
    groups = (*q.shape[:2], 2**self.levels, -1, q.shape[-1])
    q_groups, k_groups, v_groups = (permute(x, order).reshape(groups) for x in (q, k, v))
    overlap = min(self.options.overlap, q_groups.shape[-2])
    k_groups, v_groups = (add_overlap(x, overlap) for x in (k_groups, v_groups))
    y = self.mix(q_groups, k_groups, v_groups, rngs).reshape(q.shape)
    return unpermute(y, order), clusters

  def attend_kmeans(self, q, k, v, rngs: nnx.Rngs | None) -> tuple[jax.Array, jax.Array]:
    """Attention inside unequal clusters. Any may hold all tokens, so each is padded to all, and masked: quadratic."""
    clusters = kmeans_clusters(q, 2**self.levels, self.options.iterations)
    return self.mix(q, k, v, rngs, clusters[..., :, None] == clusters[..., None, :]), clusters

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the new tokens (B, N, C) and the cluster of each token for each head, (B, heads, N) int."""
    batch, tokens, dim = x.shape
    *_, values = projected = self.qkv(x)
    q, k, v = (split_heads(y, self.num_heads).swapaxes(1, 2) for y in projected)
    attend = self.attend_balanced if self.options.clustering == "balanced" else self.attend_kmeans
    y, clusters = attend(q, k, v, rngs)
    y = y.swapaxes(1, 2).reshape(batch, tokens, dim)
    y = y + self.get_v(values.reshape(batch, *self.grid, dim)).reshape(y.shape)
    return drop(self.proj_drop, self.proj(y), rngs), clusters


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
    y, clusters = self.attnC(self.norm4(x), rngs)
    return x + y, {"attnC.clusters": clusters}


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
    y, clusters = self.content_attn(self.norm3(x), rngs)
    return x + drop(self.drop_path, y, rngs), {"content_attn.clusters": clusters}


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
