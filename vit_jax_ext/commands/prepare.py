"""Make a TFDS dataset readable in any order, so that it is shuffled exactly on any hosts and runs resume at once.

ArrayRecord files are written beside its TFRecord files, or with --output into a data_dir of their own. ImageNet is
first prepared from its archives where it is not. The same command goes on where it was interrupted.
"""

import argparse

from vit_jax_ext import commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_config(parser)
  commands.add_output(parser)


def run(args: argparse.Namespace) -> None:
  """Prints where the dataset is."""
  from vit_jax_ext import config as configs

  with commands.resumable():
    from absl import logging

    from vit_jax_ext.console import CONSOLE, transfer_bar
    from vit_jax_ext.data import datasets
    from vit_jax_ext.files import size

    config = configs.load_config(args.config or configs.DEFAULT)
    configs.override(config, args.overrides)
    name = config.dataset.name
    with transfer_bar() as bar:
      task, tenths = bar.add_task(name, total=None), 0
      for done, whole in datasets.convert(name, config.dataset.data_dir, args.output):
        bar.update(task, completed=done, total=whole)
        if not CONSOLE.is_terminal and 10 * done // whole > tenths:
          tenths = 10 * done // whole
          logging.info("%s: %s of %s are written", name, size(done), size(whole))
    folder = args.output or config.dataset.data_dir
    print(f"{name} is ready{f'; --config.dataset.data_dir={folder} reads it' if folder else ''}")
