"""Loading mappings: strict both ways, and the model unchanged on failure."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx


@pytest.fixture
def loaded(golden):
  model = vx.create_model("crossvit_tiny_224", rngs=nnx.Rngs(0))
  return model, golden("crossvit_tiny_224")[0]


def snapshot(model):
  return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_timm_names_and_buffers(loaded):
  model, state_dict = loaded
  renamed = {
    key.replace(".", "_") if key.startswith(("pos_embed", "cls_token")) else key: value
    for key, value in state_dict.items()
  }
  report = vx.load_pretrained(model, renamed | {"num_batches_tracked": np.int64(3)})
  assert report.unused == ["num_batches_tracked"]
  assert sorted(report.loaded) == sorted(state_dict)
  np.testing.assert_array_equal(model.pos_embed[1][...], state_dict["pos_embed.1"])
  np.testing.assert_array_equal(model.head[0].kernel[...], state_dict["head.0.weight"].T)


def test_values_take_param_dtype(golden):
  model = vx.create_model("crossvit_tiny_224", rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
  vx.load_pretrained(model, golden("crossvit_tiny_224")[0])
  assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (lambda d: d.pop("norm.0.bias"), ["norm.0.bias is missing"]),
    (lambda d: d.update(extra=np.zeros(3, np.float32)), ["extra is no parameter"]),
    (lambda d: d.update({"norm.0.bias": np.zeros(7, np.float32)}), ["norm.0.bias", "(7,)", "(96,)"]),
    (lambda d: d.update({"norm.0.bias": np.full(96, np.nan, np.float32)}), ["norm.0.bias", "not finite"]),
    (lambda d: (d.pop("norm.1.bias"), d.update(extra=np.zeros(3, np.float32))), ["norm.1.bias", "extra"]),
  ],
)
def test_misfits_are_named_and_change_nothing(loaded, damage, words):
  model, state_dict = loaded
  before = snapshot(model)
  damage(state_dict)
  with pytest.raises(vx.UserError) as error:
    vx.load_pretrained(model, state_dict)
  assert "\n" not in str(error.value)
  assert all(word in str(error.value) for word in words)
  jax.tree.map(np.testing.assert_array_equal, before, snapshot(model))
