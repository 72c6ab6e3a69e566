"""How alike a model's attention maps are: the evidence of DeepViT's section 3, attention collapse.

Zhou et al. 2021, arXiv 2103.11886. A model is seen through its intermediates `out`: for every block i the maps
`blocks.{i}.attn` (B, H, T, T), indexed [image, head, query, key], and the tokens `blocks.{i}` (B, T, C). T counts the
class token too. With re-attention the maps are those that multiply the values.

Everything is computed per image, summed over images in float32 inside a batch and in float64 over batches: the memory
does not depend on the number of images.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import registry
from vit_jax_ext.models.isotropic import IsotropicTransformer

NEIGHBOURS = (1, 2, 3)  # the paper's k: block p is compared with block p + k


def unit(x: jax.Array, axis: int) -> jax.Array:
  """Returns x in at least float32, its vectors along `axis` scaled to length 1; zero vectors stay zero."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  squares = jnp.sum(x * x, axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(x.dtype).tiny))


def block_similarity(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns M[b, h, t], the cosine similarity of two blocks' maps per head and token (equation 2).

  M[b, h, t] = <p[b, h, :, t], q[b, h, :, t]> / (|p[b, h, :, t]| |q[b, h, :, t]|): the vector of token t says how much
  it, as a key, contributes to each of the T output tokens.

  Args:
    p, q: maps (B, H, T, T).
  """
  return jnp.sum(unit(p, -2) * unit(q, -2), axis=-2)


def head_similarity(maps: jax.Array) -> jax.Array:
  """Returns S[b, h, g, t], the cosine similarity of heads h and g of one block's maps (B, H, T, T), per token."""
  maps = unit(maps, -2)
  return jnp.einsum("bhqt,bgqt->bhgt", maps, maps, precision="highest")


def feature_similarity(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns F[b, t], the cosine similarity over the channels of two blocks' tokens (B, T, C)."""
  return jnp.sum(unit(x, -1) * unit(y, -1), axis=-1)


def attention_maps(out: Mapping[str, Any]) -> list[Any]:
  """Returns the maps of all blocks in order, each (B, H, T, T).

  Raises:
    UserError: the model has none, or of several sizes; names the models that have them.
  """
  maps = []
  while f"blocks.{len(maps)}.attn" in out:
    maps.append(out[f"blocks.{len(maps)}.attn"])
  if not maps or any(m.shape != maps[0].shape for m in maps):
    able = (n for n, v in registry.VARIANTS.items() if issubclass(v.model, IsotropicTransformer))
    raise UserError(
      "the model has no attention maps of one size for every block, so its blocks cannot be compared; "
      f"choose one of {', '.join(sorted(able))}"
    )
  return maps


def batch_similarity(
  out: Mapping[str, jax.Array], mask: jax.Array, threshold: float, head_threshold: float
) -> dict[str, jax.Array]:
  """Returns sums over the images whose `mask` (B,) is True; L blocks, H heads, T tokens.

  `images`: their number. `similarity.{k}` and `ratio.{k}` (L - k,): M of equation 2 between blocks p and p + k averaged
  over heads and tokens, and the share of its entries that reach `threshold`. `features.{k}` (L - k,): feature
  similarity, averaged over tokens. `heads` (L, H, H): head similarity, averaged over tokens. `head_ratio` (L,): share
  of tokens and pairs of different heads that reach `head_threshold`. `maps` (L, T, T): maps averaged over heads.
  """
  maps = attention_maps(out)
  tokens = [out[f"blocks.{p}"] for p in range(len(maps))]

  def total(per_image: list[jax.Array]) -> jax.Array:
    """(B, ...) of each block to (blocks, ...), the sum over the images."""
    values = jnp.stack(per_image)
    return jnp.sum(values, axis=1, where=mask.reshape(1, -1, *[1] * (values.ndim - 2)))

  heads = [head_similarity(m) for m in maps]
  pairs = np.triu(np.ones(heads[0].shape[1:3], bool), 1)[..., None]  # each pair of different heads once
  sums = {
    "images": jnp.sum(mask, dtype=jnp.float32),
    "heads": total([s.mean(-1) for s in heads]),
    "head_ratio": total(
      [jnp.sum((s >= head_threshold) & pairs, (1, 2, 3)) / max(1, pairs.sum() * s.shape[-1]) for s in heads]
    ),
    "maps": total([m.astype(jnp.float32).mean(1) for m in maps]),
  }
  for k in NEIGHBOURS[: len(maps) - 1]:
    similarities = [block_similarity(p, q) for p, q in zip(maps, maps[k:], strict=False)]
    sums[f"similarity.{k}"] = total([s.mean((1, 2)) for s in similarities])
    sums[f"ratio.{k}"] = total([(s >= threshold).mean((1, 2)) for s in similarities])
    sums[f"features.{k}"] = total([feature_similarity(x, y).mean(1) for x, y in zip(tokens, tokens[k:], strict=False)])
  return sums


def summarize(sums: Mapping[str, np.ndarray], threshold: float, head_threshold: float) -> dict[str, Any]:
  """Turns sums over all images into the means that the paper's figures show, plain numbers and lists.

  Args:
    sums: of `batch_similarity` over all batches, and `top1`, the number of hits.
    threshold, head_threshold: which the sums were made with.

  Returns:
    images, top1 (share of hits; of several labels the likeliest may be any), blocks, heads, tokens, threshold,
      head_threshold: numbers.
    similarity, ratio, feature_similarity: {"1": [L - 1 numbers], "2": [L - 2], "3": [L - 3]} by distance k, indexed by
      the lower block p.
    mean_similarity: the mean of `similarity["1"]`; None if there is one block.
    similar_blocks: number of blocks p whose mean similarity to block p + 1 reaches `threshold`. (The paper's README
      counts such blocks and leaves the rule open.)
    head_similarity: [L][H][H]. head_similarity_mean: [L], over pairs of different heads; 0 if there is one head.
      head_ratio: [L], share of pairs and tokens that reach `head_threshold`.
  """
  means = {name: np.asarray(value, np.float64) / sums["images"] for name, value in sums.items()}
  distances = [k for k in NEIGHBOURS if f"similarity.{k}" in means]
  heads = means["heads"]
  pairs = np.triu_indices(heads.shape[1], 1)
  return {
    "images": int(sums["images"]),
    "top1": float(means["top1"]),
    "blocks": heads.shape[0],
    "heads": heads.shape[1],
    "tokens": means["maps"].shape[1],
    "threshold": threshold,
    "head_threshold": head_threshold,
    "similarity": {str(k): means[f"similarity.{k}"].tolist() for k in distances},
    "ratio": {str(k): means[f"ratio.{k}"].tolist() for k in distances},
    "feature_similarity": {str(k): means[f"features.{k}"].tolist() for k in distances},
    "mean_similarity": float(means["similarity.1"].mean()) if distances else None,
    "similar_blocks": sum(s >= threshold for s in means["similarity.1"].tolist()) if distances else 0,
    "head_similarity": heads.tolist(),
    "head_similarity_mean": (heads[:, *pairs].sum(-1) / max(1, len(pairs[0]))).tolist(),
    "head_ratio": means["head_ratio"].tolist(),
  }


def check_thresholds(threshold: float, head_threshold: float) -> None:
  """Raises UserError unless both are in (0, 1]."""
  for name, value in (("threshold", threshold), ("head_threshold", head_threshold)):
    if not 0 < value <= 1:
      raise UserError(
        f"{name} {value} is no cosine similarity above 0; choose one in (0, 1], the paper has 0.8 and 0.5"
      )


def measure_similarity(
  model: nnx.Module,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  normalize: Callable[[jax.Array], jax.Array] = lambda images: images,
  threshold: float = 0.8,
  head_threshold: float = 0.5,
) -> tuple[dict[str, Any], np.ndarray]:
  """Measures how alike the attention maps of a model's blocks and heads are on a dataset.

  Args:
    model: with attention maps of one size for every block: ViT, DeiT, DeepViT.
    batches: of one size, each `image` (B, H, W, 3), `label` (B,) and `mask` (B,), False for padding.
    normalize: applied to the images on the device, in front of the model.
    threshold: cosine similarity from which two blocks' vectors count as similar, in (0, 1].
    head_threshold: the same for two heads of a block.

  Returns:
    summary: see `summarize`.
    maps: (L, T, T) float32, each block's attention averaged over heads and images, [query, key].

  Raises:
    UserError: a model without such maps, a threshold outside (0, 1], no images.
  """
  check_thresholds(threshold, head_threshold)
  graphdef, state = nnx.split(model)

  @jax.jit
  def step(state, batch):
    logits, out = nnx.merge(graphdef, state)(normalize(batch["image"]), train=False)
    best, label = jnp.argmax(logits, axis=-1), batch["label"]
    hits = best == label if label.ndim == 1 else jnp.take_along_axis(label, best[:, None], axis=-1)[:, 0]
    return batch_similarity(out, batch["mask"], threshold, head_threshold) | {"top1": jnp.sum(batch["mask"] & hits)}

  sums = None
  for batch in batches:
    new = jax.tree.map(lambda s: np.asarray(s, np.float64), step(state, batch))
    sums = new if sums is None else jax.tree.map(np.add, sums, new)
  if sums is None or not sums["images"]:
    raise UserError("there are no images to measure; choose a split that has some")
  return summarize(sums, threshold, head_threshold), (sums["maps"] / sums["images"]).astype(np.float32)
