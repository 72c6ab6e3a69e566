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
  for weights, rows in evaluation.get("classes", {}).items():
    _print_classes(weights, rows)
  if args.output:
    commands.print_written(write_json(args.output, "evaluation.json", evaluation))


def _print_classes(weights: str, rows: list[dict]) -> None:
  """Prints the labels with their scores, and which have no image and so are left out of map."""
  width = max(len(row["name"]) for row in rows)
  print(f"{weights + ', by label':{width + 2}}  images  average precision  threshold  precision  recall      F1")
  for row in rows:
    average = row["average_precision"]
    shares = "".join(f"{row[key]:{space}.2%}" for key, space in (("precision", 11), ("recall", 8), ("f1", 8)))
    average = "-" if average is None else f"{average:.2%}"
    print(f"  {row['name']:{width}}  {row['images']:6}  {average:>17}  {row['threshold']:9.4f}{shares}")
  if absent := [row["name"] for row in rows if not row["images"]]:
    print(f"  {weights}/map leaves out {len(absent)} of {len(rows)} labels, which no image has: {', '.join(absent)}")
