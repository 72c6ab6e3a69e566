"""ViT and DeiT: a plain transformer over patches, and the baseline of the DeepViT paper.

Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021, arXiv 2010.11929; Touvron et al.: Training data-efficient
image transformers (DeiT), ICML 2021, arXiv 2012.12877. Attribute names follow timm's state dict (Apache 2.0), which the
authors of DeiT and DeepViT build on. Written anew.
"""

from vit_jax_ext.models.isotropic import IsotropicTransformer


class VisionTransformer(IsotropicTransformer):
  """The plain isotropic transformer, as it is."""
