"""Write a model as a StableHLO program and as the authors' safetensors, and check both."""

import argparse

from vit_jax_ext import commands
from vit_jax_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_workdir(parser)
  commands.add_output(parser)
  parser.add_argument("--model", metavar="NAME", help="with the weights of --config.pretrained, else random ones")


def run(args: argparse.Namespace) -> None:
  """Exports a run, its best checkpoint and averaged weights where it has some, or a model by name.

  Raises:
    UserError: neither or both of --model and --workdir, no folder, two sources of weights; what `export` refuses.
  """
  if bool(args.model) == bool(args.workdir):
    raise UserError(f"--model={args.model} and --workdir={args.workdir}: give one of them to export")
  if not args.output:
    raise UserError("an export is written into a folder; give --output=DIR")
  from vit_jax_ext import compilation_cache
  from vit_jax_ext import config as configs
  from vit_jax_ext.export import export
  from vit_jax_ext.workdir.config import read_workdir_config

  commands.check_one_source(args, [args.workdir] if args.workdir else [])
  if args.workdir:
    config = read_workdir_config(args.workdir)
  else:
    config = commands.published_model(args.model, dataset={"crop": None}, pretrained=None)
  configs.override(config, args.overrides)
  compilation_cache.use(config)
  exported = export(config.model, args.workdir or config.pretrained, args.output, crop=config.dataset.crop)
  commands.print_written(*exported.paths)
  print(f"{config.model.name}, {exported.source}; loaded back, the two files' logits differ by at most "
        f"{exported.difference:.2g}")  # fmt: skip
