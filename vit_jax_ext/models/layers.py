"""What two or more architectures share: patch embedding, attention, windows, MLP, block.

Shapes: images are (B, H, W, 3), token sequences (B, N, C), attention maps (B, heads, queries, keys).
Every module takes `dtype` (of matrix products and convolutions), `param_dtype` (of the parameters) and `rngs` (which
draws the initial parameters and is not kept). Randomness at run time is an argument, `rngs=nnx.Rngs(key)`; without it
nothing is dropped. `train` is an argument too, where a subclass or a sibling has batch statistics: then it says whose
to use.

Precision is mixed as under torch's autocast and in big_vision: the residual stream with its class token and position
embedding, norms, softmax, biases and logits are at least float32, whatever `dtype` is, and so are the sums of their
gradients. What a product takes and gives is of `dtype`.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import fused_depthwise, fused_mlp, fused_norm, fused_projections, initial
from vit_jax_ext.models.attention import attend, attend_packed, is_fused, platform, widest
from vit_jax_ext.models.dropout import DropPath, drop, keep_factors
from vit_jax_ext.models.fused_windows import Windows
from vit_jax_ext.models.gelu import gelu
from vit_jax_ext.models.kernels import can_pack, pack

# timm's trunc_normal_(std=0.02) cuts at an absolute 2, a hundred standard deviations away: it is a plain normal.
token_init = initial.normal(0.02)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a bias in at least float32, in which its gradient is then summed; the dtype of x stays."""
  if platform() == "tpu" and x.dtype == jnp.bfloat16 and x.ndim == 3:
    return _add_bias_to_tokens(x, bias)
  dtype = widest(x.dtype)
  return (x.astype(dtype) + bias.astype(dtype)).astype(x.dtype)


@jax.custom_vjp
def _add_bias_to_tokens(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Does it for bfloat16 tokens (B, N, C), with a product as gradient: a TPU's vector unit takes longer to sum."""
  return (x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _add_bias_backward(bias: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
  # Behind a barrier, as the compiler makes a sum of a product with ones that it knows; 8 rows fill a tile.
  ones = jax.lax.optimization_barrier(jnp.ones((len(grad), 8, grad.shape[1]), grad.dtype))
  sums = jnp.einsum("bkn,bnc->kc", ones, grad, preferred_element_type=jnp.float32)
  return grad, sums[0].astype(bias.dtype)


_add_bias_to_tokens.defvjp(lambda x, bias: (_add_bias_to_tokens(x, bias), bias), _add_bias_backward)


class Linear(nnx.Linear):
  """A matrix product in `dtype`, (..., dim_in) to (..., dim_out), and a bias."""

  def __init__(self, dim_in: int, dim_out: int, **kw):
    super().__init__(dim_in, dim_out, kernel_init=token_init, bias_init=initial.constant(0), **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
    return x if self.bias is None else add_bias(x, self.bias[...])

  def add_to(self, x: jax.Array, ys: list[list[jax.Array]], keep: jax.Array) -> jax.Array:
    """Returns x + keep * self(y) by a kernel, see `fused_projections.add_projected`."""
    return fused_projections.add_projected(x, ys, keep, _weight_and_bias(self))


class Conv(nnx.Conv):
  """A convolution in `dtype`, (B, H, W, dim_in) to (B, H', W', dim_out), and a bias.

  Args:
    padding: pixels on every side.
    groups: of channels that do not see each other.
  """

  def __init__(
    self, dim_in: int, dim_out: int, kernel: int, *, stride: int = 1, padding: int = 0, groups: int = 1, **kw
  ):
    # torch's default, kaiming_uniform(a=sqrt(5)) and likewise the bias: uniform within 1 / sqrt(fan_in).
    init = initial.uniform((kernel**2 * dim_in // groups) ** -0.5)
    super().__init__(
      dim_in, dim_out, (kernel, kernel), strides=(stride, stride), padding=((padding, padding),) * 2,
      feature_group_count=groups, kernel_init=init, bias_init=init, **kw,
    )  # fmt: skip

  def __call__(self, x: jax.Array) -> jax.Array:
    x = jax.lax.conv_general_dilated(
      x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.strides, self.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=self.feature_group_count,
    )  # fmt: skip
    return x if self.bias is None else add_bias(x, self.bias[...])


class Head(Linear):
  """The classifier, in at least float32."""

  def __init__(self, dim: int, num_classes: int, *, dtype: jnp.dtype, **kw):
    super().__init__(dim, num_classes, dtype=widest(dtype), **kw)


class LayerNorm(nnx.LayerNorm):
  """LayerNorm in at least float32.

  Args:
    stream: what it gives stays in the residual stream, at least float32; else it is for a product, and of `dtype`.

  Attributes:
    implementation: auto, or reference for no kernel; set by `registry.create_model`.
  """

  def __init__(self, dim: int, *, dtype: jnp.dtype, stream: bool = False, epsilon: float = 1e-6, **kw):
    ones, zeros = initial.constant(1), initial.constant(0)
    super().__init__(dim, dtype=widest(dtype), epsilon=epsilon, scale_init=ones, bias_init=zeros, **kw)
    self.out_dtype, self.implementation = self.dtype if stream else dtype, "auto"

  def __call__(self, x: jax.Array) -> jax.Array:
    taken = platform() == "tpu" and self.implementation != "reference" and self.out_dtype == jnp.float32
    if taken and fused_norm.fits(x):
      return fused_norm.normalise(x, *_weight_and_bias(self), self.epsilon)
    return super().__call__(x).astype(self.out_dtype)


def _weight_and_bias(layer: LayerNorm | Linear) -> tuple[jax.Array, jax.Array]:
  """Returns scale or kernel, and bias, as kernels for TPUs take them."""
  weight = layer.scale if isinstance(layer, LayerNorm) else layer.kernel
  return weight[...].astype(jnp.float32), layer.bias[...].astype(jnp.float32)


class Sequential(nnx.List):
  """Callables applied in turn; parameters are found under the index, as in torch's Sequential."""

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in self:
      x = layer(x)
    return x


def patch_grid(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
  """Returns (rows, columns) of patches.

  Raises:
    UserError: if a side does not divide into patches; names the nearest sizes that do.
  """
  for side in image_size:
    if side < patch_size or side % patch_size:
      below = side // patch_size * patch_size
      nearest = " and ".join(str(size) for size in (below, below + patch_size) if size)
      raise UserError(
        f"image_size {side} does not divide into {patch_size}-pixel patches; the nearest sizes are {nearest}"
      )
  return image_size[0] // patch_size, image_size[1] // patch_size


def check_images(images: jax.Array, image_size: tuple[int, int]) -> None:
  """Checks that images are floating-point numbers (B, *image_size, 3).

  Raises:
    UserError: they are not; says what the model takes.
  """
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f"images of type {images.dtype} are not normalised; give floating-point ones, (images / 255 - mean) / std with "
      "mean and std of vit_jax_ext.models.registry.get_variant(name)"
    )
  if images.shape[1:] == (*image_size, 3):
    return
  takes = f"images of shape {images.shape} do not fit; this model takes (batch, {image_size[0]}, {image_size[1]}, 3)"
  if images.ndim != 4:
    raise UserError(f"{takes}, four dimensions; stack images, or add one with images[None]")
  if images.shape[1] == 3 and images.shape[3] != 3:
    raise UserError(f"{takes}, channels last; give images.transpose(0, 2, 3, 1)")
  if images.shape[3] != 3:
    raise UserError(f"{takes}, three colours; convert them to RGB")
  raise UserError(f"{takes}: resize them, or create the model with image_size={images.shape[1:3]}")


def fit_window(side: int, window_size: int) -> int:
  """Returns the divisor of `side` whose ratio to `window_size` is nearest to 1; of two, the larger.

  With the papers' 7 it is 7 wherever 7 divides (224, 448 pixels), and 8 in every stage at 256 pixels.
  """
  divisors = (d for d in range(1, side + 1) if side % d == 0)
  return min(divisors, key=lambda d: (abs(math.log(d / window_size)), -d))


def partition_windows(x: jax.Array, window: tuple[int, int]) -> jax.Array:
  """Cuts (B, H, W, C) into windows of (height, width), row by row: (B, windows, height * width, C)."""
  batch, rows, columns, dim = x.shape
  h, w = window
  x = x.reshape(batch, rows // h, h, columns // w, w, dim).swapaxes(2, 3)
  return x.reshape(batch, -1, h * w, dim)


def merge_windows(x: jax.Array, grid: tuple[int, int], window: tuple[int, int]) -> jax.Array:
  """Inverse of `partition_windows`: (B, windows, height * width, C) back to (B, *grid, C)."""
  (rows, columns), (h, w) = grid, window
  x = x.reshape(x.shape[0], rows // h, columns // w, h, w, -1).swapaxes(2, 3)
  return x.reshape(x.shape[0], rows, columns, -1)


class PatchEmbed(nnx.Module):
  """Images (B, H, W, 3) to tokens (B, rows * columns, dim) by one strided convolution."""

  def __init__(self, patch_size: int, dim: int, **kw):
    self.proj = Conv(3, dim, patch_size, stride=patch_size, **kw)

  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    x = self.proj(images)
    return x.reshape(x.shape[0], -1, x.shape[-1])


class DepthwiseConv(Conv):
  """3x3 convolution of each channel by itself, (B, H, W, dim) to the same: the position term of CSWin and BOAT.

  A sum over nine shifted images: on CPU 4 to 50 times as fast as XLA's grouped convolution, forward and backward. On
  TPUs a kernel (fused_depthwise), unless devices share the channels of an image.

  Attributes:
    implementation: auto, or reference for no kernel; set by `registry.create_model`.
  """

  def __init__(self, dim: int, **kw):
    super().__init__(dim, dim, 3, padding=1, groups=dim, **kw)
    self.implementation = "auto"

  def taps(self) -> jax.Array:
    """Returns the kernel's nine rows and the bias, (10, C), at least float32."""
    kernel = self.kernel[...].reshape(9, -1)
    return jnp.concatenate([kernel, self.bias[...][None]]).astype(widest(self.dtype))

  def __call__(self, x: jax.Array, stripe: tuple[int, int] | None = None) -> jax.Array:
    """Returns x convolved; parts of (height, width) `stripe`, if given, see nothing of each other."""
    dtype, grid = widest(self.dtype), x.shape[1:3]
    x, kernel, bias = x.astype(self.dtype), self.kernel[...][:, :, 0].astype(dtype), self.bias[...].astype(dtype)
    shared = jax.sharding.get_abstract_mesh().shape.get("model", 1) > 1
    taken = platform() == "tpu" and x.dtype in (jnp.bfloat16, jnp.float32) and not shared
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    if taken and self.implementation != "reference" and fused_depthwise.fits(tokens, grid):
      return fused_depthwise.depthwise_conv(tokens, kernel.reshape(9, -1), bias[None], grid, stripe).reshape(x.shape)
    if stripe is not None:
      stripes = partition_windows(x, stripe)
      return merge_windows(self(stripes.reshape(-1, *stripe, x.shape[-1])).reshape(stripes.shape), grid, stripe)
    rows, columns = grid
    padded = jnp.pad(x.astype(dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = (padded[:, i : i + rows, j : j + columns] * kernel[i, j] for i in range(3) for j in range(3))
    return (sum(taps) + bias).astype(self.dtype)


class Mlp(nnx.Module):
  """Linear, GELU, dropout, Linear, dropout.

  Attributes:
    implementation: auto, or reference for no kernel; set by `registry.create_model`.
  """

  def __init__(self, dim: int, hidden_dim: int, drop_rate: float = 0.0, **kw):
    self.implementation = "auto"
    self.fc1 = Linear(dim, hidden_dim, **kw)
    self.fc2 = Linear(hidden_dim, dim, **kw)
    self.drop = nnx.Dropout(drop_rate)

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
    x = drop(self.drop, gelu(self.fc1(x)), rngs)
    return drop(self.drop, self.fc2(x), rngs)

  def add_to(
    self, x: jax.Array, norm: LayerNorm, drop_path: nnx.Dropout, rngs: nnx.Rngs | None, adjustment: float = 1.0
  ) -> jax.Array:
    """Returns x + self(norm(x * adjustment)) / adjustment, with stochastic depth; by a kernel for TPUs if one fits."""
    taken = platform() == "tpu" and self.implementation != "reference" and not (rngs and self.drop.rate)
    if taken and fused_mlp.fits(x, self.fc1.dtype, self.fc1.out_features):
      weights, epsilon = (_weight_and_bias(layer) for layer in (norm, self.fc1, self.fc2)), norm.epsilon / adjustment**2
      return fused_mlp.add_mlp(x, keep_factors(drop_path, x, rngs) / adjustment, *weights, epsilon, self.fc1.dtype)
    return x + drop(drop_path, self(norm(x * adjustment), rngs), rngs) / adjustment


def projections_are_fused(
  x: jax.Array,
  qkv: Linear,
  rngs: nnx.Rngs | None,
  proj_drop: nnx.Dropout | None = None,
  values: int = 1,
  shares: int = 1,
) -> bool:
  """Returns whether kernels lead from the residual stream x to queries, keys and values, and back to it.

  Args:
    x, rngs: of the block.
    qkv: the projection.
    proj_drop: dropout of the result, which the kernels do not know.
    values, shares: see `PackedQKV.after_norm`.
  """
  dropped = rngs and proj_drop is not None and proj_drop.rate
  arrays = shares * (2 + values)
  return platform() == "tpu" and not dropped and fused_projections.fits(x, qkv.dtype, arrays, shares)


def head_dim(dim: int, num_heads: int) -> int:
  """Returns the width of one head.

  Raises:
    UserError: the heads do not divide the width.
  """
  if dim % num_heads:
    raise UserError(f"embed_dim {dim} does not divide into {num_heads} heads; change embed_dim or num_heads")
  return dim // num_heads


class PackedQKV(Linear):
  """Projection to queries, keys and values, (..., C) to three of (..., C), packed in one kernel (C, 3 C).

  For kernels that read all three from one array, `side_by_side`. Else three products on TPUs, or the result would have
  to be copied apart. Elsewhere one, or parts of the kernel are copied; and one where devices share the heads of an
  image, or the gradient of x would be summed over the devices three times.
  """

  def __init__(self, dim: int, **kw):
    super().__init__(dim, 3 * dim, **kw)

  def __call__(self, x: jax.Array, share: int = 0, shares: int = 1) -> list[jax.Array]:
    """Returns queries, keys and values; of one of `shares` equal sets of heads alone, (..., C / shares)."""
    x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
    kernel = kernel.reshape(len(kernel), 3, shares, -1)[:, :, share]
    bias = self.bias[...].reshape(3, shares, -1)[:, share]
    if platform() != "tpu" or jax.sharding.get_abstract_mesh().shape.get("model", 1) > 1:
      return [*jnp.moveaxis(add_bias(jnp.tensordot(x, kernel, 1), bias), -2, 0)]
    return [add_bias(x @ kernel[:, i], bias[i]) for i in range(3)]

  def after_norm(
    self, x: jax.Array, norm: LayerNorm, values: int = 1, shares: int = 1, packed: bool = False, adjustment: float = 1.0
  ) -> tuple[jax.Array, list[list[jax.Array]]]:
    """Returns x, for the residual, and what self(norm(x * adjustment)) has for each of `shares`, by a kernel for TPUs.

    Args:
      x, norm: see `fused_projections.project_normed`.
      values: how often values are returned, for as many uses.
      shares: as above.
      packed: side by side, in one array for each share, instead.
    """
    scale_and_bias, (kernel, bias) = _weight_and_bias(norm), _weight_and_bias(self)
    if packed:
      parts, size = [*range(shares)], 1
      kernel, bias = (y.reshape(*y.shape[:-1], 3, shares, -1).swapaxes(-3, -2).reshape(y.shape) for y in (kernel, bias))
    else:
      parts, size = [share + part * shares for share in range(shares) for part in (0, 1, *[2] * values)], 2 + values
    epsilon = norm.epsilon / adjustment**2
    x, found = fused_projections.project_normed(x, scale_and_bias, (kernel, bias), tuple(parts), epsilon, self.dtype)
    return x, [found[i : i + size] for i in range(0, len(found), size)]

  def side_by_side(self, x: jax.Array, num_heads: int, share: int = 0, shares: int = 1) -> jax.Array:
    """Returns queries, keys and values in one array (..., 3 C / shares), as `kernels.pack` orders them.

    Args:
      num_heads: of the share.
      share, shares: as above.
    """

    def own(columns):
      if shares > 1:
        columns = jnp.concatenate(jnp.split(columns, 3 * shares, axis=-1)[share::shares], axis=-1)
      return pack(columns, num_heads)

    return add_bias(x.astype(self.dtype) @ own(self.kernel[...].astype(self.dtype)), own(self.bias[...]))


class MultiHeadAttention(nnx.Module):
  """What all kinds of attention have: heads, the scale of the logits, dropout of maps and of the result.

  Attributes:
    implementation: see `attention.attend`; set by `registry.create_model`.
  """

  def __init__(self, dim: int, num_heads: int, attn_drop_rate: float, proj_drop_rate: float):
    self.num_heads = num_heads
    self.scale = head_dim(dim, num_heads) ** -0.5
    self.implementation = "auto"
    self.attn_drop = nnx.Dropout(attn_drop_rate)
    self.proj_drop = nnx.Dropout(proj_drop_rate)

  def attend(self, q, k, v, rngs: nnx.Rngs | None, **kw) -> tuple[jax.Array, jax.Array]:
    """Calls `attention.attend` with what the module knows; **kw: bias, mask."""
    return attend(q, k, v, scale=self.scale, **self._known(rngs), **kw)

  def is_fused(self, q, k, rngs: nnx.Rngs | None) -> bool:
    """Calls `attention.is_fused` with what the module knows."""
    return is_fused(q, k, **self._known(rngs))

  def windows_are_fused(self, x: jax.Array, windows: Windows, rngs: nnx.Rngs | None) -> bool:
    """Returns whether a kernel finds the windows of x (B, tokens, C) itself; a single one needs none."""
    tokens = jax.ShapeDtypeStruct((x.shape[0], windows.number, math.prod(windows.window), x.shape[-1]), x.dtype)
    return windows.number > 1 and self.is_fused(tokens, tokens, rngs) and windows.fits(x, x.shape[-1] // self.num_heads)

  def _known(self, rngs: nnx.Rngs | None) -> dict[str, Any]:
    dropped = functools.partial(drop, self.attn_drop, rngs=rngs) if rngs and self.attn_drop.rate else None
    return dict(num_heads=self.num_heads, drop=dropped, implementation=self.implementation)


class Attention(MultiHeadAttention):
  """Multi-head self-attention with packed qkv."""

  def __init__(self, dim: int, num_heads: int, attn_drop_rate: float = 0.0, proj_drop_rate: float = 0.0, **kw):
    super().__init__(dim, num_heads, attn_drop_rate, proj_drop_rate)
    self.qkv = PackedQKV(dim, **kw)
    self.proj = Linear(dim, dim, **kw)

  def attend_packed(self, qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what `attend_tokens` does of queries, keys and values side by side, where a kernel takes them so."""
    return attend_packed(qkv, num_heads=self.num_heads, scale=self.scale)

  def attend_tokens(self, q, k, v, rngs: nnx.Rngs | None, train: bool) -> tuple[jax.Array, jax.Array]:
    """Returns what attention gives (B, N, C), before the projection, and the maps (B, heads, N, N) of `__call__`."""
    return self.attend(q, k, v, rngs)

  def is_packed(self, x: jax.Array | jax.ShapeDtypeStruct, rngs: nnx.Rngs | None) -> bool:
    """Returns whether `attend_packed` takes what tokens like x (B, N, C) are projected to."""
    return self.is_fused(x, x, rngs) and can_pack(x.shape[-1], self.num_heads)

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns the new tokens (B, N, C) and the attention maps before dropout (B, heads, N, N)."""
    if self.is_packed(x, rngs):
      y, attn = self.attend_packed(self.qkv.side_by_side(x, self.num_heads))
    else:
      y, attn = self.attend_tokens(*self.qkv(x), rngs, train)
    return drop(self.proj_drop, self.proj(y), rngs), attn

  def add_to(
    self,
    x: jax.Array,
    norm: LayerNorm,
    drop_path: nnx.Dropout,
    rngs: nnx.Rngs | None,
    adjustment: float = 1.0,
    *,
    train: bool,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns x + self(norm(x * adjustment)) / adjustment, with stochastic depth, and the attention maps."""
    if self.implementation == "reference" or not projections_are_fused(x, self.qkv, rngs, self.proj_drop):
      y, attn = self(norm(x * adjustment), rngs, train=train)
      return x + drop(drop_path, y, rngs) / adjustment, attn
    packed = self.is_packed(jax.ShapeDtypeStruct(x.shape, self.qkv.dtype), rngs)
    x, (qkv,) = self.qkv.after_norm(x, norm, packed=packed, adjustment=adjustment)
    y, attn = self.attend_packed(*qkv) if packed else self.attend_tokens(*qkv, rngs, train)
    return self.proj.add_to(x, [[y]], keep_factors(drop_path, x, rngs) / adjustment), attn


class Block(nnx.Module):
  """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)), both with stochastic depth.

  Args:
    attention: what creates the attention.
    adjustment: factor of the residual stream as the branches see it; what they give is divided by it.
  """

  def __init__(
    self,
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    *,
    attention: Callable[..., Attention] = Attention,
    adjustment: float = 1.0,
    **kw,
  ):
    self.adjustment = adjustment
    self.norm1 = LayerNorm(dim, **kw)
    self.attn = attention(dim, num_heads, attn_drop_rate, drop_rate, **kw)
    self.norm2 = LayerNorm(dim, **kw)
    self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate, **kw)
    self.drop_path = DropPath(drop_path_rate)

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns the new tokens (B, N, C) and the attention maps (B, heads, N, N)."""
    x, attn = self.attn.add_to(x, self.norm1, self.drop_path, rngs, self.adjustment, train=train)
    return self.mlp.add_to(x, self.norm2, self.drop_path, rngs, self.adjustment), attn


def call(block: Callable, *args, remat: bool, **static):
  """Calls `block(*args, **static)`; `static` are no arrays, like `train`.

  With `remat` keeps only its inputs for the backward pass and computes the rest again. Unlike `jax.checkpoint`,
  `nnx.remat` keeps the updates of batch statistics.
  """

  def apply(block, *args):
    return block(*args, **static)

  return nnx.remat(apply)(block, *args) if remat else apply(block, *args)


def add_cls_token(tokens: jax.Array, cls_token: jax.Array, pos_embed: jax.Array) -> jax.Array:
  """Returns [class token | tokens] + position embedding, (B, 1 + N, C), the residual stream, at least float32.

  A distilled model has two tokens (1, 2, C) in place of one.
  """
  dtype = widest(tokens.dtype)
  cls_token = jnp.broadcast_to(cls_token.astype(dtype), (tokens.shape[0], *cls_token.shape[1:]))
  return jnp.concatenate([cls_token, tokens.astype(dtype)], axis=1) + pos_embed.astype(dtype)
