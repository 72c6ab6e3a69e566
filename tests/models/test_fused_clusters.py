"""The kernels of attention inside clusters, interpreted, against plain jnp."""

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_ext.models import boat, fused_clusters
from vit_jax_ext.models.fused_windows import Windows


@pytest.fixture(autouse=True)
def interpreted():
  with pltpu.force_tpu_interpret_mode():
    yield


def split(x, heads):
  """(B, tokens, C) to (B, heads, tokens, width)."""
  return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def plain(q, k, v, taps, order, mask, scale, grid):
  """Attention of each head inside pairs of clusters, token by token, and a grouped convolution."""
  batch, tokens, dim = v.shape
  heads, pair = order.shape[1], len(mask)
  q, k, values = (jnp.take_along_axis(split(x, heads), order[..., None], 2) for x in (q, k, v))
  q, k, values = (x.reshape(batch, heads, tokens // pair, pair, -1) for x in (q, k, values))
  maps = jax.nn.softmax(jnp.einsum("bhpqc,bhpkc->bhpqk", q, k, precision="highest") * scale + mask)
  y = jnp.einsum("bhpqk,bhpkc->bhpqc", maps, values, precision="highest").reshape(batch, heads, tokens, -1)
  y = jnp.take_along_axis(y, jnp.argsort(order, -1)[..., None], 2).swapaxes(1, 2).reshape(v.shape)
  convolved = jax.lax.conv_general_dilated(
    v.reshape(batch, *grid, dim),
    taps[:9].reshape(3, 3, 1, dim),
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=dim,
    precision="highest",
  )
  return y + convolved.reshape(v.shape) + taps[9]


def values(function, dy, *arrays):
  y, back = jax.vjp(lambda *arrays: function(*arrays).astype(jnp.float32), *arrays)
  return [y, *back(dy)]


def draw(grid, heads, width, pair, dtype):
  rng, tokens, dim = np.random.default_rng(0), grid[0] * grid[1], heads * width
  q, k, v, dy = (jnp.asarray(rng.standard_normal((4, tokens, dim)), dtype) for _ in range(4))
  taps = jnp.asarray(rng.standard_normal((10, dim)), jnp.float32)
  order = rng.permuted(np.broadcast_to(np.arange(tokens, dtype=np.int32), (4, heads, tokens)), axis=-1)
  windows = Windows((tokens // pair, pair), (1, pair))
  return (q, k, v, taps), dy.astype(jnp.float32), jnp.asarray(order), boat.overlap_mask(pair // 2, 1), windows


def fused(order, mask, windows, width, grid):
  place = jnp.argsort(order, axis=-1).astype(jnp.int32)

  def run(q, k, v, taps):
    return fused_clusters.attend_clusters(q, k, v, order, place, mask, taps, windows, width, 0.3, grid)

  return run


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(
  ("grid", "heads", "width", "pair"),
  [
    ((6, 8), 3, 32, 6),
    ((4, 12), 5, 48, 8),  # heads that no tile of 128 lanes divides into
    ((4, 6), 2, 4, 24),  # one pair
    ((4, 4), 2, 100, 4),  # three arrays of which no tile has two
  ],
)
def test_the_kernels_are_attention_inside_clusters(grid, heads, width, pair, by_rows, monkeypatch):
  if by_rows:
    monkeypatch.setattr(fused_clusters, "MANY", 1)
    monkeypatch.setattr(fused_clusters, "UNROLLED", (8, 16))
  arrays, dy, order, mask, windows = draw(grid, heads, width, pair, jnp.float32)
  assert bool(fused_clusters._unrolled(grid[0] * grid[1], width)) == by_rows
  found = values(fused(order, mask, windows, width, grid), dy, *arrays)
  expected = values(lambda *arrays: plain(*arrays, order, mask, 0.3, grid), dy, *arrays)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))
  np.testing.assert_array_equal(
    fused(order, mask, windows, width, grid)(*arrays), found[0]
  )  # where no gradient is asked


@pytest.mark.parametrize("by_rows", [False, True])
def test_in_half_precision(by_rows, monkeypatch):
  if by_rows:
    monkeypatch.setattr(fused_clusters, "MANY", 1)
    monkeypatch.setattr(fused_clusters, "UNROLLED", (8, 16))
  arrays, dy, order, mask, windows = draw((6, 8), 3, 32, 6, jnp.bfloat16)
  found = values(fused(order, mask, windows, 32, (6, 8)), dy, *arrays)
  exact = [x.astype(jnp.float32) for x in arrays]
  expected = values(lambda *arrays: plain(*arrays, order, mask, 0.3, (6, 8)), dy, *exact)
  for a, b in zip(found, expected, strict=True):
    assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.01 * jnp.linalg.norm(b)


@pytest.mark.parametrize("heads", [4, 3])  # which two devices share, and do not
def test_over_a_mesh(heads):
  grid, width, pair = (4, 6), 8, 6
  arrays, dy, order, mask, windows = draw(grid, heads, width, pair, jnp.float32)
  run = fused(order, mask, windows, width, grid)
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with jax.sharding.set_mesh(mesh):
    found = jax.jit(lambda *arrays: values(run, dy, *arrays))(*arrays)
  for a, b in zip(found, values(run, dy, *arrays), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_rows_are_moved_one_by_one_where_many_can_be_written_out():
  assert fused_clusters._unrolled(3136, 32) == 448
  assert fused_clusters._unrolled(4096, 32) == 512
  assert fused_clusters._unrolled(784, 32) is None
  assert fused_clusters._unrolled(8 * 211, 32) is None
  assert fused_clusters._unrolled(3136, 192) is None


@pytest.mark.parametrize(
  ("kind", "side", "heads", "dim", "taken"),
  [
    ("TPU v4", 56, 2, 64, False),  # 22.7 of 16 MiB
    ("TPU v4", 28, 6, 192, True),
    ("TPU v4", 24, 12, 384, False),  # 17.1 of 16 MiB
    ("TPU v5", 96, 3, 96, False),  # 66.5 of 64 MiB
    ("TPU v5", 80, 3, 96, True),
    ("TPU v5 lite", 96, 4, 128, True),
  ],
)
def test_they_keep_to_what_fits_on_a_chip(kind, side, heads, dim, taken, on_a_kind):
  """As compilers for these chips did or refused."""
  tokens = side * side
  pair = 2 * tokens >> boat.cluster_levels(tokens)
  q = jax.ShapeDtypeStruct((2, tokens, dim), jnp.bfloat16)
  with on_a_kind(kind):
    assert fused_clusters.fits(q, Windows((tokens // pair, pair), (1, pair)), dim // heads, (side, side)) == taken
