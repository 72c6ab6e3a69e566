"""Swin Transformer: attention inside windows that shift by half between blocks, four stages of falling resolution.

Liu et al.: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, arXiv 2103.14030.
The authors' code is microsoft/Swin-Transformer (MIT); attribute names follow its state dict. Written anew.

Tokens are (B, N, C), row by row; `grid` is the (rows, columns) they lie on.
"""

from collections.abc import Callable, Iterator, Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.models import fused_merging, layers
from vit_jax_ext.models.dropout import drop, keep_factors
from vit_jax_ext.models.fused_windows import Windows, attend_packed_windows, attend_windows
from vit_jax_ext.models.kernels import can_pack
from vit_jax_ext.models.layers import Linear
from vit_jax_ext.models.pyramid import Grid, Intermediates, LayerNorm, Pyramid, PyramidBlock


@functools.cache
def relative_position_index(window: Grid) -> np.ndarray:
  """Returns, for each pair of places in a window, the row of the bias table: (tokens, tokens) int32 (section 3.2).

  Not int64: JAX (0.10) keeps what it made of an array while a program holds it, even if x64 is switched on meanwhile.
  """
  h, w = window
  place = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij")).reshape(2, -1)
  offset = place[:, :, None] - place[:, None]
  return ((offset[0] + h - 1) * (2 * w - 1) + offset[1] + w - 1).astype(np.int32)


@functools.cache
def seam_mask(grid: Grid, window: Grid, shift: Grid) -> np.ndarray:
  """Returns 0 for tokens that are neighbours in the image, -inf across the seam of a cyclic shift: (windows, n, n).

  Only the last row and column of windows hold a seam (figure 4).
  """
  row, column = (np.arange(side) >= side - by for side, by in zip(grid, shift, strict=True))
  region = (2 * row[:, None] + column).reshape(1, *grid, 1)
  region = layers.partition_windows(region, window)[0, :, :, 0]
  return np.where(region[:, :, None] == region[:, None, :], 0.0, -np.inf).astype(np.float32)


class WindowAttention(layers.MultiHeadAttention):
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
    super().__init__(dim, num_heads, attn_drop_rate, proj_drop_rate)
    self.grid, self.window, self.shift = grid, window, shift
    table = layers.token_init(
      kw["rngs"].params(), ((2 * window[0] - 1) * (2 * window[1] - 1), num_heads), kw["param_dtype"]
    )
    self.relative_position_bias_table = nnx.Param(table)
    self.qkv = layers.PackedQKV(dim, **kw)
    self.proj = Linear(dim, dim, **kw)

  @property
  def windows(self) -> Windows:
    """Where the windows lie."""
    return Windows(self.grid, self.window, self.shift)

  def attention_bias(self) -> jax.Array:
    """Returns the bias of each relative position, (heads, n, n), at least float32."""
    table = self.relative_position_bias_table[...]
    table = table.astype(layers.widest(table.dtype))
    return table[relative_position_index(self.window)].transpose(2, 0, 1)

  def mask(self) -> np.ndarray | None:
    """Returns the mask of the seams of shifted windows."""
    return seam_mask(self.grid, self.window, self.shift) if any(self.shift) else None

  def is_fused_whole(self, x: jax.Array, rngs: nnx.Rngs | None) -> bool:
    """Returns whether kernels do it all, from the norm of the residual stream x to the sum."""
    normed = jax.ShapeDtypeStruct(x.shape, self.qkv.dtype)
    fused = layers.projections_are_fused(x, self.qkv, rngs, self.proj_drop)
    return fused and self.windows_are_fused(normed, self.windows, rngs)

  def attend_fused(self, qkv: list[jax.Array]) -> jax.Array:
    """Returns what attention gives (B, N, C), before the projection; `qkv` are three arrays, or one that has all."""
    bias, mask = self.attention_bias(), self.mask()
    if len(qkv) == 1:
      return attend_packed_windows(*qkv, bias, mask, self.windows, self.num_heads, self.scale)
    return attend_windows(*qkv, bias, mask, self.windows, qkv[0].shape[-1] // self.num_heads, self.scale)

  def add_to(self, x: jax.Array, norm: LayerNorm, keep: jax.Array) -> jax.Array:
    """Returns x + keep * self(norm(x)) where `is_fused_whole`; keep (B, 1, 1)."""
    x, (qkv,) = self.qkv.after_norm(x, norm, packed=can_pack(x.shape[-1], self.num_heads))
    return self.proj.add_to(x, [[self.attend_fused(qkv)]], keep)

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Returns the new tokens (B, N, C)."""
    batch, tokens, dim = x.shape
    if self.windows_are_fused(x, self.windows, rngs):
      packed = can_pack(dim, self.num_heads)
      qkv = [self.qkv.side_by_side(x, self.num_heads)] if packed else self.qkv(x)
      return drop(self.proj_drop, self.proj(self.attend_fused(qkv)), rngs)
    mask = self.mask()
    x = x.reshape(batch, *self.grid, dim)
    if any(self.shift):
      x = jnp.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
    q, k, v = self.qkv(layers.partition_windows(x, self.window))
    x, _ = self.attend(q, k, v, rngs, bias=self.attention_bias(), mask=None if mask is None else jnp.asarray(mask))
    x = layers.merge_windows(self.proj(x), self.grid, self.window)
    if any(self.shift):
      x = jnp.roll(x, self.shift, (1, 2))
    return drop(self.proj_drop, x.reshape(batch, tokens, dim), rngs)


class SwinBlock(PyramidBlock):
  """Window attention and MLP (equation 3)."""

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
    super().__init__(dim, mlp_ratio, drop_rate, drop_path_rate, **kw)

  def attend(self, x: jax.Array, rngs: nnx.Rngs | None) -> tuple[jax.Array, Intermediates]:
    if self.attn.is_fused_whole(x, rngs):
      return self.attn.add_to(x, self.norm1, keep_factors(self.drop_path, x, rngs)), {}
    return x + drop(self.drop_path, self.attn(self.norm1(x), rngs), rngs), {}


class PatchMerging(nnx.Module):
  """Halves both sides and doubles the width: joins 2x2 neighbours, (B, N, C) to (B, N / 4, 2 C).

  Attributes:
    implementation: auto, or reference for no kernel; set by `registry.create_model`.
  """

  def __init__(self, dim: int, grid: Grid, **kw):
    self.grid, self.implementation = grid, "auto"
    self.norm = LayerNorm(4 * dim, **kw)
    self.reduction = Linear(4 * dim, 2 * dim, use_bias=False, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    batch, _, dim = x.shape
    rows, columns = self.grid
    if layers.platform() == "tpu":
      if self.implementation != "reference" and fused_merging.fits(x, self.reduction.dtype):
        parameters = self.norm.scale, self.norm.bias, self.reduction.kernel
        weights = (parameter[...].astype(jnp.float32) for parameter in parameters)
        return fused_merging.merge(x, *weights, self.grid, self.norm.epsilon, self.reduction.dtype)
      return self._convolve(x.reshape(batch, rows, columns, dim)).reshape(batch, -1, 2 * dim).astype(x.dtype)
    # The released weights expect the four neighbours column by column.
    x = x.reshape(batch, rows // 2, 2, columns // 2, 2, dim).transpose(0, 1, 3, 4, 2, 5)
    return self.reduction(self.norm(x.reshape(batch, -1, 4 * dim))).astype(x.dtype)

  def _convolve(self, x: jax.Array) -> jax.Array:
    """Returns the same from (B, H, W, C) as a convolution, which reads the neighbours where they lie.

    To bring them together is what TPUs take longest for. The norm does the same to all four; its scale and bias go
    into the convolution's.
    """
    x, dtype = x.astype(self.norm.dtype), self.reduction.dtype
    cells = (x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2)

    def mean(x):
      """Returns the mean of the four neighbours' channels, for each of them, (B, H, W, 1)."""
      means = x.mean(-1).reshape(cells).mean((2, 4), keepdims=True)
      return jnp.broadcast_to(means, cells).reshape(*x.shape[:-1], 1)

    centre = mean(x)
    variance = jnp.maximum(mean(x * x) - centre * centre, 0)
    x = (x - centre) * jax.lax.rsqrt(variance + self.norm.epsilon)
    kernel = self.reduction.kernel[...].astype(x.dtype)
    bias = self.norm.bias[...].astype(x.dtype) @ kernel
    kernel = (kernel * self.norm.scale[...].astype(x.dtype)[:, None]).reshape(2, 2, -1, kernel.shape[-1])
    x = jax.lax.conv_general_dilated(
      x.astype(dtype), kernel.swapaxes(0, 1).astype(dtype), (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return x + bias


class PatchEmbed(layers.PatchEmbed):
  """Patch embedding with a norm."""

  def __init__(self, patch_size: int, dim: int, **kw):
    super().__init__(patch_size, dim, **kw)
    self.norm = LayerNorm(dim, stream=True, **kw)

  def __call__(self, images: jax.Array) -> jax.Array:
    return self.norm(super().__call__(images))


class Stage(nnx.Module):
  """Blocks of one resolution, then `downsample` in all stages but the last."""

  def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None):
    self.blocks = nnx.List(blocks)
    self.downsample = downsample


class Swin(Pyramid):
  """The whole classifier; see Pyramid for the other arguments, for its call and intermediates.

  Args:
    patch_size: side of a patch, pixels.
    embed_dim: width of the first stage; doubles with each stage.
    depths, num_heads: blocks and heads, of each stage.
    window_size: side of the windows, tokens; each stage takes the nearest divisor of its own sides
      (`layers.fit_window`). The authors' models for 384 pixels have 12.
  """

  merging = PatchMerging

  def __init__(
    self,
    *,
    patch_size: int = 4,
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int = 7,
    **kw,
  ):
    self.patch_size, self.depths, self.window_size = patch_size, tuple(depths), window_size
    self.layers = nnx.List()
    super().__init__(embed_dim=embed_dim, num_heads=num_heads, **kw)

  def add_embedding(self, dim: int, drop_rate: float, **kw) -> None:
    self.patch_embed = PatchEmbed(self.patch_size, dim, **kw)
    self.pos_drop = nnx.Dropout(drop_rate)

  def embed(self, images: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
    return drop(self.pos_drop, self.patch_embed(images), rngs)

  def block_arguments(self, stage: int, index: int) -> tuple[Grid, Grid]:
    """Returns the window, and by how many tokens it is shifted: in every other block by half."""
    grid = self.grids[stage]
    window = tuple(layers.fit_window(side, self.window_size) for side in grid)
    # Windows that span the image have nowhere to move.
    return window, tuple(w // 2 if index % 2 and w < side else 0 for w, side in zip(window, grid, strict=True))

  def make_block(self, stage: int, index: int) -> Callable[..., SwinBlock]:
    return SwinBlock

  def add_stage(self, stage: int, blocks: list[SwinBlock], merging: PatchMerging | None) -> None:
    self.layers.append(Stage(blocks, merging))

  def stages(self) -> Iterator[tuple[str, Sequence[SwinBlock], PatchMerging | None]]:
    for i, stage in enumerate(self.layers):
      yield f"layers.{i}.blocks", stage.blocks, stage.downsample
