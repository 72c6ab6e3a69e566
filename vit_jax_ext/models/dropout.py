"""Dropout and stochastic depth, and the keys that they draw from."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from vit_jax_ext.errors import UserError

KEYS = 64  # made at a time

# Stochastic depth (Huang et al. 2016): drops the residual branch of a whole sample, and scales the ones that stay.
DropPath = functools.partial(nnx.Dropout, broadcast_dims=(1, 2))


class KeyStream(nnx.RngStream):
  """Gives keys that are made many at a time.

  To make one is a hundred operations on single numbers, each of which a TPU's compiler keeps by itself, to make many
  is one on vectors.
  """

  def __init__(self, key: jax.Array, *, tag: str):
    super().__init__(key, tag=tag)
    self.used, self.keys = 0, nnx.RngKey(jax.random.split(key, KEYS), tag=tag)

  def __call__(self) -> jax.Array:
    """Returns the next key."""
    if self.used == KEYS - 1:  # the last one is for the next ones
      self.used, self.keys[...] = 0, jax.random.split(self.keys[...][-1], KEYS)
    self.used += 1
    return self.keys[...][self.used - 1]


def drop(layer: nnx.Dropout, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
  """Applies a Dropout or DropPath; the identity without `rngs`."""
  return layer(x, deterministic=rngs is None, rngs=rngs)


def keep_factors(drop_path: nnx.Dropout | None, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
  """Returns what stochastic depth multiplies the branch of each sample of x with, (B, 1, 1): 0 where it drops it."""
  ones = jnp.ones((x.shape[0], 1, 1), x.dtype)
  return ones if drop_path is None else drop(drop_path, ones, rngs)


def runtime_rngs(train: bool, rngs: nnx.Rngs | None, *rates: float) -> nnx.Rngs | None:
  """Returns the rngs that the blocks get: none in evaluation, else those given, their dropout's a `KeyStream`.

  Raises:
    UserError: in training with a positive dropout or stochastic-depth rate but nothing to draw from.
  """
  if not train:
    return None
  if any(rates):
    if rngs is None:
      raise UserError(f"train=True with drop rates {rates} needs randomness; pass rngs=nnx.Rngs(key)")
    key = rngs["dropout"]()
    rngs = nnx.Rngs(**{name: stream() for name, stream in rngs.items()})
    rngs.dropout = KeyStream(key, tag="dropout")
  return rngs
