"""Measure a run's best checkpoint, or pretrained weights, on an evaluation split."""

import argparse

from vit_jax_ext import commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_workdir(parser)
  commands.add_config(parser)
  commands.add_output(parser)
  commands.add_processes(parser)


def run(args: argparse.Namespace) -> None:
  """Prints the scores; of several processes one does."""
  commands.check_one_source(args, [args.workdir] if args.workdir else [])  # before the others are waited for
  with commands.joined_processes(args):
    import jax

    from vit_jax_ext.files import write_json
    from vit_jax_ext.training.evaluate import evaluate_weights

    config, workdir = commands.trained_model(args)
    evaluation = evaluate_weights(config, workdir)
  if jax.process_index():
    return
  print("{weights}: {images} images of {dataset}/{split}".format(**evaluation))
  for name, value in evaluation.items():
    if name.startswith("eval"):
      print(f"  {name:16} {value:.4f}" if name.endswith("loss") else f"  {name:16} {value:.2%}")
  if args.output:
    commands.print_written(write_json(args.output, "evaluation.json", evaluation))
