"""The command line: flags and dispatch."""

import argparse
import os
import signal
import sys

DEFAULT_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "digits.py")
EPILOG = """
Any value of the config is set with --config.KEY=VALUE, for example
  python main.py --config=configs/digits.py:crossvit --workdir=/tmp/run --config.batch_size=64
evaluate, predict, analyze and export take a run's weights from --workdir, others from --config.pretrained=FILE.
No command means train, no --config means configs/digits.py, no --workdir a fixed folder under ~/.cache/vit_jax_ext.
Exit status: 0 done, 2 your input is wrong (one line says what), 75 preempted (SIGTERM) and saved: run the same command
again, 1 anything else.
"""


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """Returns the arguments of a command and the config overrides as KEY=VALUE."""
  common = argparse.ArgumentParser(add_help=False)
  common.add_argument("--workdir", metavar="DIR", help="folder of the run: config, checkpoints, metrics")
  with_config = argparse.ArgumentParser(add_help=False)
  with_config.add_argument("--config", metavar="FILE[:ARG]", help="experiment (default: configs/digits.py)")
  with_output = argparse.ArgumentParser(add_help=False)
  with_output.add_argument("--output", metavar="DIR", help="write the results into this folder")

  several = argparse.ArgumentParser(add_help=False)
  group = several.add_argument_group("several processes, one on each host; see launch/")
  group.add_argument("--distributed", action="store_true", help="ask SLURM, Open MPI, Cloud TPU or Kubernetes for them")
  group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0, as all can reach it")
  group.add_argument("--num-processes", metavar="N", type=int, help="how many there are")
  group.add_argument("--process-id", metavar="I", type=int, help="which one this is, from 0")
  group.add_argument("--hosts", metavar="NAME,...", default="", help="where they run, to name those that do not come")
  group.add_argument("--wait", metavar="SECONDS", type=int, default=300, help="for all to come (default: 300)")

  parser = argparse.ArgumentParser(
    prog="python main.py",
    description="Train, evaluate and compare vision transformers.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(dest="command", metavar="COMMAND")

  def add(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    return commands.add_parser(
      name, help=help, description=help, parents=parents, epilog=EPILOG, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip

  add(
    "doctor", "check dataset, devices, memory, weights and workdir in seconds, before a long run", common, with_config
  )
  add("train", "train a model, or continue where an earlier run in the workdir stopped", common, with_config, several)
  add(
    "evaluate",
    "measure a run's best checkpoint, or pretrained weights, on an evaluation split",
    common,
    with_config,
    with_output,
    several,
  )
  predict = add("predict", "name the five likeliest classes of image files", common, with_config, with_output)
  predict.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG or PNG file")
  convert = add("convert", "write a run's weights, or others in any known format, under the authors' names", common)
  convert.add_argument(
    "source", metavar="SOURCE", nargs="?", help="file, or True for the published weights (default: workdir)"
  )
  convert.add_argument("target", metavar="FILE", help="new file, .safetensors or .pth")
  convert.add_argument("--model", metavar="NAME", help="whose weights they are (default: the run's)")
  convert.add_argument("--num-classes", metavar="N", type=int, help="another number of classes: a new classifier")
  export = add("export", "write a model as a StableHLO program and as the authors' safetensors, and check both", common,
               with_output)  # fmt: skip
  export.add_argument("--model", metavar="NAME", help="with the weights of --config.pretrained, else random ones")

  collectives = add("collectives", "print what a training step moves between the devices of a mesh, and keeps on each; "
                    "needs neither the devices nor the dataset", with_config, with_output)  # fmt: skip
  collectives.add_argument("--num-classes", metavar="N", type=int, default=1000, help="of the dataset (default: 1000)")

  runs = argparse.ArgumentParser(add_help=False)
  runs.add_argument("--workdir", metavar="DIR", action="append", help="folder of the run; repeat to compare several")
  compare = add(
    "compare",
    "print parameters and multiply-adds beside the published figures; with --output measure speed and memory, and "
    "write a report",
    runs,
    with_output,
  )
  compare.add_argument("--models", metavar="NAME,...", help="models to compare (default: all, or none but the runs)")
  compare.add_argument("--batch-sizes", metavar="N,...", default="8", help="for --output, e.g. 1,8 (default: 8)")
  compare.add_argument("--dtypes", metavar="NAME,...", default="float32", help="for --output (default: float32)")
  compare.add_argument("--rounds", metavar="N", default="5", help="of timings, for --output (default: 5)")
  compare.add_argument("--fusion", action="store_true", help="CrossViT-S under the five fusions of the paper's Table 6")
  compare.add_argument("--study", metavar="NAME", help="train small models into --output and report their accuracy: "
                       "fusion, depth, boat, all, or a config file with a STUDY")  # fmt: skip
  compare.add_argument("--seeds", metavar="N", default="2", help="of each model of a study (default: 2)")

  thresholds = argparse.ArgumentParser(add_help=False)
  thresholds.add_argument("--threshold", type=float, default=0.8, help="similarity of similar blocks (default: 0.8)")
  thresholds.add_argument("--head-threshold", type=float, default=0.5, help="of similar heads (default: 0.5)")
  analyze = add("analyze", "measure and draw how alike the attention maps of blocks and heads are; or BOAT's clusters",
                runs, with_config, thresholds, with_output)  # fmt: skip
  analyze.add_argument("--clusters", metavar="IMAGE", help="draw this image's patches by their cluster in a BOAT model")
  analyze.add_argument("--model", metavar="NAME", help="for --clusters, with random weights (default: boat_swin_tiny)")
  analyze.add_argument("--block", metavar="NAME", help="for --clusters, e.g. layers.0.blocks.1 (default: the first)")
  analyze.add_argument("--heads", metavar="I,...", help="for --clusters, e.g. 0,1,2 (default: the first three)")
  add("study", "train the runs that a config lists, e.g. configs/digits_depth.py, and analyze them together", common,
      with_config, thresholds, with_output)  # fmt: skip

  if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
    argv = ["train", *argv]
  overrides, rest = [], []
  for argument in argv:
    (overrides if argument.startswith("--config.") else rest).append(argument)
  return parser.parse_args(rest), [argument.removeprefix("--config.") for argument in overrides]


def run_compare(args: argparse.Namespace, overrides: list[str]) -> None:
  """Dispatches `compare`."""
  from vit_jax_ext.compare import comparison as compare
  from vit_jax_ext.errors import UserError

  if args.study:
    if args.models or args.workdir or args.fusion:
      raise UserError(
        f"--study={args.study} trains models of its own; give --models, --workdir or --fusion in a command of their "
        "own, with the same --output for one report"
      )
    from vit_jax_ext.studies import study as studies

    studies.run_studies(args.study, args.seeds, overrides, args.output)
    return
  if overrides:
    raise UserError(
      f"--config.{overrides[0]} is for a --study; models are compared as they were published, runs as they were "
      "trained: leave it out"
    )
  models = args.models.split(",") if args.models else None
  if args.fusion or not (args.output or args.workdir):
    compare.print_costs(models, fusion=args.fusion, output=args.output)
  else:
    compare.compare(models, args.workdir or (), args.output, batch_sizes=args.batch_sizes.split(","),
                    dtypes=args.dtypes.split(","), rounds=args.rounds)  # fmt: skip


def run(args: argparse.Namespace, overrides: list[str]) -> None:
  """Dispatches to the command; imports what it needs and no more."""
  if args.command == "compare":
    run_compare(args, overrides)
    return

  from vit_jax_ext import config as configs
  from vit_jax_ext.errors import UserError

  spec = getattr(args, "config", None) or DEFAULT_CONFIG
  pretrained = any(override.startswith("pretrained=") for override in overrides)
  if pretrained and args.command in ("evaluate", "predict", "analyze") and args.workdir:
    raise UserError(f"--workdir={args.workdir} and --config.pretrained both name weights; give one of them")
  if args.command == "analyze" and args.clusters:
    from vit_jax_ext.attention import clusters

    clusters.analyze(args.clusters, args.workdir, args.config, args.model, overrides,
                     block=args.block, heads=args.heads, output=args.output)  # fmt: skip
    return
  if args.command in ("analyze", "study"):
    from vit_jax_ext.attention import measure

    options = dict(threshold=args.threshold, head_threshold=args.head_threshold)
    if args.command == "study":
      measure.study(spec, args.workdir or configs.default_workdir(spec), overrides, args.output, **options)
      return
    if pretrained:
      runs = {None: configs.load_config(spec)}
    else:
      workdirs = args.workdir or [configs.default_workdir(spec)]
      runs = {workdir: configs.read_workdir_config(workdir) for workdir in workdirs}
    for config in runs.values():
      configs.override(config, overrides)
    measure.analyze(runs, args.output, **options)
    return

  if args.command == "convert":
    from vit_jax_ext import convert

    convert.convert(
      args.source or args.workdir or configs.default_workdir(spec), args.target, args.model, args.num_classes, overrides
    )
    return

  if args.command == "export":
    from vit_jax_ext.export import export

    export(args.model, args.workdir, overrides, args.output)
    return

  if args.command == "collectives":
    from vit_jax_ext.plan import collectives

    config = configs.load_config(spec)
    configs.override(config, overrides)
    collectives.simulate_devices(config.mesh)
    collectives.report(config, args.num_classes, args.output)
    return

  if args.command in ("train", "evaluate") and (args.distributed or args.coordinator):
    from vit_jax_ext.training import distributed

    hosts = args.hosts.split(",") if args.hosts else ()
    distributed.join(args.coordinator, args.num_processes, args.process_id, hosts=hosts, wait=args.wait)

  workdir = args.workdir or configs.default_workdir(spec) + ("-smoke" if "smoke=True" in overrides else "")
  from_file = args.command in ("train", "doctor") or pretrained
  config = configs.load_config(spec) if from_file else configs.read_workdir_config(workdir)
  configs.override(config, overrides)
  if args.command in ("evaluate", "predict") and pretrained:
    workdir = None

  if args.command == "train":
    from vit_jax_ext.training.train import train

    train(config, workdir)
  elif args.command == "doctor":
    from vit_jax_ext.training.doctor import doctor

    doctor(config, workdir)
  elif args.command == "evaluate":
    from vit_jax_ext.training.evaluate import evaluate_weights

    evaluate_weights(config, workdir, args.output)
  else:
    from vit_jax_ext.training.predict import predict

    predict(config, workdir, args.images, args.output)


def main() -> int:
  """Runs the command line and returns the exit status."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # announces itself twice at every start
  args, overrides = parse_args(sys.argv[1:])
  from vit_jax_ext.console import log_to_console
  from vit_jax_ext.errors import Preempted, RunError, UserError

  def preempted(*_):
    print("preempted; the same command continues", file=sys.stderr)
    sys.exit(Preempted.status)

  trains = args.command in ("train", "study") or getattr(args, "study", None)
  if trains:  # until the training itself takes care of it
    signal.signal(signal.SIGTERM, preempted)
  log_to_console()
  try:
    run(args, overrides)
  except Preempted as notice:
    print(notice, file=sys.stderr)
    return notice.status
  except (UserError, RunError) as error:
    print(f"error: {error}", file=sys.stderr)
    return error.status
  except KeyboardInterrupt:
    goes_on = "; the same command continues from the last checkpoint" if trains else ""
    print(f"interrupted{goes_on}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
