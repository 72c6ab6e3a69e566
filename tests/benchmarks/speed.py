"""How fast the recipes' training steps are: by the TPU compiler's own estimates, or timed beside PyTorch.

Run: python tests/benchmarks/speed.py [MODEL ...] [--plans=DIR]
     python tests/benchmarks/speed.py [MODEL ...] --torch [--rounds=N]
The first needs libtpu and no TPU: cycles and temporaries of a step on v5e:2x2, sorts and kernels counted as in
docs/plan.md, seconds to compile; plans that DIR has are not made again. The second needs timm and torch, and times
forward pass and training step in turns on the device at hand: on a GPU in bfloat16 against torch.compile, on a CPU in
float32 against eager PyTorch.
"""

import argparse
import statistics
import time

import rich.console
import rich.table

# Model -> config, images a chip. All in bfloat16.
RECIPES = {
  "deit_small": ("configs/vit.py:deit_small", 128),
  "crossvit_15_dagger": ("configs/crossvit.py:15_dagger", 128),
  "vit_16b": ("configs/vit.py:16b", 64),
  "deepvit_16b": ("configs/deepvit.py:16b", 64),
  "swin_tiny": ("configs/swin.py:tiny", 64),
  "boat_swin_tiny": ("configs/boat.py:swin_tiny", 64),
  "cswin_tiny": ("configs/cswin.py:tiny", 64),
  "boat_cswin_tiny": ("configs/boat.py:cswin_tiny", 64),
}
# Our name, timm's, batch: the ones that are the same network there.
TIMM = {
  "deit_small": ("deit_small_patch16_224", "deit_small_patch16_224"),
  "crossvit_small": ("crossvit_small_224", "crossvit_small_240"),
  "swin_tiny": ("swin_tiny", "swin_tiny_patch4_window7_224"),
}


def planned(models: list[str], folder: str) -> rich.table.Table:
  """Returns a table of what the TPU compiler says."""
  from vit_jax_ext.console import Countdown
  from vit_jax_ext.plan.cases import Case, make_plan

  table = rich.table.Table("model", "images a chip", "M cycles", "GiB of temporaries", "of peak, about", "s to compile")
  with Countdown({"plan": (len(models), 120.0)}) as countdown:
    for model in models:
      config, images = RECIPES[model]
      overrides = (f"batch_size={4 * images}", "model.overrides.dtype=bfloat16")
      found = make_plan(Case(config, overrides, "v5e:2x2", 1, 1000, 1_281_167), folder, countdown)
      if "error" in found or not found["fits"]:
        table.add_row(model, str(images), found.get("error", "does not fit"))
        continue
      work = found["work"]
      counted = sum(row["cycles"] for row in work["counted"])
      table.add_row(
        model,
        str(images),
        f"{(work['estimated_cycles'] + counted) / 1e6:.1f} ({counted / 1e6:.1f} counted)",
        f"{found['memory']['temporaries'] / 2**30:.2f}",
        f"{found['time']['share_of_peak']:.1%}",
        f"{found['compilation']['seconds']:.0f}",
      )
  return table


def timed(models: list[str], rounds: int) -> rich.table.Table:
  """Returns a table of seconds beside PyTorch's, medians of `rounds` taken in turns."""
  table = rich.table.Table("model", "batch", "program", "JAX, ms", "PyTorch, ms", "times as fast")
  for model in models:
    name, timm_name = TIMM[model]
    ours, theirs, batch = _ours(name), _theirs(timm_name), _batch_size()
    for program in ("forward", "training"):
      _seconds(theirs[program])  # the first one compiles
      pairs = [(batch / ours.images_per_second(program), _seconds(theirs[program])) for _ in range(rounds)]
      jax_ms, torch_ms = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
      ratio = statistics.median(b / a for a, b in pairs)
      table.add_row(model, str(batch), program, f"{jax_ms:.1f}", f"{torch_ms:.1f}", f"{ratio:.2f}")
  return table


def _batch_size() -> int:
  import torch

  return 128 if torch.cuda.is_available() else 8


def _seconds(run) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def _ours(name: str):
  import jax

  from vit_jax_ext.compare.benchmark import Benchmark

  dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
  benchmark = Benchmark({"name": name, "overrides": {}}, 1000, _batch_size(), dtype)
  for program in ("forward", "training"):
    benchmark.compile(program)
  return benchmark


def _theirs(name: str) -> dict:
  import timm
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = timm.create_model(name).to(device)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
  run = torch.compile(model) if device == "cuda" else model
  images = torch.randn(_batch_size(), 3, *model.pretrained_cfg["input_size"][1:], device=device)
  labels = torch.randint(0, 1000, (_batch_size(),), device=device)
  loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

  def wait():
    if device == "cuda":
      torch.cuda.synchronize()

  def logits():
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
      return run(images)

  def forward():
    model.eval()
    with torch.inference_mode():
      logits()
    wait()

  def training():
    model.train()
    optimizer.zero_grad()
    loss(logits(), labels).backward()
    optimizer.step()
    wait()

  return {"forward": forward, "training": training}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  names = f"of {', '.join(RECIPES)}; with --torch {', '.join(TIMM)}"
  parser.add_argument("models", nargs="*", metavar="MODEL", help=names)
  parser.add_argument("--torch", action="store_true", help="time it beside PyTorch")
  parser.add_argument("--plans", metavar="DIR", default="plans", help="keeps the plans (default: plans)")
  parser.add_argument("--rounds", type=int, default=5, help="timings of each program (default: 5)")
  args = parser.parse_args()
  known = TIMM if args.torch else RECIPES
  if unknown := set(args.models) - set(known):
    parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
  models = args.models or list(known)
  table = timed(models, args.rounds) if args.torch else planned(models, args.plans)
  rich.console.Console(width=120).print(table)


if __name__ == "__main__":
  main()
