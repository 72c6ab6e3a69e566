"""Shared layers, against torch and NumPy."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.benchmarks import precision
from vit_jax_ext.models import layers


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
