"""CSWin Transformer: half of the heads attend in vertical stripes, half in horizontal ones.

Dong et al.: CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows, CVPR 2022,
arXiv 2107.00652. The authors' code is microsoft/CSWin-Transformer (MIT); attribute names follow its state dict.
Written anew.

Tokens are (B, N, C), row by row; `grid` is the (rows, columns) they lie on.
"""

from collections.abc import Callable, Iterator, Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import layers
from vit_jax_ext.models.dropout import drop, keep_factors
from vit_jax_ext.models.fused_windows import Windows, attend_packed_stripes, attend_windows
from vit_jax_ext.models.kernels import can_pack
from vit_jax_ext.models.layers import Conv, Linear, Sequential
from vit_jax_ext.models.pyramid import Grid, Intermediates, LayerNorm, Pyramid, PyramidBlock


def flatten(x: jax.Array) -> jax.Array:
  """(B, H, W, C) to tokens (B, H * W, C)."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


class StripeAttention(layers.MultiHeadAttention):
  """Attention inside stripes of some of the heads, plus locally-enhanced positions (section 3.3).

  The position term `get_v` is a depthwise convolution of the values that sees one stripe at a time.
  """

  def __init__(self, dim: int, num_heads: int, grid: Grid, stripe: Grid, attn_drop_rate: float = 0.0, **kw):
    super().__init__(dim, num_heads, attn_drop_rate, 0.0)
    self.grid, self.stripe = grid, stripe
    self.get_v = layers.DepthwiseConv(dim, **kw)

  def is_fused_in(self, x: jax.Array | jax.ShapeDtypeStruct, shares: int, rngs: nnx.Rngs | None) -> bool:
    """Returns whether a kernel finds the stripes in one of `shares` of the channels of tokens x (B, N, C)."""
    share = jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2] // shares), x.dtype)
    return self.windows_are_fused(share, Windows(self.grid, self.stripe), rngs)

  def positions(self, v: jax.Array) -> jax.Array:
    """Returns the position term of values (B, N, C / shares)."""
    return self.get_v(v.reshape(v.shape[0], *self.grid, -1), self.stripe).reshape(v.shape)

  def terms(self, qkv: list[jax.Array]) -> list[jax.Array]:
    """Returns the two terms of what `is_fused_in` a share's tokens (B, N, C / shares): attention and positions.

    Args:
      qkv: queries, keys and values, these once for each term; or all in one array.
    """
    windows = Windows(self.grid, self.stripe)
    if len(qkv) == 1:
      y, v = attend_packed_stripes(*qkv, windows, self.num_heads, self.scale)
    else:
      q, k, values, v = qkv
      y = attend_windows(q, k, values, None, None, windows, v.shape[-1] // self.num_heads, self.scale)
    return [y, self.positions(v)]

  def __call__(
    self, x: jax.Array, qkv: layers.PackedQKV, share: int, shares: int, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    """Returns the new tokens (B, N, C / shares) from the block's (B, N, C).

    Args:
      qkv: the block's.
      share, shares: which of its equal sets of heads are meant.
    """
    batch, tokens, dim = x.shape
    if self.is_fused_in(x, shares, rngs):
      if can_pack(dim // shares, self.num_heads):
        return sum(self.terms([qkv.side_by_side(x, self.num_heads, share, shares)]))
      q, k, v = qkv(x, share, shares)
      return sum(self.terms([q, k, v, v]))
    q, k, v = qkv(layers.partition_windows(x.reshape(batch, *self.grid, -1), self.stripe), share, shares)
    y, _ = self.attend(q, k, v, rngs)
    y = y + self.get_v(v.reshape(-1, *self.stripe, v.shape[-1])).reshape(y.shape)
    return layers.merge_windows(y, self.grid, self.stripe).reshape(batch, tokens, -1)


class JoinShares(Linear):
  """Projection of the stripes' shares of the channels, (..., shares, C / shares) to (..., C).

  Unpacks its kernel as PackedQKV does, and for the same reason.
  """

  def __init__(self, dim: int, **kw):
    super().__init__(dim, dim, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.kernel[...].astype(self.dtype).reshape(*x.shape[-2:], -1)
    return layers.add_bias(jnp.tensordot(x.astype(self.dtype), kernel, 2), self.bias[...])


class CSWinBlock(PyramidBlock):
  """Cross-shaped window attention and MLP (equation 6).

  Args:
    grid: (rows, columns) of tokens.
    stripes: (height, width) of the stripes; each takes an equal share of the heads and channels.
  """

  def __init__(
    self,
    dim: int,
    num_heads: int,
    grid: Grid,
    stripes: Sequence[Grid],
    mlp_ratio: float,
    drop_rate: float,
    attn_drop_rate: float,
    drop_path_rate: float,
    **kw,
  ):
    share = len(stripes)
    if num_heads % share:
      raise UserError(f"{num_heads} heads do not divide into {share} kinds of stripes; change num_heads")
    self.norm1 = LayerNorm(dim, **kw)
    self.qkv = layers.PackedQKV(dim, **kw)
    self.attns = nnx.List(
      StripeAttention(dim // share, num_heads // share, grid, stripe, attn_drop_rate, **kw) for stripe in stripes
    )
    self.proj = JoinShares(dim, **kw)
    super().__init__(dim, mlp_ratio, drop_rate, drop_path_rate, **kw)

  def attend(self, x: jax.Array, rngs: nnx.Rngs | None) -> tuple[jax.Array, Intermediates]:
    number, normed = len(self.attns), jax.ShapeDtypeStruct(x.shape, self.qkv.dtype)
    fused = (attn.is_fused_in(normed, number, rngs) for attn in self.attns)
    if layers.projections_are_fused(x, self.qkv, rngs, values=2, shares=number) and all(fused):
      packed = can_pack(x.shape[-1] // number, self.attns[0].num_heads)
      x, shares = self.qkv.after_norm(x, self.norm1, values=2, shares=number, packed=packed)
      ys = [attn.terms(qkv) for attn, qkv in zip(self.attns, shares, strict=True)]
      return self.proj.add_to(x, ys, keep_factors(self.drop_path, x, rngs)), {}
    normed = self.norm1(x)
    y = jnp.stack([attn(normed, self.qkv, i, number, rngs) for i, attn in enumerate(self.attns)], axis=-2)
    return x + drop(self.drop_path, self.proj(y), rngs), {}


class MergeBlock(nnx.Module):
  """Halves both sides and doubles the width by a convolution: (B, N, C) to (B, N / 4, 2 C)."""

  def __init__(self, dim: int, grid: Grid, **kw):
    self.grid = grid
    self.conv = Conv(dim, 2 * dim, 3, stride=2, padding=1, **kw)
    self.norm = LayerNorm(2 * dim, stream=True, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.norm(flatten(self.conv(x.reshape(x.shape[0], *self.grid, -1))))


class CSWin(Pyramid):
  """The whole classifier; see Pyramid for the other arguments, for its call and intermediates.

  Args:
    embed_dim: width of the first stage; doubles with each stage.
    depth, num_heads: blocks and heads, of each stage.
    split_size: width of the stripes of each stage, tokens; a stage takes the nearest divisor of its own sides
      (`layers.fit_window`). In the last stage one window spans the image. The authors' models for 384 pixels have
      (1, 2, 12, 12).
  """

  merging = MergeBlock
  patch_size = 4

  def __init__(
    self,
    *,
    embed_dim: int = 64,
    depth: Sequence[int] = (1, 2, 21, 1),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    split_size: Sequence[int] = (1, 2, 7, 7),
    **kw,
  ):
    if len(split_size) != len(depth):
      raise UserError(f"split_size {tuple(split_size)} has not one value for each of {len(depth)} stages; change it")
    self.depths, self.split_size = tuple(depth), tuple(split_size)
    super().__init__(embed_dim=embed_dim, num_heads=num_heads, **kw)

  def add_embedding(self, dim: int, drop_rate: float, **kw) -> None:
    stem = Conv(3, dim, 7, stride=self.patch_size, padding=2, **kw)
    self.stage1_conv_embed = Sequential([stem, flatten, LayerNorm(dim, stream=True, **kw)])

  def embed(self, images: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
    return self.stage1_conv_embed(images)

  def block_arguments(self, stage: int, index: int) -> tuple[list[Grid]]:
    """Returns the stripes, vertical and horizontal ones; in the last stage one window."""
    grid = self.grids[stage]
    if stage == len(self.depths) - 1:
      return ([grid],)
    rows, columns = (layers.fit_window(side, self.split_size[stage]) for side in grid)
    return ([(grid[0], columns), (rows, grid[1])],)

  def make_block(self, stage: int, index: int) -> Callable[..., CSWinBlock]:
    return CSWinBlock

  def add_stage(self, stage: int, blocks: list[CSWinBlock], merging: MergeBlock | None) -> None:
    setattr(self, f"stage{stage + 1}", nnx.List(blocks))
    if merging is not None:
      setattr(self, f"merge{stage + 1}", merging)

  def stages(self) -> Iterator[tuple[str, Sequence[CSWinBlock], MergeBlock | None]]:
    for i in range(1, len(self.depths) + 1):
      yield f"stage{i}", getattr(self, f"stage{i}"), getattr(self, f"merge{i}", None)
