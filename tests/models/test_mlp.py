"""GELU as TPUs compute it, against SciPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special

from vit_jax_ext.models import gelu


@pytest.mark.parametrize("largest", [0.01, 1, 12, 1e4, 3e38])
def test_tanh_gives_the_normal_distribution(largest):
  x = np.linspace(-largest, largest, 100_001).astype(np.float32)
  exact = scipy.special.ndtr(x.astype(np.float64))
  cdf = np.asarray(gelu.normal_cdf(jnp.asarray(x)), np.float64)
  assert np.abs(x * (cdf - exact)).max() < 4e-6
  density = np.exp(-0.5 * np.square(x.astype(np.float64))) / np.sqrt(2 * np.pi)
  slope = np.asarray(gelu.gelu_derivative(jnp.asarray(x), jnp.asarray(cdf, jnp.float32)))
  np.testing.assert_allclose(slope, exact + x * density, atol=2e-5)


def test_gelu_of_all_bfloat16_numbers_on_tpus(monkeypatch):
  """At most the next number to the right one, and that seldom, where it is 0.002 or more."""
  numbers = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
  numbers = numbers[np.isfinite(numbers.astype(np.float32)) & (np.abs(numbers.astype(np.float32)) < 1e30)]
  exact = numbers.astype(np.float64) * scipy.special.ndtr(numbers.astype(np.float64))
  monkeypatch.setattr(gelu, "platform", lambda: "tpu")
  ours, back = jax.vjp(gelu.gelu, jnp.asarray(numbers))
  assert ours.dtype == jnp.bfloat16
  assert "tanh" in str(jax.make_jaxpr(gelu.gelu)(numbers)) and "erf" not in str(jax.make_jaxpr(gelu.gelu)(numbers))
  away = np.abs(np.asarray(ours).view(np.int16).astype(int) - exact.astype(ml_dtypes.bfloat16).view(np.int16))
  large = np.abs(exact) >= 0.002
  assert away[large].max() == 1 and (away[large] == 1).mean() < 1e-3
  np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8, atol=4e-6)
  density = np.exp(-0.5 * np.square(numbers.astype(np.float64))) / np.sqrt(2 * np.pi)
  slope = scipy.special.ndtr(numbers.astype(np.float64)) + numbers.astype(np.float64) * density
  (ours,) = back(jnp.ones_like(numbers))
  np.testing.assert_allclose(np.asarray(ours, np.float64), slope, rtol=2**-8, atol=2e-5)
