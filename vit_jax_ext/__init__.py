"""vit_jax_ext: CrossViT, DeepViT and BOAT in JAX and Flax NNX, with what they are compared with."""

from vit_jax_ext.errors import UserError
from vit_jax_ext.models.registry import create_model, list_models
from vit_jax_ext.pretrained import LoadReport, load_pretrained, save_pretrained

__all__ = ["LoadReport", "UserError", "create_model", "list_models", "load_pretrained", "save_pretrained"]
