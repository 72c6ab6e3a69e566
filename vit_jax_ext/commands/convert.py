"""Write a run's weights, or others in any known format, under the authors' names; or as timm and the Hub have them."""

import argparse
import os

from vit_jax_ext import commands
from vit_jax_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_workdir(parser)
  parser.add_argument(
    "source", metavar="SOURCE", nargs="?", help="file, or True for the published weights (default: workdir)"
  )
  parser.add_argument(
    "target",
    metavar="TARGET",
    help="new file, .safetensors or .pth; with --to=timm a folder, with --to=hub OWNER/NAME",
  )
  parser.add_argument("--to", choices=("file", "timm", "hub"), default="file", help="what is written (default: file)")
  parser.add_argument("--license", metavar="ID", help="of the weights, for the card, such as apache-2.0")
  parser.add_argument("--model", metavar="NAME", help="whose weights they are (default: the run's)")
  parser.add_argument("--num-classes", metavar="N", type=int, help="another number of classes: a new classifier")


def run(args: argparse.Namespace) -> None:
  """Prints what happened to every array as a table.

  Raises:
    UserError: a source that does not tell its model, a license without a card; what `convert`, `write_folder` or
      `publish` refuse.
  """
  if args.license and args.to == "file":
    raise UserError(f"--license={args.license} goes into a card, and a file has none; add --to=timm or --to=hub")
  import rich.console
  import rich.table

  from vit_jax_ext import config as configs
  from vit_jax_ext.pretrained import convert, read_description
  from vit_jax_ext.publish import publish, write_folder
  from vit_jax_ext.workdir.config import default_workdir, read_workdir_config

  source = args.source or args.workdir or default_workdir(configs.DEFAULT)
  if args.model:
    config = commands.published_model(args.model)
  elif about := read_description(source):
    config = commands.published_model(about["model"])
    config.model.overrides.update(about["overrides"])
  elif os.path.isdir(source) or not args.source:
    config = read_workdir_config(source)  # which says what is missing
  else:
    raise UserError(f"weights {source} do not tell their model; name it with --model=NAME")
  configs.override(config, args.overrides)
  weights, target = source == "True" or source, args.target
  if args.to == "file":
    report = convert(weights, target, config.model, args.num_classes)
  elif args.to == "timm":
    report = write_folder(weights, target, config.model, args.num_classes, license=args.license)
  else:
    report, target = publish(weights, target, config.model, args.num_classes, license=args.license)

  table = rich.table.Table("", "arrays", "names")
  table.add_row("loaded", str(len(report.loaded)), "")
  for outcome in ("resized", "reinitialized", "unused"):
    names = getattr(report, outcome)
    table.add_row(outcome, str(len(names)), "\n".join(names))
  rich.console.Console(width=120).print(table)
  print(f"wrote {target}: {config.model.name} from {report.source}")
