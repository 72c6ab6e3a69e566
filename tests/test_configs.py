"""The recipes against FACTS.md, section 5, transcribed here; and that each of them can be built, changed and saved."""

import importlib
import itertools
import json
import re

import jax
import jax.numpy as jnp
import pytest

from tests.command_line import execute
import vit_jax_ext as vx
from vit_jax_ext import config as configs
from vit_jax_ext.models import registry
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.workdir.config import claim_workdir, read_workdir_config

SIZES = ("tiny", "small", "base")
ARGUMENTS = {
  "crossvit": (*SIZES, "9", "15", "18", "9_dagger", "15_dagger", "18_dagger", "15_dagger_384", "18_dagger_384"),
  "deepvit": ("16b", "24b", "32b", "s", "l", "l_384"),
  "boat": tuple(f"{family}_{size}" for family in ("swin", "cswin") for size in SIZES),
  "vit": ("deit_tiny", "deit_small", "deit_base", "16b", "24b", "32b"),
  "swin": SIZES,
  "cswin": SIZES,
}
SPECS = [f"configs/{family}.py:{argument}" for family, arguments in ARGUMENTS.items() for argument in arguments]

SHARED = {
  "optimizer.initial_learning_rate": 1e-6,
  "optimizer.final_learning_rate": 1e-5,
  "optimizer.warmup_prefix": False,
  "label_smoothing": 0.1,
  "augment.randaugment": "rand-m9-mstd0.5-inc1",
  "augment.erasing": 0.25,
  "augment.switch_probability": 0.5,
  "augment.color_jitter": 0.0,
  "dataset.name": "imagenet2012",
  "dataset.crop": None,  # the variant's
}
NAMES = ("batch_size", "optimizer.learning_rate", "optimizer.warmup_epochs", "optimizer.weight_decay",
         "model.overrides.drop_path_rate", "augment.mixup", "augment.cutmix", "ema_decay", "optimizer.clip_norm",
         "augment.repeats", "augment.interpolation", "optimizer.per_epoch", "total_epochs",
         "optimizer.cooldown_epochs", "augment.erase_mixed")  # fmt: skip
# The last: timm's train.py mixes before it erases; DeiT's main.py, on which CrossViT and Swin build, after.
CROSSVIT = (4096, 4e-3, 30, 0.05, 0.1, 0.8, 1.0, 0, None, 3, "bicubic", True, 300, 0, False)
DEEPVIT = (256, 5e-4, 5, 0.05, 0.2, 0.8, 1.0, 0.99996, None, 1, "random", True, 310, 10, True)
DEEPVIT_32B = (256, 5e-4, 5, 0.05, 0.2, 0.1, 0, 0.99996, None, 1, "random", True, 310, 10, True)
SWIN = {
  "tiny": (1024, 1e-3, 20, 0.05, 0.2, 0.8, 1.0, 0, 5.0, 1, "bicubic", False, 300, 0, False),
  "small": (1024, 1e-3, 20, 0.05, 0.3, 0.8, 1.0, 0, 5.0, 1, "bicubic", False, 300, 0, False),
  "base": (1024, 1e-3, 20, 0.05, 0.5, 0.8, 1.0, 0, 5.0, 1, "bicubic", False, 300, 0, False),
}
CSWIN = {
  "tiny": (2048, 2e-3, 20, 0.05, 0.2, 0.8, 1.0, 0.99984, None, 1, "random", True, 310, 10, True),
  "small": (2048, 2e-3, 20, 0.05, 0.4, 0.8, 1.0, 0.99984, None, 1, "random", True, 310, 10, True),
  "base": (1024, 1e-3, 20, 0.1, 0.5, 0.8, 1.0, 0.99992, None, 1, "random", True, 310, 10, True),
}
DEIT = (1024, 1e-3, 5, 0.05, 0.1, 0.8, 1.0, 0, None, 3, "bicubic", True, 300, 0, False)


def row(family, argument):
  """Returns the column of FACTS.md that holds for a config."""
  size = argument.rpartition("_")[2]
  if family == "deepvit":
    return DEEPVIT_32B if argument == "32b" else DEEPVIT
  if family == "vit":
    return DEIT if argument.startswith("deit") else DEEPVIT
  if family in ("swin", "cswin", "boat"):
    return (CSWIN if "cswin" in family + argument else SWIN)[size]
  return CROSSVIT


def load(spec, *overrides):
  config = configs.load_config(spec)
  configs.override(config, overrides)
  return config


def value(config, name):
  for key in name.split("."):
    config = config[key]
  return config


def family_and_argument(spec):
  return re.fullmatch(r"configs/(\w+).py:(\w+)", spec).groups()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.endswith("_384")])
def test_recipes_are_those_of_the_papers(spec):
  expected = row(*family_and_argument(spec))
  config = load(spec)
  for name, figure in (SHARED | dict(zip(NAMES, expected, strict=True))).items():
    ours = value(config, name)
    assert ours == (pytest.approx(figure, rel=1e-12) if isinstance(figure, float) else figure), name
  assert config.total_steps is None and config.optimizer.warmup_steps == 0
  assert config.batch_size % config.augment.mixing_batch == 0


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.endswith("_384")])
def test_fine_tuning_is_deits(spec):
  """README_deit.md: 16 GPUs with 32 images each, --lr 5e-6 --min-lr 5e-6 --weight-decay 1e-8 --epochs 30.

  Then engine.py trains in evaluation mode, where nothing is dropped, and so does CrossViT's.
  """
  config = load(spec)
  assert config.model.name.endswith("_384")
  assert (config.batch_size, config.augment.mixing_batch, config.total_epochs) == (512, 32, 30)
  assert config.optimizer.learning_rate == config.optimizer.final_learning_rate == 5e-6
  assert (config.optimizer.weight_decay, config.optimizer.cooldown_epochs) == (1e-8, 0)
  assert config.model.overrides.drop_path_rate == 0
  lower = config.model.name.replace("_384", "_224") if "crossvit" in spec else "deepvit_l"
  assert config.pretrained == registry.get_variant(lower).url


def test_cosine_regularizer_is_of_32b_alone():
  for spec in SPECS:
    regularizer = load(spec).cosine_regularizer
    is_32b = spec == "configs/deepvit.py:32b"
    assert (regularizer.weight, regularizer.blocks) == ((0.1, tuple(range(12))) if is_32b else (0.0, ()))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("smoke", [False, True])
def test_models_can_be_built(spec, smoke):
  config = load(spec, f"smoke={smoke}")
  model = registry.abstract_model(config.model, 1000)
  assert isinstance(model, registry.get_variant(config.model.name).model)


@pytest.mark.parametrize("spec", SPECS)
def test_published_accuracy_is_in_the_docstring(spec):
  _, argument = family_and_argument(spec)
  top1 = registry.get_variant(load(spec).model.name).top1
  docstring = configs._load_module(spec.split(":")[0]).__doc__
  figures = dict(re.findall(r"\b(\w+) (\d\d\.\d+)", docstring))
  assert top1 is None or float(figures[argument]) == top1


@pytest.mark.parametrize("family", ARGUMENTS)
def test_unknown_arguments_are_refused(family):
  with pytest.raises(vx.UserError) as error:
    load(f"configs/{family}.py:huge")
  assert all(argument in str(error.value) for argument in ("huge", *ARGUMENTS[family]))


def test_learning_rate_follows_the_batch_size():
  config = load("configs/crossvit.py:18", "batch_size=512")
  assert config.optimizer.learning_rate == pytest.approx(5e-4)
  assert json.loads(config.to_json_best_effort())["optimizer"]["learning_rate"] == pytest.approx(5e-4)
  # Unless it is given itself, before or after.
  for overrides in itertools.permutations(("optimizer.learning_rate=1e-3", "batch_size=512")):
    assert load("configs/crossvit.py:18", *overrides).optimizer.learning_rate == 1e-3
  config = load("configs/boat.py:swin_tiny", "batch_size=2048")
  rates = config.optimizer.initial_learning_rate, config.optimizer.learning_rate, config.optimizer.final_learning_rate
  assert rates == pytest.approx((2e-6, 2e-3, 2e-5))


@pytest.mark.parametrize("spec", SPECS[::6])
def test_saved_configs_are_the_same(spec, tmp_path):
  config = load(spec, "batch_size=64")
  claim_workdir(str(tmp_path), config)
  claim_workdir(str(tmp_path), config)
  saved = read_workdir_config(str(tmp_path))
  assert json.loads(saved.to_json()) == json.loads(config.to_json_best_effort())
  assert saved.optimizer.learning_rate == config.optimizer.learning_rate


@pytest.mark.parametrize("spec", [*SPECS, "configs/digits.py:vit", "configs/digits_depth.py:vit,12"])
def test_smoke_shrinks_the_run(spec):
  config = load(spec, "smoke=True", "log_every_steps=7")
  assert (config.batch_size, config.total_steps, config.total_epochs, config.log_every_steps) == (8, 2, None, 7)
  assert config.optimizer.warmup_steps == config.optimizer.warmup_epochs == config.optimizer.cooldown_epochs == 0
  assert config.get("pretrained") is None
  if "digits" not in spec:
    assert config.dataset.name == "synthetic"
    assert config.model.overrides.image_size <= 64
  assert load(spec, "smoke=False") == load(spec)


@pytest.mark.parametrize("family", ARGUMENTS)
def test_a_config_knows_its_arguments(family):
  module = importlib.import_module(f"configs.{family}")
  assert tuple(module.VARIANTS) == ARGUMENTS[family]
  with pytest.raises(vx.UserError, match=f"does not know the argument 'huge'; choose one of {ARGUMENTS[family][0]}"):
    configs.load_config(f"configs/{family}.py:huge")


@pytest.mark.parametrize("spec", SPECS)
def test_every_recipe_describes_a_training_step(spec):
  """With the small model of a smoke run; nothing is allocated or compiled."""
  config = load(spec, "smoke=True")
  experiment = Experiment(config, 1000, 1_281_167)
  state = jax.eval_shape(experiment.init)
  image = jax.ShapeDtypeStruct((config.batch_size, *experiment.model.image_size, 3), jnp.uint8)
  label = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
  new, metrics = jax.eval_shape(experiment.train_step, state, {"image": image, "label": label})
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert {"loss", "top1", "grad_norm"} <= metrics.keys()


# One of each shape; sizes differ in numbers alone. `pytest -m slow` smokes all.
SMOKED = ("crossvit.py:15_dagger", "crossvit.py:18_dagger_384", "deepvit.py:32b", "deepvit.py:s", "deepvit.py:l_384",
          "boat.py:swin_tiny", "boat.py:cswin_tiny", "vit.py:deit_small", "vit.py:16b", "swin.py:tiny",
          "cswin.py:tiny")  # fmt: skip


@pytest.mark.parametrize(
  "spec", [spec if spec.endswith(SMOKED) else pytest.param(spec, marks=pytest.mark.slow) for spec in SPECS]
)
def test_smoke(spec, tmp_path):
  """Two steps and an evaluation on synthetic images."""
  assert execute(f"--config={spec}", f"--workdir={tmp_path}", "--config.smoke=True") == 0
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 2]
  assert {"eval/loss", "eval/top1", "eval/top5", "eval/ece"} <= rows[-1].keys()
