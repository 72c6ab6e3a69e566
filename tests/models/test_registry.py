"""Every registered name."""

import pathlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

import vit_jax_ext as vx
from vit_jax_ext.compare.cost import count_params
from vit_jax_ext.models import registry

# Counted on the authors' models.
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
  "deit_tiny_patch16_224": 5_717_416,
  "deit_small_patch16_224": 22_050_664,
  "deit_base_patch16_224": 86_567_656,
  "deit_tiny_distilled_patch16_224": 5_910_800,
  "deit_small_distilled_patch16_224": 22_436_432,
  "deit_base_distilled_patch16_224": 87_338_192,
  "vit_16b": 24_423_784,
  "vit_24b": 36_257_128,
  "vit_32b": 48_090_472,
  "deepvit_16b": 24_426_664,
  "deepvit_24b": 36_261_448,
  "deepvit_32b": 48_096_232,
  "deepvit_s": 27_312_632,
  "deepvit_l": 58_883_708,
  "deepvit_l_384": 59_043_308,
  "swin_tiny": 28_288_354,
  "swin_small": 49_606_258,
  "swin_base": 87_768_224,
  "cswin_tiny": 22_320_552,
  "cswin_small": 34_643_304,
  "cswin_base": 77_382_184,
  "boat_swin_tiny": 30_265_186,
  "boat_swin_small": 55_158_898,
  "boat_swin_base": 97_612_960,
  "boat_cswin_tiny": 26_390_952,
  "boat_cswin_small": 40_112_488,
  "boat_cswin_base": 89_628_712,
}


def test_names():
  assert vx.list_models() == sorted(PARAMS)


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_parameter_count(name):
  model = registry.abstract_model({"name": name, "overrides": {}}, num_classes=1000)
  assert count_params(model) == PARAMS[name] == registry.VARIANTS[name].params


@pytest.mark.parametrize(
  ("name", "image_size", "crop"),
  [
    ("deit_base_patch16_224", (224, 224), 0.875),
    ("deit_base_patch16_224", (384, 384), 1.0),  # with which the paper's 83.1 comes out (timm: 83.108)
    ("deit_small_patch16_224", (384, 384), 0.875),  # published at 224 alone
    ("deit_base_distilled_patch16_224", (384, 384), 1.0),  # the default_cfg of timm: crop_pct 1.0
    ("swin_base", (224, 224), 0.875),
    ("swin_base", (384, 384), 1.0),  # swin_base_patch4_window12_384_finetune.yaml: TEST.CROP False
    ("swin_base", (384, 512), 0.875),
    ("swin_tiny", (384, 384), 0.875),
    ("cswin_base", (224, 224), 0.9),
    ("cswin_base", (384, 384), 1.0),  # models/cswin.py, cswin_384: crop_pct 1.0
    ("boat_swin_base", (384, 384), 1.0),
    ("boat_cswin_base", (384, 384), 1.0),
    ("crossvit_18_dagger_224", (240, 240), 0.875),
    ("crossvit_18_dagger_384", (408, 408), 0.875),  # main.py, --crop-ratio: 256 / 224
    ("deepvit_l", (224, 224), 0.9),
    ("deepvit_l_384", (384, 384), 1.0),
  ],
)
def test_the_crop_is_that_published_for_the_size(name, image_size, crop):
  assert registry.get_variant(name).crop_at(image_size) == crop


def test_all_ask_for_the_crop_of_the_models_size():
  package = pathlib.Path(registry.__file__).parents[1]
  uses = {
    (path.relative_to(package).as_posix(), use)
    for path in package.rglob("*.py")
    for use in re.findall(r"variant\.(crop\w*(?:\([^)]*\))?)", path.read_text())
  }
  users = "attention/clusters.py", "attention/measure.py", "training/evaluate.py", "training/predict.py"
  assert uses == {(path, "crop_at(model.image_size)") for path in users} | {
    ("workdir/description.py", "crop_at(image_size)"),
    ("inputs.py", "crop_at(image_size)"),
  }


def create(**kw):
  return nnx.eval_shape(lambda: vx.create_model(**({"name": "crossvit_tiny_224", "rngs": nnx.Rngs(0)} | kw)))


@pytest.mark.parametrize(
  ("kw", "words"),
  [
    (dict(name="crossvit_tiny"), ["crossvit_tiny", "crossvit_tiny_224"]),
    (dict(name="resnet50"), ["resnet50", "list_models"]),
    (dict(name="vit_base_patch16_224"), ["did you mean", "deit_base_patch16_224"]),
    (dict(name="crossvit_9_240"), ["did you mean", "crossvit_9_224"]),
    (dict(name="swin_tiny_patch4_window7_224"), ["did you mean", "swin_tiny"]),
    (dict(name="swinv2_tiny_window8_256"), ["did you mean", "swin_tiny"]),
    (dict(dropout=0.1), ["dropout", "drop_rate"]),
    (dict(num_classes=-1), ["num_classes -1"]),
    (dict(dtype="int8"), ["int8", "bfloat16"]),
    (dict(rngs=0), ["rngs 0", "nnx.Rngs"]),
    (dict(dtype="flaot32"), ["flaot32", "bfloat16"]),
    (dict(param_dtype=jnp.float64), ["float64", "jax_enable_x64"]),
    (dict(image_size=230), ["230", "228 and 240"]),
    (dict(image_size=(240, 7)), ["7", "12"]),
    (dict(fusion="sum"), ["sum", "cross_attention"]),
    (dict(num_heads=(5, 3)), ["96", "5 heads"]),
    (dict(name="vit_16b", grid=(3, 3)), ["'grid'", "patch_size"]),
    (dict(name="boat_swin_tiny", clusters=4), ["'clusters'", "cluster_size", "window_size"]),
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
