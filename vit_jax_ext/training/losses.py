"""Losses: pure JAX."""

import jax
import jax.numpy as jnp
import optax


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
