"""Measure and draw how alike the attention maps of blocks and heads are; or, with --clusters, BOAT's clusters."""

import argparse
import os

from vit_jax_ext import commands
from vit_jax_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_workdirs(parser)
  commands.add_config(parser)
  commands.add_thresholds(parser)
  commands.add_output(parser)
  parser.add_argument("--clusters", metavar="IMAGE", help="draw this image's patches by their cluster in a BOAT model")
  parser.add_argument("--model", metavar="NAME", help="for --clusters, with random weights (default: boat_swin_tiny)")
  parser.add_argument("--block", metavar="NAME", help="for --clusters, e.g. layers.0.blocks.1 (default: the first)")
  parser.add_argument("--heads", metavar="I,...", help="for --clusters, e.g. 0,1,2 (default: the first three)")


def run(args: argparse.Namespace) -> None:
  """Prints a table of similarities, or draws clusters."""
  if args.clusters:
    _draw_clusters(args)
    return
  import rich.console
  import rich.table

  from vit_jax_ext.attention.measure import analyze

  pairs = commands.trained_models(args, args.workdir or [])
  summaries, paths = analyze(pairs, args.output, threshold=args.threshold, head_threshold=args.head_threshold)
  table = rich.table.Table(
    "model", "blocks", "top-1", f"blocks similar to the next ({args.threshold}+)", "mean similarity"
  )
  for summary in summaries:
    mean = summary["mean_similarity"]
    similar = f"{summary['similar_blocks']} of {summary['blocks']}"
    table.add_row(
      summary["model"], str(summary["blocks"]), f"{summary['top1']:.2%}", similar, "" if mean is None else f"{mean:.3f}"
    )
  rich.console.Console(width=120).print(table)
  commands.print_written(*paths)


def _draw_clusters(args: argparse.Namespace) -> None:
  """Draws the clusters of a run, of a config's weights, or of a model by name.

  Raises:
    UserError: several of them, heads that are no numbers, and what `draw_clusters` refuses.
  """
  from vit_jax_ext import config as configs
  from vit_jax_ext.attention.clusters import draw_clusters
  from vit_jax_ext.workdir import analysis
  from vit_jax_ext.workdir.config import read_workdir_config

  workdirs = args.workdir or []
  sources = [*workdirs, *filter(None, (args.config, args.model))]
  if len(sources) > 1:
    raise UserError(f"clusters come from one model, not from {', '.join(sources)}; give one of them")
  commands.check_one_source(args, workdirs)
  workdir = workdirs[0] if workdirs else None
  if workdir:
    config = read_workdir_config(workdir)
  elif args.config:
    config = configs.load_config(args.config)
  else:
    config = commands.published_model(args.model or "boat_swin_tiny", seed=0, dataset={"crop": 1.0}, pretrained=None)
  configs.override(config, args.overrides)
  try:
    heads = [int(head) for head in args.heads.split(",")] if args.heads else None
  except ValueError:
    raise UserError(f"--heads={args.heads} is no list of numbers; write for example --heads=0,1,2") from None
  output = args.output or os.path.join(workdir or "", analysis.FOLDER)
  commands.print_written(draw_clusters(config, workdir, args.clusters, block=args.block, heads=heads, output=output))
