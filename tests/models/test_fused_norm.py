"""The kernels of the norm that begins a stream, interpreted, against plain jnp."""

from flax import nnx
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_ext.models import fused_norm, layers


def plain(x, scale, bias):
  x = x.astype(jnp.float32)
  x = x - x.mean(axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6) * scale + bias


def draw(tokens, dim, dtype):
  rng = np.random.default_rng(0)
  x, dy = (jnp.asarray(rng.normal(1, 2, (4, tokens, dim)), jnp.float32) for _ in range(2))
  scale, bias = (jnp.asarray(rng.normal(1, 0.5, dim), jnp.float32) for _ in range(2))
  return (x.astype(dtype), scale, bias), dy


def values(function, arrays, dy):
  y, back = jax.vjp(function, *arrays)
  return [y, *back(dy)]


def fused(arrays, dy):
  with pltpu.force_tpu_interpret_mode():
    return values(lambda *arrays: fused_norm.normalise(*arrays, 1e-6), arrays, dy)


@pytest.mark.parametrize(("tokens", "dim"), [(150, 96), (130, 160), (3000, 96)])
def test_the_kernels_are_a_norm(tokens, dim):
  arrays, dy = draw(tokens, dim, jnp.float32)
  for a, b in zip(fused(arrays, dy), values(plain, arrays, dy), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(b).max()))


def test_in_half_precision():
  arrays, dy = draw(150, 96, jnp.bfloat16)
  found, expected = fused(arrays, dy), values(plain, arrays, dy)
  assert [x.dtype for x in found] == [x.dtype for x in expected]
  for a, b in zip(found, expected, strict=True):
    a, b = (x.astype(jnp.float32) for x in (a, b))
    assert jnp.linalg.norm(a - b) < 0.005 * jnp.linalg.norm(b)


def test_over_a_mesh():
  arrays, dy = draw(150, 96, jnp.float32)
  mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with jax.sharding.set_mesh(mesh):
    found = jax.jit(lambda *arrays: fused(arrays, dy))(*arrays)
  for a, b in zip(found, fused(arrays, dy), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
  ("stream", "dtype", "tokens", "implementation", "taken"),
  [
    (True, "bfloat16", 150, "auto", True),
    (True, "bfloat16", 150, "reference", False),
    (True, "bfloat16", 49, "auto", False),
    (True, "float32", 150, "auto", False),
    (False, "bfloat16", 150, "auto", False),
  ],
)
def test_where_a_stream_begins_in_half_precision(stream, dtype, tokens, implementation, taken, monkeypatch):
  monkeypatch.setattr(layers, "platform", lambda: "tpu")
  norm = layers.LayerNorm(96, stream=stream, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  norm.implementation = implementation
  graphdef, params = nnx.split(norm)
  program = jax.make_jaxpr(lambda params, x: nnx.merge(graphdef, params)(x))(params, jnp.ones((2, tokens, 96), dtype))
  assert ("pallas_call" in str(program)) == taken
  assert program.out_avals[0].dtype == (jnp.float32 if stream else jnp.bfloat16)


@pytest.mark.parametrize(("side", "taken"), [(56, True), (96, False)])
def test_they_keep_to_what_fits_on_a_chip(side, taken, on_a_kind):
  """A v4 takes 18.3 of 16 MiB for 96 x 96 tokens, as its compiler says."""
  with on_a_kind("TPU v4"):
    assert fused_norm.fits(jax.ShapeDtypeStruct((2, side * side, 96), jnp.bfloat16)) == taken
