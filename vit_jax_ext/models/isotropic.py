"""A class token and patch tokens through blocks of one width: what ViT, DeiT and DeepViT share."""

from collections.abc import Callable

from flax import nnx
import jax
import numpy as np

from vit_jax_ext.models import layers
from vit_jax_ext.models.dropout import drop, runtime_rngs


class IsotropicTransformer(nnx.Module):
  """The whole classifier: patch embedding, blocks, norm, a linear head on the class token.

  Subclasses choose the patch embedding and the blocks: `make_patch_embed`, `make_block`; a distilled one has a second
  learned token: `num_learned_tokens`, `learned_tokens`, `classify`.

  Args:
    num_classes: classes of the head; 0 for none, which gives the pooled features instead of logits.
    image_size: (height, width) of the images; divides into patches of `patch_size`.
    patch_size: side of the square patches, pixels.
    embed_dim: width of the tokens.
    depth: number of blocks.
    num_heads, mlp_ratio: heads and MLP expansion of every block.
    drop_rate, attn_drop_rate: dropout of tokens and of attention weights.
    drop_path_rate: stochastic depth of the last block; rises linearly from 0.
    remat: keep only the blocks' inputs for the backward pass.

  Raises:
    UserError: an image size that does not divide into patches, heads that do not divide the width.
  """

  num_learned_tokens = 1  # before those of the patches

  def __init__(
    self,
    *,
    num_classes: int = 1000,
    image_size: tuple[int, int] = (224, 224),
    patch_size: int = 16,
    embed_dim: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    mlp_ratio: float = 4,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    remat: bool = False,
    **kw,
  ):
    self.image_size, self.grid = image_size, layers.patch_grid(image_size, patch_size)
    self.drop_rates = (drop_rate, attn_drop_rate, drop_path_rate)
    self.remat = remat
    rngs, param_dtype = kw["rngs"], kw["param_dtype"]
    self.patch_embed = self.make_patch_embed()(patch_size, embed_dim, **kw)
    self.blocks = nnx.List(
      self.make_block(i)(embed_dim, num_heads, mlp_ratio, drop_rate, attn_drop_rate, rate, **kw)
      for i, rate in enumerate(np.linspace(0, drop_path_rate, depth).tolist())
    )
    self.cls_token = nnx.Param(layers.token_init(rngs.params(), (1, 1, embed_dim), param_dtype))
    tokens = self.num_learned_tokens + self.grid[0] * self.grid[1]
    self.pos_embed = nnx.Param(layers.token_init(rngs.params(), (1, tokens, embed_dim), param_dtype))
    self.pos_drop = nnx.Dropout(drop_rate)
    self.norm = layers.LayerNorm(embed_dim, stream=True, **kw)
    self.head = layers.Head(embed_dim, num_classes, **kw) if num_classes else None

  def make_patch_embed(self) -> Callable[..., nnx.Module]:
    """Returns what creates the patch embedding: images (B, H, W, 3) to tokens (B, N, C), called with `train`."""
    return layers.PatchEmbed

  def make_block(self, index: int) -> Callable[..., nnx.Module]:
    """Returns what creates block `index`: tokens to (tokens, attention maps), called with `rngs` and `train`."""
    return layers.Block

  def learned_tokens(self) -> jax.Array:
    """Returns the tokens before those of the patches, (1, `num_learned_tokens`, C)."""
    return self.cls_token[...]

  def classify(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what the call does, of the last block's tokens (B, tokens, C), and the intermediates that are added."""
    x = self.norm(x[:, 0])
    return x if self.head is None else self.head(x), {"pre_logits": x}

  def __call__(
    self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classifies normalised images (B, H, W, 3).

    Returns:
      logits (B, num_classes), at least float32; without a head the pooled features, the normalised class token (B, C).
      out: for block i `blocks.{i}.attn` (B, heads, 1 + N, 1 + N), the maps that multiply the values, and `blocks.{i}`
        (B, 1 + N, C), the tokens after it; `pre_logits` (B, C), the normalised class token.

    Raises:
      UserError: images of another size, or train=True with positive drop rates and no rngs.
    """
    layers.check_images(images, self.image_size)
    rngs = runtime_rngs(train, rngs, *self.drop_rates)
    tokens = self.patch_embed(images, train=train)
    x = drop(self.pos_drop, layers.add_cls_token(tokens, self.learned_tokens(), self.pos_embed[...]), rngs)
    out = {}
    for i, block in enumerate(self.blocks):
      x, out[f"blocks.{i}.attn"] = layers.call(block, x, rngs, train=train, remat=self.remat)
      out[f"blocks.{i}"] = x
    x, last = self.classify(x)
    return x, out | last
