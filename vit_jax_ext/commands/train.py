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
    from vit_jax_ext.workdir import lock

    config, workdir = commands.new_experiment(args)
    if not (args.distributed or args.coordinator):  # of one host, before anything heavy is imported
      lock.check(workdir)
    with commands.joined_processes(args):
      from vit_jax_ext.training.accelerators import unused

      if remark := unused():
        print(f"warning: {remark}", file=sys.stderr)
      from vit_jax_ext.training.train import train

      train(config, workdir, compiled=args.compiled)
