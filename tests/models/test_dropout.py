"""Dropout and stochastic depth, and their keys."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import vit_jax_ext as vx
from vit_jax_ext.models import dropout, layers


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
  x = jnp.ones((4000, 3, 5))
  y = np.asarray(dropout.drop(dropout.DropPath(0.25), x, nnx.Rngs(0)))
  assert all(len(np.unique(sample)) == 1 for sample in y)
  np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
  assert abs(y.mean() - 1) < 0.03
  np.testing.assert_array_equal(dropout.drop(dropout.DropPath(0.25), x, None), x)


def draw(rngs: nnx.Rngs, number: int) -> list[tuple[int, ...]]:
  return [tuple(jax.random.key_data(rngs["dropout"]()).tolist()) for _ in range(number)]


def test_no_key_comes_twice():
  number = 3 * dropout.KEYS + 1
  given = nnx.Rngs(0)
  first, second = (dropout.runtime_rngs(True, given, 0.1) for _ in range(2))
  keys = [*draw(first, number), *draw(second, number)]
  others = [tuple(jax.random.key_data(rngs()).tolist()) for rngs in (given, first, second) for _ in range(number)]
  assert len({*keys, *others}) == 5 * number
  assert keys[:number] == draw(dropout.runtime_rngs(True, nnx.Rngs(0), 0.1), number)


def test_the_streams_of_the_caller_are_kept():
  given = nnx.Rngs(default=0, dropout=1, noise=2)
  found = dropout.runtime_rngs(True, given, 0.1)
  assert sorted(name for name, _ in found.items()) == ["default", "dropout", "noise"]
  assert type(given.dropout) is nnx.RngStream
  assert draw(found, 3) == draw(dropout.runtime_rngs(True, nnx.Rngs(dropout=1), 0.1), 3)
  assert dropout.runtime_rngs(True, given, 0.0) is given
  assert dropout.runtime_rngs(False, given, 0.1) is None


class Twice(nnx.Module):
  def __init__(self):
    self.drop, self.factor = nnx.Dropout(0.5), nnx.Param(jnp.ones(()))

  def __call__(self, x, rngs):
    return dropout.drop(self.drop, dropout.drop(self.drop, x * self.factor, rngs), rngs)


def test_blocks_that_compute_again_draw_the_same():
  """Over so many blocks that keys are made twice, once in the midst of a block's backward pass."""

  def total(x, key, remat):
    rngs = dropout.runtime_rngs(True, nnx.Rngs(key), 0.5)
    dropped = [layers.call(Twice(), x, rngs, remat=remat) for _ in range(dropout.KEYS)]
    return sum(i * y for i, y in enumerate(dropped, 1)).sum(), jnp.stack(dropped)

  run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=2)
  (_, kept), gradient = run(jnp.ones(16), jax.random.key(3), False)
  (_, again), gradient_again = run(jnp.ones(16), jax.random.key(3), True)
  np.testing.assert_array_equal(kept, again)
  np.testing.assert_array_equal(gradient, gradient_again)
  assert len({tuple(y) for y in kept.tolist()}) > dropout.KEYS * 0.9
  np.testing.assert_allclose(kept.mean(), 1, atol=0.25)


def test_no_block_makes_keys_of_its_own():
  def operations(depth):
    options = dict(image_size=32, depth=depth, drop_path_rate=0.5, drop_rate=0.5, num_classes=2)
    model = nnx.eval_shape(lambda: vx.create_model("deit_tiny_patch16_224", rngs=nnx.Rngs(0), **options))
    graphdef, params = nnx.split(model)
    step = jax.make_jaxpr(lambda params, x, key: nnx.merge(graphdef, params)(x, train=True, rngs=nnx.Rngs(key))[0])(
      params, jnp.zeros((2, 32, 32, 3)), jax.random.key(0)
    )
    return str(step).count("random_fold_in") + str(step).count("random_split")

  assert operations(2) == operations(6) > 0
