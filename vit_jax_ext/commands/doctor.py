"""Check dataset, devices, memory, weights and workdir in seconds, before a long run."""

import argparse

from vit_jax_ext import commands
from vit_jax_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_workdir(parser)
  commands.add_config(parser)
  commands.add_devices(parser, help="compile the step for these, such as v5e:4x4, h100:1x8 or here")


def run(args: argparse.Namespace) -> None:
  """Prints one line for each thing.

  Raises:
    UserError: something is wrong; says how much.
  """
  from vit_jax_ext.plan.kinds import open_target
  from vit_jax_ext.training.doctor import examine

  target = open_target(args.devices, args.slices) if args.devices else None
  wrong = 0
  for name, healthy, finding in examine(*commands.new_experiment(args), target):
    print(f"{'ok' if healthy else 'WRONG':6}{name:12}{finding}", flush=True)
    wrong += not healthy
  if wrong:
    raise UserError(f"{wrong} thing(s) would stop this run; mend what is marked WRONG above")
