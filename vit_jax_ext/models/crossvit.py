"""CrossViT: two branches with patches of two sizes, fused by cross-attention of a single class token.

Chen, Fan, Panda: CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification, ICCV 2021,
arXiv 2103.14899. The authors' code is IBM/CrossViT (Apache 2.0); attribute names follow its state dict. Written anew.

Branch 0 has the small patches, branch 1 the large ones. K multi-scale blocks each run N_i self-attention blocks per
branch and then exchange what they know (section 3.3 of the paper, `fusion`).
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import layers
from vit_jax_ext.models.attention import split_heads, widest
from vit_jax_ext.models.dropout import DropPath, drop, runtime_rngs
from vit_jax_ext.models.gelu import gelu
from vit_jax_ext.models.kernels import head_shards
from vit_jax_ext.models.layers import Attention, Block, Conv, LayerNorm, Linear, Sequential
from vit_jax_ext.models.resize import resize_bicubic

Intermediates = dict[str, jax.Array]
Branches = list[jax.Array]  # tokens of both branches, [(B, 1 + N_0, C_0), (B, 1 + N_1, C_1)]

# Patch size -> (kernel, stride, padding) of the dagger models' three convolutions (section 4.1).
CONV_STEMS = {
  12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)),
  16: ((7, 4, 3), (3, 2, 1), (3, 2, 1)),
}


def branch_sizes(image_size: tuple[int, int], patch_size: Sequence[int]) -> list[tuple[int, int]]:
  """Returns the (height, width) that each branch sees.

  Branch 0 sees the image as it is. Branch 1 sees it resized to the multiple of its patch size that is nearest to
  14/15 of the image: one rule that gives both of the authors' pairs, 240 -> 224 and 408 -> 384.
  """
  large = patch_size[1]
  return [image_size, tuple(max(1, round(side * 14 / 15 / large)) * large for side in image_size)]


class ConvPatchEmbed(nnx.Module):
  """The dagger models' patch embedding: three convolutions with ReLU between, widths dim/4, dim/2, dim."""

  def __init__(self, patch_size: int, dim: int, **kw):
    widths = (3, dim // 4, dim // 2, dim)
    self.proj = Sequential()
    for i, (kernel, stride, pad) in enumerate(CONV_STEMS[patch_size]):
      if i:
        self.proj.append(jax.nn.relu)
      self.proj.append(Conv(widths[i], widths[i + 1], kernel, stride=stride, padding=pad, **kw))

  def __call__(self, images: jax.Array) -> jax.Array:
    x = self.proj(images)
    return x.reshape(x.shape[0], -1, x.shape[-1])


class CrossAttention(layers.MultiHeadAttention):
  """Attention of the first token, the only query, over all tokens: linear in their number (equation 4).

  A single query needs no keys and values of all tokens, two products of (N, C) with (C, C). It goes back through `wk`
  to meet the tokens as they are, and what it gathers of them goes through `wv`. So "auto" does; other implementations
  have keys and values, and so have devices that share the heads: they would sum the gradient of x in float32.
  """

  def __init__(self, dim: int, num_heads: int, attn_drop_rate: float, proj_drop_rate: float, **kw):
    super().__init__(dim, num_heads, attn_drop_rate, proj_drop_rate)
    self.wq = Linear(dim, dim, **kw)
    self.wk = Linear(dim, dim, **kw)
    self.wv = Linear(dim, dim, **kw)
    self.proj = Linear(dim, dim, **kw)

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the new first token (B, 1, C) and its attention (B, heads, 1, N)."""
    if self.implementation == "auto" and head_shards(self.num_heads) == 1:
      y, attn = self._attend_to_tokens(x, rngs)
    else:
      y, attn = self.attend(self.wq(x[:, :1]), self.wk(x), self.wv(x), rngs)
    return drop(self.proj_drop, self.proj(y), rngs), attn

  def _attend_to_tokens(self, x: jax.Array, rngs: nnx.Rngs | None) -> tuple[jax.Array, jax.Array]:
    dtype, wide = x.dtype, widest(x.dtype)
    wk, wv = (split_heads(layer.kernel[...].astype(dtype), self.num_heads) for layer in (self.wk, self.wv))
    query = jnp.einsum("bqhd,chd->bhqc", split_heads(self.wq(x[:, :1]), self.num_heads), wk)
    # The bias of wk would add the same to all logits of a head, which the softmax drops.
    logits = jnp.einsum("bhqc,bkc->bhqk", query, x, preferred_element_type=wide) * self.scale
    attn = jax.nn.softmax(logits, axis=-1)
    used = drop(self.attn_drop, attn, rngs)
    gathered = jnp.einsum("bhqk,bkc->bqhc", used.astype(dtype), x)
    y = jnp.einsum("bqhc,chd->bqhd", gathered, wv, preferred_element_type=wide)
    # What the weights sum to is 1 but for dropout.
    y += used.sum(axis=-1).swapaxes(1, 2)[..., None] * split_heads(self.wv.bias[...].astype(wide), self.num_heads)
    return y.astype(dtype).reshape(x.shape[0], 1, -1), attn  # not len(x): an export leaves it open


class FusionBlock(nnx.Module):
  """Pre-norm attention with a residual and no MLP; `attention` is CrossAttention or Attention (equation 5)."""

  def __init__(
    self,
    attention: type[CrossAttention] | type[Attention],
    dim: int,
    num_heads: int,
    drop_rate: float,
    attn_drop_rate: float,
    drop_path_rate: float,
    **kw,
  ):
    self.norm1 = LayerNorm(dim, **kw)
    self.attn = attention(dim, num_heads, attn_drop_rate, drop_rate, **kw)
    self.drop_path = DropPath(drop_path_rate)

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, jax.Array]:
    y, attn = self.attn(self.norm1(x), rngs)
    return x[:, : y.shape[1]] + drop(self.drop_path, y, rngs), attn


def projection(dim_in: int, dim_out: int, **kw) -> Sequential:
  """The paper's f and g between widths: LayerNorm, GELU, Linear."""
  return Sequential([LayerNorm(dim_in, stream=True, **kw), gelu, Linear(dim_in, dim_out, **kw)])


def set_cls_token(x: jax.Array, cls_token: jax.Array) -> jax.Array:
  """Returns tokens x (B, 1 + N, C) with another first one, (B, 1, C); to cut and join them would copy all of them."""
  return jax.lax.dynamic_update_slice(x, cls_token.astype(x.dtype), (0, 0, 0))


class MultiScaleBlock(nnx.Module):
  """Self-attention blocks per branch, without fusion; the subclasses add one of the paper's fusions (figure 3).

  Args:
    dim: width of each branch.
    grids: (rows, columns) of patches of each branch.
    depth: number of self-attention blocks of each branch.
    num_heads: heads of each branch.
    mlp_ratio: MLP expansion of each branch.
    drop_path_rates: stochastic depth of the stage's blocks; the branches share them and fusion takes the last.
  """

  def __init__(
    self,
    dim: Sequence[int],
    grids: Sequence[tuple[int, int]],
    depth: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: Sequence[float],
    drop_rate: float,
    attn_drop_rate: float,
    drop_path_rates: Sequence[float],
    remat: bool,
    **kw,
  ):
    self.remat = remat
    self.grids = tuple(grids)
    self.blocks = nnx.List(
      nnx.List(
        Block(dim[b], num_heads[b], mlp_ratio[b], drop_rate, attn_drop_rate, drop_path_rates[i], **kw)
        for i in range(depth[b])
      )
      for b in (0, 1)
    )
    self.add_fusion(dim, num_heads, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate,
                    drop_path_rate=drop_path_rates[-1], **kw)  # fmt: skip

  def add_fusion(self, dim: Sequence[int], num_heads: Sequence[int], **kw) -> None:
    """Creates the parameters of the fusion."""

  def fuse(self, xs: Branches, rngs: nnx.Rngs | None) -> tuple[Branches, Intermediates]:
    """Exchanges information between the branches' tokens."""
    return xs, {}

  def __call__(self, xs: Branches, rngs: nnx.Rngs | None = None) -> tuple[Branches, Intermediates]:
    """Returns the branches' tokens and the intermediates, named by their place in this module."""
    out, xs = {}, list(xs)
    for b, blocks in enumerate(self.blocks):
      for i, block in enumerate(blocks):
        xs[b], out[f"blocks.{b}.{i}.attn"] = layers.call(block, xs[b], rngs, remat=self.remat)
        out[f"blocks.{b}.{i}.cls_token"] = xs[b][:, 0]
    xs, fused = self.fuse(xs, rngs)
    return xs, out | fused | {f"cls_token.{b}": x[:, 0] for b, x in enumerate(xs)}


class CrossAttentionFusion(MultiScaleBlock):
  """Figure 3(d), section 3.3: the class token of each branch queries the patch tokens of the other.

  Projected to the other width (`projs`), it attends to itself and the other branch's patches (`fusion`), and is
  projected back (`revert_projs`).
  """

  def add_fusion(self, dim, num_heads, *, drop_rate, attn_drop_rate, drop_path_rate, **kw):
    self.projs = nnx.List(projection(dim[b], dim[1 - b], **kw) for b in (0, 1))
    self.fusion = nnx.List(
      FusionBlock(CrossAttention, dim[1 - b], num_heads[1 - b], drop_rate, attn_drop_rate, drop_path_rate, **kw)
      for b in (0, 1)
    )
    self.revert_projs = nnx.List(projection(dim[1 - b], dim[b], **kw) for b in (0, 1))

  def fuse(self, xs, rngs):
    fused, out = [], {}
    for b in (0, 1):
      query = self.projs[b](xs[b][:, :1])
      tokens = set_cls_token(xs[1 - b], query)
      cls_token, out[f"fusion.{b}.attn"] = layers.call(self.fusion[b], tokens, rngs, remat=self.remat)
      fused.append(set_cls_token(xs[b], self.revert_projs[b](cls_token)))
    return fused, out


class AllAttentionFusion(MultiScaleBlock):
  """Figure 3(a): all tokens of both branches attend to each other at the larger width, quadratic in their number.

  y = [f_1(x_1) || f_0(x_0)], o = y + MSA(LN(y)), z_b = g_b(o_b). No official code exists. Table 6 gives 27.7 M
  parameters and 7.6 G multiply-adds. One f and g per branch for all its tokens gives 26.9 M; separate ones for class
  and patch tokens (`projs`, `patch_projs`), chosen here, give 28.2 M at the same cost and come closer.
  """

  def add_fusion(self, dim, num_heads, *, drop_rate, attn_drop_rate, drop_path_rate, **kw):
    width = max(dim)
    self.projs = nnx.List(projection(dim[b], width, **kw) for b in (0, 1))
    self.patch_projs = nnx.List(projection(dim[b], width, **kw) for b in (0, 1))
    self.fusion = FusionBlock(
      Attention, width, num_heads[dim.index(width)], drop_rate, attn_drop_rate, drop_path_rate, **kw
    )
    self.revert_projs = nnx.List(projection(width, dim[b], **kw) for b in (0, 1))
    self.patch_revert_projs = nnx.List(projection(width, dim[b], **kw) for b in (0, 1))

  def fuse(self, xs, rngs):
    def project(x, of_class, of_patches):
      return jnp.concatenate([of_class(x[:, :1]), of_patches(x[:, 1:])], axis=1).astype(x.dtype)

    ys = [project(xs[b], self.projs[b], self.patch_projs[b]) for b in (1, 0)]
    o, attn = layers.call(self.fusion, jnp.concatenate(ys, axis=1), rngs, remat=self.remat)
    large, small = jnp.split(o, [ys[0].shape[1]], axis=1)
    fused = [project(x, self.revert_projs[b], self.patch_revert_projs[b]) for b, x in enumerate((small, large))]
    return fused, {"fusion.attn": attn}


class ClassTokenFusion(MultiScaleBlock):
  """Figure 3(b): z_b = [g_b(sum_j f_j(x_j,cls)) || x_b,patch].

  The common width is the larger one. Table 6's 24.2 M parameters leave room for f and g of the narrower branch alone,
  so the wider branch has none.
  """

  def add_fusion(self, dim, num_heads, *, drop_rate, attn_drop_rate, drop_path_rate, **kw):
    width = max(dim)
    self.projs = nnx.List(projection(d, width, **kw) if d < width else Sequential() for d in dim)
    self.revert_projs = nnx.List(projection(width, d, **kw) if d < width else Sequential() for d in dim)

  def fuse(self, xs, rngs):
    total = sum(proj(x[:, :1]) for proj, x in zip(self.projs, xs, strict=True))
    return [set_cls_token(x, revert(total)) for revert, x in zip(self.revert_projs, xs, strict=True)], {}


class PairwiseFusion(ClassTokenFusion):
  """Figure 3(c): class tokens as in ClassTokenFusion, patch tokens of the same place summed with the same f and g.

  The other branch's grid is brought to one's own by bilinear interpolation, which the paper leaves open.
  """

  def fuse(self, xs, rngs):
    ys = [proj(x) for proj, x in zip(self.projs, xs, strict=True)]
    fused = []
    for b in (0, 1):
      own, other = ys[b], ys[1 - b]
      batch, _, width = own.shape
      grid = other[:, 1:].reshape(batch, *self.grids[1 - b], width)
      grid = jax.image.resize(grid, (batch, *self.grids[b], width), "bilinear", antialias=False)
      other = jnp.concatenate([other[:, :1], grid.reshape(batch, -1, width)], axis=1)
      fused.append(self.revert_projs[b](own + other).astype(xs[b].dtype))
    return fused, {}


FUSIONS = {
  "none": MultiScaleBlock,
  "all_attention": AllAttentionFusion,
  "class_token": ClassTokenFusion,
  "pairwise": PairwiseFusion,
  "cross_attention": CrossAttentionFusion,
}


class CrossViT(nnx.Module):
  """The whole classifier.

  Args:
    num_classes: classes of the two heads; 0 for none, which gives the pooled features instead of logits.
    image_size: (height, width) of the images; divides into patches of `patch_size[0]` (see `branch_sizes`).
    patch_size, embed_dim, num_heads, mlp_ratio: one value per branch, small patches first.
    depth: self-attention blocks per branch, for each multi-scale block: ((1, 4), (1, 4), (1, 4)).
    multi_conv: the dagger models' convolutional patch embedding.
    fusion: a key of FUSIONS, the rows of the paper's Table 6.
    drop_rate, attn_drop_rate: dropout of tokens and of attention weights.
    drop_path_rate: stochastic depth of the last block; rises linearly from 0.
    remat: keep only the blocks' inputs for the backward pass.

  Raises:
    UserError: an image size that does not divide, an unknown fusion, heads that do not divide a width.
  """

  def __init__(
    self,
    *,
    num_classes: int = 1000,
    image_size: tuple[int, int] = (240, 240),
    patch_size: Sequence[int] = (12, 16),
    embed_dim: Sequence[int] = (192, 384),
    depth: Sequence[Sequence[int]] = ((1, 4), (1, 4), (1, 4)),
    num_heads: Sequence[int] = (6, 6),
    mlp_ratio: Sequence[float] = (4, 4),
    multi_conv: bool = False,
    fusion: str = "cross_attention",
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    remat: bool = False,
    **kw,
  ):
    if fusion not in FUSIONS:
      raise UserError(f"fusion {fusion!r} is unknown; choose one of {', '.join(FUSIONS)}")
    if multi_conv and not set(patch_size) <= set(CONV_STEMS):
      raise UserError(f"multi_conv is defined for patches of 12 and 16 pixels, not {tuple(patch_size)}")
    self.image_size = image_size
    self.sizes = branch_sizes(image_size, patch_size)
    self.grids = tuple(layers.patch_grid(size, patch) for size, patch in zip(self.sizes, patch_size, strict=True))
    self.drop_rates = (drop_rate, attn_drop_rate, drop_path_rate)

    embed = ConvPatchEmbed if multi_conv else layers.PatchEmbed
    rngs, param_dtype = kw["rngs"], kw["param_dtype"]
    self.patch_embed = nnx.List(embed(patch, dim, **kw) for patch, dim in zip(patch_size, embed_dim, strict=True))
    self.pos_embed = nnx.List(
      nnx.Param(layers.token_init(rngs.params(), (1, 1 + rows * columns, dim), param_dtype))
      for (rows, columns), dim in zip(self.grids, embed_dim, strict=True)
    )
    self.cls_token = nnx.List(
      nnx.Param(layers.token_init(rngs.params(), (1, 1, dim), param_dtype)) for dim in embed_dim
    )
    self.pos_drop = nnx.Dropout(drop_rate)

    stage_depths = [max(d) for d in depth]
    rates = np.linspace(0, drop_path_rate, sum(stage_depths)).tolist()
    starts = np.cumsum([0, *stage_depths])
    self.blocks = nnx.List(
      FUSIONS[fusion](embed_dim, self.grids, depth[k], num_heads, mlp_ratio, drop_rate, attn_drop_rate,
                      rates[starts[k]:starts[k + 1]], remat, **kw)
      for k in range(len(depth))
    )  # fmt: skip
    self.norm = nnx.List(LayerNorm(dim, stream=True, **kw) for dim in embed_dim)
    self.head = nnx.List(layers.Head(dim, num_classes, **kw) for dim in embed_dim if num_classes)

  def __call__(
    self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, Intermediates]:
    """Classifies normalised images (B, H, W, 3).

    Returns:
      logits (B, num_classes), at least float32, the mean of both heads'; without heads pooled features (B, C_0 + C_1).
      out: for multi-scale block k, branch b and block i
        `blocks.{k}.blocks.{b}.{i}.attn` (B, heads, 1 + N, 1 + N), `blocks.{k}.blocks.{b}.{i}.cls_token` (B, C),
        `blocks.{k}.fusion.{b}.attn` (B, heads, 1, 1 + N of the other branch) with cross-attention,
        `blocks.{k}.fusion.attn` (all tokens) with all-attention, `blocks.{k}.cls_token.{b}` (B, C) after fusion,
        `pre_logits.{b}` (B, C) the normalised class tokens, `logits.{b}` (B, num_classes) each head's.

    Raises:
      UserError: images of another size, or train=True with positive drop rates and no rngs.
    """
    layers.check_images(images, self.image_size)
    rngs = runtime_rngs(train, rngs, *self.drop_rates)
    xs = []
    for embed, size, cls_token, pos_embed in zip(
      self.patch_embed, self.sizes, self.cls_token, self.pos_embed, strict=True
    ):
      tokens = embed(resize_bicubic(images, size))
      xs.append(drop(self.pos_drop, layers.add_cls_token(tokens, cls_token[...], pos_embed[...]), rngs))

    out = {}
    for k, block in enumerate(self.blocks):
      xs, stage = block(xs, rngs)
      out |= {f"blocks.{k}.{name}": value for name, value in stage.items()}

    pre_logits = [norm(x[:, 0]) for norm, x in zip(self.norm, xs, strict=True)]
    out |= {f"pre_logits.{b}": x for b, x in enumerate(pre_logits)}
    if not self.head:
      return jnp.concatenate(pre_logits, axis=-1), out
    logits = [head(x) for head, x in zip(self.head, pre_logits, strict=True)]
    out |= {f"logits.{b}": x for b, x in enumerate(logits)}
    return (logits[0] + logits[1]) / 2, out
