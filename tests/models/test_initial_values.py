"""Initial values by distribution, against the rules of the authors' code.

Their `_init_weights` touch Linear and LayerNorm: weights from a normal of 0.02 (timm's truncation is a hundred standard
deviations away), biases 0, scales 1. Tokens, position embeddings and tables of relative positions are drawn from the
same normal. Convolutions have torch's default: weight and bias uniform within 1 / sqrt(fan_in).
"""

import math
import re

from flax import nnx
import jax
import numpy as np
import pytest
import scipy.stats

import vit_jax_ext as vx
from vit_jax_ext.models import registry

# Fewer blocks, the published widths.
SHALLOW = {
  "crossvit": dict(depth=((1, 1),)),
  "deit": dict(depth=1),
  "vit": dict(depth=1),
  "deepvit": dict(depth=2),
  "swin": dict(depths=(1, 1, 1, 1)),
  "cswin": dict(depth=(1, 1, 1, 1)),
  "boat_swin": dict(depths=(2, 1, 1, 1)),
  "boat_cswin": dict(depth=(1, 1, 1, 1)),
}
DEFAULT = ("crossvit_9_dagger_224", "deepvit_s", "boat_cswin_tiny")  # all kinds of parameters; the others are slow
CONVOLUTION = re.compile(
  r"patch_embed\.(\d\.)?(proj(\.\d)?|conv\d)$|stage1_conv_embed\.0$|merge\d\.conv$|get_v$|reatten_matrix$"
)
TOKENS = re.compile(r"(pos_embed|cls_token|dist_token)(\.\d)?$|relative_position_bias_table$")


def parameters(name):
  family = next(f for f in sorted(SHALLOW, key=len, reverse=True) if name.startswith(f))
  overrides = SHALLOW[family] | ({"reattention_blocks": (1,)} if re.match("deepvit_[sl]", name) else {})
  model = vx.create_model(name, rngs=nnx.Rngs(0), **overrides)
  for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    *module, leaf = map(str, path)
    yield ".".join(module), leaf, np.asarray(param.get_value(), np.float64)


@pytest.mark.parametrize(
  "name",
  [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in sorted(registry.VARIANTS)],
)
def test_initial_values(name):
  uniform, normal, kinds, fan_in = {"kernel": [], "bias": []}, [], set(), {}
  for module, leaf, values in parameters(name):
    if CONVOLUTION.search(module):
      if leaf == "kernel":
        fan_in[module] = math.prod(values.shape[:-1])
      uniform[leaf].append((module, values))
      kinds.add("convolution")
    elif leaf == "kernel" or TOKENS.search(f"{module}.{leaf}"):
      normal.append(values.ravel() / 0.02)
      kinds.add("tokens" if leaf != "kernel" else "linear")
    else:
      assert leaf in ("bias", "scale"), (module, leaf)
      np.testing.assert_array_equal(values, 1.0 if leaf == "scale" else 0.0, err_msg=f"{module}.{leaf}")
  assert kinds >= {"convolution", "linear"}
  # Each array of any size for itself, and all together.
  scaled = [(m, v.ravel() * math.sqrt(fan_in[m])) for values in uniform.values() for m, v in values]
  for module, values in [*scaled, ("all", np.concatenate([v for _, v in scaled]))]:
    assert np.abs(values).max() < 1 + 1e-6
    assert scipy.stats.kstest(values[:50_000], scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-6, module
  biases = np.concatenate([v.ravel() * math.sqrt(fan_in[m]) for m, v in uniform["bias"]])
  assert len(biases) > 50 and scipy.stats.kstest(biases, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-4
  for values in [*normal, np.concatenate(normal)]:
    assert scipy.stats.kstest(values[:50_000], "norm").pvalue > 1e-6
  jax.clear_caches()
