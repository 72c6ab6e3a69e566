"""DeepViT: attention maps mixed across the heads (re-attention), so that deep blocks do not all attend alike.

Zhou et al.: DeepViT: Towards Deeper Vision Transformer, 2021, arXiv 2103.11886. The authors' code is
zhoudaquan/dvit_repo (MIT); attribute names follow its state dict. Written anew.
"""

from collections.abc import Callable, Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import layers
from vit_jax_ext.models.attention import map_covariance, reattend, softmax_attention, weigh, widest
from vit_jax_ext.models.batch_norm import BatchNorm
from vit_jax_ext.models.dropout import drop
from vit_jax_ext.models.isotropic import IsotropicTransformer
from vit_jax_ext.models.layers import Attention, Block, Conv


class ConvStem(nnx.Module):
  """Patch embedding of the s and l models: two convolutions of 64 channels at half resolution, then the projection."""

  def __init__(self, patch_size: int, dim: int, statistics_batch: int | None, **kw):
    self.conv1 = Conv(3, 64, 7, stride=2, padding=3, use_bias=False, **kw)
    self.bn1 = BatchNorm(64, statistics_batch=statistics_batch, **kw)
    self.conv2 = Conv(64, 64, 3, padding=1, use_bias=False, **kw)
    self.bn2 = BatchNorm(64, statistics_batch=statistics_batch, **kw)
    self.proj = Conv(64, dim, patch_size // 2, stride=patch_size // 2, **kw)

  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    x = jax.nn.relu(self.bn1(self.conv1(images), train=train))
    x = jax.nn.relu(self.bn2(self.conv2(x), train=train))
    x = self.proj(x)
    return x.reshape(x.shape[0], -1, x.shape[-1])


class HeadMixing(Conv):
  """1x1 convolution over the heads of attention maps (B, heads, queries, keys), which stay in that layout."""

  def __init__(self, num_heads: int, **kw):
    super().__init__(num_heads, num_heads, 1, **kw)

  def __call__(self, maps: jax.Array) -> jax.Array:
    kernel, bias = (param[...].astype(maps.dtype) for param in (self.kernel, self.bias))
    return jnp.einsum("bhqk,hg->bgqk", maps, kernel[0, 0]) + bias[:, None, None]


NORMS = ("batch", "layer", "none")


def head_norm(norm: str, num_heads: int, statistics_batch: int | None, **kw) -> nnx.Module | None:
  """Returns one of NORMS for attention maps (B, heads, queries, keys): BatchNorm per head, LayerNorm over the heads."""
  if norm == "batch":
    return BatchNorm(num_heads, axis=1, statistics_batch=statistics_batch, **kw)
  return layers.LayerNorm(num_heads, stream=True, reduction_axes=1, feature_axes=1, **kw) if norm == "layer" else None


class ReAttention(Attention):
  """Attention whose maps are mixed across heads and normalised before they meet the values (equation 3).

  Args:
    norm: "batch", statistics per head over batch, queries and keys; "layer", over the heads; "none".
    reatten_scale: factor of the new maps; None for head_dim ** -0.5.
    statistics_batch: see BatchNorm.
  """

  def __init__(
    self,
    dim: int,
    num_heads: int,
    attn_drop_rate: float,
    proj_drop_rate: float,
    *,
    norm: str,
    reatten_scale: float | None,
    statistics_batch: int | None = None,
    **kw,
  ):
    super().__init__(dim, num_heads, attn_drop_rate, proj_drop_rate, **kw)
    self.reatten_matrix = HeadMixing(num_heads, **kw)
    self.var_norm = head_norm(norm, num_heads, statistics_batch, **kw)
    self.reatten_scale = self.scale if reatten_scale is None else reatten_scale

  def is_packed(self, x: jax.Array | jax.ShapeDtypeStruct, rngs: nnx.Rngs | None) -> bool:
    return False

  def attend_tokens(self, q, k, v, rngs: nnx.Rngs | None, train: bool) -> tuple[jax.Array, jax.Array]:
    """Returns what attention gives, and the maps that multiply the values (B, heads, N, N)."""
    if isinstance(self.var_norm, layers.LayerNorm) or (rngs and self.attn_drop.rate):
      return self._attend_by_maps(q, k, v, rngs, train)
    mixing, shift = self._mixing(q, k, train)
    return reattend(
      q, k, v, mixing, shift, num_heads=self.num_heads, scale=self.scale, implementation=self.implementation
    )

  def _mixing(self, q: jax.Array, k: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
    """Returns what convolution, BatchNorm and scale make of the maps, as factors of the centred ones and an addition.

    A mixed map has the mean b + sum_h w_h / N over queries and keys, and the variance w^T C w with the covariance C of
    the heads: no mixed map has to be there before it can be normalised. The bias b drops out.
    """
    dtype = widest(q.dtype)
    kernel, bias = (param[...].astype(dtype) for param in (self.reatten_matrix.kernel, self.reatten_matrix.bias))
    kernel, keys, norm = kernel[0, 0], k.shape[1], self.var_norm
    mean = bias + kernel.sum(axis=0) / keys
    if norm is None:
      return self.reatten_scale * kernel[None], self.reatten_scale * mean[None]
    var = norm.var[...][None]
    if train:
      images = norm.group_size(len(q))
      covariance = map_covariance(
        q, k, num_heads=self.num_heads, scale=self.scale, images=images, implementation=self.implementation
      )
      var = jnp.einsum("hf,ghi,if->gf", kernel, covariance, kernel, precision=jax.lax.Precision.HIGHEST)
    factor = self.reatten_scale * norm.scale[...].astype(dtype) * jax.lax.rsqrt(var + norm.epsilon)
    shift = jnp.broadcast_to(self.reatten_scale * norm.bias[...].astype(dtype), factor.shape)
    if train:
      norm.update(mean, var[0], images * q.shape[1] * keys)
    else:
      shift += factor * (mean - norm.mean[...])
    return kernel * factor[:, None], shift

  def _attend_by_maps(self, q, k, v, rngs, train) -> tuple[jax.Array, jax.Array]:
    """Attends by whole maps: LayerNorm looks across the heads, and after dropout their rows do not sum to 1."""
    attn = drop(self.attn_drop, softmax_attention(q, k, num_heads=self.num_heads, scale=self.scale), rngs)
    attn = self.reatten_matrix(attn)
    if isinstance(self.var_norm, BatchNorm):
      attn = self.var_norm(attn, train=train)
    elif self.var_norm is not None:
      attn = self.var_norm(attn)
    attn *= self.reatten_scale
    return weigh(attn, v), attn


class DeepViT(IsotropicTransformer):
  """The whole classifier; see IsotropicTransformer for the other arguments, for its call and intermediates.

  The paper's width expansion (Table 1) is `embed_dim` alone.

  Args:
    patch_size: side of the square patches, pixels.
    depth: number of blocks.
    num_heads, mlp_ratio: heads and MLP expansion of every block.
    reattention_blocks: indices of the blocks with re-attention, the others attend plainly; None for all.
    reattention_norm: "batch", "layer" or "none"; see ReAttention.
    statistics_batch: images of which each BatchNorm, also that of the stem, takes statistics; None for the whole batch,
      on all devices together. The authors' scripts have 32 on each GPU and do not synchronise them.
    reatten_scale: factor of the maps after re-attention; None for head_dim ** -0.5.
    scale_adjustment: factor of the residual stream as the branches see it; see Block.
    conv_stem: two convolutions with BatchNorm before the patches are embedded; `patch_size` is then even.

  Raises:
    UserError: besides, an unknown norm, a block that does not exist, an odd patch size for the convolutional stem.
  """

  def __init__(
    self,
    *,
    patch_size: int = 16,
    depth: int = 16,
    num_heads: int = 12,
    mlp_ratio: float = 3,
    reattention_blocks: Sequence[int] | None = None,
    reattention_norm: str = "batch",
    statistics_batch: int | None = None,
    reatten_scale: float | None = 1.0,
    scale_adjustment: float = 1.0,
    conv_stem: bool = False,
    **kw,
  ):
    if reattention_norm not in NORMS:
      raise UserError(f"reattention_norm {reattention_norm!r} is unknown; choose one of {', '.join(NORMS)}")
    if conv_stem and patch_size % 2:
      raise UserError(
        f"patch_size {patch_size} is odd, but the convolutional stem halves the image; choose an even one"
      )
    reattention_blocks = range(depth) if reattention_blocks is None else reattention_blocks
    if not set(reattention_blocks) <= set(range(depth)):
      raise UserError(f"reattention_blocks {tuple(reattention_blocks)} do not fit; the blocks are 0 to {depth - 1}")
    self.conv_stem, self.scale_adjustment = conv_stem, scale_adjustment
    self.reattention_blocks = tuple(reattention_blocks)
    self.reattention_norm, self.reatten_scale = reattention_norm, reatten_scale
    self.statistics_batch = statistics_batch
    super().__init__(patch_size=patch_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, **kw)

  def make_patch_embed(self) -> Callable[..., nnx.Module]:
    if not self.conv_stem:
      return super().make_patch_embed()
    return functools.partial(ConvStem, statistics_batch=self.statistics_batch)

  def make_block(self, index: int) -> Callable[..., Block]:
    attention = Attention
    if index in self.reattention_blocks:
      attention = functools.partial(
        ReAttention,
        norm=self.reattention_norm,
        statistics_batch=self.statistics_batch,
        reatten_scale=self.reatten_scale,
      )
    return functools.partial(Block, adjustment=self.scale_adjustment, attention=attention)
