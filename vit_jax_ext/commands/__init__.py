"""The commands, one file each: the docstring is the help, `add_arguments` adds the flags, `run` works and prints.

Here stand the flags that several of them have, and what those mean. Whatever needs JAX is imported by `run`, so that
help and mistakes are told at once.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from vit_jax_ext import config_keys
from vit_jax_ext.errors import Preempted, Stopped, UserError

if TYPE_CHECKING:
  import ml_collections


def add_workdir(parser: argparse.ArgumentParser, **kw) -> None:
  """Adds --workdir."""
  parser.add_argument("--workdir", **{"metavar": "DIR", "help": "folder of the run: config, checkpoints, metrics"} | kw)


def add_workdirs(parser: argparse.ArgumentParser) -> None:
  """Adds a --workdir that can be repeated; without any it is None."""
  add_workdir(parser, action="append", help="folder of the run; repeat to compare several")


def add_config(parser: argparse.ArgumentParser) -> None:
  """Adds --config, and tells its keys."""
  parser.epilog = f"{parser.epilog}\nKeys of the config, what they may be and mean:\n{config_keys.describe()}\n"
  parser.add_argument("--config", metavar="FILE[:ARG]", help="experiment (default: configs/digits.py)")


def add_output(parser: argparse.ArgumentParser) -> None:
  """Adds --output."""
  parser.add_argument("--output", metavar="DIR", help="write the results into this folder")


def check_output(args: argparse.Namespace) -> None:
  """Raises UserError if --workdir or --output are no folders, or --output cannot be written: before the work."""
  for name in ("workdir", "output"):
    value = getattr(args, name, None)
    for folder in value if isinstance(value, list) else [value]:
      if folder == "":  # of a shell variable that is not set
        raise UserError(f"--{name}= is empty; give a folder, or leave out --{name}")
      if folder and "://" in folder:
        raise UserError(f"--{name}={folder} is in a bucket; give a folder, such as one on which the bucket is mounted")
  if output := getattr(args, "output", None):
    from vit_jax_ext.files import check_new_file

    check_new_file(output if output.endswith((".json", ".csv")) else os.path.join(output, "results"))


def add_devices(parser: argparse.ArgumentParser, **kw) -> None:
  """Adds --devices and --slices."""
  parser.add_argument("--devices", metavar="KIND:SHAPE", **{"help": "such as v5e:4x4, h100:1x8, cpu:8 or here"} | kw)
  parser.add_argument("--slices", metavar="N", type=int, default=1, help="of TPUs, joined by a network (default: 1)")


def add_thresholds(parser: argparse.ArgumentParser) -> None:
  """Adds the thresholds of similarity."""
  parser.add_argument("--threshold", type=float, default=0.8, help="similarity of similar blocks (default: 0.8)")
  parser.add_argument("--head-threshold", type=float, default=0.5, help="of similar heads (default: 0.5)")


def add_processes(parser: argparse.ArgumentParser) -> None:
  """Adds what one of several processes has to know, see `joined_processes`."""
  group = parser.add_argument_group("several processes, one on each host; see launch/")
  group.add_argument("--distributed", action="store_true", help="ask SLURM, Open MPI, Cloud TPU or Kubernetes for them")
  group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0, as all can reach it")
  group.add_argument("--num-processes", metavar="N", type=int, help="how many there are")
  group.add_argument("--process-id", metavar="I", type=int, help="which one this is, from 0")
  group.add_argument("--hosts", metavar="NAME,...", default="", help="where they run, to name those that do not come")
  group.add_argument("--wait", metavar="SECONDS", type=int, default=300, help="for all to come (default: 300)")


@contextlib.contextmanager
def joined_processes(args: argparse.Namespace) -> Iterator[None]:
  """Joins the other processes of a run, if there are any; an error of one then ends all."""
  if not (args.distributed or args.coordinator):
    yield
    return
  from vit_jax_ext.training import distributed

  hosts = args.hosts.split(",") if args.hosts else ()
  distributed.join(args.coordinator, args.num_processes, args.process_id, hosts=hosts, wait=args.wait)
  with distributed.together():
    yield


@contextlib.contextmanager
def resumable() -> Iterator[None]:
  """While open, Ctrl-C and SIGTERM end the command, until the training itself takes care of them, at once.

  Where Python happens to be, an exception might be swallowed. What was saved stays, and the same command continues.
  """
  words = {signal.SIGTERM: (b"preempted", Preempted.status), signal.SIGINT: (b"interrupted", Stopped.status)}

  def leave(notice, _):
    what, status = words[notice]
    os.write(sys.stderr.fileno(), what + b"; the same command continues from the last checkpoint\n")
    os._exit(status)

  previous = {notice: signal.signal(notice, leave) for notice in words}
  try:
    yield
  except KeyboardInterrupt:
    raise Stopped("interrupted; the same command continues from the last checkpoint") from None
  finally:
    for notice, handler in previous.items():
      signal.signal(notice, handler)


def new_experiment(args: argparse.Namespace) -> tuple["ml_collections.ConfigDict", str]:
  """Returns the config that --config names, with the command line's values, and the workdir of its run."""
  from vit_jax_ext import compilation_cache
  from vit_jax_ext import config as configs

  config = configs.load_config(args.config or configs.DEFAULT)
  configs.override(config, args.overrides)
  workdir = args.workdir or default_workdir(args)
  # A run that goes on has its architecture already, whatever has become of the weights that it began with.
  adopt_architecture(config, workdir if os.path.exists(os.path.join(workdir, "config.json")) else config.pretrained)
  configs.check(config)
  compilation_cache.use(config)
  return config, workdir


def adopt_architecture(config: "ml_collections.ConfigDict", source: object, *, whole: bool = False) -> None:
  """Gives the config what weights tell of their model, where they do and as far as it does not say otherwise.

  Args:
    config: with `pretrained` weights; else nothing happens.
    source: that tells: a workdir, a checkpoint in one, or a file of ours.
    whole: name, all options and the crop of images, in place of the config's own.

  Raises:
    UserError: they are those of another model.
  """
  if not config.pretrained or isinstance(source, bool):
    return
  from absl import logging

  from vit_jax_ext.pretrained import read_description

  if (about := read_description(source)) is None:
    return
  if whole:
    config.model.name, config.model.overrides, config.dataset.crop = about["model"], {}, about["crop"]
  elif config.model.name != about["model"]:
    raise UserError(
      f"weights {source} are those of {about['model']}, and config.model.name={config.model.name}; give "
      f"--config.model.name={about['model']}, or other weights"
    )
  missing = {key: value for key, value in about["overrides"].items() if key not in config.model.overrides}
  with config.unlocked():
    config.model.overrides.update(missing)
  if missing:
    options = ", ".join(f"{key}={value}" for key, value in missing.items())
    logging.info("as the weights %s have it: %s %s", source, about["model"], options)


def default_workdir(args: argparse.Namespace) -> str:
  """Returns the workdir of the runs of --config that do not name one; smoke runs have their own."""
  from vit_jax_ext import config as configs
  from vit_jax_ext.workdir import config as workdirs

  return workdirs.default_workdir(args.config or configs.DEFAULT) + ("-smoke" if "smoke=True" in args.overrides else "")


def check_one_source(args: argparse.Namespace, workdirs: Sequence[str]) -> bool:
  """Returns whether --config.pretrained names the weights.

  Raises:
    UserError: a --workdir does too.
  """
  pretrained = any(override.startswith("pretrained=") for override in args.overrides)
  if pretrained and workdirs:
    raise UserError(f"--workdir={workdirs[0]} and --config.pretrained both name weights; give one of them")
  return pretrained


def published_model(name: str, **values) -> "ml_collections.ConfigDict":
  """Returns as much of a config as says that a model is meant as it was published, and other `values`."""
  import ml_collections

  return ml_collections.ConfigDict({"model": {"name": name, "overrides": {}}} | values)


def trained_model(args: argparse.Namespace) -> tuple["ml_collections.ConfigDict", str | None]:
  """Returns config and workdir of a run; or, with --config.pretrained, what --config says and None.

  Raises:
    UserError: both are given.
  """
  (pair,) = trained_models(args, [args.workdir] if args.workdir else [])
  return pair


def trained_models(
  args: argparse.Namespace, workdirs: Sequence[str]
) -> list[tuple["ml_collections.ConfigDict", str | None]]:
  """Returns `trained_model` for several workdirs; without any, for that of --config."""
  from vit_jax_ext import compilation_cache
  from vit_jax_ext import config as configs
  from vit_jax_ext.workdir.config import read_workdir_config

  if check_one_source(args, workdirs):
    config = configs.load_config(args.config or configs.DEFAULT)
    configs.override(config, [each for each in args.overrides if each.startswith("pretrained=")])
    adopt_architecture(config, config.pretrained, whole=not args.config)
    pairs = [(config, None)]
  else:
    if args.config:
      configs.load_config(args.config)  # which may register the model
    pairs = [(read_workdir_config(workdir), workdir) for workdir in workdirs or [default_workdir(args)]]
  for config, _ in pairs:
    configs.override(config, args.overrides)
    configs.check(config)
  compilation_cache.use(pairs[0][0])
  return pairs


def print_written(*paths: str) -> None:
  """Tells where results are."""
  for path in paths:
    print(f"wrote {path}")


def positive(option: str, value: str) -> int:
  """Returns the number that an option gives; raises UserError if it is none."""
  if not value.isdecimal() or int(value) < 1:
    raise UserError(f"--{option}={value} is no positive number; give one, such as 8")
  return int(value)
