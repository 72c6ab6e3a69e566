"""Train a model, or continue where an earlier run in the workdir stopped."""

import argparse
import sys

from vit_jax_ext import commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_workdir(parser)
  commands.add_config(parser)
  parser.add_argument("--compiled", metavar="FILE", help="start with the programs of plan --save where they fit")
  commands.add_processes(parser)


def run(args: argparse.Namespace) -> None:
  """Trains."""
  with commands.resumable():
    commands.join_processes(args)
    from vit_jax_ext.training.accelerators import unused

    if remark := unused():
      print(f"warning: {remark}", file=sys.stderr)
    from vit_jax_ext.training.train import train

    train(*commands.new_experiment(args), compiled=args.compiled)
