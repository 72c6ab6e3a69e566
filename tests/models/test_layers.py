"""Shared layers, against torch and NumPy."""

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_ext.models import layers


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_bicubic_equals_torch(height, width, new_height, new_width):
  torch = pytest.importorskip("torch")
  images = np.random.default_rng(0).standard_normal((2, height, width, 3))
  with jax.enable_x64(True):
    ours = layers.resize_bicubic(jnp.asarray(images), (new_height, new_width))
  theirs = torch.nn.functional.interpolate(
    torch.from_numpy(images).permute(0, 3, 1, 2), size=(new_height, new_width), mode="bicubic", align_corners=False
  )
  np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-10)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
  x = jnp.ones((4000, 3, 5))
  y = np.asarray(layers.drop(layers.DropPath(0.25), x, nnx.Rngs(0)))
  assert all(len(np.unique(sample)) == 1 for sample in y)
  np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
  assert abs(y.mean() - 1) < 0.03
  np.testing.assert_array_equal(layers.drop(layers.DropPath(0.25), x, None), x)


def test_attention_equals_numpy():
  with jax.enable_x64(True):
    attention = layers.Attention(12, 3, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 5, 12))
    y, attn = attention(jnp.asarray(x))
    qkv = x @ np.asarray(attention.qkv.kernel[...]) + np.asarray(attention.qkv.bias[...])
    for head in range(3):
      q, k = (qkv[..., part * 12 + head * 4 : part * 12 + head * 4 + 4] for part in range(2))
      logits = np.einsum("bqd,bkd->bqk", q, k) / 2
      weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
      np.testing.assert_allclose(attn[:, head], weights, atol=1e-12)
    assert y.shape == x.shape
