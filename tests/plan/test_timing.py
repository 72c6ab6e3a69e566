"""Programs run on synthetic images: what is timed, and the trace; and the command that does it, and saves."""

import itertools
import json
import types

import jax
import pytest

from configs import digits
from vit_jax_ext.plan import compile, timing
from vit_jax_ext.training.experiment import Experiment

TINY = ["image_size=8", "patch_size=4", "embed_dim=8", "num_heads=2", "depth=1"]


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(timing, "SECONDS", 0.0)


@pytest.fixture
def config():
  config = digits.get_config("vit")
  config.model.overrides.update(image_size=8, patch_size=4, embed_dim=8, num_heads=2, depth=1)
  config.mesh.update(data=4, fsdp=2)
  return config


@pytest.mark.parametrize("program", compile.PROGRAMS)
def test_all_programs_run(config, quick, program, tmp_path):
  measured = timing.time_program(config, Experiment(config, 10, 1437), program, str(tmp_path))
  assert measured["steps"] == timing.LEAST
  assert 0 < measured["fastest"] <= measured["step"] <= measured["slowest"]
  assert measured["images_per_second"] == 64 / measured["step"]
  assert measured["peak_memory"] is None  # CPU devices count nothing
  (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(trace)).planes
  names = [event.name for plane in planes for line in plane.lines for event in line.events]
  assert names.count(program) == timing.TRACED


def test_what_is_timed(config, monkeypatch):
  """By a clock of our own: steps of 2, 4 and 6 s in turns, until 5 s are over and 5 steps done."""
  ticks = itertools.accumulate(itertools.chain.from_iterable(zip(itertools.repeat(1), itertools.cycle((2, 4, 6)))))
  monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
  measured = timing.time_program(config, Experiment(config, 10, 1437), "predict")
  assert [measured[name] for name in ("steps", "step", "fastest", "slowest")] == [5, 4, 2, 6]
  assert measured["images_per_second"] == 16


def test_plan_measures_and_saves_and_train_starts_with_it(run, quick, tmp_path, data_dir, compiled):
  options = ["--config=configs/digits.py:vit", *(f"--config.model.overrides.{option}" for option in TINY)]
  options += ["--config.mesh.fsdp=2", "--config.total_steps=2", "--config.optimizer.warmup_steps=1"]
  file, output = tmp_path / "folder" / "step", tmp_path / "plan"
  status, out, err = run("plan", *options, "--devices=cpu:8", "--num-classes=10", "--examples=1437", "--measure",
                         f"--save={file}", f"--output={output}")  # fmt: skip
  assert status == 0, err
  lines = [line for line in out.splitlines() if line.startswith(("measured", "wrote"))]
  assert [line.split()[0] for line in lines] == ["measured", "wrote", "wrote", "wrote"]
  assert "images/s" in lines[0] and str(file) in lines[2] and f"--logdir={output}" in lines[3]
  measured = json.loads((output / "plan.json").read_text())["measured"]
  assert f"{measured['images_per_second']:,.0f} in all" in lines[0]
  assert list(output.glob("plugins/profile/*/*.xplane.pb"))

  compiled.clear()
  status, out, err = run("train", *options, f"--compiled={file}", f"--workdir={tmp_path / 'run'}",
                         f"--config.dataset.data_dir={data_dir}")  # fmt: skip
  assert status == 0 and not {"jit(init)", "jit(step)"} & set(compiled), err
  assert f"{file} has the compiled training step" in err


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--measure", "--devices=v5e:2x2"], "v5e:2x2 is not at hand; give --devices=here or cpu:N"),
    (["--save=x", "--program=predict"], "--save writes the training step, not --program=predict"),
  ],
)
def test_mistakes_are_told(run, flags, words):
  status, out, err = run("plan", *flags)
  assert (status, out, err.count("\n")) == (2, "", 1) and words in err
