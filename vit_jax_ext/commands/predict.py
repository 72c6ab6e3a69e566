"""Name the likeliest classes of image files; needs neither the dataset nor TensorFlow.

Where images have several labels, all above their thresholds are named.
IMAGE is a file, a folder (all that is in it), a pattern such as 'photos/*.jpg', or a text file with one name a line.
Files that cannot be read are named, counted and left out. EXIF orientation is not looked at, as in training.
"""

import argparse
import os
import sys

from vit_jax_ext import commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_workdir(parser)
  commands.add_config(parser)
  parser.add_argument("--output", metavar="DIR", help="write predictions.json and .csv into it; or a FILE.json or .csv")
  parser.add_argument("--top", metavar="N", help="classes of each image (default: 5; of labels, see above)")
  parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG, GIF, BMP or WebP, see above")


def run(args: argparse.Namespace) -> None:
  """Prints the classes of each image with their probabilities."""
  from vit_jax_ext.files import check_new_file
  from vit_jax_ext.images import find_images
  from vit_jax_ext.training.predict import predict

  top_k = commands.positive("top", args.top) if args.top is not None else None
  targets = _targets(args.output)
  for target in targets:
    check_new_file(target)
  config, workdir = commands.trained_model(args)
  paths = find_images(args.images)
  predictions, unreadable = predict(config, workdir, paths, top_k)
  for prediction in predictions:
    print(prediction["image"])
    for name, probability in prediction["classes"].items():
      print(f"  {probability:7.2%}  {name}")
    if not prediction["classes"]:
      print("  no label is above its threshold")
  for complaint in unreadable:
    print(complaint, file=sys.stderr)
  if unreadable:
    print(f"{len(unreadable)} of {len(paths)} images are left out", file=sys.stderr)
  for target in targets:
    _write(target, predictions)
  commands.print_written(*targets)


def _targets(output: str | None) -> list[str]:
  """Returns the files that --output names."""
  if output is None:
    return []
  if output.endswith((".json", ".csv")):
    return [output]
  return [os.path.join(output, name) for name in ("predictions.json", "predictions.csv")]


def _write(path: str, predictions: list[dict]) -> None:
  import csv

  from vit_jax_ext.files import replace, write_json

  folder, name = os.path.split(path)
  if name.endswith(".json"):
    write_json(folder or ".", name, predictions)
    return
  columns = range(1, max(len(prediction["classes"]) for prediction in predictions) + 1)
  with replace(folder or ".", name) as file:
    writer = csv.writer(file)
    writer.writerow(["image", *(f"{what}_{i}" for i in columns for what in ("class", "probability"))])
    for prediction in predictions:
      writer.writerow([prediction["image"], *(part for item in prediction["classes"].items() for part in item)])
