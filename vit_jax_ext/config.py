"""Experiment configs: from a file and the command line into a run."""

import ast
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import importlib.util
import json
import os
import pathlib
import sys
import traceback
import types
from typing import Any

import ml_collections

from vit_jax_ext import config_keys
from vit_jax_ext.config_keys import KEYS, OPTIONS
from vit_jax_ext.errors import UserError

# A wheel has them inside; in the repository they lie beside the package, for people who edit them.
CONFIGS = pathlib.Path(__file__).parent / "configs"
if not CONFIGS.is_dir():
  CONFIGS = CONFIGS.parents[1] / "configs"
DEFAULT = str(CONFIGS / "digits.py")


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Runs `get_config(argument)` of a config file; the file's VARIANTS, if it has some, are the arguments it takes.

  Args:
    spec: PATH or PATH:ARGUMENT, e.g. "configs/digits.py:crossvit"; ours are found from any folder.

  Raises:
    UserError: the file is missing, is no config, or does not know the argument.
  """
  path, _, argument = spec.partition(":")
  module = _load_module(path)
  variants = getattr(module, "VARIANTS", None)
  if argument and variants and argument not in variants:
    raise UserError(f"config {path} does not know the argument {argument!r}; choose one of {', '.join(variants)}")
  try:
    config = module.get_config(argument) if argument else module.get_config()
  except (KeyError, ValueError) as error:
    raise UserError(f"config {path} does not know the argument {argument!r}; {error.args[0]}") from None
  except Exception as error:
    raise _broken(path, error) from None
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"config {path}: get_config returns {type(config).__name__}; return an ml_collections.ConfigDict")
  return config


def default_config() -> ml_collections.ConfigDict:
  """Returns a config with every key at its default: configs/common.py's."""
  return _load_module(str(CONFIGS / "common.py"), "base_config").base_config()


def check(config: ml_collections.ConfigDict) -> None:
  """Checks all that can be known of a config without its dataset and devices; see `config_keys`.

  Raises:
    UserError: a key is unknown or missing, or a value does not fit.
  """
  config_keys.check_values(flatten(config.to_dict()))


def read_study(spec: str) -> tuple[str, dict[str, str]]:
  """Returns what a config file studies, in words, and the runs that it compares: argument -> label.

  Its STUDY lists the arguments, or maps them to labels; the words are the first line of its docstring.

  Raises:
    UserError: it lists none.
  """
  path, _, argument = spec.partition(":")
  module = _load_module(path)
  study = getattr(module, "STUDY", None)
  if argument or not study:
    raise UserError(f"config {spec} is no study; give a file that lists its runs, such as configs/digits_depth.py")
  title = (module.__doc__ or pathlib.Path(path).stem).splitlines()[0]
  return title, dict(study) if isinstance(study, Mapping) else {argument: argument for argument in study}


def read_probe(spec: str) -> Mapping[str, Any] | None:
  """Returns what a study that is a probe has beside its STUDY, its PROBE; None if it is none.

  That is `learning_rates`, from which each model takes the one that is best on validation data; `claims`, pairs of
  arguments: a model and its baseline; and optionally `ablations`, argument of a model -> label -> the values of
  `config.model.overrides` that it has then.
  """
  return getattr(_load_module(spec.partition(":")[0]), "PROBE", None)


def _load_module(path: str, function: str = "get_config") -> types.ModuleType:
  if not os.path.isfile(path) and os.path.dirname(path) == CONFIGS.name:
    path = str(CONFIGS.parent / path)
  if not os.path.isfile(path):
    raise UserError(f"config {path} does not exist; give a file such as configs/digits.py")
  module_spec = importlib.util.spec_from_file_location("experiment_config", path)
  if module_spec is None:
    raise UserError(f"config {path} is no Python file; give one such as configs/digits.py")
  module = importlib.util.module_from_spec(module_spec)
  try:
    with _importable_configs(path):
      module_spec.loader.exec_module(module)
  except Exception as error:
    raise _broken(path, error) from None
  if not hasattr(module, function):
    raise UserError(f"config {path} defines no {function}(argument); see configs/digits.py for one that does")
  return module


@contextlib.contextmanager
def _importable_configs(path: str) -> Iterator[None]:
  """While open, `from configs import ...` finds what lies beside the file, if its folder has this name, and then ours.

  No other package of the name counts, and none is disturbed.
  """

  def loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == CONFIGS.name]

  others = {name: sys.modules.pop(name) for name in loaded()}
  folder = pathlib.Path(path).resolve().parent
  package = sys.modules[CONFIGS.name] = types.ModuleType(CONFIGS.name)
  package.__path__ = [*([str(folder)] if folder.name == CONFIGS.name else []), str(CONFIGS)]
  try:
    yield
  finally:
    for name in loaded():
      del sys.modules[name]
    sys.modules.update(others)


def _broken(path: str, error: Exception) -> UserError:
  """Returns what a user shall know of an exception in a config file."""
  line = traceback.extract_tb(error.__traceback__)[-1].lineno if error.__traceback__ else None
  line = getattr(error, "lineno", None) or line  # of a SyntaxError
  why = " ".join(f"{type(error).__name__}: {error}".split())
  return UserError(f"config {path} fails in line {line} ({why}); mend the file")


def override(config: ml_collections.ConfigDict, assignments: Sequence[str]) -> None:
  """Sets config values from "key.path=value" strings; values are Python literals or plain text.

  Keys must exist, and values fit their rules, save below `model.overrides`, which `create_model` checks. One follows
  the other; smoke=True sets all that stands below `when_smoke`.

  Raises:
    UserError: an unknown key (names the nearest ones), or a value that does not fit.
  """
  for assignment in assignments:
    key, equals, text = assignment.partition("=")
    if not equals:
      raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
    *parents, leaf = key.split(".")
    node = config
    for parent in parents:
      node = node.get(parent) if isinstance(node, ml_collections.ConfigDict) else None
    option = key.startswith(OPTIONS) and len(parents) == 2
    known = isinstance(node, ml_collections.ConfigDict) and (leaf in node or option)
    if not leaf or not known or isinstance(node.get(leaf), ml_collections.ConfigDict):
      raise config_keys.unknown_key(key)
    value = _parse(key, text)
    if key in KEYS:
      KEYS[key].rule.check(f"config.{key}=", value, KEYS[key].meaning)
      value = float(value) if KEYS[key].rule.kind is float and isinstance(value, int) else value
    with node.unlocked(), node.ignore_type():
      node[leaf] = value
    if key == "smoke" and value:
      config.update(config.when_smoke)


def _parse(key: str, text: str) -> Any:
  """Returns what a value on the command line means: a Python literal, or plain text where it is none or text is due."""
  words = {"true": "True", "false": "False", "none": "None"}
  rule = KEYS[key].rule if key in KEYS else None
  if key.startswith(OPTIONS):
    del words["none"]  # fusion=none is a name
  if rule and rule.kind is str:
    return None if rule.optional and text.lower() == "none" else text
  if text.strip().lower() in ("nan", "inf", "-inf"):
    return float(text)
  try:
    return ast.literal_eval(words.get(text.lower(), text))
  except (SyntaxError, ValueError, MemoryError, RecursionError):
    return text


def is_folder(dataset: str) -> bool:
  """Tells whether the name of a dataset means a folder of images, not one of TFDS."""
  return dataset.startswith(("/", "./", "../", "~")) or (os.sep in dataset and os.path.isdir(dataset))


def saved(config: ml_collections.ConfigDict) -> dict:
  """Returns what a run keeps of a config: plain values, and absolute paths, so that it can be used from anywhere."""
  values = json.loads(config.to_json_best_effort())

  def absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))

  dataset = values["dataset"]
  if is_folder(dataset["name"]):
    dataset["name"] = absolute(dataset["name"])
  if dataset["data_dir"] and "://" not in dataset["data_dir"]:
    dataset["data_dir"] = absolute(dataset["data_dir"])
  if isinstance(values["pretrained"], str) and os.path.exists(os.path.expanduser(values["pretrained"])):
    values["pretrained"] = absolute(values["pretrained"])
  return values


def flatten(tree: dict, prefix: str = "") -> dict:
  """Returns the values of a tree of dicts by their keys, joined with dots."""
  flat = {}
  for key, value in tree.items():
    flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
  return flat
