"""Every key of a config with values of the wrong type, below, above, nan, empty: train and doctor say the same."""

import math

import pytest

from tests.command_line import execute
import vit_jax_ext as vx
from vit_jax_ext import config as configs
from vit_jax_ext.config_keys import KEYS
from vit_jax_ext.rules import LARGEST
from vit_jax_ext.training.doctor import examine
from vit_jax_ext.training.train import train

NUMBERS = [key for key in KEYS if KEYS[key].rule.kind in (int, float)]


def test_the_table_has_every_key_of_the_default_config():
  flat = configs.flatten(configs.default_config().to_dict())
  assert {key for key in flat if not key.startswith(("when_smoke", "model.overrides"))} == set(KEYS)


@pytest.mark.parametrize("spec", ["configs/digits.py", "configs/crossvit.py", "configs/deepvit.py", "configs/swin.py"])
def test_recipes_fit(spec):
  configs.check(configs.load_config(spec))


def wrong_values(rule):
  """Yields values that a rule refuses: wrong type, below, above, nan, empty."""
  yield from ("3 apples", "", [], {}, object()) if rule.kind in (int, float, bool) and not rule.nesting else ()
  if rule.kind is str:
    yield from (3, True, ["x"], *(() if rule.empty else ("", "  ")))
  if rule.kind is object:
    yield from (3, 0.5, "", [])
  if rule.kind is bool:
    yield from (1, 0.0, math.nan)
  if rule.kind in (int, float):
    numbers = [math.nan, math.inf, -math.inf]
    numbers += [True, -(10**400), 10**400] if rule.kind is int else []  # ml_collections makes floats of these
    low, high = max(rule.least, rule.above), min(rule.most, rule.below)
    numbers += [low - 1] if math.isfinite(low) else []
    numbers += [rule.above] if math.isfinite(rule.above) else []
    numbers += [high + 1] if math.isfinite(high) else []
    numbers += [rule.below] if math.isfinite(rule.below) else []
    numbers += [1.5] if rule.kind is int else []
    yield from ([[n] * (rule.length or 1) for n in numbers] if rule.nesting else numbers)
  if rule.nesting:
    yield from ("x", 3, [[1]], *([] if rule.length is None else [[0.5] * (rule.length + 1)]))
  if rule.choices:
    yield "cubic"
  if not rule.optional:
    yield None


@pytest.mark.parametrize("key", KEYS)
def test_train_and_doctor_refuse_alike(key, tiny_config, tmp_path):
  *parents, leaf = key.split(".")
  for value in wrong_values(KEYS[key].rule):
    config = tiny_config.copy_and_resolve_references()
    node = config
    for parent in parents:
      node = node[parent]
    with node.ignore_type():
      node[leaf] = value
    with pytest.raises(vx.UserError) as error:
      train(config, str(tmp_path / "run"))
    message = str(error.value)
    assert f"config.{key}" in message and "; " in message and "\n" not in message and len(message) < 400, message
    assert [*examine(config, str(tmp_path / "run"))] == [("config", False, message)]
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("assignment", "words"),
  [
    *((f"{key}={value}", key) for key in NUMBERS for value in ("nan", "-1e999", "True", f"{10**400}", "")),
    ("total_steps=0", "1 or more"), ("optimizer.accumulation_steps=0", "1 or more"), ("seed=99999999999", f"{LARGEST}"),
    ("augment.interpolation=cubic", "bicubic"), ("augment.repeats=0", "1 or more"), ("batch_size=-4", "1 or more"),
    ("optimizer.learning_rate=-1", "above 0"), ("optimizer.weight_decay=-1", "0 to"), ("ema_decay=1.5", "below 1"),
    ("label_smoothing=2", "below 1"), ("augment.flip=2", "0 to 1"), ("augment.crop_scale=(0.5,0.1)", "smaller one"),
    ("dataset.crop=0", "0.1 to 1"), ("dataset.crop=-3", "0.1 to 1"), ("optimizer.clip_norm=-1", "above 0"),
    ("optimizer.layer_decay=0", "above 0 to 1"), ("dataset.max_unreadable=5", "0 to 1"), ("augment.mixup=-1", "0 to"),
    ("dataset.shuffle_buffer=0", "1 or more"), ("optimizer.lr=1", "optimizer.learning_rate"), ("mesh=3", "mesh.data"),
    ("model.overrides=3", "unknown"), ("total_epochs=2", "give one of them"), ("pretrained=", "a path"),
    ("cosine_regularizer.weight=1", "cosine_regularizer.blocks"), ("mesh.fsdp=-1", "all axes but one"),
    ("when_smoke.batch_size=0", "1 or more"), ("optimizer=None", "unknown"), ("=3", "unknown"), (".=3", "unknown"),
    ("model.overrides.num_heads=0", "num_heads"), ("model.overrides.depth=-1", "depth"),
    ("model.overrides.num_classes=7", "num_classes"), ("model.overrides.drop_path_rate=3", "below 1"),
    ("model.overrides.rngs=3", "rngs"), ("model.overrides.embed_dim=(8,)", "2 integers"),
    ("model.overrides.image_size=(1,2,3)", "height and width"), ("model.overrides.dtype=int8", "bfloat16"),
    ("augment.randaugment=random", "rand-m9-mstd0.5-inc1"), ("total_epochs=1e-9", "give one"),
  ],
)  # fmt: skip
def test_on_the_command_line(assignment, words, capsys, data_dir, tmp_path):
  """Status 2, one line with key and remedy, and of doctor the same one, or one among what it finds."""
  place = f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}"
  assert execute(*place, f"--config.{assignment}") == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and words in line and assignment.partition("=")[0].rpartition(".")[2] in line, line
  assert execute("doctor", *place, f"--config.{assignment}") == 2
  found = capsys.readouterr()
  assert line.removeprefix("error: ") in found.err + found.out
  assert not (tmp_path / "run").exists()


def test_help_has_every_key(run):
  status, out, _ = run("train", "--help")
  assert status == 0
  for key, (rule, meaning) in KEYS.items():
    assert f"{key} " in out and str(rule) in out and meaning in out


def test_a_config_file_that_fails(tmp_path):
  base = "from configs import digits\n\n\ndef get_config():\n  config = digits.get_config()\n"
  for text, words in [
    (base, "returns NoneType"),
    (base + "  return config[\n", r"fails in line \d \(SyntaxError"),
    (base + "  return konfig\n", r"fails in line 6 \(NameError"),
    ("import nothing_like_this\n", r"fails in line 1 \(ModuleNotFoundError"),
  ]:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(vx.UserError, match=words):
      configs.load_config(str(tmp_path / "mine.py"))
  (tmp_path / "mine.py").write_text(base + "  config.optimizer.lr = 3.0\n  return config\n")
  with pytest.raises(vx.UserError, match=r"'optimizer.lr' is unknown; did you mean optimizer.learning_rate"):
    configs.check(configs.load_config(str(tmp_path / "mine.py")))
