"""CSWin: the authors' logits, published facts, stripes, bad input."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext.compare import cost
from vit_jax_ext.models import cswin, layers, registry

SMALL = dict(num_classes=5, embed_dim=8, depth=(1, 1), num_heads=(2, 4), split_size=(2, 7))


@pytest.mark.slow  # boat_cswin_tiny passes through the same code
def test_logits_are_the_authors(check_golden):
  check_golden("cswin_tiny")


@pytest.mark.parametrize(
  "name", ["cswin_tiny", *(pytest.param(f"cswin_{size}", marks=pytest.mark.slow) for size in ("small", "base"))]
)
def test_multiply_adds_are_the_published(name):
  assert cost.model_cost(name)[1] / 1e9 == pytest.approx(registry.get_variant(name).multiply_adds, rel=0.02)


def test_stripes_cross():
  """Half of the channels reach a token's columns, half its rows."""
  kw = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  block = cswin.CSWinBlock(4, 2, (4, 6), [(4, 2), (1, 6)], 1, 0.0, 0.0, 0.0, **kw)
  x = jax.random.normal(jax.random.key(0), (1, 24, 2))
  row, column = np.divmod(np.arange(24), 6)
  for attention, place in zip(block.attns, (column // 2, row), strict=True):
    jacobian = jax.jit(jax.jacobian(lambda x, f=attention: f(x, lambda y, *_: [y] * 3, 0, 1)[0].sum(-1)))(x)[:, 0]
    reach = jnp.abs(jacobian).sum(-1) > 0
    np.testing.assert_array_equal(reach, place[:, None] == place)


def test_depthwise_convolution_is_the_grouped_one():
  conv = layers.DepthwiseConv(5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 1, 7, 5))
  np.testing.assert_allclose(conv(x), nnx.Conv.__call__(conv, x), rtol=1e-5, atol=1e-6)


def test_features_of_every_stage_and_rectangular_images(random_model):
  model = random_model("cswin_tiny", **SMALL | {"image_size": (16, 24), "num_classes": 0})
  features, out = jax.jit(lambda model, x: model(x))(model, jnp.ones((3, 16, 24, 3)))
  assert model.image_size == (16, 24)
  assert out["stages.0"].shape == (3, 4, 6, 8)
  assert out["stages.1"].shape == (3, 2, 3, 16)
  assert features.shape == (3, 16)
  np.testing.assert_array_equal(features, out["pre_logits"])


def test_refuses_what_does_not_fit():
  with pytest.raises(vx.UserError, match=r"100.*nearest sizes are 96 and 128"):
    vx.create_model("cswin_tiny", rngs=nnx.Rngs(0), image_size=100)
  with pytest.raises(vx.UserError, match="num_heads"):
    vx.create_model("cswin_tiny", rngs=nnx.Rngs(0), **SMALL | {"num_heads": (1, 2)})
