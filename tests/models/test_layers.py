"""Shared layers, against torch and NumPy."""

from unittest import mock

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.benchmarks import precision
from vit_jax_ext.models import layers


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.sampled_from(["cpu", "tpu"]))
def test_bicubic_equals_torch(height, width, new_height, new_width, platform):
  torch = pytest.importorskip("torch")
  images = np.random.default_rng(0).standard_normal((2, height, width, 3))
  with jax.enable_x64(True), mock.patch.object(layers, "platform", lambda: platform):
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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_in_bfloat16_are_summed_in_float32(platform, monkeypatch):
  """Of the biases above all: in bfloat16 a sum over many tokens stops growing, and they were 10% off."""
  monkeypatch.setattr(layers, "platform", lambda: platform)
  tokens, dim = 512, 32
  rng = np.random.default_rng(0)
  x, g = (rng.standard_normal((64, tokens, dim)).astype(np.float32) + 0.3 for _ in range(2))

  def gradient(layer, dtype):
    layer = layer(dtype)
    graphdef, params = nnx.split(layer, nnx.Param)

    def weighted(params):
      y = nnx.merge(graphdef, params)(jnp.asarray(x))
      return sum(jnp.sum(part * g) for part in (y if isinstance(y, list) else [y]))

    return jax.tree.leaves(jax.grad(weighted)(params))

  kw = dict(param_dtype=jnp.float32)
  for layer in (
    lambda dtype: layers.Linear(dim, dim, dtype=dtype, rngs=nnx.Rngs(0), **kw),
    lambda dtype: layers.PackedQKV(dim, dtype=dtype, rngs=nnx.Rngs(0), **kw),
    lambda dtype: layers.LayerNorm(dim, dtype=dtype, rngs=nnx.Rngs(0), **kw),
  ):
    for ours, exact in zip(gradient(layer, jnp.bfloat16), gradient(layer, jnp.float32), strict=True):
      assert ours.dtype == jnp.float32
      assert np.linalg.norm(ours - exact) < 5e-3 * np.linalg.norm(exact)


def test_a_bias_is_the_same_on_tpus(monkeypatch):
  """Bit for bit; its gradient, there a product, to the rounding of float32."""
  rng, found = np.random.default_rng(0), {}
  x, grad = (jnp.asarray(rng.standard_normal((3, 197, 5)), jnp.bfloat16) for _ in range(2))
  bias = jnp.asarray(rng.standard_normal(5), jnp.float32)
  for platform in ("cpu", "tpu"):
    monkeypatch.setattr(layers, "platform", lambda platform=platform: platform)
    y, back = jax.vjp(layers.add_bias, x, bias)
    assert ("dot_general" in str(jax.make_jaxpr(back)(grad))) == (platform == "tpu")
    found[platform] = [y, *back(grad)]
  for ours, others in zip(*(values[:2] for values in found.values()), strict=True):
    assert ours.dtype == others.dtype
    np.testing.assert_array_equal(ours, others)
  for values in found.values():
    assert values[2].dtype == jnp.float32
    np.testing.assert_allclose(values[2], np.asarray(grad, float).sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", precision.THIN)
def test_gradients_in_bfloat16_are_near_those_in_float32(name):
  """Every tensor below 2%; tests/benchmarks/precision.py prints the table."""
  _, found = precision.errors(name, precision.THIN[name], 32)
  assert len(found) > 50
  assert max(found.values()) < 0.02, sorted(found.items(), key=lambda item: -item[1])[:5]
