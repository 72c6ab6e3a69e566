"""DeepViT in training: BatchNorm statistics over devices, in averages, under remat, after a resume; cosine loss."""

import json

from flax import nnx
import jax
import numpy as np
import optax
import pytest

from configs import digits
from tests.training.steps import make_step
import vit_jax_ext as vx
from vit_jax_ext.console import Progress
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.training import sharding, train, train_step

TINY = dict(image_size=8, patch_size=2, embed_dim=8, depth=2, num_heads=2, mlp_ratio=1)


def make(name="deepvit_s", model_options=None, **kw):
  """Returns (state, jitted step) of a tiny model in float64; deepvit_s has every kind of BatchNorm."""
  tx = optax.sgd(0.1)
  options = TINY | dict(drop_path_rate=0.3, dtype="float64", param_dtype="float64") | (model_options or {})

  def create():
    return vx.create_model(name, num_classes=10, rngs=nnx.Rngs(0), **options)

  graphdef, _, _ = split_model(nnx.eval_shape(create))
  state = jax.jit(lambda: train_step.init_state(create, tx, kw.get("ema_decay", 0) > 0))()
  return state, jax.jit(make_step(graphdef, tx, mean=(0.5,) * 3, std=(0.5,) * 3, **kw))


def batch(seed=0):
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
  return {"image": image, "label": rng.integers(0, 10, 16).astype(np.int32)}


def assert_close(a, b, **kw):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


@pytest.mark.parametrize("shape", [dict(data=8, fsdp=1, model=1), dict(data=2, fsdp=4, model=1)])
def test_eight_devices_have_the_statistics_of_the_whole_batch(shape, x64):
  state, step = make(model_options=dict(reattention_blocks=(1,)), ema_decay=0.9)
  mesh = sharding.make_mesh(shape)
  everywhere, by_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  sharded = jax.jit(step, in_shardings=(everywhere, by_batch), out_shardings=everywhere)
  alone = together = state
  for seed in range(2):
    alone, a = step(alone, batch(seed))
    together, b = sharded(jax.device_put(together, everywhere), jax.device_put(batch(seed), by_batch))
  np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-10)
  assert_close(alone, together, atol=1e-10)
  assert len(jax.tree.leaves(alone.stats)) == 6  # mean and variance: twice in the stem, once in the second block
  for old, new in zip(jax.tree.leaves(state.stats), jax.tree.leaves(together.stats), strict=True):
    assert np.any(np.asarray(old) != np.asarray(new))


def test_averages_and_remat_keep_the_statistics(x64):
  options = dict(reattention_blocks=(1,))
  state, step = make(model_options=options, ema_decay=0.9)
  _, remat_step = make(model_options=options | dict(remat=True), ema_decay=0.9)
  new, _ = step(state, batch())
  assert_close(new, remat_step(state, batch())[0], atol=1e-10)
  first = jax.tree.map(lambda old, s: (s - 0.9 * old) / 0.1, state.stats, new.stats)
  assert_close(new.ema["stats"], first, atol=1e-12)  # not from a variance of 1
  later, _ = step(new, batch(1))
  second = jax.tree.map(lambda old, s: (s - 0.9 * old) / 0.1, new.stats, later.stats)
  assert_close(later.ema["stats"], jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, first, second), atol=1e-12)


def test_averaged_variances_are_those_of_the_maps(x64):
  """Those are tiny; the running averages need a hundred steps to forget the 1 they begin with. In float32 as in 64."""
  averaged = {}
  for dtype in ("float32", "float64"):
    state, step = make("deepvit_16b", dict(dtype=dtype, param_dtype=dtype, drop_path_rate=0.0), ema_decay=0.99)
    for seed in range(5):
      state, _ = step(state, batch(seed))
    averaged[dtype], running = (
      np.asarray(stats["blocks"][0]["attn"]["var_norm"]["var"]) for stats in (state.ema["stats"], state.stats)
    )
    assert np.all(averaged[dtype] < 1e-2) and np.all(running > 0.5)
  np.testing.assert_allclose(averaged["float32"], averaged["float64"], atol=1e-6)


def test_accumulated_parts_have_statistics_of_their_own(x64):
  """The averages take up those of the parts, of which the running ones have seen each."""
  state, step = make(model_options=dict(reattention_blocks=(1,)), ema_decay=0.9, accumulation_steps=2)
  new, _ = step(state, batch())
  expected = jax.tree.map(lambda old, s: (s - 0.81 * old) / 0.19, state.stats, new.stats)
  assert_close(new.ema["stats"], expected, atol=1e-12)


def test_cosine_regularizer_is_part_of_the_loss_and_of_the_update(x64):
  state, plain = make("vit_16b")
  _, regularized = make("vit_16b", cosine_weight=3.0, cosine_blocks=(0,))
  (a_state, a), (b_state, b) = plain(state, batch()), regularized(state, batch())
  assert "attention_cosine" not in a
  np.testing.assert_allclose(b["loss"], a["loss"] + 3 * b["attention_cosine"], rtol=1e-10)
  a_kernel, b_kernel = (s.params["blocks"][0]["attn"]["qkv"]["kernel"] for s in (a_state, b_state))
  assert np.any(np.asarray(a_kernel) != np.asarray(b_kernel))


@pytest.fixture
def deepvit_config(data_dir):
  config = digits.get_config("deepvit")
  config.dataset.data_dir = data_dir
  config.model.overrides.update(TINY)
  config.cosine_regularizer.weight = 0.1
  config.cosine_regularizer.blocks = (0,)
  config.batch_size = 64
  config.optimizer.warmup_steps = 1
  config.total_steps = 4
  config.log_every_steps = 1
  config.eval_every_steps = config.checkpoint.every_steps = 2
  return config


def final_checkpoint(config, workdir):
  """Returns all arrays of the last checkpoint."""
  import orbax.checkpoint as ocp

  with ocp.CheckpointManager(workdir / "checkpoints") as checkpoints:
    assert checkpoints.latest_step() == config.total_steps
    items = ("model", "ema", "optimizer")
    args = ocp.args.Composite(**dict.fromkeys(items, ocp.args.StandardRestore()))
    return dict(checkpoints.restore(config.total_steps, args=args))


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(deepvit_config, tmp_path, monkeypatch):
  results = train.train(deepvit_config, str(tmp_path / "whole"))

  def interrupt(self, step):
    if step == 4:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Progress, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.train(deepvit_config, str(tmp_path / "parts"))
  assert train.train(deepvit_config, str(tmp_path / "parts")) == results
  whole, parts = (final_checkpoint(deepvit_config, tmp_path / name) for name in ("whole", "parts"))
  assert jax.tree.leaves(whole["model"]["stats"])
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
  assert all(-1 <= line["train/attention_cosine"] <= 1 for line in lines if "train/loss" in line)


@pytest.mark.parametrize(
  "config, blocks, message",
  [("crossvit", "(0,)", "choose a ViT, DeiT or DeepViT"), ("vit", "(5,)", "cannot compare blocks 5 and 6"),
   ("vit", "()", "without blocks")],
)  # fmt: skip
def test_a_model_without_maps_is_refused_before_the_workdir_is_claimed(
  config, blocks, message, tmp_path, data_dir, run
):
  status, _, err = run(
    f"--config=configs/digits.py:{config}", f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}",
    "--config.cosine_regularizer.weight=0.1", f"--config.cosine_regularizer.blocks={blocks}",
  )  # fmt: skip
  assert status == 2 and message in err
  assert not (tmp_path / "run").exists()
