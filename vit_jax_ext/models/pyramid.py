"""Stages of falling resolution and rising width: what Swin and CSWin, and BOAT on both, share.

Tokens are (B, N, C), row by row; `grid` is the (rows, columns) they lie on.
"""

from collections.abc import Callable, Iterator, Sequence
import functools

from flax import nnx
import jax
import numpy as np

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import layers
from vit_jax_ext.models.dropout import DropPath, runtime_rngs

Intermediates = dict[str, jax.Array]
Grid = tuple[int, int]

LayerNorm = functools.partial(layers.LayerNorm, epsilon=1e-5)


class PyramidBlock(nnx.Module):
  """Attention of any kind (`attend`), then an MLP, each with pre-norm, residual and stochastic depth.

  Args:
    dim: C.
    mlp_ratio: MLP expansion.
    drop_rate, drop_path_rate: dropout of MLP activations; stochastic depth.
  """

  def __init__(self, dim: int, mlp_ratio: float, drop_rate: float, drop_path_rate: float, **kw):
    self.norm2 = LayerNorm(dim, **kw)
    self.mlp = layers.Mlp(dim, int(dim * mlp_ratio), drop_rate, **kw)
    self.drop_path = DropPath(drop_path_rate)

  def attend(self, x: jax.Array, rngs: nnx.Rngs | None) -> tuple[jax.Array, Intermediates]:
    """Adds what the tokens tell each other; returns intermediates too, named by their place in this module."""
    raise NotImplementedError

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, Intermediates]:
    """Returns the new tokens (B, N, C) and the intermediates of `attend`."""
    x, out = self.attend(x, rngs)
    return self.mlp.add_to(x, self.norm2, self.drop_path, rngs), out


class Pyramid(nnx.Module):
  """The whole classifier: stages of blocks, norm, mean over the tokens, a linear head.

  The authors of Swin and CSWin call the same things by different names, so a subclass keeps its parts and finds them
  again. Before it calls this constructor it sets `patch_size`, `depths` and whatever its own methods use.

  Args:
    num_classes: classes of the head; 0 for none, which gives the pooled features instead of logits.
    image_size: (height, width) of the images; must divide by the patch size times 2 for each further stage.
    embed_dim: width of the first stage; doubles with each stage.
    num_heads: one value per stage.
    mlp_ratio: MLP expansion.
    drop_rate, attn_drop_rate: dropout of activations and of attention weights.
    drop_path_rate: stochastic depth of the last block; rises linearly from 0.
    remat: keep only the blocks' inputs for the backward pass.

  Raises:
    UserError: an image size that does not divide, heads that do not divide a width.
  """

  patch_size: int  # side of a patch, pixels
  depths: tuple[int, ...]  # number of blocks, of each stage
  merging: type[nnx.Module]  # halves both sides and doubles the width; takes dim and grid

  def __init__(
    self,
    *,
    num_classes: int = 1000,
    image_size: tuple[int, int] = (224, 224),
    embed_dim: int,
    num_heads: Sequence[int],
    mlp_ratio: float = 4,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    remat: bool = False,
    **kw,
  ):
    if len(num_heads) != len(self.depths):
      raise UserError(f"num_heads {tuple(num_heads)} is not one value for each of {len(self.depths)} stages")
    rows, columns = layers.patch_grid(image_size, self.patch_size * 2 ** (len(self.depths) - 1))
    self.image_size = image_size
    self.drop_rates = (drop_rate, attn_drop_rate, drop_path_rate)
    self.remat = remat
    self.grids = tuple((rows * 2**i, columns * 2**i) for i in reversed(range(len(self.depths))))
    self.add_embedding(embed_dim, drop_rate, **kw)
    rates = iter(np.linspace(0, drop_path_rate, sum(self.depths)).tolist())
    for i, (depth, grid, heads) in enumerate(zip(self.depths, self.grids, num_heads, strict=True)):
      dim, last = embed_dim * 2**i, i == len(self.depths) - 1
      if dim % heads:
        raise UserError(f"width {dim} of stage {i} does not divide into {heads} heads; change embed_dim or num_heads")
      blocks = [
        self.make_block(i, j)(
          dim, heads, grid, *self.block_arguments(i, j), mlp_ratio, drop_rate, attn_drop_rate, next(rates), **kw
        )
        for j in range(depth)
      ]
      self.add_stage(i, blocks, None if last else self.merging(dim, grid, **kw))
    self.norm = LayerNorm(dim, stream=True, **kw)
    self.head = layers.Head(dim, num_classes, **kw) if num_classes else None

  def add_embedding(self, dim: int, drop_rate: float, **kw) -> None:
    """Creates what `embed` uses."""
    raise NotImplementedError

  def embed(self, images: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
    """Returns the tokens (B, N, C) of the first stage."""
    raise NotImplementedError

  def block_arguments(self, stage: int, index: int) -> tuple:
    """Returns what block `index` of `stage` attends inside, as further arguments of its class."""
    raise NotImplementedError

  def make_block(self, stage: int, index: int) -> Callable[..., PyramidBlock]:
    """Returns what creates block `index` of `stage`."""
    raise NotImplementedError

  def add_stage(self, stage: int, blocks: list[PyramidBlock], merging: nnx.Module | None) -> None:
    """Keeps the blocks of a stage, and what leads from there to the next."""
    raise NotImplementedError

  def stages(self) -> Iterator[tuple[str, Sequence[PyramidBlock], nnx.Module | None]]:
    """Yields what `add_stage` has kept, with the blocks' path in the model before."""
    raise NotImplementedError

  def __call__(
    self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, Intermediates]:
    """Classifies normalised images (B, H, W, 3).

    Returns:
      logits (B, num_classes), at least float32; without a head the pooled features (B, C).
      out: `stages.{i}` (B, H / s, W / s, C_i) after the blocks of stage i, strides s = 4, 8, 16, 32;
        `pre_logits` (B, C) the mean of the normalised tokens; the blocks' own under their paths,
        `layers.{i}.blocks.{j}` in Swin and `stage{i + 1}.{j}` in CSWin.

    Raises:
      UserError: images of another size, or train=True with positive drop rates and no rngs.
    """
    layers.check_images(images, self.image_size)
    rngs = runtime_rngs(train, rngs, *self.drop_rates)
    x = self.embed(images, rngs)
    out = {}
    for i, (path, blocks, merging) in enumerate(self.stages()):
      for j, block in enumerate(blocks):
        x, inner = layers.call(block, x, rngs, remat=self.remat)
        out |= {f"{path}.{j}.{name}": value for name, value in inner.items()}
      out[f"stages.{i}"] = x.reshape(x.shape[0], *self.grids[i], -1)
      if merging is not None:
        x = merging(x)
    out["pre_logits"] = x = self.norm(x).mean(axis=1)
    if self.head is not None:
      x = self.head(x)
    return x, out
