"""ViT and DeiT: a plain transformer over patches, and the baseline of the DeepViT paper.

Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021, arXiv 2010.11929; Touvron et al.: Training data-efficient
image transformers (DeiT), ICML 2021, arXiv 2012.12877. Attribute names follow timm's state dict (Apache 2.0), which the
authors of DeiT and DeepViT build on. Written anew.
"""

import numpy as np

from vit_jax_ext.models import layers


class VisionTransformer(layers.IsotropicTransformer):
  """The whole classifier; see IsotropicTransformer for its call and intermediates.

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
    super().__init__(
      layers.PatchEmbed(patch_size, embed_dim, **kw),
      [
        layers.Block(embed_dim, num_heads, mlp_ratio, drop_rate, attn_drop_rate, rate, **kw)
        for rate in np.linspace(0, drop_path_rate, depth).tolist()
      ],
      num_classes=num_classes,
      image_size=image_size,
      grid=layers.patch_grid(image_size, patch_size),
      embed_dim=embed_dim,
      drop_rates=(drop_rate, attn_drop_rate, drop_path_rate),
      remat=remat,
      **kw,
    )
