"""Initial values of parameters.

Outside jit JAX compiles a generator for every shape, seconds for a model. There these draw in pieces of one size, by
one program, and give the values of `jax.random` bit for bit: value i of a draw depends on the key and on i alone.
"""

from collections.abc import Callable

from flax import nnx
import jax
from jax.extend import random
import jax.numpy as jnp
import numpy as np

PIECE = 2**16  # values

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def normal(stddev: float) -> Initializer:
  """Returns `initializer(key, shape, dtype)`, which draws from a normal distribution around 0."""
  drawn_by_jax = nnx.initializers.normal(stddev)

  def init(key, shape, dtype):
    if not _in_pieces(key, dtype):
      return drawn_by_jax(key, shape, dtype)
    above_minus_one = np.nextafter(np.float32(-1), np.float32(0))
    drawn = _draw(key, shape, above_minus_one, 1, _to_normal)
    drawn *= np.float32(stddev)
    return jax.device_put(drawn)

  return init


def uniform(bound: float) -> Initializer:
  """Returns `initializer(key, shape, dtype)`, which draws from [-bound, bound)."""

  def init(key, shape, dtype):
    if not _in_pieces(key, dtype):
      return jax.random.uniform(key, shape, dtype, -bound, bound)
    return jax.device_put(_draw(key, shape, -bound, bound, lambda drawn: drawn))

  return init


def constant(value: float) -> Initializer:
  """Returns `initializer(key, shape, dtype)`, which gives the same value everywhere."""

  def init(key, shape, dtype):
    if isinstance(key, jax.core.Tracer):
      return jnp.full(shape, value, dtype)
    return jax.device_put(np.full(shape, value, dtype))

  return init


def _in_pieces(key: jax.Array, dtype: jnp.dtype) -> bool:
  threefry = jax.config.jax_threefry_partitionable and jax.random.key_impl(key) == "threefry2x32"
  return threefry and dtype == jnp.float32 and not isinstance(key, jax.core.Tracer)


def _draw(key, shape, low, high, transform) -> np.ndarray:
  size, words = int(np.prod(shape)), jax.random.key_data(key)
  low, high = np.float32(low), np.float32(high)
  pieces = [transform(_uniform_piece(words, np.uint32(at), low, high)) for at in range(0, size, PIECE)]
  return np.concatenate(pieces)[:size].reshape(shape)


@jax.jit
def _uniform_piece(words, start, low, high):
  """Returns values `start` to `start + PIECE` of a draw from [low, high)."""
  index = start + jnp.arange(PIECE, dtype=jnp.uint32)
  first, second = jnp.split(random.threefry_2x32(words, jnp.concatenate([jnp.zeros_like(index), index])), 2)
  # 23 random bits after the point of a number from [1, 2).
  from_one = jax.lax.bitcast_convert_type((first ^ second) >> 9 | np.float32(1).view(np.uint32), jnp.float32)
  return jnp.maximum(low, (from_one - 1) * (high - low) + low)


@jax.jit
def _to_normal(drawn):
  """Turns draws from (-1, 1) into draws from the standard normal distribution."""
  return np.float32(2**0.5) * jax.lax.erf_inv(drawn)
