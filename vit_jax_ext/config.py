"""Experiment configs: from a file and the command line into a run, and back out of a workdir."""

import ast
from collections.abc import Mapping, Sequence
import difflib
import importlib.util
import json
import os
import pathlib
import types

import ml_collections

from vit_jax_ext.errors import UserError

# What may differ when a run is continued: it changes where and how often, not what is computed.
FREE_KEYS = ("mesh", "checkpoint", "log_every_steps", "eval_every_steps", "dataset.data_dir",
             "skip_nonfinite")  # fmt: skip


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Runs `get_config(argument)` of a config file.

  Args:
    spec: PATH or PATH:ARGUMENT, e.g. "configs/digits.py:crossvit".

  Raises:
    UserError: the file is missing or is no config.
  """
  path, _, argument = spec.partition(":")
  module = _load_module(path)
  try:
    return module.get_config(argument) if argument else module.get_config()
  except (KeyError, ValueError) as error:
    raise UserError(f"config {path} does not know the argument {argument!r}: {error.args[0]}") from None


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
  known = list(_flatten(config.to_dict()))
  nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)
  return UserError(f"config key {key!r} is unknown; did you mean {', '.join(nearest)}?")


def _flatten(tree: dict, prefix: str = "") -> dict:
  flat = {}
  for key, value in tree.items():
    flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
  return flat


def default_workdir(spec: str) -> str:
  """Returns the fixed folder of a config under the user's cache."""
  cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
  path, _, argument = spec.partition(":")
  name = pathlib.Path(path).stem + (f"-{argument}" if argument else "")
  return os.path.join(cache, "vit_jax_ext", name.replace(os.sep, "_"))


def read_workdir_config(workdir: str) -> ml_collections.ConfigDict:
  """Returns the config that a run saved.

  Raises:
    UserError: the folder holds none, or it is damaged.
  """
  path = os.path.join(workdir, "config.json")
  try:
    with open(path) as file:
      return ml_collections.ConfigDict(json.load(file))
  except FileNotFoundError:
    raise UserError(
      f"workdir {workdir} holds no run (config.json is missing); train one with --workdir={workdir}"
    ) from None
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}); restore it, or train anew in another workdir") from None


def claim_workdir(workdir: str, config: ml_collections.ConfigDict) -> None:
  """Saves the config of a new run, or checks that the run in `workdir` is the same one.

  Raises:
    UserError: the folder cannot be written, belongs to another config, or holds something else.
  """
  check_workdir(workdir, config)
  path = os.path.join(workdir, "config.json")
  if os.path.exists(path):
    return
  try:
    os.makedirs(workdir, exist_ok=True)
    with open(path + ".tmp", "w") as file:
      json.dump(json.loads(config.to_json_best_effort()), file, indent=2)
    os.replace(path + ".tmp", path)
  except OSError as error:
    raise UserError(f"workdir {workdir} cannot be written: {error.strerror}; choose another --workdir") from None


def check_workdir(workdir: str, config: ml_collections.ConfigDict, option: str = "workdir") -> None:
  """Checks that a run in `workdir`, if there is one, has this config.

  Args:
    workdir: the run's.
    config: the config of the run that shall be continued.
    option: of the command line, on which the folder depends.

  Raises:
    UserError: it has another one, or the folder holds something else.
  """
  if not os.path.exists(os.path.join(workdir, "config.json")):
    if os.path.exists(os.path.join(workdir, "checkpoints")):
      raise UserError(f"workdir {workdir} holds checkpoints without a config.json; choose another --{option}")
    return
  new = json.loads(config.to_json_best_effort())
  old, new = _flatten(read_workdir_config(workdir).to_dict()), _flatten(new)
  for key in sorted(old):  # a key that did not exist then has its default now, which changes nothing
    if not key.startswith(FREE_KEYS) and old.get(key) != new.get(key):
      raise UserError(
        f"workdir {workdir} was made with config.{key}={old.get(key)}, this run has {new.get(key)}; "
        f"choose another --{option}, or the config that made it"
      )
