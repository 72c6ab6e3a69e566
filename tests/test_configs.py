"""The recipes against the authors', transcribed here; and that each of them can be built, changed and saved."""

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
from vit_jax_ext.compare.cost import count_params
from vit_jax_ext.models import registry
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.workdir.config import claim_workdir, read_workdir_config

SIZES = ("tiny", "small", "base")
ARGUMENTS = {
  "crossvit": (*SIZES, "9", "15", "18", "9_dagger", "15_dagger", "18_dagger", "15_dagger_384", "18_dagger_384"),
  "deepvit": ("16b", "24b", "32b", "s", "l", "l_384"),
  "boat": tuple(f"{family}_{size}" for family in ("swin", "cswin") for size in SIZES),
  "vit": ("deit_tiny", "deit_small", "deit_base", "deit_base_384", "16b", "24b", "32b"),
  "swin": (*SIZES, "base_384"),
  "cswin": (*SIZES, "base_384"),
}
SPECS = [f"configs/{family}.py:{argument}" for family, arguments in ARGUMENTS.items() for argument in arguments]
# One of each shape; sizes differ in numbers alone. `pytest -m slow` has all: the first are smoked, the others traced.
SMOKED = ("crossvit.py:15_dagger", "deepvit.py:32b", "deepvit.py:s", "boat.py:swin_tiny", "boat.py:cswin_tiny",
          "vit.py:deit_small", "swin.py:base_384", "cswin.py:base_384")  # fmt: skip
TRACED = ("crossvit.py:9", "crossvit.py:15_dagger_384", "deepvit.py:l_384", "vit.py:deit_base_384", "vit.py:16b",
          "swin.py:tiny", "cswin.py:tiny")  # fmt: skip


def mark_slow(specs, shapes):
  """Returns all, those that do not end as one of the shapes for `pytest -m slow` alone."""
  return [spec if spec.endswith(shapes) else pytest.param(spec, marks=pytest.mark.slow) for spec in specs]


SHARED = {
  "optimizer.warmup_prefix": False,
  "label_smoothing": 0.1,
  "augment.randaugment": "rand-m9-mstd0.5-inc1",
  "augment.erasing": 0.25,
  "augment.switch_probability": 0.5,
  "augment.color_jitter": 0.0,
  "dataset.name": "imagenet2012",
  "dataset.crop": None,  # the variant's
}
STARTS_AND_FLOORS = {"optimizer.initial_learning_rate": 1e-6, "optimizer.final_learning_rate": 1e-5}
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
# Fine-tuning at 384 pixels: NAMES and RATES; then the paper's top-1, the model's parameters in millions, the crop of
# evaluation, and the weights to start from.
RATES = ("optimizer.initial_learning_rate", "optimizer.final_learning_rate", "augment.mixing_batch")
# facebookresearch/deit, README_deit.md: run_with_submitit.py --batch-size 32 --nodes 2 --lr 5e-6 --min-lr 5e-6
# --weight-decay 1e-8 --epochs 30; the rest are main.py's defaults. engine.py trains in evaluation mode then, where
# nothing is dropped, and so does CrossViT's.
DEIT_384 = (512, 5e-6, 5, 1e-8, 0, 0.8, 1.0, 0, None, 3, "bicubic", True, 30, 0, False), (1e-6, 5e-6, 32)
FINE_TUNED = {
  "vit.py:deit_base_384": (
    *DEIT_384,
    83.1, 87, 1.0, "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth",
  ),
  "crossvit.py:15_dagger_384": (
    *DEIT_384,
    83.5, 29, 0.875, "https://github.com/IBM/CrossViT/releases/download/weights-0.1/crossvit_15_dagger_224.pth",
  ),
  "crossvit.py:18_dagger_384": (
    *DEIT_384,
    83.9, 45, 0.875, "https://github.com/IBM/CrossViT/releases/download/weights-0.1/crossvit_18_dagger_224.pth",
  ),
  # No script of its own is published.
  "deepvit.py:l_384": (
    (512, 5e-6, 5, 1e-8, 0, 0.8, 1.0, 0.99996, None, 1, "random", True, 30, 0, True), (1e-6, 5e-6, 32),
    84.25, 59, 1.0, registry.get_variant("deepvit_l").url,
  ),
  # microsoft/Swin-Transformer, configs/swin/swin_base_patch4_window12_384_finetune.yaml: BASE_LR 2e-5, WARMUP_LR 2e-8,
  # MIN_LR 2e-7, which main.py multiplies by B / 512; get_started.md: 8 GPUs, --batch-size 64 --accumulation-steps 2.
  "swin.py:base_384": (
    (1024, 4e-5, 5, 1e-8, 0.5, 0.8, 1.0, 0, 5.0, 1, "bicubic", False, 30, 0, False), (4e-8, 4e-7, 64),
    84.5, 88, 1.0,
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224.pth",
  ),
  # microsoft/CSWin-Transformer, README: finetune.sh 8 -b 32 --lr 5e-6 --min-lr 5e-7 --weight-decay 1e-8 --warmup-epochs
  # 0 --model-ema-decay 0.9998 --epochs 20 --mixup 0.1 --cooldown-epochs 10 --drop-path 0.7 --lr-scale 1 --cutmix 0.1.
  "cswin.py:base_384": (
    (256, 5e-6, 0, 1e-8, 0.7, 0.1, 0.1, 0.9998, None, 1, "random", True, 30, 10, True), (1e-6, 5e-7, 32),
    85.4, 77, 1.0, "https://github.com/microsoft/CSWin-Transformer/releases/download/v0.1.0/cswin_base_224.pth",
  ),
}  # fmt: skip


def row(family, argument):
  """Returns the row that holds for a config."""
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


def check(config, figures):
  for name, figure in figures.items():
    ours = value(config, name)
    assert ours == (pytest.approx(figure, rel=1e-12) if isinstance(figure, float) else figure), name
  assert config.total_steps is None and config.optimizer.warmup_steps == 0
  assert config.batch_size % config.augment.mixing_batch == 0


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.endswith("_384")])
def test_recipes_are_those_of_the_papers(spec):
  expected = row(*family_and_argument(spec))
  check(load(spec), SHARED | STARTS_AND_FLOORS | dict(zip(NAMES, expected, strict=True)))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.endswith("_384")])
def test_fine_tuning_is_that_of_the_authors(spec):
  expected, rates, _, millions, crop, weights = FINE_TUNED[spec.removeprefix("configs/")]
  config = load(spec)
  check(config, SHARED | dict(zip(NAMES, expected, strict=True)) | dict(zip(RATES, rates, strict=True)))
  variant = registry.get_variant(config.model.name)
  assert weights == (variant.url if config.pretrained is True else config.pretrained)
  model = registry.abstract_model(config.model, 1000)
  assert model.image_size == ((408, 408) if "crossvit" in spec else (384, 384))
  assert round(count_params(model) / 1e6) == millions
  assert variant.crop_at(model.image_size) == crop


def test_windows_at_384():
  """WINDOW_SIZE: 12 of the yaml; split_size of CSWin_96_24322_base_384 in models/cswin.py."""
  swin, cswin = (
    registry.abstract_model(load(f"configs/{family}.py:base_384").model, 1000) for family in ("swin", "cswin")
  )
  assert {block.attn.window for stage in swin.layers for block in stage.blocks} == {(12, 12)}
  widths = [blocks[0].attns[0].stripe[1] for _, blocks, _ in cswin.stages()]
  assert widths == [1, 2, 12, 12]


def test_cosine_regularizer_is_of_32b_alone():
  for spec in SPECS:
    regularizer = load(spec).cosine_regularizer
    is_32b = spec == "configs/deepvit.py:32b"
    assert (regularizer.weight, regularizer.blocks) == ((0.1, tuple(range(12))) if is_32b else (0.0, ()))


@pytest.mark.parametrize("spec", mark_slow(SPECS, SMOKED + TRACED))
def test_models_can_be_built(spec):
  config = load(spec)
  model = registry.abstract_model(config.model, 1000)
  assert isinstance(model, registry.get_variant(config.model.name).model)


@pytest.mark.parametrize("spec", SPECS)
def test_published_accuracy_is_in_the_docstring(spec):
  _, argument = family_and_argument(spec)
  top1 = registry.get_variant(load(spec).model.name).top1
  if spec.endswith("_384"):
    _, _, top1, *_ = FINE_TUNED[spec.removeprefix("configs/")]
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
  assert load("configs/cswin.py:base_384", "batch_size=128").optimizer.learning_rate == pytest.approx(2.5e-6)


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


@pytest.mark.parametrize("spec", mark_slow([spec for spec in SPECS if not spec.endswith(SMOKED)], TRACED))
def test_every_recipe_describes_a_training_step(spec):
  """Those that are not smoked, with the small model of a smoke run; nothing is allocated or compiled."""
  config = load(spec, "smoke=True")
  experiment = Experiment(config, 1000, 1_281_167)
  state = jax.eval_shape(experiment.init)
  image = jax.ShapeDtypeStruct((config.batch_size, *experiment.model.image_size, 3), jnp.uint8)
  label = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
  new, metrics = jax.eval_shape(experiment.train_step, state, {"image": image, "label": label})
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert {"loss", "top1", "grad_norm"} <= metrics.keys()


@pytest.mark.parametrize("spec", mark_slow(SPECS, SMOKED))
def test_smoke(spec, tmp_path):
  """Two steps and an evaluation on synthetic images."""
  assert execute(f"--config={spec}", f"--workdir={tmp_path}", "--config.smoke=True") == 0
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 2]
  assert {"eval/loss", "eval/top1", "eval/top5", "eval/ece"} <= rows[-1].keys()
