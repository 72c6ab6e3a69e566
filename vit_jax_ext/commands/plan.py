"""Say whether an experiment fits on devices, how fast it would be and what it sends; needs neither devices nor dataset.

XLA's own compiler for KIND:SHAPE compiles the very step that training would run. v5e:4x4, v4:2x2x4 and the like are
TPU slices (v3, v4, v5e, v5p, v6e, tpu7x), h100:1x8 is HOSTSxGPUS (a100, h100, h200, b200), cpu:8 simulated CPU devices,
here what this machine has.
"""

import argparse
from collections.abc import Iterator
import contextlib
import shlex
import sys
from typing import Any

import humanize

from vit_jax_ext import commands
from vit_jax_ext.errors import RunError, UserError
from vit_jax_ext.files import size


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  commands.add_config(parser)
  commands.add_output(parser)
  commands.add_devices(parser, default="here")
  parser.add_argument("--program", choices=("train", "evaluate", "predict"), default="train", help="(default: train)")
  parser.add_argument("--num-classes", metavar="N", type=int, default=1000, help="of the dataset (default: 1000)")
  parser.add_argument(
    "--examples", metavar="N", type=int, default=1_281_167, help="of the training split (default: ImageNet's 1,281,167)"
  )
  parser.add_argument("--measure", action="store_true", help="run it on synthetic images, on --devices=here or cpu:N")
  parser.add_argument("--save", metavar="FILE", help="write the compiled training step, for train --compiled=FILE")
  many = parser.add_mutually_exclusive_group()
  many.add_argument("--search", action="store_true", help="find the fastest split and number of images at once")
  many.add_argument("--all", action="store_true", help="a table of the papers' recipes on four kinds of devices")


def run(args: argparse.Namespace) -> None:
  """Prints what the program needs, and writes plan.json.

  Raises:
    RunError: the compiler crashes, or the program fails on the devices at hand.
  """
  if args.search or args.all:
    return run_many(args)
  if args.measure and args.devices.partition(":")[0] not in ("here", "cpu"):
    raise UserError(f"--measure runs the program, and {args.devices} is not at hand; give --devices=here or cpu:N")
  if args.save and args.program != "train":
    raise UserError(f"--save writes the training step, not --program={args.program}; leave one of them out")
  from vit_jax_ext import config as configs
  from vit_jax_ext.files import write_json
  from vit_jax_ext.plan import kinds, memory, report, timing
  from vit_jax_ext.training import ahead
  from vit_jax_ext.training.experiment import Experiment

  config = configs.load_config(args.config or configs.DEFAULT)
  configs.override(config, args.overrides)
  target = kinds.open_target(args.devices, args.slices)
  facts = args.num_classes, args.examples
  experiment = Experiment(config, *facts, devices=target.devices)
  # The compiler itself is wanted: its time is told, and what it makes is saved.
  with _failure_told("XLA's compiler fails"), ahead.without_cache():
    plan = report.plan(config, target, *facts, args.program, experiment)
    if not plan["fits"]:
      plan |= memory.find_remedies(config, target, *facts, args.program, plan)
  print_plan(plan)
  written = [write_json(args.output, "plan.json", plan)] if args.output else []
  if (args.save or args.measure) and not plan["fits"]:
    print("neither saved nor measured, for it does not fit")
  if args.save and plan["fits"]:
    with _failure_told("XLA's compiler fails"):
      ahead.save(args.save, experiment, config, *facts)
    written.append(args.save)
  if args.measure and plan["fits"]:
    with _failure_told("the program fails on these devices"):
      plan["measured"] = timing.time_program(config, experiment, args.program, args.output)
    _print_measured(plan)
    if args.output:
      write_json(args.output, "plan.json", plan)
      written.append(f"a trace; look at it with xprof {args.output} or tensorboard --logdir={args.output}")
  commands.print_written(*written)


def run_many(args: argparse.Namespace) -> None:
  """Prints the table of a search, or of all recipes.

  Raises:
    UserError: a flag of a single plan is given, or no --output.
  """
  what = "--search" if args.search else "--all"
  if args.measure or args.save or args.program != "train":
    raise UserError(f"{what} compiles training steps alone; leave out --measure, --save and --program")
  if not args.output:
    raise UserError(
      f"{what} compiles for a long time; give --output=DIR, and the same command continues what is stopped"
    )
  if args.all and (args.config or args.devices != "here" or args.slices > 1):
    raise UserError("--all has recipes and devices of its own; leave out --config, --devices and --slices")
  from vit_jax_ext import config as configs
  from vit_jax_ext.plan import cases, search

  facts = args.num_classes, args.examples
  with commands.resumable():
    if args.all:
      rows = cases.plan_all(args.output, args.overrides, *facts)
    else:
      case = cases.Case(args.config or configs.DEFAULT, tuple(args.overrides), args.devices, args.slices, *facts)
      trials = search.search(case, args.output)
      rows = search.table(trials)
  for row in rows:
    print(f"| {' | '.join(row)} |")
    if row is rows[0]:
      print("|---" * len(row) + "|")
  if args.search:
    flags = " ".join(f"--config.{override}" for override in trials[0].overrides)
    print(f"best: {flags}" if trials[0].fits else "nothing fits; give more devices, or a smaller --config.batch_size")


@contextlib.contextmanager
def _failure_told(what: str) -> Iterator[None]:
  from vit_jax_ext.plan.cases import FAILURES, first_line

  try:
    yield
  except UserError:
    raise
  except FAILURES as error:
    raise RunError(f"{what}: {first_line(error)}; reproduce it with {shlex.join(sys.argv[1:])}") from None


def print_plan(plan: dict[str, Any]) -> None:
  """Prints a plan for people."""
  mesh = " x ".join(f"{axis}={devices}" for axis, devices in plan["mesh"].items())
  print(f"{plan['program']} {plan['model']}, {plan['parameters']:,} parameters, {plan['batch_size']} images a step, "
        f"on {plan['devices']}: {plan['chips']} chip(s), {mesh}")  # fmt: skip
  if plan["remarks"]:
    print(f"  {plan['remarks']}")
  _print_memory(plan["memory"], plan["fits"])
  if not plan["fits"]:
    _print_way_out(plan)
    return
  if plan["time"]:
    _print_time(plan["time"], plan["work"])
  _print_collectives(plan["collectives"], plan["least_sent"])
  for name, rows in plan["dearest"].items():
    print(f"dearest {name}:")
    for row in rows:
      cycles = f"{row['cycles'] / 1e6:12,.3f} M cycles" if plan["time"] and row["cycles"] else ""
      print(f"{cycles}{row['memory_bytes'] / 1e6:14,.1f} MB  {row['pass']:8} {row['where']}")
  compilation = plan["compilation"]
  print(f"compiled in {compilation['seconds']:.1f} s with {size(compilation['peak_memory'])}")


def _print_memory(memory: dict[str, Any], fits: bool) -> None:
  of = f" of {size(memory['limit'])}" if memory["limit"] else ""
  print(f"{'fits' if fits else 'DOES NOT FIT'}: {size(memory['total'])}{of} on each device")
  for name, part in memory.items():
    if name not in ("total", "limit") and part:
      print(f"  {name:14}{size(part):>11}")


def _print_way_out(plan: dict[str, Any]) -> None:
  limit = plan["memory"]["limit"]
  print("tried:" if plan["remedies"] else "nothing to try: images and parameters are as divided as they can be")
  for remedy in plan["remedies"]:
    verdict = "fits" if remedy["total"] <= limit else "does not fit"
    print(f"  {size(remedy['total']):>11}, {verdict}: {remedy['flags']}")
  print("largest arrays" + (":" if "padding" in plan["memory"] else ", of the first of these that compiled:"))
  for row in plan["largest"]:
    print(f"  {size(row['bytes']):>11}  {row['number']:3} x {row['array']:28} {row['pass']:8} {row['where']}")


def _print_time(time: dict[str, float], work: dict[str, Any]) -> None:
  print(f"estimated step: {time['step'] * 1e3:,.2f} ms, {time['images_per_second_per_chip']:,.0f} images/s a chip, "
        f"{time['images_per_second']:,.0f} in all, {time['share_of_peak']:.1%} of peak")  # fmt: skip
  if "training_hours" in time:
    print(f"  estimated training, without evaluations: {time['training_hours']:,.1f} h")
  print(f"  {humanize.metric(work['flops'], 'FLOP')} a device, "
        f"{work['matmul_flops'] / max(work['flops'], 1):.1%} in matmuls; "
        f"{humanize.metric(work['memory_bytes'], 'B')} to and from memory, {time['memory'] * 1e3:,.2f} ms")  # fmt: skip
  if "estimated_cycles" in work:
    counted = sum(row["cycles"] for row in work["counted"])
    print(f"  {work['estimated_cycles'] / 1e6:,.2f} M cycles as the compiler estimates, {counted / 1e6:,.2f} M counted "
          f"for what it does not:")  # fmt: skip
    for row in work["counted"][:5]:
      print(f"    {row['cycles'] / 1e6:10,.3f} M  {row['times']:,} x {row['what']}")
  else:
    print("  from FLOPs and bytes at the published speeds alone, which a real step hardly reaches")
  for loop in work["unknown_loops"]:
    print(f"  {loop}: a loop of unknown rounds, counted once")


def _print_collectives(rows: list[dict[str, Any]], least: dict[str, float]) -> None:
  if not rows:
    return
  print("collectives, each device's arrays and what it sends:")
  for row in rows:
    how = "asynchronous" if row["asynchronous"] else "synchronous"
    sent = row["sent_near"] + row["sent_far"]
    print(f"  {row['kind']:19}{row['axes']:13}{row['bytes'] / 1e6:12,.3f} MB in {row['operations']:<5,}sends "
          f"{sent / 1e6:12,.3f} MB  {row['reach']}, {how}")  # fmt: skip
  sent = sum(row["sent_near"] + row["sent_far"] for row in rows)
  print(f"  in all {sent / 1e6:,.3f} MB; at least " +
        ", ".join(f"{few / 1e6:,.3f} MB for {name}" for name, few in least.items()))  # fmt: skip


def _print_measured(plan: dict[str, Any]) -> None:
  measured, memory = plan["measured"], plan["memory"]
  print(f"measured step: {measured['step'] * 1e3:,.2f} ms, the median of {measured['steps']} from "
        f"{measured['fastest'] * 1e3:,.2f} to {measured['slowest'] * 1e3:,.2f}; "
        f"{measured['images_per_second'] / plan['chips']:,.0f} images/s a chip, "
        f"{measured['images_per_second']:,.0f} in all")  # fmt: skip
  if plan["time"]:
    estimated = plan["time"]["step"]
    print(f"  {estimated / measured['step']:.0%} of it was estimated, {estimated * 1e3:,.2f} ms")
  if measured["peak_memory"]:
    print(f"  {size(measured['peak_memory'])} on a device at the most, {size(memory['total'])} planned")
