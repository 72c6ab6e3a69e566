import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_ext.models import initial


def key(seed, impl="threefry2x32"):
  return jax.random.fold_in(jax.random.key(seed, impl=impl), 5)


@pytest.mark.parametrize("shape", [(), (3, 3, 1, 7), (3, 2**14), (5, initial.PIECE - 1), (2, initial.PIECE)])
def test_values_are_those_of_jax_bit_for_bit(shape):
  for seed in range(3):
    np.testing.assert_array_equal(
      initial.normal(0.02)(key(seed), shape, jnp.float32), jax.random.normal(key(seed), shape) * jnp.float32(0.02)
    )
    np.testing.assert_array_equal(
      initial.uniform(0.3)(key(seed), shape, jnp.float32),
      jax.random.uniform(key(seed), shape, jnp.float32, -0.3, 0.3),
    )


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_other_types_are_drawn_by_jax(dtype, x64):
  expected = jax.random.uniform(key(0), (4, 5), dtype, -0.3, 0.3)
  drawn = initial.uniform(0.3)(key(0), (4, 5), dtype)
  assert drawn.dtype == dtype
  np.testing.assert_array_equal(drawn, expected)


def test_other_generators_are_drawn_by_jax():
  np.testing.assert_array_equal(
    initial.normal(1.0)(key(0, "rbg"), (70, 3), jnp.float32), jax.random.normal(key(0, "rbg"), (70, 3))
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_constants(dtype):
  init = initial.constant(1)
  for ones in (init(key(0), (2, 3), dtype), jax.jit(lambda key: init(key, (2, 3), dtype))(key(0))):
    assert isinstance(ones, jax.Array) and ones.dtype == dtype
    np.testing.assert_array_equal(ones, np.ones((2, 3)))


def test_values_under_jit_are_the_same_up_to_rounding():
  def draw(key):
    return initial.normal(0.02)(key, (70, 1000), jnp.float32), initial.uniform(0.1)(key, (30,), jnp.float32)

  for inside, outside in zip(jax.jit(draw)(key(1)), draw(key(1)), strict=True):
    np.testing.assert_allclose(inside, outside, rtol=3e-7)


def test_one_program_draws_all_shapes(compiled):
  initial._uniform_piece.clear_cache()
  for size in range(1, 9):
    initial.normal(0.02)(key(0), (size, 100 * size), jnp.float32)
    initial.uniform(0.02)(key(0), (size,), jnp.float32)
  assert compiled.count("jit(_uniform_piece)") == 1
  assert not {"jit(_normal)", "jit(_uniform)", "jit(multiply)"} & set(compiled)


def test_single_precision_beside_double(x64):
  drawn = initial.normal(0.02)(key(0), (30, 7), jnp.float32)
  assert drawn.dtype == jnp.float32
  np.testing.assert_array_equal(drawn, jax.random.normal(key(0), (30, 7), jnp.float32) * jnp.float32(0.02))
