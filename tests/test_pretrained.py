"""Weights into models and out again: strict both ways, resized as torch does it, bitwise back."""

import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

import vit_jax_ext as vx
from vit_jax_ext.models.crossvit import CrossViT
from vit_jax_ext.workdir import description

DEPTH = ((1, 1),)  # one multi-scale block, so that creating the model is quick


@pytest.fixture(scope="module")
def state_dict(golden):
  """The part of the authors' state dict that a model of that depth has."""
  whole, _, _ = golden("crossvit_tiny_224")
  absent = ("blocks.1", "blocks.2", *(f"blocks.0.blocks.1.{i}" for i in (1, 2, 3)))
  return {key: value for key, value in whole.items() if not key.startswith(absent)}


@pytest.fixture(scope="module")
def model():
  return vx.create_model("crossvit_tiny_224", depth=DEPTH, rngs=nnx.Rngs(0))


def abstract(name, **kw):
  return nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0), **kw))


def snapshot(model):
  return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat))))


def random_state_dict(name, **kw):
  """Returns a state dict of a model's shapes, made of a file that `save_pretrained` wrote."""
  return {
    key: np.random.default_rng(0).normal(size=shape).astype(np.float32) for key, shape in torch_shapes(name, **kw)
  }


def torch_shapes(name, **kw):
  for path, variable in nnx.to_flat_state(nnx.state(abstract(name, **kw), (nnx.Param, nnx.BatchStat))):
    *parents, leaf = map(str, path)
    shape = variable.shape
    if leaf == "kernel":
      shape = shape[::-1] if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    yield ".".join([*parents, names.get(leaf, leaf)]), shape


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (lambda d: d.pop("norm.0.bias"), ["1 missing: norm.0.bias"]),
    (lambda d: d.update(extra=np.zeros(3, np.float32)), ["does not have: extra"]),
    (lambda d: d.update(index=np.zeros(3, np.int64)), ["does not have: index"]),
    (lambda d: d.update({"norm.0.bias": np.zeros(7, np.float32)}), ["norm.0.bias", "(7,)", "(96,)"]),
    (lambda d: d.update({"norm.0.bias": np.full(96, np.nan, np.float32)}), ["norm.0.bias", "not finite"]),
    (lambda d: d.update({"norm.0.bias": np.zeros(96, np.int32)}), ["norm.0.bias", "int32"]),
    (lambda d: (d.pop("norm.1.bias"), d.update(extra=np.zeros(3, np.float32))), ["norm.1.bias", "extra"]),
    (lambda d: d.update({"head.0.weight": np.zeros((9, 7), np.float32)}), ["head.0.weight", "(9, 7)", "(1000, 96)"]),
    (lambda d: d.update({"pos_embed.0": np.zeros((1, 42, 96), np.float32)}), ["pos_embed.0", "(1, 42, 96)"]),
  ],
)
def test_misfits_are_named_and_change_nothing(model, state_dict, damage, words):
  before, damaged = snapshot(model), dict(state_dict)
  damage(damaged)
  with pytest.raises(vx.UserError) as error:
    vx.load_pretrained(model, damaged)
  assert "\n" not in str(error.value)
  assert all(word in str(error.value) for word in ["crossvit_tiny_224", *words])
  jax.tree.map(np.testing.assert_array_equal, before, snapshot(model))


def test_wrong_variant_is_one_short_line(model, golden):
  with pytest.raises(vx.UserError) as error:
    vx.load_pretrained(model, golden("crossvit_9_dagger_224")[0])
  assert "more" in str(error.value)
  assert len(str(error.value)) < 1500


def test_timm_names_and_buffers(model, state_dict):
  renamed = {
    key.replace(".", "_") if key.startswith(("pos_embed", "cls_token")) else key: value
    for key, value in state_dict.items()
  }
  report = vx.load_pretrained(model, renamed | {"num_batches_tracked": np.int64(3)})
  assert report.unused == ["num_batches_tracked"]
  assert sorted(report.loaded) == sorted(state_dict)
  np.testing.assert_array_equal(model.pos_embed[1][...], state_dict["pos_embed.1"])
  np.testing.assert_array_equal(model.head[0].kernel[...], state_dict["head.0.weight"].T)


def test_timm_swin_keeps_the_merging_in_the_next_stage():
  kw = dict(depths=(1, 1, 1), num_heads=(1, 1, 1), embed_dim=8, image_size=32, window_size=2, num_classes=3)
  authors = random_state_dict("swin_tiny", **kw)
  timm = {
    key.replace("layers.1.downsample", "layers.2.downsample")
    .replace("layers.0.downsample", "layers.1.downsample")
    .replace("head.", "head.fc."): value
    for key, value in authors.items()
  }
  assert "layers.2.downsample.norm.bias" in timm
  ours, theirs = abstract("swin_tiny", **kw), abstract("swin_tiny", **kw)
  vx.load_pretrained(ours, authors)
  vx.load_pretrained(theirs, timm)
  jax.tree.map(np.testing.assert_array_equal, snapshot(ours), snapshot(theirs))


def test_abstract_models_are_filled_in_their_param_dtype(state_dict):
  model = abstract("crossvit_tiny_224", depth=DEPTH, param_dtype="bfloat16")
  vx.load_pretrained(model, state_dict)
  params = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert all(isinstance(p, jax.Array) and p.dtype == jnp.bfloat16 for p in params)


def test_arrays_stay_on_the_devices_of_the_model(state_dict):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  model = abstract("crossvit_tiny_224", depth=DEPTH)
  state = jax.tree.map(lambda p: jax.device_put(np.zeros(p.shape, p.dtype), everywhere), nnx.state(model, nnx.Param))
  nnx.update(model, state)
  vx.load_pretrained(model, state_dict)
  assert all(p.sharding == everywhere for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def torch_bicubic(rows, side, grid):
  tensor = torch.from_numpy(rows).reshape(1, side, side, -1).permute(0, 3, 1, 2)
  resized = torch.nn.functional.interpolate(tensor, size=grid, mode="bicubic", align_corners=False)
  return resized.permute(0, 2, 3, 1).reshape(-1, rows.shape[-1]).numpy()


def test_another_size_and_number_of_classes(state_dict):
  model = vx.create_model("crossvit_tiny_224", depth=DEPTH, image_size=(384, 288), num_classes=5, rngs=nnx.Rngs(0))
  head = snapshot(model)["head"]
  report = vx.load_pretrained(model, state_dict)
  assert sorted(report.resized) == ["pos_embed.0", "pos_embed.1"]
  assert sorted(report.reinitialized) == ["head.0.bias", "head.0.weight", "head.1.bias", "head.1.weight"]
  assert not report.unused
  assert "2 resized: pos_embed.0, pos_embed.1" in str(report)
  jax.tree.map(np.testing.assert_array_equal, snapshot(model)["head"], head)
  for branch, side, grid in ((0, 20, (32, 24)), (1, 14, (22, 17))):
    source, ours = state_dict[f"pos_embed.{branch}"], np.asarray(model.pos_embed[branch][...])
    np.testing.assert_array_equal(ours[:, 0], source[:, 0])
    np.testing.assert_allclose(ours[0, 1:], torch_bicubic(source[0, 1:], side, grid), rtol=0, atol=1e-5)
  with pytest.raises(vx.UserError, match=r"head\.0\.bias has shape"):
    vx.load_pretrained(model, state_dict, keep_classifier=True)


def test_relative_position_tables_are_resized():
  kw = dict(depths=(2,), num_heads=(3,), embed_dim=12, num_classes=3)
  source = random_state_dict("swin_tiny", image_size=28, window_size=7, **kw)
  model = abstract("swin_tiny", image_size=(48, 20), window_size=12, **kw)  # windows of 12 x 5
  report = vx.load_pretrained(model, source)
  name = "layers.0.blocks.1.attn.relative_position_bias_table"
  assert name in report.resized
  assert len(report.resized) == 2
  table = model.layers[0].blocks[1].attn.relative_position_bias_table[...]
  height, width = model.layers[0].blocks[1].attn.window
  assert table.shape == ((2 * height - 1) * (2 * width - 1), 3)
  expected = torch_bicubic(source[name], 13, (2 * height - 1, 2 * width - 1))
  np.testing.assert_allclose(table, expected, rtol=0, atol=1e-5)


def test_a_model_without_classifier_leaves_it(state_dict):
  report = vx.load_pretrained(abstract("crossvit_tiny_224", depth=DEPTH, num_classes=0), state_dict)
  assert sorted(report.unused) == ["head.0.bias", "head.0.weight", "head.1.bias", "head.1.weight"]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_round_trip_is_bitwise(tmp_path, suffix):
  """DeepViT has BatchNorm, bfloat16 is the dtype that NumPy lacks."""
  kw = dict(image_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=4, num_classes=3)
  source = random_state_dict("deepvit_16b", **kw)
  model, again = abstract("deepvit_16b", **kw), abstract("deepvit_16b", **kw)
  vx.load_pretrained(model, source)
  path = tmp_path / f"x.{suffix}"
  vx.save_pretrained(model, path)
  if suffix == "pth":
    saved = {key: value.numpy() for key, value in torch.load(path, weights_only=True)["model"].items()}
  else:
    saved = safetensors.numpy.load_file(path)
  for key, array in source.items():
    np.testing.assert_array_equal(saved.pop(key), array)
  assert set(saved) == {f"blocks.{i}.attn.var_norm.num_batches_tracked" for i in range(2)}
  report = vx.load_pretrained(again, path)
  assert set(report.loaded) == set(source)
  jax.tree.map(np.testing.assert_array_equal, snapshot(model), snapshot(again))


def test_bfloat16_round_trip(tmp_path, state_dict):
  model = abstract("crossvit_tiny_224", depth=DEPTH, param_dtype="bfloat16")
  vx.load_pretrained(model, state_dict)
  for name in ("x.safetensors", "x.pth"):
    vx.save_pretrained(model, tmp_path / name)
    again = abstract("crossvit_tiny_224", depth=DEPTH, param_dtype="bfloat16")
    vx.load_pretrained(again, tmp_path / name)
    jax.tree.map(np.testing.assert_array_equal, snapshot(model), snapshot(again))


@pytest.mark.parametrize(("name", "words"), [("x.bin", "x.bin"), ("there.pth", "overwritten"), ("no/x.pth", "no")])
def test_save_refuses(model, tmp_path, name, words):
  (tmp_path / "there.pth").write_text("mine")
  with pytest.raises(vx.UserError, match=words):
    vx.save_pretrained(model, tmp_path / name)
  assert (tmp_path / "there.pth").read_text() == "mine"


@pytest.mark.parametrize("source", [3, None, "/no/such/file.pth"])
def test_bad_sources(model, source):
  with pytest.raises(vx.UserError):
    vx.load_pretrained(model, source)


def test_nothing_was_published():
  with pytest.raises(vx.UserError, match="no weights were published for deepvit_16b"):
    vx.load_pretrained(abstract("deepvit_16b"), True)


def test_memory_and_time_of_a_large_file(tmp_path):
  """105 M parameters: below 3 times the file in memory, and 3 times torch.load in time, each in fresh processes."""
  path = str(tmp_path / "x.pth")
  torch.save({"model": {key: torch.randn(shape) for key, shape in torch_shapes("crossvit_base_224")}}, path)
  code = r"""
import os, re, sys, time, psutil, torch
from flax import nnx
import vit_jax_ext as vx
_, what, path = sys.argv
model = nnx.eval_shape(lambda: vx.create_model("crossvit_base_224", rngs=nnx.Rngs(0)))
load = vx.load_pretrained  # imports what it needs
before, start = psutil.Process().memory_info().rss, time.perf_counter()
load(model, path) if what == "ours" else torch.load(path, weights_only=True)
seconds = time.perf_counter() - start
# ru_maxrss would begin at that of the process which started this one.
peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
print((peak - before) / os.path.getsize(path), seconds)
"""
  measured = {"ours": [], "theirs": []}
  for what in ("theirs", "ours") * 4:  # the least of four, for other tests run beside it
    result = subprocess.run([sys.executable, "-c", code, what, path], capture_output=True, text=True, check=True)
    measured[what].append(tuple(map(float, result.stdout.split())))
  memory = max(memory for memory, _ in measured["ours"])
  ours, theirs = (min(seconds for _, seconds in measured[what]) for what in ("ours", "theirs"))
  print(f"memory {memory:.2f} of the file, time {ours / theirs:.2f} of torch.load")
  assert memory < 3
  assert ours / theirs < 3


def test_a_class_without_a_registered_name(state_dict):
  model = nnx.eval_shape(
    lambda: CrossViT(
      embed_dim=(96, 192), num_heads=(3, 3), depth=DEPTH, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32
    )
  )
  assert len(vx.load_pretrained(model, state_dict).loaded) == len(state_dict)
  with pytest.raises(vx.UserError, match="CrossViT"):
    vx.load_pretrained(model, {})


def test_windows_that_would_be_shrunk_are_refused(tmp_path):
  """Weights of window 12 at 384 pixels in a model of window 7."""
  small = dict(image_size=96, depths=(1, 1), num_heads=(1, 1), embed_dim=8, num_classes=3)

  def create(window_size):
    return vx.create_model("swin_base", window_size=window_size, rngs=nnx.Rngs(0), **small)

  vx.save_pretrained(create(12), tmp_path / "x.safetensors")
  with pytest.raises(vx.UserError, match="create it with window_size=12"):
    vx.load_pretrained(create(6), tmp_path / "x.safetensors")
  assert not vx.load_pretrained(create(12), tmp_path / "x.safetensors").resized


def test_shapes_are_told_as_the_authors_have_them(tmp_path):
  """(out, in), not ours."""
  small = dict(image_size=32, depth=1, num_heads=2, num_classes=3, rngs=nnx.Rngs(0))
  vx.save_pretrained(vx.create_model("vit_16b", embed_dim=8, **small), tmp_path / "x.safetensors")
  with pytest.raises(vx.UserError, match=r"fc1.weight has shape \(24, 8\) instead of \(48, 16\)"):
    vx.load_pretrained(vx.create_model("vit_16b", embed_dim=16, **small), tmp_path / "x.safetensors")


def test_weights_of_ours_tell_the_shape_of_their_grid(tmp_path):
  """64 patches of 16x4 are none of 8x8; files of others are square."""
  kw = dict(patch_size=(4, 8), embed_dim=(8, 16), num_heads=(2, 2), depth=((1, 1),), mlp_ratio=(1, 1))
  source = vx.create_model("crossvit_tiny_224", num_classes=3, rngs=nnx.Rngs(0), image_size=(64, 16), **kw)
  assert source.grids == ((16, 4), (7, 2))
  about = description.describe({"name": "crossvit_tiny_224", "overrides": {"image_size": (64, 16)} | kw}, 3, None, None)
  vx.save_pretrained(source, tmp_path / "ours.safetensors", about)
  model = abstract("crossvit_tiny_224", num_classes=3, image_size=(96, 48), **kw)
  assert sorted(vx.load_pretrained(model, tmp_path / "ours.safetensors").resized) == ["pos_embed.0", "pos_embed.1"]
  for branch, (of_source, of_model) in enumerate(zip(source.grids, model.grids, strict=True)):
    rows = np.asarray(source.pos_embed[branch][0, 1:])
    tensor = torch.from_numpy(rows).reshape(1, *of_source, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(tensor, size=of_model, mode="bicubic", align_corners=False)
    expected = expected.permute(0, 2, 3, 1).reshape(-1, rows.shape[-1])
    np.testing.assert_allclose(model.pos_embed[branch][0, 1:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [None, "64", [64], [64, 0], [64, "16"], {}])
def test_a_size_that_is_none_is_not_believed(size, tmp_path):
  model = vx.create_model("vit_16b", num_classes=3, rngs=nnx.Rngs(0), image_size=8, patch_size=4, embed_dim=8,
                          num_heads=2, depth=1)  # fmt: skip
  vx.save_pretrained(model, tmp_path / "x.safetensors", {"image_size": size})
  larger = abstract("vit_16b", num_classes=3, image_size=16, patch_size=4, embed_dim=8, num_heads=2, depth=1)
  assert vx.load_pretrained(larger, tmp_path / "x.safetensors").resized == ["pos_embed"]
