"""Print what a training step moves between the devices of a mesh, and keeps on each; needs neither devices nor dataset.

The mesh is simulated: give the size of each axis, --config.mesh.data=D --config.mesh.fsdp=F --config.mesh.model=M.
"""

import argparse

from vit_jax_ext import commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_config(parser)
  commands.add_output(parser)
  parser.add_argument("--num-classes", metavar="N", type=int, default=1000, help="of the dataset (default: 1000)")


def run(args: argparse.Namespace) -> None:
  """Prints bytes by kind of collective, and memory by what it is for."""
  from vit_jax_ext import config as configs
  from vit_jax_ext.files import write_json
  from vit_jax_ext.plan import collectives

  config = configs.load_config(args.config or configs.DEFAULT)
  configs.override(config, args.overrides)
  collectives.simulate_devices(config.mesh)
  result = collectives.measure(config, args.num_classes)
  mesh = " x ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
  print(f"{result['model']}, {result['parameters']:,} parameters, {result['batch_size']} images a step on {mesh}")
  if result["remarks"]:
    print(f"  {result['remarks']}")
  print("moved in a step, each device's results:")
  for kind, row in result["collectives"].items():
    print(f"  {kind:20} {row['bytes'] / 1e6:12,.3f} MB in {row['operations']:,}, "
          f"the largest {row['largest'] / 1e6:,.3f} MB")  # fmt: skip
  print("on each device:")
  for name, size in result["device"].items():
    print(f"  {name:20} {size / 1e6:12,.3f} MB")
  if args.output:
    commands.print_written(write_json(args.output, "collectives.json", result))
