"""What plans say, against what can be counted by hand and what the compiler says itself."""

import json
import math
import os
import subprocess
import sys

import jax
import ml_collections
import pytest

from configs import digits
import main
import vit_jax_ext as vx
from vit_jax_ext.plan.compile import compile_program
from vit_jax_ext.plan.hlo import Program
from vit_jax_ext.plan.kinds import open_target
from vit_jax_ext.plan.report import plan
from vit_jax_ext.training.experiment import Experiment


@pytest.fixture
def config():
  """A ViT of two blocks."""
  config = digits.get_config("vit")
  config.model.overrides.update(depth=2)
  config.ema_decay = 0.0
  return config


def planned(config, devices="cpu:8", program="train", **mesh):
  config.mesh.update(mesh)
  result = plan(config, open_target(devices), 10, config.batch_size, program)
  bytes_of = {}
  for row in result["collectives"]:
    bytes_of[row["kind"]] = bytes_of.get(row["kind"], 0) + row["bytes"]
  return result, bytes_of


def sent(result):
  return sum(row["sent_near"] + row["sent_far"] for row in result["collectives"])


def test_data_parallel_reduces_each_gradient_once_and_nothing_else(config):
  result, bytes_of = planned(config, data=8, fsdp=1, model=1)
  loss_and_top1 = 8
  assert bytes_of == {"all-reduce": 4 * result["parameters"] + loss_and_top1}
  assert result["least_sent"] == {"parameters": 0, "gradients": 2 * 7 / 8 * 4 * result["parameters"]}
  assert sent(result) == pytest.approx(result["least_sent"]["gradients"], rel=1e-3)
  memory = result["memory"]
  # Weights, two moments; three counters of steps.
  assert memory["parameters"] == 4 * result["parameters"]
  assert memory["optimizer"] == 8 * result["parameters"] + 12
  assert memory["averages"] == 0 and memory["batch"] == 8 * (24 * 24 * 3 + 4)
  assert result["fits"] and memory["limit"] is None and result["time"] is None


def test_accumulation_reduces_in_every_part(config):
  config.optimizer.accumulation_steps = 4
  result, bytes_of = planned(config, data=8, fsdp=1, model=1)
  assert bytes_of["all-reduce"] == pytest.approx(4 * 4 * result["parameters"], rel=1e-3)


def test_fsdp_gathers_and_reduces_each_parameter_once(config):
  result, bytes_of = planned(config, data=1, fsdp=8, model=1)
  assert bytes_of == {
    "all-gather": 4 * result["parameters"],
    "all-reduce": pytest.approx(4 * result["parameters"], rel=0.01),  # the gradient's norm takes a few bytes an array
  }
  assert {row["axes"] for row in result["collectives"]} == {"fsdp"}
  assert result["memory"]["parameters"] == pytest.approx(4 * result["parameters"] / 8, rel=0.01)
  # bfloat16 would do, and a scatter for the sum.
  assert result["least_sent"]["parameters"] == pytest.approx(2 * 7 / 8 * result["parameters"], rel=0.01)
  assert result["least_sent"]["gradients"] == pytest.approx(4 * 7 / 8 * result["parameters"], rel=0.01)


def test_model_axis_exchanges_the_residual_stream_four_times_a_block(config):
  """After attention and MLP, forward and backward (Megatron-LM, section 3); at most the parameters besides."""
  result, bytes_of = planned(config, data=4, fsdp=1, model=2)
  residual_stream = 4 * 16 * 37 * 48  # bytes: float32, images of a device, tokens, channels
  parameters = 4 * result["parameters"]
  assert bytes_of.keys() == {"all-reduce", "all-gather"}
  assert 2 * 4 * residual_stream < bytes_of["all-reduce"] < 2 * 4 * residual_stream + parameters
  assert bytes_of["all-gather"] < parameters
  largest = max(row["largest"] for row in result["collectives"] if row["kind"] == "all-gather")
  assert largest < 4 * 48 * 145  # no activations


@pytest.mark.slow
@pytest.mark.parametrize("family", digits.VARIANTS)
def test_model_axis_leaves_only_parameters_to_gather(family):
  """In all families: parameters, and the gradients of packed qkv. Re-attention mixes the heads, so its maps travel."""
  config = digits.get_config(family)
  _, bytes_of = planned(config, data=8, fsdp=1, model=1)
  assert bytes_of.keys() == {"all-reduce"}
  result, bytes_of = planned(config, data=4, fsdp=1, model=2)
  assert bytes_of.keys() == {"all-reduce", "all-gather"}
  maps = 4 * 2 * 4 * 16 * 4 * 37 * 37 if family == "deepvit" else 0
  assert bytes_of["all-gather"] <= 1.5 * 4 * result["parameters"] + maps


@pytest.mark.parametrize("program", ["evaluate", "predict"])
def test_programs_without_gradients(config, program):
  result, bytes_of = planned(config, "cpu:2", program)
  assert result["memory"].keys().isdisjoint({"optimizer", "averages"})
  assert "gradients" not in result["least_sent"]
  # Sums over the images of both devices; each computes all predictions by itself.
  assert (bytes_of != {}) == (program == "evaluate")


@pytest.fixture(scope="module")
def tpu_plan():
  """A ViT of one block, as `plan` sees it on four chips, and what XLA says of the very program."""
  pytest.importorskip("libtpu")
  config = digits.get_config("vit")
  config.model.overrides.update(depth=1)
  target = open_target("v5e:2x2")
  experiment = Experiment(config, 10, 1437, devices=target.devices)
  with pytest.MonkeyPatch.context() as patch:
    compilation = compile_program(config, experiment)
    patch.setattr("vit_jax_ext.plan.report.compile_program", lambda *_: compilation)
    return plan(config, target, 10, 1437), compilation.compiled


def test_memory_is_what_the_tpu_compiler_says(tpu_plan):
  result, compiled = tpu_plan
  found, memory = compiled.memory_analysis(), result["memory"]
  assert memory["temporaries"] == found.temp_size_in_bytes
  assert memory["program"] == found.generated_code_size_in_bytes
  assert memory["results"] == found.output_size_in_bytes - found.alias_size_in_bytes
  arguments = [memory[name] for name in ("parameters", "optimizer", "averages", "batch", "padding")]
  assert sum(arguments) == found.argument_size_in_bytes and memory["padding"] > 0
  assert memory["total"] == sum(size for name, size in memory.items() if name not in ("total", "limit"))
  assert memory["limit"] == 16 * 2**30 and result["fits"]


def test_work_and_time_on_a_tpu(tpu_plan):
  result, compiled = tpu_plan
  work, time = result["work"], result["time"]
  assert work["flops"] == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)
  # Forward, and twice that backward: qkv and proj, both MLPs, both products of attention, patches, classifier. And one
  # product again, as attention's kernel keeps no maps.
  tokens, dim = 37, 48
  block = tokens * (4 * dim * dim + 4 * dim * dim) + 2 * tokens * tokens * dim
  patches = 36 * 48 * dim  # of which there is no gradient to the image
  assert work["matmul_flops"] == pytest.approx(
    16 * 2 * (3 * block + tokens * tokens * dim + 2 * patches + 3 * 10 * dim), rel=0.02
  )
  # All instructions are in one computation without loops.
  program = Program(compiled.as_text())
  assert work["estimated_cycles"] == sum(i.cycles or 0 for i in program.computations[program.entry].values())
  cycles = work["estimated_cycles"] + sum(row["cycles"] for row in work["counted"])
  assert time["computation"] == cycles / 1.5e9
  assert time["images_per_second"] == pytest.approx(4 * time["images_per_second_per_chip"])
  assert time["training_hours"] == pytest.approx(digits.get_config("vit").total_steps * time["step"] / 3600)


def test_collectives_and_places_on_a_tpu(tpu_plan):
  result, _ = tpu_plan
  (row,) = result["collectives"]
  loss_and_top1 = 8
  assert (row["kind"], row["axes"], row["reach"]) == ("all-reduce", "data", "in a slice")
  assert row["bytes"] == 4 * result["parameters"] + loss_and_top1
  lines, modules = ({row["where"] for row in result["dearest"][name]} for name in ("lines", "modules"))
  assert any(line.startswith("models/layers.py:") for line in lines)
  assert {"Attention/PackedQKV", "Mlp/Linear"} <= modules
  assert len(result["dearest"]["lines"]) == 10


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_an_answer(config, run):
  pytest.importorskip("libtpu")
  status, out, _ = run(
    "plan", "--config=configs/digits.py:vit", "--devices=v5e:2x2", "--config.batch_size=262144",
    "--config.model.overrides.depth=2",
  )  # fmt: skip
  assert status == 0
  assert "DOES NOT FIT" in out and "of 15.75 GiB" in out and "models/layers.py:" in out
  assert "fits: --config.optimizer.accumulation_steps=2" in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a100", "h100", "h200", "b200"])
def test_gpus(kind, config):
  pytest.importorskip("jax_cuda12_plugin")
  config.model.overrides.update(depth=1)
  result = plan(config, open_target(f"{kind}:2x4"), 10, 1437)
  assert result["fits"] and result["chips"] == 8
  tokens, dim = 37, 48
  block = tokens * (4 * dim * dim + 4 * dim * dim) + 2 * tokens * tokens * dim
  expected = 8 * 2 * (3 * block + 2 * 36 * 48 * dim + 3 * 10 * dim)
  assert result["work"]["matmul_flops"] == pytest.approx(expected, rel=0.02)
  (row,) = (row for row in result["collectives"] if row["bytes"] > 1000)
  assert (row["kind"], row["axes"], row["reach"]) == ("all-reduce", "data", "between hosts")
  # The published speed of neither arithmetic nor memory is exceeded.
  time = result["time"]
  assert time["step"] >= max(time["computation"], time["memory"]) > 0 and 0 < time["share_of_peak"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "tokens", "overrides"),
  [
    ("deit_tiny_patch16_224", [197], dict(depth=2)),
    ("crossvit_15_dagger_224", [401, 197], dict(depth=((1, 1),))),
    ("swin_tiny", [49], dict(depths=(2, 2), num_heads=(3, 6))),
  ],
)
def test_gpus_have_no_maps_in_float32(name, tokens, overrides, config):
  """None where cuDNN keeps them on the chip; where there is a bias they are in memory in half precision."""
  pytest.importorskip("jax_cuda12_plugin")
  config.model.update(name=name)
  config.model.overrides = ml_collections.ConfigDict(overrides | dict(dtype="bfloat16"))
  config.batch_size = 4
  experiment = Experiment(config, 10, 1437, devices=open_target("h100:1x1").devices)
  program = Program(compile_program(config, experiment).compiled.as_text())
  arrays = {array for instruction, _ in program.executed() for array in instruction.results}
  maps = [array for array in arrays if array.shape[-2:] in [(n, n) for n in tokens]]  # and gradients of biases
  found = {array.dtype for array in maps if math.prod(array.shape[:-2]) >= config.batch_size * 3}
  assert found == ({"bf16"} if name == "swin_tiny" else set())


@pytest.mark.slow
def test_parts_of_a_batch_are_as_much_work_as_all_at_once(config):
  """The loop over them counts as often as it turns."""
  pytest.importorskip("libtpu")
  target, work = open_target("v5e:2x2"), []
  for parts in (1, 4):
    config.optimizer.accumulation_steps = parts
    work.append(plan(config, target, 10, 1437)["work"])
  assert work[1]["matmul_flops"] == work[0]["matmul_flops"] and work[1]["unknown_loops"] == []
  assert work[1]["estimated_cycles"] > work[0]["estimated_cycles"]


@pytest.mark.slow
def test_slices_are_joined_by_the_network(config):
  pytest.importorskip("libtpu")
  config.batch_size = 64
  result = plan(config, open_target("v5e:2x2", slices=2), 10, 1437)
  assert result["mesh"]["data"] == 8
  between = [row for row in result["collectives"] if row["reach"] == "between slices"]
  assert {row["kind"] for row in between} == {"all-reduce"}
  # Each device exchanges a quarter, with padding, of the gradients that its slice has summed up.
  assert 4 * result["parameters"] / 4 <= sum(row["sent_far"] for row in between) < 4 * result["parameters"]


def test_a_mesh_that_does_not_fit_the_devices(config):
  with pytest.raises(vx.UserError, match="8 device"):
    planned(config, data=3)


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, NotImplementedError, ValueError])
def test_a_compiler_that_crashes_is_told_in_a_line(kind, run, monkeypatch):
  """Lowering raises Python's own errors where a platform does not take a program."""

  def crash(*_):
    raise kind("INTERNAL: Mosaic failed\nfor many reasons")

  monkeypatch.setattr("vit_jax_ext.plan.report.compile_program", crash)
  status, _, err = run("plan", "--config=configs/digits.py:vit", "--devices=cpu:2")
  assert (status, err.count("\n")) == (1, 1)
  assert "INTERNAL: Mosaic failed; reproduce" in err and "--config=configs/digits.py:vit --devices=cpu:2" in err


@pytest.mark.slow
def test_command_simulates_more_devices_than_there_are(tmp_path):
  command = [sys.executable, "main.py", "plan", "--devices=cpu:32", "--num-classes=10", f"--output={tmp_path}"]
  root = os.path.dirname(main.__file__)
  printed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
  result = json.loads((tmp_path / "plan.json").read_text())
  assert result["mesh"]["data"] == 32 != jax.device_count()
  assert "data=32 x fsdp=1 x model=1" in printed and "all-reduce" in printed
