"""Loading mappings: strict both ways, and the model unchanged on failure."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx

DEPTH = ((1, 1),)  # one multi-scale block, so that creating the model is quick


@pytest.fixture(scope="module")
def state_dict(golden):
  """The part of the authors' state dict that a model of that depth has."""
  whole, _, _ = golden("crossvit_tiny_224")
  absent = ("blocks.1", "blocks.2", *(f"blocks.0.blocks.1.{i}" for i in (1, 2, 3)))
  return {key: value for key, value in whole.items() if not key.startswith(absent)}


@pytest.fixture(scope="module")
def model():
  return vx.create_model("crossvit_tiny_224", depth=DEPTH, rngs=nnx.Rngs(0))


def snapshot(model):
  return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


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
def test_misfits_are_named_and_change_nothing(model, state_dict, damage, words):
  before, damaged = snapshot(model), dict(state_dict)
  damage(damaged)
  with pytest.raises(vx.UserError) as error:
    vx.load_pretrained(model, damaged)
  assert "\n" not in str(error.value)
  assert all(word in str(error.value) for word in words)
  jax.tree.map(np.testing.assert_array_equal, before, snapshot(model))


def test_timm_names_and_buffers(model, state_dict):
  renamed = {
    key.replace(".", "_") if key.startswith(("pos_embed", "cls_token")) else key: value
    for key, value in state_dict.items()
  }
  report = vx.load_pretrained(model, renamed | {"num_batches_tracked": np.int64(3)})
  assert report.unused == ["num_batches_tracked"]
  assert sorted(report.loaded) == sorted(state_dict)
  np.testing.assert_array_equal(model.pos_embed[1][...], state_dict["pos_embed.1"])
  np.testing.assert_array_equal(model.head[0].kernel[...], state_dict["head.0.weight"].T)


def test_abstract_models_are_filled_in_their_param_dtype(state_dict):
  model = nnx.eval_shape(
    lambda: vx.create_model("crossvit_tiny_224", depth=DEPTH, param_dtype="bfloat16", rngs=nnx.Rngs(0))
  )
  vx.load_pretrained(model, state_dict)
  params = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert all(isinstance(p, jax.Array) and p.dtype == jnp.bfloat16 for p in params)
