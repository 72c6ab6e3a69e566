"""Losses: pure JAX."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from vit_jax_ext.errors import UserError


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Returns the cross-entropy per example, (B,), at least float32.

  Args:
    logits: (B, classes).
    labels: class indices (B,), or probabilities (B, classes).
    smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016).
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def attention_cosine_loss(out: Mapping[str, jax.Array], blocks: Sequence[int]) -> jax.Array:
  """Returns the mean cosine similarity of neighbouring blocks' attention maps, a scalar, at least float32.

  DeepViT's regulariser, added with weight 0.1 to the cross-entropy of the 32-block recipe. As in the authors' code
  (zhoudaquan/dvit_repo, `SoftTargetCrossEntropyCosReg`): the cosine is taken **over the heads**, for each image, query
  and key, so what is penalised is that the heads share out a pair of tokens alike in both blocks; equation 2 of the
  paper, which `attention.similarity` computes, takes it over the queries. The code pairs the **first** blocks: its
  `cos_reg_component: 12` is `blocks=range(12)`, maps 0 with 1 to 11 with 12, although collapse is a matter of the last
  ones (`range(19, 31)` of 32).

  Args:
    out: a model's intermediates, with `blocks.{i}.attn` (B, heads, N, N) for block i.
    blocks: indices i; block i is compared with block i + 1.

  Raises:
    UserError: no block at all, or a block or its neighbour without an attention map of the same shape.
  """
  if not blocks:
    raise UserError("attention_cosine_loss has no blocks to compare; name at least one, or give the loss no weight")
  total = 0.0
  for i in blocks:
    p, q = (out.get(f"blocks.{j}.attn") for j in (i, i + 1))
    if p is None or q is None or p.shape != q.shape:
      raise UserError(
        f"attention_cosine_loss cannot compare blocks {i} and {i + 1}: the model has no attention maps of one size "
        "there; choose a ViT, DeiT or DeepViT and blocks below the last"
      )
    dtype = jnp.promote_types(p.dtype, jnp.float32)
    p, q = p.astype(dtype), q.astype(dtype)
    # torch's CosineSimilarity: no norm below 1e-8. The sqrt's gradient needs the floor inside it.
    norms = jnp.sqrt(jnp.maximum(jnp.sum(p * p, 1) * jnp.sum(q * q, 1), 1e-16))
    total += jnp.mean(jnp.sum(p * q, axis=1) / norms)
  return total / len(blocks)
