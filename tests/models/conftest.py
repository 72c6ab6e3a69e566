"""What the tests of several architectures share."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx


@pytest.fixture
def check_golden(golden, x64):
  """Compares a model's logits with the authors', in float64, through their state dict, Swin's masks included."""

  def check(name):
    state_dict, images, expected = golden(name)
    model = nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0), dtype="float64", param_dtype="float64"))
    report = vx.load_pretrained(model, state_dict)
    assert all(key.endswith("attn_mask") for key in report.unused)
    logits, _ = jax.jit(lambda model, x: model(x))(model, images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)

  return check


@pytest.fixture(scope="session")
def random_model():
  """Returns a function: create_model's arguments -> a model with weights from NumPy, which takes no compilation."""

  def create(name, **kw):
    model = nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0), **kw))
    rng = np.random.default_rng(0)

    def weight(p):
      spread = 0.3 if p.ndim == 1 else np.prod(p.shape[:-1]) ** -0.5
      return jnp.asarray(rng.normal(0, spread, p.shape), p.dtype)

    state = jax.tree.map(weight, nnx.state(model, nnx.Param))
    nnx.update(model, state)
    return model

  return create
