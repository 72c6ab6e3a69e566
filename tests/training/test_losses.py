"""The cosine regulariser against the authors' torch code, its limits and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext.training.losses import attention_cosine_loss


def maps(blocks=4, heads=3):
  rng = np.random.default_rng(0)
  return {f"blocks.{i}.attn": jax.nn.softmax(3 * rng.standard_normal((2, heads, 5, 5))) for i in range(blocks)}


def test_attention_cosine_loss_is_torchs_cosine_over_dimension_1():
  torch = pytest.importorskip("torch")
  out = maps()
  attn = [torch.from_numpy(np.array(m)) for m in out.values()]
  cosine = torch.nn.CosineSimilarity(dim=1)
  expected = sum(cosine(attn[i], attn[i + 1]) for i in range(3)).mean() / 3
  np.testing.assert_allclose(attention_cosine_loss(out, range(3)), expected, atol=1e-6)


def test_attention_cosine_loss_of_identical_maps_is_one_and_its_gradient_finite():
  attn = jnp.zeros((1, 2, 3, 3)).at[0, :, 0, 0].set(1.0).astype(jnp.bfloat16)
  value, grad = jax.value_and_grad(lambda a: attention_cosine_loss({"blocks.0.attn": a, "blocks.1.attn": a}, [0]))(attn)
  np.testing.assert_allclose(value, 1 / 9, rtol=1e-6)  # the other eight places are zero in both
  assert value.dtype == jnp.float32
  assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("blocks, message", [((3,), "cannot compare blocks 3 and 4"), ((), "no blocks to compare")])
def test_attention_cosine_loss_refuses(blocks, message):
  with pytest.raises(vx.UserError, match=message):
    attention_cosine_loss(maps(), blocks)
