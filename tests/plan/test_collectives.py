"""Bytes that a training step moves, against what can be counted by hand."""

import json
import os
import subprocess
import sys

import jax
import pytest

from configs import digits
import main
import vit_jax_ext as vx
from vit_jax_ext.plan.collectives import Collective, collectives, measure, simulate_devices

# A loop of 3 rounds with a loop of 5 in it; a branch; types of 1, 2, 4 and 8 bytes.
PROGRAM = """HloModule example, is_scheduled=true

FileNames
1 "all-reduce(.py"

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%inner (x: f32[4]) -> f32[4] {
  ROOT %all-gather.1 = bf16[8,4]{1,0} all-gather(%x), dimensions={0}, metadata={op_name="a = b all-reduce"}
}

%condition (x: f32[4]) -> pred[] {
  ROOT %less = pred[] compare(%x, %y), direction=LT
}

%outer (x: f32[4]) -> f32[4] {
  %while.1 = (s32[], s8[]) while(%x), condition=%condition, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %all-to-all.1 = (pred[3]{0}, f64[2]{0}, /*index=2*/s8[]) all-to-all(%x), dimensions={0}
}

%branch (x: f32[4]) -> f32[4] {
  ROOT %collective-permute.1 = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %all-reduce.1 = f32[10,10]{1,0} all-reduce(%x), to_apply=%sum, replica_groups={{0,1}}
  %while.2 = f32[4]{0} while(%x), condition=%condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %conditional.1 = f32[4]{0} conditional(%x), branch_computations={%branch, %branch}
  ROOT %done = f32[4]{0} add(%x, %all-reduce.1)
}
"""


def test_collectives_of_loops_and_branches():
  assert sorted(collectives(PROGRAM), key=lambda c: c.kind) == [
    Collective("all-gather", 64, 15),
    Collective("all-reduce", 400, 1),
    Collective("all-to-all", 20, 3),
    Collective("collective-permute", 16, 1),
    Collective("collective-permute", 16, 1),
  ]
  with pytest.raises(ValueError, match=r"all-gather\.1"):
    collectives(PROGRAM.replace('"n":"5"', '"n":"?"'))


@pytest.fixture
def config():
  """A ViT of two blocks."""
  config = digits.get_config("vit")
  config.model.overrides.update(depth=2)
  config.ema_decay = 0.0
  return config


def moved(config, **mesh):
  config.mesh.update(mesh)
  result = measure(config, 10)
  return result, {kind: row["bytes"] for kind, row in result["collectives"].items()}


def test_data_parallel_reduces_each_gradient_once_and_nothing_else(config):
  result, by_kind = moved(config, data=8, fsdp=1, model=1)
  loss_and_top1 = 8
  assert by_kind == {"all-reduce": 4 * result["parameters"] + loss_and_top1}
  assert result["device"]["state"] == 12 * result["parameters"] + 12  # weights, two moments; three counters of steps
  assert result["device"]["batch"] == 8 * (24 * 24 * 3 + 4)


def test_accumulation_reduces_in_every_part(config):
  config.optimizer.accumulation_steps = 4
  result, by_kind = moved(config, data=8, fsdp=1, model=1)
  assert by_kind["all-reduce"] == pytest.approx(4 * 4 * result["parameters"], rel=1e-3)


def test_fsdp_gathers_and_reduces_each_parameter_once(config):
  result, by_kind = moved(config, data=1, fsdp=8, model=1)
  assert by_kind == {
    "all-gather": 4 * result["parameters"],
    "all-reduce": pytest.approx(4 * result["parameters"], rel=0.01),  # the gradient's norm takes a few bytes an array
  }
  assert result["device"]["state"] == pytest.approx(12 * result["parameters"] / 8, rel=0.01)


def test_model_axis_exchanges_the_residual_stream_four_times_a_block(config):
  """After attention and MLP, forward and backward (Megatron-LM, section 3); at most the parameters besides."""
  result, by_kind = moved(config, data=4, fsdp=1, model=2)
  residual_stream = 4 * 16 * 37 * 48  # bytes: float32, images of a device, tokens, channels
  parameters = 4 * result["parameters"]
  assert by_kind.keys() == {"all-reduce", "all-gather"}
  assert 2 * 4 * residual_stream < by_kind["all-reduce"] < 2 * 4 * residual_stream + parameters
  assert by_kind["all-gather"] < parameters
  assert result["collectives"]["all-gather"]["largest"] < 4 * 48 * 145  # no activations


@pytest.mark.slow
@pytest.mark.parametrize("family", digits.VARIANTS)
def test_model_axis_leaves_only_parameters_to_gather(family):
  """In all families: parameters, and the gradients of packed qkv. Re-attention mixes the heads, so its maps travel."""
  config = digits.get_config(family)
  _, by_kind = moved(config, data=8, fsdp=1, model=1)
  assert by_kind.keys() == {"all-reduce"}
  result, by_kind = moved(config, data=4, fsdp=1, model=2)
  assert by_kind.keys() == {"all-reduce", "all-gather"}
  maps = 4 * 2 * 4 * 16 * 4 * 37 * 37 if family == "deepvit" else 0
  assert by_kind["all-gather"] <= 1.5 * 4 * result["parameters"] + maps


def test_a_mesh_left_open_is_refused(config):
  with pytest.raises(vx.UserError, match="data"):
    simulate_devices(config.mesh)


@pytest.mark.slow
def test_command_simulates_more_devices_than_there_are(tmp_path):
  command = [
    sys.executable,
    "main.py",
    "collectives",
    "--config.mesh.data=32",
    "--num-classes=10",
    f"--output={tmp_path}",
  ]
  root = os.path.dirname(main.__file__)
  printed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
  result = json.loads((tmp_path / "collectives.json").read_text())
  assert result["mesh"]["data"] == 32 != jax.device_count()
  assert "data=32 x fsdp=1 x model=1" in printed and "all-reduce" in printed
