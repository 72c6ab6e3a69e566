"""Experiment configs: from a file and the command line into a run."""

import ast
from collections.abc import Mapping, Sequence
import difflib
import importlib.util
import os
import pathlib
import types

import ml_collections

from vit_jax_ext.errors import UserError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
DEFAULT = str(CONFIGS / "digits.py")


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Runs `get_config(argument)` of a config file; the file's VARIANTS, if it has some, are the arguments it takes.

  Args:
    spec: PATH or PATH:ARGUMENT, e.g. "configs/digits.py:crossvit".

  Raises:
    UserError: the file is missing, is no config, or does not know the argument.
  """
  path, _, argument = spec.partition(":")
  module = _load_module(path)
  variants = getattr(module, "VARIANTS", None)
  if argument and variants and argument not in variants:
    raise UserError(f"config {path} does not know the argument {argument!r}; choose one of {', '.join(variants)}")
  try:
    return module.get_config(argument) if argument else module.get_config()
  except (KeyError, ValueError) as error:
    raise UserError(f"config {path} does not know the argument {argument!r}; {error.args[0]}") from None


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


def _load_module(path: str) -> types.ModuleType:
  if not os.path.isfile(path):
    raise UserError(f"config {path} does not exist; give a file such as configs/digits.py")
  module_spec = importlib.util.spec_from_file_location("experiment_config", path)
  if module_spec is None:
    raise UserError(f"config {path} is no Python file; give one such as configs/digits.py")
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise UserError(f"config {path} defines no get_config(argument); see configs/digits.py for one that does")
  return module


def override(config: ml_collections.ConfigDict, assignments: Sequence[str]) -> None:
  """Sets config values from "key.path=value" strings; values are Python literals or plain text.

  Keys must exist and keep their type, save below `model.overrides`, which `create_model` checks. One follows the other;
  smoke=True sets all that stands below `when_smoke`.

  Raises:
    UserError: an unknown key (names the nearest ones) or a value of another type.
  """
  for assignment in assignments:
    key, equals, text = assignment.partition("=")
    if not equals:
      raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
    *parents, leaf = key.split(".")
    words = {"true": "True", "false": "False"}
    if parents != ["model", "overrides"]:  # whose fusion=none is a name
      words["none"] = "None"
    try:
      value = ast.literal_eval(words.get(text.lower(), text))
    except (SyntaxError, ValueError):
      value = text
    node = config
    for i, parent in enumerate(parents):
      node = node.get(parent) if isinstance(node, ml_collections.ConfigDict) else None
      if not isinstance(node, ml_collections.ConfigDict):
        raise _unknown_key(config, ".".join(parents[: i + 1]))
    if leaf not in node and parents != ["model", "overrides"]:
      raise _unknown_key(config, key)
    try:
      with node.unlocked():
        node[leaf] = value
    except TypeError:
      expected = type(node[leaf]).__name__
      raise UserError(
        f"--config.{key}={text} is of type {type(value).__name__}; give a value of type {expected}"
      ) from None
    if key == "smoke" and value:
      config.update(config.when_smoke)


def _unknown_key(config: ml_collections.ConfigDict, key: str) -> UserError:
  known = list(flatten(config.to_dict()))
  nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)
  return UserError(f"config key {key!r} is unknown; did you mean {', '.join(nearest)}?")


def flatten(tree: dict, prefix: str = "") -> dict:
  """Returns the values of a tree of dicts by their keys, joined with dots."""
  flat = {}
  for key, value in tree.items():
    flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
  return flat
