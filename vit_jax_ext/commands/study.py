"""Train small models from several seeds to answer a question, and report their accuracy with mean and spread.

NAME is fusion, depth, boat; a probe: scales, twins or chains; or a config file with a STUDY. `all` are the first three.
The models' runs are made in DIR/studies, and DIR/report.html is written anew after each of them. Started again, the
command continues; with more seeds it trains those that are missing. Where the models have attention maps, it also
measures and draws how alike those are, as analyze does. A probe chooses each model's learning rate, tests it on every
difficulty, says which claims that supports, and trains ablations of their models.
"""

import argparse

from vit_jax_ext import commands
from vit_jax_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  parser.add_argument(
    "study",
    metavar="NAME",
    help="fusion, depth, boat, all, scales, twins, chains, or a config file with a STUDY, FILE.py",
  )
  commands.add_output(parser)
  parser.add_argument("--seeds", metavar="N", help="of each model (default: 2, of a probe's 5)")
  commands.add_thresholds(parser)


def run(args: argparse.Namespace) -> None:
  """Prints a table for each study.

  Raises:
    UserError: no folder, and what `run_studies` refuses.
  """
  if not args.output:
    raise UserError("the runs of a study need a folder; give --output=DIR")
  seeds = commands.positive("seeds", args.seeds) if args.seeds else None
  with commands.resumable():
    import rich.console
    import rich.table

    from vit_jax_ext.compare.report import study_cell
    from vit_jax_ext.studies.run import run_studies

    thresholds = {"threshold": args.threshold, "head_threshold": args.head_threshold}
    tables, paths = run_studies(args.study, seeds, args.overrides, args.output, thresholds)
  for table in tables:
    shown = rich.table.Table(*table["columns"], title=table["title"], caption=table["text"])
    for row in table["rows"]:
      shown.add_row(*map(study_cell, row))
    rich.console.Console(width=120).print(shown)
  commands.print_written(*paths)
