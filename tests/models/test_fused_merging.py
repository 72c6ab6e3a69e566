"""The kernels that merge 2x2 neighbours, interpreted, against plain jnp."""

from flax import nnx
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_ext.models import fused_merging, layers, swin


def plain(x, scale, bias, w, grid):
  """As the authors write it: the neighbours side by side, norm, product."""
  rows, columns = grid
  x = x.reshape(len(x), rows // 2, 2, columns // 2, 2, -1).transpose(0, 1, 3, 4, 2, 5)
  x = x.reshape(len(x), rows * columns // 4, -1)
  x = x - x.mean(axis=-1, keepdims=True)
  unit = x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)
  return jnp.einsum("bnc,cd->bnd", unit * scale + bias, w, precision="highest")


def draw(grid, dim, batch=2):
  rng, tokens = np.random.default_rng(0), grid[0] * grid[1]
  shapes = [(batch, tokens, dim), (4 * dim,), (4 * dim,), (4 * dim, 2 * dim), (batch, tokens // 4, 2 * dim)]
  x, scale, bias, w, dy = (jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in shapes)
  return (3 + 2 * x, 1 + 0.3 * scale, bias, 0.1 * w), dy


def values(function, arrays, dy):
  y, back = jax.vjp(function, *arrays)
  return [y, *back(dy)]


def fused(arrays, dy, grid, dtype):
  with pltpu.force_tpu_interpret_mode():
    return values(lambda *arrays: fused_merging.merge(*arrays, grid, 1e-6, dtype), arrays, dy)


@pytest.mark.parametrize(
  ("grid", "dim"),
  [
    ((4, 6), 64),  # along the lanes
    ((6, 10), 192),  # row by row, two tiles wide
    ((40, 48), 128),  # cells in two turns
  ],
)
def test_the_kernels_merge_as_the_authors_do(grid, dim):
  arrays, dy = draw(grid, dim)
  expected = values(lambda *arrays: plain(*arrays, grid), arrays, dy)
  for a, b in zip(fused(arrays, dy, grid, jnp.float32), expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_in_half_precision():
  arrays, dy = draw((8, 6), 96)
  expected = values(lambda *arrays: plain(*arrays, (8, 6)), arrays, dy)
  for a, b in zip(fused(arrays, dy, (8, 6), jnp.bfloat16), expected, strict=True):
    assert jnp.linalg.norm(a - b) < 0.01 * jnp.linalg.norm(b)


def test_over_a_mesh():
  arrays, dy = draw((4, 6), 64, batch=4)
  mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with jax.sharding.set_mesh(mesh):
    found = jax.jit(lambda *arrays: fused(arrays, dy, (4, 6), jnp.float32))(*arrays)
  for a, b in zip(found, fused(arrays, dy, (4, 6), jnp.float32), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
  ("kind", "side", "dim", "taken"),
  [
    ("TPU v4", 56, 96, True),
    ("TPU v4", 56, 128, False),  # 16.4 of 16 MiB, as its compiler says
    ("TPU v4", 28, 192, True),
    ("TPU v5 lite", 14, 512, True),
    ("TPU v5 lite", 56, 40, False),  # a tile of lanes is not filled by what comes out
  ],
)
def test_what_they_take(kind, side, dim, taken, on_a_kind):
  x = jax.ShapeDtypeStruct((2, side * side, dim), jnp.float32)
  with on_a_kind(kind):
    assert fused_merging.fits(x, jnp.bfloat16) == taken
    assert not fused_merging.fits(x, jnp.float32)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_swin_merges_by_them_unless_asked_not_to(implementation, monkeypatch):
  monkeypatch.setattr(layers, "platform", lambda: "tpu")
  merging = swin.PatchMerging(64, (4, 6), dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  merging.implementation = implementation
  graphdef, params = nnx.split(merging)
  x = 3 + jax.random.normal(jax.random.key(0), (2, 24, 64))
  program = jax.make_jaxpr(lambda params, x: nnx.merge(graphdef, params)(x))(params, x)
  assert ("pallas_call" in str(program)) == (implementation == "auto")
  with pltpu.force_tpu_interpret_mode():
    found = merging(x)
  monkeypatch.undo()  # on a CPU
  assert found.dtype == x.dtype
  expected = merging(x)
  assert jnp.linalg.norm(found - expected) < 0.02 * jnp.linalg.norm(expected)
