"""The config of a run in its workdir: where that is, what it says, and that a run goes on with the config it has."""

import json
import os
import pathlib
from typing import Any

import ml_collections

from vit_jax_ext import config as configs
from vit_jax_ext.config import flatten
from vit_jax_ext.errors import UserError
from vit_jax_ext.files import check_new_file, user_cache, write_json
from vit_jax_ext.workdir import CONFIG

FILE = CONFIG
# What may differ when a run is continued: it changes where and how often, not what is computed.
FREE_KEYS = ("mesh", "checkpoint", "log_every_steps", "eval_every_steps", "dataset.data_dir",
             "skip_nonfinite", "tracker", "compilation_cache")  # fmt: skip


LENGTHS = ("total_steps", "total_epochs")  # of which a run may get more


def default_workdir(spec: str) -> str:
  """Returns the fixed folder of a config, PATH or PATH:ARGUMENT, under the user's cache."""
  path, _, argument = spec.partition(":")
  name = pathlib.Path(path).stem + (f"-{argument}" if argument else "")
  return os.path.join(user_cache(), name.replace(os.sep, "_"))


def read_workdir_config(workdir: str) -> ml_collections.ConfigDict:
  """Returns the config that a run saved.

  Raises:
    UserError: the folder holds none, or it is damaged.
  """
  path = os.path.join(workdir, FILE)
  try:
    with open(path) as file:
      config = ml_collections.ConfigDict(_complete(json.load(file), configs.default_config().to_dict()))
    configs.check(config)
    return config
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f"workdir {workdir} holds no run ({FILE} is missing); train one with --workdir={workdir}") from None
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions") from None
  except ValueError as error:  # a UserError is one
    raise UserError(f"{path} is damaged ({error}); restore it, or train anew in another workdir") from None


def _complete(values: Any, defaults: dict) -> dict:
  """Returns the values and what they lack: a key that did not exist then has its default now, which changes nothing."""
  if not isinstance(values, dict):
    raise ValueError(f"{type(values).__name__} where a group of keys is due")
  missing = {
    key: _complete(values.get(key, {}), default) if isinstance(default, dict) else values.get(key, default)
    for key, default in defaults.items()
  }
  return values | missing


def claim_workdir(workdir: str, config: ml_collections.ConfigDict) -> str | None:
  """Saves the config of a new run, or checks that the run in `workdir` is the same one; it may be longer now.

  Returns:
    How long it was, in words, if it is longer now.

  Raises:
    UserError: the folder cannot be written, belongs to another config, or holds something else.
  """
  check_workdir(workdir, config)
  check_new_file(os.path.join(workdir, FILE), "workdir")
  was = None
  if os.path.exists(os.path.join(workdir, FILE)):
    old = read_workdir_config(workdir)
    if not (longer := [key for key in LENGTHS if is_longer(old[key], config[key])]):
      return None
    was = f"{longer[0]}={old[longer[0]]}"
  write_json(workdir, FILE, configs.saved(config), option="workdir")
  return was


def is_longer(old: float | None, new: float | None) -> bool:
  """Tells whether a run's length, in steps or epochs, has become larger."""
  return old is not None and new is not None and new > old


def check_workdir(
  workdir: str, config: ml_collections.ConfigDict, option: str = "workdir", *, may_be_longer: bool = True
) -> None:
  """Checks that a run in `workdir`, if there is one, has this config.

  Args:
    workdir: the run's.
    config: the config of the run that shall be continued.
    option: of the command line, on which the folder depends.
    may_be_longer: whether its number of steps or epochs may have become larger.

  Raises:
    UserError: it has another one, or the folder holds something else.
  """
  if os.path.isfile(workdir):
    raise UserError(f"workdir {workdir} is a file; choose another --{option}")
  if not os.path.exists(os.path.join(workdir, FILE)):
    if os.path.exists(os.path.join(workdir, "checkpoints")):
      raise UserError(f"workdir {workdir} holds checkpoints without a {FILE}; choose another --{option}")
    return
  old, new = (flatten(configs.saved(each)) for each in (read_workdir_config(workdir), config))
  for key in sorted(old):
    longer = may_be_longer and key in LENGTHS and is_longer(old.get(key), new.get(key))
    if not key.startswith(FREE_KEYS) and not longer and old.get(key) != new.get(key):
      raise UserError(
        f"workdir {workdir} was made with config.{key}={old.get(key)}, this run has {new.get(key)}; "
        f"choose another --{option}, or the config that made it"
      )
