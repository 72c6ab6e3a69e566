"""Swin: the authors' logits, published facts, windows of any size, bad input."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext.compare import cost
from vit_jax_ext.models import layers, registry, swin

SMALL = dict(image_size=64, num_classes=5, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4)


@jax.jit
def forward(model, x):
  return model(x)


def images(batch, height, width):
  return jax.random.normal(jax.random.key(1), (batch, height, width, 3))


def test_logits_are_the_authors(check_golden):
  check_golden("swin_tiny")


@pytest.mark.parametrize(
  "name", ["swin_tiny", *(pytest.param(f"swin_{size}", marks=pytest.mark.slow) for size in ("small", "base"))]
)
def test_multiply_adds_are_the_published(name):
  assert cost.model_cost(name)[1] / 1e9 == pytest.approx(registry.get_variant(name).multiply_adds, rel=0.02)


@pytest.mark.parametrize(("side", "window"), [(56, 7), (28, 7), (14, 7), (7, 7), (64, 8), (80, 8), (96, 8), (10, 5)])
def test_window_is_the_nearest_divisor(side, window):
  assert layers.fit_window(side, 7) == window


def test_authors_windows_at_384():
  assert [layers.fit_window(side, 12) for side in (96, 48, 24, 12)] == [12] * 4


def test_windows_merge_to_the_image():
  x = images(3, 6, 8)
  windows = layers.partition_windows(x, (3, 2))
  np.testing.assert_array_equal(windows[:, 1], x[:, :3, 2:4].reshape(3, 6, 3))
  np.testing.assert_array_equal(layers.merge_windows(windows, (6, 8), (3, 2)), x)


def test_shifted_windows_attend_to_neighbours_only():
  """A token reaches exactly the tokens of its shifted window, and never across the border of the image."""
  grid, window, shift = (6, 8), (3, 4), (1, 2)
  with jax.enable_x64(True):
    attention = swin.WindowAttention(
      4, 2, grid, window, shift, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (1, 48, 4), jnp.float64)
    reach = jnp.abs(jax.jit(jax.jacobian(lambda x: attention(x)[0].sum(-1)))(x)[:, 0]).sum(-1) > 0
  row, column = np.divmod(np.arange(48), 8)
  # Cut at rows 1, 4 and columns 2, 6.
  place = (row + 2) // 3 * 10 + (column + 2) // 4
  np.testing.assert_array_equal(reach, place[:, None] == place)


def test_a_kept_program_does_not_hinder_one_in_double_precision():
  """What JAX made of the index in one mode must fit the other, in whichever order."""
  for double in (False, True, False):
    with jax.enable_x64(double):
      dtype = "float64" if double else "float32"
      attention = swin.WindowAttention(4, 2, (4, 4), (4, 4), (0, 0), dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
      assert jax.jit(type(attention).attention_bias)(attention).dtype == dtype


def test_relative_positions_are_told_apart():
  index = swin.relative_position_index((2, 3))
  place = [(row, column) for row in range(2) for column in range(3)]
  offsets = {}
  for i, a in enumerate(place):
    for j, b in enumerate(place):
      offsets.setdefault((a[0] - b[0], a[1] - b[1]), set()).add(int(index[i, j]))
  assert sorted(value for values in offsets.values() for value in values) == list(range(15))


def test_patches_merge_alike_on_tpus(monkeypatch):
  """Values and gradients of a convolution with the norm inside, and of what the authors write."""
  with jax.enable_x64(True):
    merging = swin.PatchMerging(5, (4, 6), dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(merging, nnx.Param)
    rng, found = np.random.default_rng(0), []
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.5, 1, x.shape)), params)
    x, grad = jnp.asarray(rng.normal(3, 2, (2, 24, 5))), jnp.asarray(rng.standard_normal((2, 6, 10)))
    for platform in ("cpu", "tpu"):
      monkeypatch.setattr(layers, "platform", lambda platform=platform: platform)
      y, back = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
      assert ("conv" in str(jax.make_jaxpr(back)(grad))) == (platform == "tpu")
      found.append([y, *jax.tree.leaves(back(grad))])
    assert len(found[0]) == 5
    for ours, others in zip(*found, strict=True):
      np.testing.assert_allclose(ours, others, rtol=1e-9, atol=1e-9)


def test_features_of_every_stage_and_rectangular_images(random_model):
  model = random_model("swin_tiny", **SMALL | {"image_size": (32, 48), "num_classes": 0})
  features, out = forward(model, images(3, 32, 48))
  assert model.image_size == (32, 48)
  assert out["stages.0"].shape == (3, 8, 12, 8)
  assert out["stages.1"].shape == (3, 4, 6, 16)
  assert features.shape == (3, 16)
  np.testing.assert_array_equal(features, out["pre_logits"])


def test_remat_changes_no_gradient(random_model):
  grads = []
  for remat in (False, True):
    one_stage = dict(image_size=32, depths=(2,), num_heads=(2,), drop_path_rate=0.5, remat=remat)
    graphdef, params = nnx.split(random_model("swin_tiny", **SMALL | one_stage))

    def loss(params, graphdef=graphdef):
      logits, _ = nnx.merge(graphdef, params)(images(2, 32, 32), train=True, rngs=nnx.Rngs(3))
      return (logits**2).sum()

    grads.append(jax.jit(jax.grad(loss))(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *grads)


def test_refuses_what_does_not_fit():
  with pytest.raises(vx.UserError, match=r"230.*nearest sizes are 224 and 256"):
    vx.create_model("swin_tiny", rngs=nnx.Rngs(0), image_size=(224, 230))
  with pytest.raises(vx.UserError, match="num_heads"):
    vx.create_model("swin_tiny", rngs=nnx.Rngs(0), embed_dim=32)
  with pytest.raises(vx.UserError, match="no option 'patches'"):
    vx.create_model("swin_tiny", rngs=nnx.Rngs(0), patches=3)
  model = nnx.eval_shape(lambda: vx.create_model("swin_tiny", rngs=nnx.Rngs(0), **SMALL))
  with pytest.raises(vx.UserError, match="image_size="):
    model(images(1, 32, 32))
