"""Train, evaluate and compare vision transformers."""

import argparse
import difflib
import importlib
import os
import pkgutil
import sys

from vit_jax_ext import commands
from vit_jax_ext.errors import RunError, Stopped, UserError

EPILOG = """
Any value of the config is set with --config.KEY=VALUE, for example --config.batch_size=64.
evaluate, predict, analyze and export take a run's weights from --workdir, others from --config.pretrained=FILE.
No command means train, no --config means configs/digits.py, no --workdir a fixed folder under ~/.cache/vit_jax_ext.
Exit status: 0 done, 2 your input is wrong (one line says what), 75 preempted and saved (run it again), 1 anything else.
"""
FORMAT = dict(epilog=EPILOG, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)


def command_names() -> list[str]:
  """Returns the files of vit_jax_ext/commands."""
  return [file.name for file in pkgutil.iter_modules(commands.__path__)]


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser: one subcommand for each file of vit_jax_ext/commands."""
  prog = "python main.py" if os.path.basename(sys.argv[0]) == "main.py" else "vit-jax-ext"
  parser = argparse.ArgumentParser(prog=prog, description=__doc__, **FORMAT)
  choices = parser.add_subparsers(dest="command", metavar="COMMAND")
  for name in command_names():
    command = importlib.import_module(f"{commands.__name__}.{name}")
    about = command.__doc__.splitlines()[0].removesuffix(".")
    subparser = choices.add_parser(name, help=about, description=command.__doc__, **FORMAT)
    command.add_arguments(subparser)
    subparser.set_defaults(run=command.run)
  return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
  """Returns the arguments of a command; `run` is what to call with them, `overrides` the config's KEY=VALUE.

  Raises:
    UserError: an unknown command.
  """
  if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
    argv = ["train", *argv]
  names = command_names()
  if argv[0] not in (*names, "-h", "--help"):
    nearest = difflib.get_close_matches(argv[0], names, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(names)}"
    raise UserError(f"command {argv[0]!r} is unknown; {remedy}")
  overrides = [argument for argument in argv if argument.startswith("--config.")]
  args = make_parser().parse_args([argument for argument in argv if argument not in overrides])
  args.overrides = [argument.removeprefix("--config.") for argument in overrides]
  return args


def main() -> int:
  """Runs the command line and returns the exit status."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # announces itself twice at every start
  try:
    args = parse_args(sys.argv[1:])
    from vit_jax_ext.console import filter_stderr, log_to_console  # not before: the parser answers at once

    filter_stderr()
    log_to_console()
    commands.check_output(args)
    args.run(args)
  except (UserError, RunError) as error:
    print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
    return error.status
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 1
  return 0
