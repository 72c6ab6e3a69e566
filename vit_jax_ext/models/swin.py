"""Swin Transformer: attention inside windows that shift by half between blocks, four stages of falling resolution.

Liu et al.: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, arXiv 2103.14030.
The authors' code is microsoft/Swin-Transformer (MIT); attribute names follow its state dict. Written anew.

Tokens are (B, N, C), row by row; `grid` is the (rows, columns) they lie on.
"""

from collections.abc import Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import layers
from vit_jax_ext.models.layers import Linear, drop

Intermediates = dict[str, jax.Array]
Grid = tuple[int, int]

LayerNorm = functools.partial(layers.LayerNorm, epsilon=1e-5)


@functools.cache
def relative_position_index(window: Grid) -> np.ndarray:
  """Returns, for each pair of places in a window, the row of the bias table: (tokens, tokens) int (section 3.2)."""
  h, w = window
  place = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij")).reshape(2, -1)
  offset = place[:, :, None] - place[:, None]
  return (offset[0] + h - 1) * (2 * w - 1) + offset[1] + w - 1


@functools.cache
def seam_mask(grid: Grid, window: Grid, shift: Grid) -> np.ndarray:
  """Returns 0 for tokens that are neighbours in the image, -inf across the seam of a cyclic shift: (windows, 1, n, n).

  Only the last row and column of windows hold a seam (figure 4).
  """
  row, column = (np.arange(side) >= side - by for side, by in zip(grid, shift, strict=True))
  region = (2 * row[:, None] + column).reshape(1, *grid, 1)
  region = layers.partition_windows(region, window)[0, :, :, 0]
  return np.where(region[:, None, :, None] == region[:, None, None, :], 0.0, -np.inf).astype(np.float32)


class WindowAttention(nnx.Module):
  """Multi-head attention inside windows, with a learned bias for each relative position (equation 4).

  Args:
    grid: (rows, columns) of tokens.
    window: (height, width) of a window, in tokens; divides the grid.
    shift: tokens by which the windows move down and right, cyclically.
  """

  def __init__(
    self,
    dim: int,
    num_heads: int,
    grid: Grid,
    window: Grid,
    shift: Grid,
    attn_drop_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    **kw,
  ):
    self.grid, self.window, self.shift = grid, window, shift
    self.num_heads = num_heads
    self.scale = (dim // num_heads) ** -0.5
    table = layers.token_init(
      kw["rngs"].params(), ((2 * window[0] - 1) * (2 * window[1] - 1), num_heads), kw["param_dtype"]
    )
    self.relative_position_bias_table = nnx.Param(table)
    self.qkv = layers.PackedQKV(dim, num_heads, **kw)
    self.proj = Linear(dim, dim, **kw)
    self.attn_drop = nnx.Dropout(attn_drop_rate)
    self.proj_drop = nnx.Dropout(proj_drop_rate)

  def attention_bias(self) -> jax.Array:
    """Returns the position bias, and the seam mask where the windows are shifted: (windows or 1, heads, n, n)."""
    table = self.relative_position_bias_table[...]
    table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    bias = table[relative_position_index(self.window)].transpose(2, 0, 1)[None]
    return bias + seam_mask(self.grid, self.window, self.shift) if any(self.shift) else bias

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Returns the new tokens (B, N, C)."""
    batch, tokens, dim = x.shape
    x = x.reshape(batch, *self.grid, dim)
    if any(self.shift):
      x = jnp.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
    qkv = self.qkv(layers.partition_windows(x, self.window))
    q, k, v = (qkv[:, :, :, i] for i in range(3))
    attn = layers.softmax_attention(q, k, self.scale, self.attention_bias())
    x = self.proj(layers.attend(drop(self.attn_drop, attn, rngs), v))
    x = layers.merge_windows(x, self.grid, self.window)
    if any(self.shift):
      x = jnp.roll(x, self.shift, (1, 2))
    return drop(self.proj_drop, x.reshape(batch, tokens, dim), rngs)


class SwinBlock(nnx.Module):
  """Window attention and MLP, each with pre-norm, residual and stochastic depth (equation 3)."""

  def __init__(
    self,
    dim: int,
    num_heads: int,
    grid: Grid,
    window: Grid,
    shift: Grid,
    mlp_ratio: float,
    drop_rate: float,
    attn_drop_rate: float,
    drop_path_rate: float,
    **kw,
  ):
    self.norm1 = LayerNorm(dim, **kw)
    self.attn = WindowAttention(dim, num_heads, grid, window, shift, attn_drop_rate, drop_rate, **kw)
    self.norm2 = LayerNorm(dim, **kw)
    self.mlp = layers.Mlp(dim, int(dim * mlp_ratio), drop_rate, **kw)
    self.drop_path = layers.DropPath(drop_path_rate)

  def attend(self, x: jax.Array, rngs: nnx.Rngs | None) -> tuple[jax.Array, Intermediates]:
    """Adds what the tokens tell each other."""
    return x + drop(self.drop_path, self.attn(self.norm1(x), rngs), rngs), {}

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, Intermediates]:
    """Returns the new tokens (B, N, C) and the intermediates, named by their place in this module."""
    x, out = self.attend(x, rngs)
    return x + drop(self.drop_path, self.mlp(self.norm2(x), rngs), rngs), out


class PatchMerging(nnx.Module):
  """Halves both sides and doubles the width: joins 2x2 neighbours, (B, N, C) to (B, N / 4, 2 C)."""

  def __init__(self, dim: int, grid: Grid, **kw):
    self.grid = grid
    self.norm = LayerNorm(4 * dim, **kw)
    self.reduction = Linear(4 * dim, 2 * dim, use_bias=False, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    batch, _, dim = x.shape
    rows, columns = self.grid
    # The released weights expect the four neighbours column by column.
    x = x.reshape(batch, rows // 2, 2, columns // 2, 2, dim).transpose(0, 1, 3, 4, 2, 5)
    return self.reduction(self.norm(x.reshape(batch, -1, 4 * dim)))


class PatchEmbed(layers.PatchEmbed):
  """Patch embedding with a norm."""

  def __init__(self, patch_size: int, dim: int, **kw):
    super().__init__(patch_size, dim, **kw)
    self.norm = LayerNorm(dim, **kw)

  def __call__(self, images: jax.Array) -> jax.Array:
    return self.norm(super().__call__(images))


class Stage(nnx.Module):
  """Blocks of one resolution, then `downsample` in all stages but the last."""

  def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None):
    self.blocks = nnx.List(blocks)
    self.downsample = downsample


class Swin(nnx.Module):
  """The whole classifier.

  Args:
    num_classes: classes of the head; 0 for none, which gives the pooled features instead of logits.
    image_size: (height, width) of the images; must divide by the patch size times 2 for each further stage.
    patch_size: side of a patch, pixels.
    embed_dim: width of the first stage; doubles with each stage.
    depths, num_heads: one value per stage.
    window_size: side of the windows, tokens; each stage takes the nearest divisor of its own sides
      (`layers.fit_window`). The authors' models for 384 pixels have 12.
    mlp_ratio: MLP expansion.
    drop_rate, attn_drop_rate: dropout of tokens and of attention weights.
    drop_path_rate: stochastic depth of the last block; rises linearly from 0.
    remat: keep only the blocks' inputs for the backward pass.

  Raises:
    UserError: an image size that does not divide, heads that do not divide a width.
  """

  def __init__(
    self,
    *,
    num_classes: int = 1000,
    image_size: tuple[int, int] = (224, 224),
    patch_size: int = 4,
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int = 7,
    mlp_ratio: float = 4,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    remat: bool = False,
    **kw,
  ):
    rows, columns = layers.patch_grid(image_size, patch_size * 2 ** (len(depths) - 1))
    self.image_size = image_size
    self.drop_rates = (drop_rate, attn_drop_rate, drop_path_rate)
    self.remat = remat
    self.dtype = kw["dtype"]
    self.depths = tuple(depths)
    self.patch_embed = PatchEmbed(patch_size, embed_dim, **kw)
    self.pos_drop = nnx.Dropout(drop_rate)

    self.grids = tuple((rows * 2**i, columns * 2**i) for i in reversed(range(len(depths))))
    rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
    self.layers = nnx.List()
    for i, (grid, heads) in enumerate(zip(self.grids, num_heads, strict=True)):
      dim = embed_dim * 2**i
      if dim % heads:
        raise UserError(f"width {dim} of stage {i} does not divide into {heads} heads; change embed_dim or num_heads")
      window = tuple(layers.fit_window(side, window_size) for side in grid)
      blocks = []
      for j in range(depths[i]):
        # Windows that span the image have nowhere to move.
        shift = tuple(w // 2 if j % 2 and w < side else 0 for w, side in zip(window, grid, strict=True))
        blocks.append(
          self.make_block(i, j)(
            dim, heads, grid, window, shift, mlp_ratio, drop_rate, attn_drop_rate, next(rates), **kw
          )
        )
      last = i == len(depths) - 1
      self.layers.append(Stage(blocks, None if last else PatchMerging(dim, grid, **kw)))
    self.norm = LayerNorm(dim, **kw)
    self.head = Linear(dim, num_classes, **kw) if num_classes else None

  def make_block(self, stage: int, index: int):
    """Returns what creates block `index` of `stage`; takes SwinBlock's arguments."""
    return SwinBlock

  def __call__(
    self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, Intermediates]:
    """Classifies normalised images (B, H, W, 3).

    Returns:
      logits (B, num_classes), at least float32; without a head the pooled features (B, C).
      out: `stages.{i}` (B, H / s, W / s, C_i) after the blocks of stage i, strides s = 4, 8, 16, 32;
        `pre_logits` (B, C) the mean of the normalised tokens; the blocks' own, under `layers.{i}.blocks.{j}`.

    Raises:
      UserError: images of another size, or train=True with positive drop rates and no rngs.
    """
    layers.check_images(images, self.image_size)
    rngs = layers.runtime_rngs(train, rngs, *self.drop_rates)
    x = drop(self.pos_drop, self.patch_embed(images.astype(self.dtype)), rngs)
    out = {}
    for i, (grid, stage) in enumerate(zip(self.grids, self.layers, strict=True)):
      for j, block in enumerate(stage.blocks):
        x, inner = layers.call(block, x, rngs, remat=self.remat)
        out |= {f"layers.{i}.blocks.{j}.{name}": value for name, value in inner.items()}
      out[f"stages.{i}"] = x.reshape(x.shape[0], *grid, -1)
      if stage.downsample is not None:
        x = stage.downsample(x)
    out["pre_logits"] = x = self.norm(x).mean(axis=1)
    if self.head is not None:
      x = self.head(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)), out
