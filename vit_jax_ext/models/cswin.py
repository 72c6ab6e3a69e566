"""CSWin Transformer: half of the heads attend in vertical stripes, half in horizontal ones.

Dong et al.: CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows, CVPR 2022,
arXiv 2107.00652. The authors' code is microsoft/CSWin-Transformer (MIT); attribute names follow its state dict.
Written anew.

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
from vit_jax_ext.models.layers import Conv, Linear, Sequential, drop

Intermediates = dict[str, jax.Array]
Grid = tuple[int, int]

LayerNorm = functools.partial(layers.LayerNorm, epsilon=1e-5)


def flatten(x: jax.Array) -> jax.Array:
  """(B, H, W, C) to tokens (B, H * W, C)."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


class StripeAttention(nnx.Module):
  """Attention inside stripes of some of the heads, plus locally-enhanced positions (section 3.3).

  The position term `get_v` is a depthwise convolution of the values that sees one stripe at a time.
  """

  def __init__(self, dim: int, num_heads: int, grid: Grid, stripe: Grid, attn_drop_rate: float = 0.0, **kw):
    self.grid, self.stripe = grid, stripe
    self.num_heads = num_heads
    self.scale = (dim // num_heads) ** -0.5
    self.get_v = layers.DepthwiseConv(dim, **kw)
    self.attn_drop = nnx.Dropout(attn_drop_rate)

  def __call__(self, qkv: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Returns the new tokens (B, N, C) from queries, keys and values (B, N, 3, heads, head_dim)."""
    batch, tokens, _, heads, width = qkv.shape
    grids = (qkv[:, :, i].reshape(batch, *self.grid, heads * width) for i in range(3))
    stripes = (layers.partition_windows(grid, self.stripe) for grid in grids)
    q, k, v = (stripe.reshape(*stripe.shape[:3], heads, width) for stripe in stripes)
    attn = layers.softmax_attention(q, k, self.scale)
    x = layers.attend(drop(self.attn_drop, attn, rngs), v)
    x = x + self.get_v(v.reshape(-1, *self.stripe, heads * width)).reshape(x.shape)
    return layers.merge_windows(x, self.grid, self.stripe).reshape(batch, tokens, heads * width)


class JoinShares(nnx.Linear):
  """Projection of the stripes' shares of the channels, (..., shares, C / shares) to (..., C).

  Unpacks its kernel as PackedQKV does, and for the same reason.
  """

  def __init__(self, dim: int, **kw):
    super().__init__(dim, dim, kernel_init=layers.token_init, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel, bias = (param[...].astype(self.dtype) for param in (self.kernel, self.bias))
    return jnp.tensordot(x.astype(self.dtype), kernel.reshape(*x.shape[-2:], -1), 2) + bias


class CSWinBlock(nnx.Module):
  """Cross-shaped window attention and MLP, each with pre-norm, residual and stochastic depth (equation 6).

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
    self.norm1 = LayerNorm(dim, **kw)
    share = len(stripes)
    self.qkv = layers.PackedQKV(dim, share, num_heads // share, **kw)
    self.attns = nnx.List(
      StripeAttention(dim // share, num_heads // share, grid, stripe, attn_drop_rate, **kw) for stripe in stripes
    )
    self.proj = JoinShares(dim, **kw)
    self.norm2 = LayerNorm(dim, **kw)
    self.mlp = layers.Mlp(dim, int(dim * mlp_ratio), drop_rate, **kw)
    self.drop_path = layers.DropPath(drop_path_rate)

  def attend(self, x: jax.Array, rngs: nnx.Rngs | None) -> tuple[jax.Array, Intermediates]:
    """Adds what the tokens tell each other."""
    qkv = self.qkv(self.norm1(x))
    y = jnp.stack([attn(qkv[:, :, :, i], rngs) for i, attn in enumerate(self.attns)], axis=-2)
    return x + drop(self.drop_path, self.proj(y), rngs), {}

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, Intermediates]:
    """Returns the new tokens (B, N, C) and the intermediates, named by their place in this module."""
    x, out = self.attend(x, rngs)
    return x + drop(self.drop_path, self.mlp(self.norm2(x), rngs), rngs), out


class MergeBlock(nnx.Module):
  """Halves both sides and doubles the width by a convolution: (B, N, C) to (B, N / 4, 2 C)."""

  def __init__(self, dim: int, grid: Grid, **kw):
    self.grid = grid
    self.conv = Conv(dim, 2 * dim, (3, 3), strides=2, padding=((1, 1), (1, 1)), **kw)
    self.norm = LayerNorm(2 * dim, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.norm(flatten(self.conv(x.reshape(x.shape[0], *self.grid, -1))))


class CSWin(nnx.Module):
  """The whole classifier.

  Args:
    num_classes: classes of the head; 0 for none, which gives the pooled features instead of logits.
    image_size: (height, width) of the images; must divide by 4 times 2 for each further stage.
    embed_dim: width of the first stage; doubles with each stage.
    depth, num_heads: one value per stage.
    split_size: width of the stripes of each stage, tokens; a stage takes the nearest divisor of its own sides
      (`layers.fit_window`). In the last stage one window spans the image. The authors' models for 384 pixels have
      (1, 2, 12, 12).
    mlp_ratio: MLP expansion.
    drop_rate, attn_drop_rate: dropout of MLP activations and of attention weights.
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
    embed_dim: int = 64,
    depth: Sequence[int] = (1, 2, 21, 1),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    split_size: Sequence[int] = (1, 2, 7, 7),
    mlp_ratio: float = 4,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    remat: bool = False,
    **kw,
  ):
    stages = len(depth)
    rows, columns = layers.patch_grid(image_size, 4 * 2 ** (stages - 1))
    self.image_size = image_size
    self.drop_rates = (drop_rate, attn_drop_rate, drop_path_rate)
    self.remat = remat
    self.dtype = kw["dtype"]
    self.depth = tuple(depth)
    stem = Conv(3, embed_dim, (7, 7), strides=4, padding=((2, 2), (2, 2)), **kw)
    self.stage1_conv_embed = Sequential([stem, flatten, LayerNorm(embed_dim, **kw)])

    self.grids = tuple((rows * 2**i, columns * 2**i) for i in reversed(range(stages)))
    rates = iter(np.linspace(0, drop_path_rate, sum(depth)).tolist())
    for i, (grid, heads, split) in enumerate(zip(self.grids, num_heads, split_size, strict=True)):
      dim, last = embed_dim * 2**i, i == stages - 1
      if dim % heads or (heads % 2 and not last):
        raise UserError(
          f"{heads} heads of stage {i} do not divide its width {dim}, or are odd; change embed_dim or num_heads"
        )
      if i:
        setattr(self, f"merge{i}", MergeBlock(dim // 2, self.grids[i - 1], **kw))
      vertical = (grid[0], layers.fit_window(grid[1], split))
      horizontal = (layers.fit_window(grid[0], split), grid[1])
      stripes = [grid] if last else [vertical, horizontal]
      blocks = nnx.List(
        self.make_block(i, j)(dim, heads, grid, stripes, mlp_ratio, drop_rate, attn_drop_rate, next(rates), **kw)
        for j in range(depth[i])
      )
      setattr(self, f"stage{i + 1}", blocks)
    self.norm = LayerNorm(dim, **kw)
    self.head = Linear(dim, num_classes, **kw) if num_classes else None

  def make_block(self, stage: int, index: int):
    """Returns what creates block `index` of `stage`; takes CSWinBlock's arguments."""
    return CSWinBlock

  def __call__(
    self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, Intermediates]:
    """Classifies normalised images (B, H, W, 3).

    Returns:
      logits (B, num_classes), at least float32; without a head the pooled features (B, C).
      out: `stages.{i}` (B, H / s, W / s, C_i) after the blocks of stage i, strides s = 4, 8, 16, 32;
        `pre_logits` (B, C) the mean of the normalised tokens; the blocks' own, under `stage{i + 1}.{j}`.

    Raises:
      UserError: images of another size, or train=True with positive drop rates and no rngs.
    """
    layers.check_images(images, self.image_size)
    rngs = layers.runtime_rngs(train, rngs, *self.drop_rates)
    x = self.stage1_conv_embed(images.astype(self.dtype))
    out = {}
    for i, grid in enumerate(self.grids):
      if i:
        x = getattr(self, f"merge{i}")(x)
      for j, block in enumerate(getattr(self, f"stage{i + 1}")):
        x, inner = layers.call(block, x, rngs, remat=self.remat)
        out |= {f"stage{i + 1}.{j}.{name}": value for name, value in inner.items()}
      out[f"stages.{i}"] = x.reshape(x.shape[0], *grid, -1)
    out["pre_logits"] = x = self.norm(x).mean(axis=1)
    if self.head is not None:
      x = self.head(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)), out
