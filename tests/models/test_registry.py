"""Every registered name."""

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

import vit_jax_ext as vx
from vit_jax_ext.analysis.cost import count_params
from vit_jax_ext.models import registry

# FACTS: counted on the authors' models.
PARAMS = {
  "crossvit_tiny_224": 7_014_800,
  "crossvit_small_224": 26_856_272,
  "crossvit_base_224": 105_025_232,
  "crossvit_9_224": 8_553_296,
  "crossvit_15_224": 27_528_464,
  "crossvit_18_224": 43_271_408,
  "crossvit_9_dagger_224": 8_776_592,
  "crossvit_15_dagger_224": 28_209_008,
  "crossvit_18_dagger_224": 44_266_976,
  "crossvit_15_dagger_384": 28_500_080,
  "crossvit_18_dagger_384": 44_606_560,
}


def test_names():
  assert vx.list_models() == sorted(PARAMS)


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_parameter_count(name):
  model = registry.abstract_model({"name": name, "overrides": {}}, num_classes=1000)
  assert count_params(model) == PARAMS[name] == registry.VARIANTS[name].params


def create(**kw):
  return nnx.eval_shape(lambda: vx.create_model(**({"name": "crossvit_tiny_224", "rngs": nnx.Rngs(0)} | kw)))


@pytest.mark.parametrize(
  ("kw", "words"),
  [
    (dict(name="crossvit_tiny"), ["crossvit_tiny", "crossvit_tiny_224"]),
    (dict(name="resnet50"), ["resnet50", "list_models"]),
    (dict(dropout=0.1), ["dropout", "drop_rate"]),
    (dict(num_classes=-1), ["num_classes -1"]),
    (dict(dtype="int8"), ["int8", "bfloat16"]),
    (dict(dtype="flaot32"), ["flaot32", "bfloat16"]),
    (dict(param_dtype=jnp.float64), ["float64", "jax_enable_x64"]),
    (dict(image_size=230), ["230", "228 and 240"]),
    (dict(image_size=(240, 7)), ["7", "12"]),
    (dict(fusion="sum"), ["sum", "cross_attention"]),
    (dict(num_heads=(5, 3)), ["96", "5 heads"]),
  ],
)
def test_bad_input(kw, words):
  with pytest.raises(vx.UserError) as error:
    create(**kw)
  assert "\n" not in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_wrong_image_is_refused_in_words():
  model = create()
  graphdef, state = nnx.split(model)
  with pytest.raises(vx.UserError, match=r"240, 240, 3.*image_size=\(224, 224\)"):
    jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, jnp.zeros((1, 224, 224, 3)))
