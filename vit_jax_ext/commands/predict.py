"""Name the five likeliest classes of image files."""

import argparse

from vit_jax_ext import commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_workdir(parser)
  commands.add_config(parser)
  commands.add_output(parser)
  parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG or PNG file")


def run(args: argparse.Namespace) -> None:
  """Prints the classes of each image with their probabilities."""
  from vit_jax_ext.files import write_json
  from vit_jax_ext.training.predict import predict

  config, workdir = commands.trained_model(args)
  predictions = predict(config, workdir, args.images)
  for prediction in predictions:
    print(prediction["image"])
    for name, probability in prediction["classes"].items():
      print(f"  {probability:7.2%}  {name}")
  if args.output:
    commands.print_written(write_json(args.output, "predictions.json", predictions))
