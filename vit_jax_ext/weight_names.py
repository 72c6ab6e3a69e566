"""Names of weights elsewhere -> the authors', which our models have: wrappers, Google's ViT, Transformers, timm.

Tables of patterns, applied in turn; query, key and value that lie apart are packed. What no table names keeps its name,
so that whoever compares names with a model's sees it.
"""

from collections.abc import Callable, Iterable, Mapping
import re

import numpy as np

from vit_jax_ext.errors import UserError

Weights = dict[str, np.ndarray]
Table = Iterable[tuple[str, str]]

# DataParallel, torch.compile and Lightning, in any order.
_WRAPPERS = ((r"^(?:(?:module|_orig_mod|model)\.)+", ""),)

# google-research/vision_transformer.
_GOOGLE = (
  (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
  ("LayerNorm_0", "norm1"),
  ("LayerNorm_2", "norm2"),
  ("MultiHeadDotProductAttention_1/out", "attn.proj"),
  (r"MultiHeadDotProductAttention_1/(\w)\w+", r"attn.\1"),
  ("MlpBlock_3/Dense_0", "mlp.fc1"),
  ("MlpBlock_3/Dense_1", "mlp.fc2"),
  ("^embedding/", "patch_embed.proj/"),
  ("^Transformer/encoder_norm", "norm"),
  ("^Transformer/posembed_input/pos_embedding$", "pos_embed"),
  ("^cls$", "cls_token"),
  ("/(kernel|scale)$", ".weight"),
  ("/bias$", ".bias"),
)

# Hugging Face's ViT, DeiT and Swin: as files have it, and as modules are called since Transformers 5.
_TRANSFORMERS = (
  (r"^(vit|deit|swin)\.", ""),
  (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
  (r"^encoder\.", ""),
  (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
  (r"^embeddings\.norm\.", "patch_embed.norm."),
  (r"^embeddings\.position_embeddings$", "pos_embed"),
  (r"^embeddings\.cls_token$", "cls_token"),
  (r"^embeddings\.distillation_token$", "dist_token"),
  (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
  (r"\.attention\.(?:attention|self|relative_position_bias)\.", ".attn."),
  (r"\.attention\.(\w)_proj\.", r".attn.\1."),
  (r"\.attn\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
  (r"\.layernorm_before\.", ".norm1."),
  (r"\.layernorm_after\.", ".norm2."),
  (r"\.intermediate\.dense\.", ".mlp.fc1."),
  (r"\.output\.dense\.", ".mlp.fc2."),
  (r"^layernorm\.", "norm."),
  (r"^(?:cls_)?classifier\.", "head."),
  (r"^distillation_classifier\.", "head_dist."),
)

# CrossViT, and the classifier of Swin.
_TIMM = ((r"^(pos_embed|cls_token)_([01])$", r"\1.\2"), (r"^head\.fc\.", "head."))
_TO_TIMM = ((r"^(pos_embed|cls_token)\.([01])$", r"\1_\2"),)
_TO_TIMM_SWIN = ((r"^head\.", "head.fc."),)


def to_authors(weights: Mapping[str, np.ndarray]) -> Weights:
  """Returns weights under the authors' names and in their layouts.

  Raises:
    UserError: two arrays would have one name.
  """
  weights = _rename(weights, _by(_WRAPPERS))
  if any("/posembed_input/" in name for name in weights):
    weights = _pack(_from_google(weights))
  elif any("embeddings.patch_embeddings." in name for name in weights):
    weights = _pack(_rename(weights, _by(_TRANSFORMERS)))
  weights = _rename(weights, _by(_TIMM))
  stages = _merging_stages(weights)
  return _move_merging(weights, -1) if stages and 0 not in stages else weights


def to_timm(weights: Mapping[str, np.ndarray]) -> Weights:
  """Returns weights of CrossViT, ViT, DeiT or Swin that have the authors' names under those of timm since 0.9."""
  if not _merging_stages(weights):
    return _rename(weights, _by(_TO_TIMM))
  return _move_merging(_rename(weights, _by(_TO_TIMM_SWIN)), 1)


def _by(table: Table) -> Callable[[str], str]:
  def rename(name: str) -> str:
    for pattern, replacement in table:
      name = re.sub(pattern, replacement, name)
    return name

  return rename


def _rename(weights: Mapping[str, np.ndarray], rename: Callable[[str], str]) -> Weights:
  renamed, origins = {}, {}
  for name, array in weights.items():
    new = rename(name)
    if new in renamed:
      raise UserError(f"weights have both {origins[new]} and {name}, which are one; give a file of one model")
    renamed[new], origins[new] = array, name
  return renamed


def _pack(weights: Weights) -> Weights:
  """Joins the rows of queries, keys and values where all three are there."""
  for name in [name for name in weights if ".attn.q." in name]:
    parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
    if len({weights[part].shape if part in weights else None for part in parts}) == 1:
      weights[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate([weights.pop(part) for part in parts])
  return weights


def _from_google(arrays: Weights) -> Weights:
  """Brings Google's ViT to timm's names and layouts; heads are joined."""
  weights = {}
  for name, array in _rename(arrays, _by(_GOOGLE)).items():
    if name.endswith("attn.proj.weight"):  # (heads, head_dim, dim)
      array = array.reshape(-1, array.shape[-1])
    if re.search(r"attn\.[qkv]\.", name):  # (dim, heads, head_dim) and (heads, head_dim)
      array = array.reshape(*array.shape[:-2], -1)
    weights[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array
  return weights


def _merging_stages(weights: Mapping[str, np.ndarray]) -> set[int]:
  """Returns the stages of Swin that hold the merging of patches."""
  return {int(match[1]) for name in weights if (match := re.match(r"layers\.(\d+)\.downsample\.", name))}


def _move_merging(weights: Weights, by: int) -> Weights:
  """Brings the merging of patches to the stage before or after.

  With the authors a stage of Swin ends with it, with timm since 0.9 the next one begins with it.
  """
  return _rename(
    weights, lambda name: re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + by}.downsample", name)
  )
