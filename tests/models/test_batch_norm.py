"""BatchNorm against torch's, one for each part of the batch as several unsynchronised processes have it."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import torch

import vit_jax_ext as vx
from vit_jax_ext.models.batch_norm import BatchNorm


def batch_norm(channels=3, dtype=jnp.float64, **kw):
  norm = BatchNorm(channels, axis=1, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), **kw)
  rng = np.random.default_rng(0)
  norm.scale[...], norm.bias[...] = (jnp.asarray(rng.uniform(0.5, 2, channels), dtype) for _ in range(2))
  return norm


@pytest.mark.parametrize("statistics_batch", [None, 2, 4])
def test_equals_one_torch_process_for_each_part(statistics_batch, x64):
  norm = batch_norm(statistics_batch=statistics_batch)
  size = statistics_batch or 8
  processes = [torch.nn.BatchNorm2d(3).double() for _ in range(8 // size)]
  for process in processes:
    process.load_state_dict(
      process.state_dict()
      | {"weight": torch.tensor(np.array(norm.scale[...])), "bias": torch.tensor(np.array(norm.bias[...]))}
    )
  rng = np.random.default_rng(1)
  for _ in range(3):
    x = rng.normal(0.5, 1, (8, 3, 5, 5)) * rng.uniform(0.5, 2, (8, 1, 1, 1))
    parts = [p(torch.tensor(x[i * size : (i + 1) * size])).detach().numpy() for i, p in enumerate(processes)]
    np.testing.assert_allclose(norm(jnp.asarray(x), train=True), np.concatenate(parts), atol=1e-12)
  # The process that saves checkpoints is the first.
  np.testing.assert_allclose(norm.mean[...], processes[0].running_mean, atol=1e-12)
  np.testing.assert_allclose(norm.var[...], processes[0].running_var, atol=1e-12)
  evaluated = processes[0].eval()(torch.tensor(x)).detach().numpy()
  np.testing.assert_allclose(norm(jnp.asarray(x), train=False), evaluated, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 0.29, 1.0])
def test_small_variances_beside_large_means(offset):
  """As those of attention maps: in one pass over x and x**2 a variance of 1e-5 around 1.0 is 1% off in float32."""
  x = offset + 3e-3 * np.random.default_rng(0).standard_normal((8, 3, 16, 16))
  norm = batch_norm(dtype=jnp.float32, statistics_batch=None)
  x = jnp.asarray(x, jnp.float32)
  y = np.asarray(norm(x, train=True), np.float64)
  exact = np.asarray(x, np.float64)
  exact = (exact - exact.mean((0, 2, 3), keepdims=True)) / np.sqrt(exact.var((0, 2, 3), keepdims=True) + 1e-5)
  scale, bias = (np.asarray(param[...])[:, None, None] for param in (norm.scale, norm.bias))
  np.testing.assert_allclose(y, exact * scale + bias, atol=2e-4)


@pytest.mark.parametrize("statistics_batch", [None, 2, 4, 8])
def test_any_mesh_gives_the_same(statistics_batch, x64):
  norm = batch_norm(statistics_batch=statistics_batch)
  graphdef, state = nnx.split(norm)
  x = jnp.asarray(np.random.default_rng(0).normal(1, 2, (16, 3, 4, 4)))

  @jax.jit
  def run(state, x):
    norm = nnx.merge(graphdef, state)
    return norm(x, train=True), nnx.state(norm)

  alone = run(state, x)
  for devices in (2, 8):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    split = run(jax.device_put(state, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("data"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), alone, split)


def test_deepvit_has_it_everywhere(x64, random_model):
  """Two images of a part do not see the others: a batch of two parts gives what each gives alone."""
  options = dict(image_size=32, num_classes=5, embed_dim=24, depth=2, num_heads=3, statistics_batch=2)
  kw = dict(dtype="float64", param_dtype="float64", reattention_blocks=(1,))
  graphdef, state = nnx.split(random_model("deepvit_s", **options, **kw))
  images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3), jnp.float64)
  logits = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, train=True)[0])
  np.testing.assert_allclose(
    logits(state, images), jnp.concatenate([logits(state, images[:2]), logits(state, images[2:])]), atol=1e-10
  )


def test_parts_that_do_not_make_up_the_batch():
  with pytest.raises(vx.UserError, match="statistics_batch 3 does not divide the 8 images"):
    batch_norm(dtype=jnp.float32, statistics_batch=3)(jnp.zeros((8, 3, 2, 2)), train=True)
