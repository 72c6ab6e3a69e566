"""ViT and DeiT: a plain transformer over patches, and the baseline of the DeepViT paper.

Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021, arXiv 2010.11929; Touvron et al.: Training data-efficient
image transformers (DeiT), ICML 2021, arXiv 2012.12877. Attribute names follow timm's state dict (Apache 2.0), which the
authors of DeiT and DeepViT build on. Written anew.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from vit_jax_ext.models import layers
from vit_jax_ext.models.isotropic import IsotropicTransformer


class VisionTransformer(IsotropicTransformer):
  """The plain isotropic transformer, as it is."""


class DistilledTransformer(VisionTransformer):
  """DeiT with a distillation token behind the class token, and a head for each (DeiT, section 4 and figure 2).

  Logits and pooled features are the mean of both tokens'; see IsotropicTransformer for everything else. In `out`, with
  two learned tokens where it has one: `blocks.{i}.attn` (B, heads, 2 + N, 2 + N), `blocks.{i}` (B, 2 + N, C), and
  besides `logits.{i}` (B, num_classes), those of the class token's head and of the distillation token's: the authors
  train the former with the labels and the latter with the teacher's.

  Args:
    dist_head: the distillation token has a head. Without it logits and pooled features are the class token's alone, as
      in DeiTForImageClassification of Transformers.
  """

  num_learned_tokens = 2

  def __init__(self, *, num_classes: int = 1000, embed_dim: int = 384, dist_head: bool = True, **kw):
    super().__init__(num_classes=num_classes, embed_dim=embed_dim, **kw)
    rngs, dtype, param_dtype = (kw[key] for key in ("rngs", "dtype", "param_dtype"))
    self.dist_token = nnx.Param(layers.token_init(rngs.params(), (1, 1, embed_dim), param_dtype))
    self.pools_both = dist_head
    self.head_dist = (
      layers.Head(embed_dim, num_classes, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
      if num_classes and dist_head
      else None
    )

  def learned_tokens(self) -> jax.Array:
    return jnp.concatenate([self.cls_token[...], self.dist_token[...]], axis=1)

  def classify(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    if not self.pools_both:
      return super().classify(x)
    tokens = self.norm(x[:, :2])
    out = {"pre_logits": tokens.mean(axis=1)}
    if self.head is None:
      return out["pre_logits"], out
    out |= {"logits.0": self.head(tokens[:, 0]), "logits.1": self.head_dist(tokens[:, 1])}
    return (out["logits.0"] + out["logits.1"]) / 2, out
