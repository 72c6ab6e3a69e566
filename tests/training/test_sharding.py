"""A model split over eight devices: what is computed stays the same, what each device keeps and sends is less."""

import math

import jax
import numpy as np
import optax
import pytest

from configs import digits
from tests.training.five_steps import five_steps, relative
import vit_jax_ext as vx
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.plan.kinds import open_target
from vit_jax_ext.training import sharding
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.training.partition import Layout
from vit_jax_ext.training.train import train
from vit_jax_ext.training.train_step import TrainState
from vit_jax_ext.workdir import checkpoint

MESHES = {
  "data8": dict(data=8, fsdp=1, model=1),
  "fsdp8": dict(data=1, fsdp=8, model=1),
  "data4_model2": dict(data=4, fsdp=1, model=2),
  "data2_fsdp2_model2": dict(data=2, fsdp=2, model=2),
}
TINY = {
  "deepvit": dict(image_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2),
  "crossvit": dict(image_size=8, patch_size=(2, 4), embed_dim=(9, 16), num_heads=(3, 2), depth=((1, 1),)),
}


def relative_of_each_array(ours, others):
  """Root mean square difference of the worst array, relative to its own root mean square or 1e-3, and its name."""

  def difference(path, a, b):
    rms = np.sqrt(np.mean(np.float64(a) ** 2))
    return np.sqrt(np.mean((np.float64(a) - b) ** 2)) / max(rms, 1e-3), jax.tree_util.keystr(path)

  pairs = jax.tree.map_with_path(difference, ours, others)
  return max(jax.tree.leaves(pairs, is_leaf=lambda x: isinstance(x, tuple)))


def check_agreement(family, meshes, dtype="float32", **overrides):
  overrides |= dict(dtype=dtype, param_dtype=dtype)
  alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
  first, losses, state = five_steps(family, alone, **overrides)
  for name in meshes:
    other_first, other_losses, other_state = five_steps(family, sharding.make_mesh(MESHES[name]), **overrides)
    jax.tree.map(np.testing.assert_array_equal, first, other_first)
    loss = np.max(np.abs(np.divide(other_losses, losses) - 1))
    params, worst = relative(state["params"], other_state["params"]), relative_of_each_array(state, other_state)
    print(f"{family:10} {dtype} {name:18} loss {loss:.1e} params {params:.1e} worst array {worst[0]:.1e} {worst[1]}")
    assert loss < 1e-5 and params < 1e-5
    assert relative(state["ema"], other_state["ema"]) < 1e-5
    if state["stats"]:
      assert relative(state["stats"], other_state["stats"]) < 1e-5
    if dtype == "float64":  # in float32 rounding reaches 1e-3 in single arrays, on whatever mesh
      assert worst[0] < 1e-9


@pytest.mark.parametrize("family", ["deepvit", pytest.param("crossvit", marks=pytest.mark.slow)])
def test_tiny_models_train_the_same_on_one_device_and_on_eight(family, x64):
  """With BatchNorm; with widths and heads of which two devices divide one."""
  check_agreement(family, ["data2_fsdp2_model2"], "float64", **TINY[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["crossvit", "deepvit", "swin", "cswin", "vit"])
def test_all_families_train_the_same_on_every_mesh(family):
  check_agreement(family, MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("family", digits.VARIANTS)
def test_all_families_train_the_same_on_every_mesh_in_float64(family, x64):
  """BOAT agrees in this precision alone: near-ties of its clustering flip in float32."""
  check_agreement(family, MESHES, "float64")


def share_of_largest_device(model, devices=8):
  """Bytes of parameters and Adam's moments on one device of fsdp=8, relative to an equal share."""
  layout = Layout(model, sharding.make_mesh(MESHES["fsdp8"]))
  _, params, _ = split_model(model)
  state = jax.eval_shape(lambda params: (params, optax.adam(1e-3).init(params)), params)
  here = jax.tree.map(lambda x, place: math.prod(place.shard_shape(x.shape)), state, layout.shardings(state))
  return sum(jax.tree.leaves(here)) * devices / sum(x.size for x in jax.tree.leaves(state))


@pytest.mark.parametrize("family", digits.VARIANTS)
def test_each_of_eight_devices_keeps_an_eighth_of_small_models(family):
  name, overrides = digits.VARIANTS[family]
  spec = dict(name=name, overrides={"image_size": 24} | overrides)
  assert 1 <= share_of_largest_device(registry.abstract_model(spec, 10)) <= 1.1


@pytest.mark.parametrize(
  "name",
  [
    name if name in ("crossvit_18_dagger_224", "deepvit_l") else pytest.param(name, marks=pytest.mark.slow)
    for name in vx.list_models()
  ],
)
def test_each_of_eight_devices_keeps_an_eighth_of_published_models(name):
  """DeepViT-L among them, none of whose widths divides by eight."""
  share = share_of_largest_device(registry.abstract_model(dict(name=name, overrides={}), 1000))
  print(f"{name}: {share:.4f}")
  assert 1 <= share <= 1.1


def test_state_is_created_where_it_lies():
  """No device ever holds more of the initial state than its part, and the parts fit together to the same numbers."""
  config = digits.get_config("vit")
  config.mesh.update(MESHES["fsdp8"])
  split = Experiment(config, 10, 1000)
  config.mesh.update(MESHES["data8"])
  whole = Experiment(config, 10, 1000)
  compiled = split.init.func.lower(*split.init.args).compile()
  assert not any(kind in compiled.as_text() for kind in ("all-gather(", "all-reduce(", "all-to-all("))
  state = split.init()
  total = sum(x.nbytes for x in jax.tree.leaves(state))
  memory = compiled.memory_analysis()
  assert memory.output_size_in_bytes < total / 8 * 1.1
  assert memory.temp_size_in_bytes < total / 8 * 1.1
  jax.tree.map(np.testing.assert_array_equal, state, whole.init())
  for x in jax.tree.leaves(state.params):
    assert max(shard.data.nbytes for shard in x.addressable_shards) <= math.ceil(x.nbytes / 8) or x.size % 8


def test_what_the_mesh_does_not_divide_is_named_in_one_line():
  model = registry.abstract_model(dict(name="crossvit_18_dagger_224", overrides={}), 1000)
  remarks = Layout(model, sharding.make_mesh(MESHES["data4_model2"])).remarks()
  assert "\n" not in remarks
  assert "model=2" in remarks and "blocks.0.blocks.0.0.attn (7 heads)" in remarks and "mlp" not in remarks
  assert Layout(model, sharding.make_mesh(MESHES["data8"])).remarks() == ""
  model = registry.abstract_model(dict(name="deepvit_16b", overrides=dict(depth=1)), 1000)
  remarks = Layout(model, sharding.make_mesh(MESHES["fsdp8"])).remarks()
  assert "blocks.0.attn.reatten_matrix.bias" in remarks and "heads" not in remarks


@pytest.mark.parametrize(
  ("devices", "slices", "fsdp", "model"),
  [
    ("v5e:4x4", 1, 1, 4),
    ("v5e:4x4", 1, 2, 2),
    ("v5p:4x4x8", 1, 2, 1),  # no subset of 4, 4, 8 multiplies to 2
    ("v5p:4x4x8", 1, 16, 4),
    ("v6e:16x16", 1, 64, 1),
    ("v5e:4x4", 2, 4, 4),
    ("v5p:2x2x2", 3, 8, 1),
  ],
)
def test_meshes_of_pods(devices, slices, fsdp, model):
  """Whatever divides the devices is a mesh; the model axis stays in a host, fsdp in a slice."""
  pytest.importorskip("libtpu")
  devices = open_target(devices, slices).devices
  grid = sharding.make_mesh(dict(data=-1, fsdp=fsdp, model=model), devices).devices
  assert {device.id for device in grid.flat} == {device.id for device in devices}
  assert all(len({device.process_index for device in group}) == 1 for group in grid.reshape(-1, model))
  assert all(len({getattr(d, "slice_index", 0) for d in group}) == 1 for group in grid.reshape(-1, fsdp * model))
  with pytest.raises(vx.UserError, match="model=8 reaches over hosts of 4 devices; choose a divisor"):
    sharding.make_mesh(dict(data=-1, fsdp=1, model=8), devices)


def test_a_checkpoint_is_read_on_another_mesh_bit_for_bit(tiny_config, tmp_path):
  tiny_config.mesh.update(MESHES["data2_fsdp2_model2"])
  state = Experiment(tiny_config, 10, 1000).init()
  with checkpoint.open_checkpoints(str(tmp_path)) as checkpoints:
    checkpoint.save(checkpoints, 1, state.checkpoint_items(), None)
  tiny_config.mesh.update(MESHES["fsdp8"])
  there = Experiment(tiny_config, 10, 1000)
  like = checkpoint.abstract(jax.eval_shape(there.init), there.places)
  restored = TrainState.from_checkpoint(checkpoint.restore(str(tmp_path), 1, like.checkpoint_items()))
  jax.tree.map(np.testing.assert_array_equal, state, restored)
  jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim) or pytest.fail(), restored, there.places)


@pytest.mark.slow
def test_training_continues_on_another_mesh(tiny_config, tmp_path, monkeypatch):
  """Stopped after step 4 on data=2 x fsdp=2 x model=2, continued on fsdp=8: ends as on data=8, but for rounding."""
  results = train(tiny_config, str(tmp_path / "whole"))
  meshes = (MESHES["data2_fsdp2_model2"], MESHES["fsdp8"])
  for mesh, last_step in zip(meshes, (4, 6), strict=True):
    tiny_config.mesh.update(mesh)

    def stop(self, step, last_step=last_step):
      if step == last_step + 1:
        raise KeyboardInterrupt

    monkeypatch.setattr("vit_jax_ext.training.train.Progress.step", stop)
    try:
      again = train(tiny_config, str(tmp_path / "parts"))
    except KeyboardInterrupt:
      assert last_step == 4
  assert again.keys() == results.keys()
  for name, value in results.items():
    np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=3 / 360 if "top" in name else 1e-3)
