"""Print parameters and multiply-adds beside the published figures; with --output measure speed and memory as well.

Then a report is written, report.html, which also shows what the runs of --workdir have learned, and the studies in DIR.
"""

import argparse
import os

from vit_jax_ext import commands
from vit_jax_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_workdirs(parser)
  commands.add_output(parser)
  parser.add_argument("--models", metavar="NAME,...", help="models to compare (default: all, or none but the runs)")
  parser.add_argument("--batch-sizes", metavar="N,...", default="8", help="for --output, e.g. 1,8 (default: 8)")
  parser.add_argument("--dtypes", metavar="NAME,...", default="float32", help="for --output (default: float32)")
  parser.add_argument("--rounds", metavar="N", default="5", help="of timings, for --output (default: 5)")
  parser.add_argument("--fusion", action="store_true", help="CrossViT-S under the five fusions of the paper's Table 6")


def run(args: argparse.Namespace) -> None:
  """Prints a table of costs, or with runs or a folder measures.

  Raises:
    UserError: values of a config, and what `comparison.compare` refuses.
  """
  if args.overrides:
    raise UserError(
      f"--config.{args.overrides[0]} is for a command that trains; models are compared as they were published, runs as "
      "they were trained: leave it out"
    )
  models = args.models.split(",") if args.models else None
  if args.fusion or not (args.output or args.workdir):
    _print_costs(models, args)
  else:
    _compare(models, args)


def _print_costs(models: list[str] | None, args: argparse.Namespace) -> None:
  import rich.console
  import rich.table

  from vit_jax_ext.compare import cost, results
  from vit_jax_ext.models import registry

  rows = cost.fusion_table() if args.fusion else cost.models_table(models or registry.list_models())
  table = rich.table.Table(*rows[0], title="CrossViT-S, Table 6" if args.fusion else None)
  for row in rows:
    table.add_row(
      *("" if value is None else f"{value:,}" if isinstance(value, int) else str(value) for value in row.values())
    )
  rich.console.Console(width=150).print(table)
  if args.output:
    results.write_csv(args.output, "cost.csv", rows)
    commands.print_written(os.path.join(args.output, "cost.csv"))


def _compare(models: list[str] | None, args: argparse.Namespace) -> None:
  import rich.console
  import rich.table

  from vit_jax_ext.compare import comparison, report, results

  if not args.output:
    raise UserError("a comparison of runs is written into a folder; give --output=DIR")
  sizes = [commands.positive("batch-sizes", size) for size in args.batch_sizes.split(",")]
  dtypes, rounds = args.dtypes.split(","), commands.positive("rounds", args.rounds)
  compared = comparison.compare(
    models, args.workdir or (), args.output, batch_sizes=sizes, dtypes=dtypes, rounds=rounds
  )
  table = results.rows(compared)
  keys = ("label", "batch_size", "dtype", "published_top1", "eval_top1", "eval_map", "params", "multiply_adds",
          "forward_images_per_second", "training_images_per_second", "training_memory", "note")  # fmt: skip
  columns = [column for column in results.columns(table) if column.key in keys]
  shown = rich.table.Table(*(column.heading for column in columns))
  for row in table:
    shown.add_row(*(column(row) for column in columns))
  rich.console.Console(width=160).print(shown)
  commands.print_written(*(os.path.join(args.output, name) for name in (*results.FILES, report.FILE)))
