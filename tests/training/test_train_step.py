"""One training step: what it computes, on one device and on eight."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.steps import make_step
import vit_jax_ext as vx
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.training import losses, mixup, optimizer, sharding, train_step

NORMALIZATION = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
AUGMENT = functools.partial(mixup.augment, num_classes=10, mixup=0.8, cutmix=1.0, mixing_batch=4, erasing=0.5)


def create_model(**kw):
  tiny = dict(image_size=8, patch_size=(2, 4), embed_dim=(8, 16), num_heads=(2, 2), depth=((1, 1),), mlp_ratio=(1, 1))
  return vx.create_model("crossvit_tiny_224", num_classes=10, rngs=nnx.Rngs(0), **(tiny | kw))


def adamw(learning_rate=1e-3, clip_norm=1.0, no_decay=()):
  return optimizer.adamw(
    optax.constant_schedule(learning_rate), weight_decay=0.05, no_decay=no_decay, clip_norm=clip_norm
  )


def batch(size=16, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8),
    "label": rng.integers(0, 10, size).astype(np.int32),
  }


def make(model_options=None, tx=None, **kw):
  """Returns (state, jitted step) of a tiny CrossViT."""
  tx = tx or adamw()

  def create():
    return create_model(**(model_options or {}))

  graphdef, _, _ = split_model(nnx.eval_shape(create))
  state = jax.jit(lambda: train_step.init_state(create, tx, kw.get("ema_decay", 0) > 0))()
  return state, jax.jit(make_step(graphdef, tx, **NORMALIZATION, **kw))


def assert_close(a, b, **kw):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


def test_loss_falls_on_one_batch_in_bfloat16_without_recompilation():
  state, step = make(dict(dtype="bfloat16", attn_drop_rate=0.1), adamw(3e-3), label_smoothing=0.1, ema_decay=0.9)
  first = None
  for _ in range(40):
    state, metrics = step(state, batch())
    first = first if first is not None else float(metrics["loss"])
  assert float(metrics["loss"]) < 0.7 * first
  assert step._cache_size() == 1
  assert {p.dtype for p in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
  assert int(state.step) == 40


def test_gradient_and_metrics_equal_a_direct_computation():
  """Loss, hits and gradient norm from the definitions; the update from optax applied by hand."""
  tx = optax.sgd(0.1)
  state, step = make(tx=tx, label_smoothing=0.1)
  data = batch()
  new, metrics = step(state, data)
  graphdef, _, _ = split_model(nnx.eval_shape(create_model))
  images = (data["image"] / 255 - np.array(NORMALIZATION["mean"])) / np.array(NORMALIZATION["std"])

  def loss(params):
    logits, _ = nnx.merge(graphdef, params, {})(jnp.asarray(images, jnp.float32))
    targets = 0.9 * jnp.eye(10)[data["label"]] + 0.01
    log_probabilities = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    return -jnp.mean(jnp.sum(targets * log_probabilities, axis=-1)), logits

  (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  np.testing.assert_allclose(metrics["top1"], np.mean(np.argmax(logits, -1) == data["label"]))
  norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  assert_close(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads), atol=1e-6)


def test_accumulated_parts_equal_the_whole_batch():
  tx = optax.sgd(0.1)  # Adam would blow rounding errors of tiny gradients up to the learning rate
  state, whole = make(tx=tx)
  _, parts = make(tx=tx, accumulation_steps=4)
  (a, a_metrics), (b, b_metrics) = whole(state, batch()), parts(state, batch())
  assert_close(a.params, b.params, atol=1e-6)
  for name in ("loss", "top1", "grad_norm"):
    np.testing.assert_allclose(a_metrics[name], b_metrics[name], rtol=1e-5)


def test_ema_is_the_recursion():
  state, step = make(ema_decay=0.9)
  expected = state.params
  for seed in range(3):
    state, _ = step(state, batch(seed=seed))
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, state.params)
  assert_close(state.ema["params"], expected, rtol=1e-6, atol=1e-7)


def test_randomness_depends_on_seed_and_step_alone():
  state, step = make(dict(attn_drop_rate=0.5))
  first, again = (step(state, batch())[1]["loss"] for _ in range(2))
  assert first == again
  later = dataclasses.replace(state, step=state.step + 1)
  assert step(later, batch())[1]["loss"] != first


class LinearModel(nnx.Module):
  """Compiles in no time."""

  def __init__(self):
    self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (8 * 8 * 3, 10)) / 20)

  def __call__(self, images, train, rngs=None):
    return images.reshape(len(images), -1) @ self.kernel[...], {}


def make_linear(**kw):
  """Returns (state, jitted step) of LinearModel."""
  graphdef, _, _ = split_model(LinearModel())
  state = train_step.init_state(LinearModel, optax.sgd(0.1), False)
  return state, jax.jit(make_step(graphdef, optax.sgd(0.1), **NORMALIZATION, **kw))


def test_loss_of_augmented_images_equals_numpy():
  """Normalised, then augmented; smoothed after mixing; a hit is the class with the largest share."""
  data, seen = batch(), []
  shares = np.random.default_rng(1).dirichlet(np.full(10, 0.2), 16).astype(np.float32)

  def augment(key, images, labels):
    seen.append((images.shape, images.dtype, labels.dtype))
    return -images, jnp.asarray(shares)

  state, step = make_linear(label_smoothing=0.1, augment=augment)
  _, metrics = step(state, data)
  assert seen[0] == ((16, 8, 8, 3), jnp.float32, jnp.int32)
  images = (data["image"] / 255 - np.array(NORMALIZATION["mean"])) / np.array(NORMALIZATION["std"])
  logits = -images.reshape(16, -1) @ np.asarray(state.params["kernel"], np.float64)
  log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  targets = 0.9 * shares + 0.01
  np.testing.assert_allclose(metrics["loss"], -np.mean(np.sum(targets * log_probabilities, -1)), rtol=1e-5)
  np.testing.assert_allclose(metrics["top1"], np.mean(logits.argmax(-1) == shares.argmax(-1)))


def test_parts_and_steps_are_augmented_differently_and_repeatably():
  keys = []

  def augment(key, images, labels):
    jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
    return images, labels

  state, step = make_linear(augment=augment, accumulation_steps=4)
  for _ in range(2):
    after, _ = step(state, batch())
    jax.effects_barrier()
  step(after, batch())
  jax.effects_barrier()
  first, again, second = (sorted(keys[i : i + 4]) for i in (0, 4, 8))
  assert first == again
  assert len({*first, *second}) == 8


def test_augmented_training_never_recompiles_or_waits_for_the_host():
  state, step = make_linear(augment=AUGMENT)
  state, _ = step(state, jax.device_put(batch()))
  batches = [jax.device_put(batch(seed=seed)) for seed in range(3)]
  with jax.transfer_guard("disallow"):
    for data in batches:
      state, metrics = step(state, data)
  assert step._cache_size() == 1
  assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("shape", [dict(data=8, fsdp=1, model=1), dict(data=2, fsdp=4, model=1)])
def test_eight_devices_compute_the_same(shape):
  """Data-parallel training equals one device; float64 leaves nothing to rounding."""
  with jax.enable_x64(True):
    state, step = make(dict(dtype="float64", param_dtype="float64", attn_drop_rate=0.3), ema_decay=0.9)
    mesh = sharding.make_mesh(shape)
    everywhere, by_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    sharded = jax.jit(step, in_shardings=(everywhere, by_batch), out_shardings=everywhere)
    alone = together = state
    for seed in range(3):
      alone, a = step(alone, batch(seed=seed))
      together, b = sharded(jax.device_put(together, everywhere), jax.device_put(batch(seed=seed), by_batch))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    assert_close(alone.params, together.params, atol=1e-9)


def test_weight_decay_mask():
  params = {
    "kernel": np.zeros((2, 2)),
    "bias": np.zeros(2),
    "pos_embed": {0: np.zeros((1, 3, 2))},
    "scale": np.zeros(2),
  }
  assert optimizer.decay_mask(params, ()) == {"kernel": True, "bias": False, "pos_embed": {0: True}, "scale": False}
  assert optimizer.decay_mask(params, ("pos_embed",))["pos_embed"] == {0: False}


def test_schedule():
  schedule = optimizer.learning_rate_schedule(peak=1.0, initial=0.1, floor=0.2, warmup_steps=10, total_steps=110)
  steps = np.array([0, 5, 10, 60, 110, 200])
  np.testing.assert_allclose([schedule(s) for s in steps], [0.1, 0.55, 1.0, 0.6, 0.2, 0.2], rtol=1e-6)


def timm_cosine(t, peak, initial, floor, warmup, total):
  """What timm's CosineLRScheduler gives at time t (steps or epochs) with the defaults of the papers' scripts."""
  if t < warmup:
    return initial + t * (peak - initial) / warmup
  return floor + 0.5 * (peak - floor) * (1 + np.cos(np.pi * t / total)) if t < total else floor


def test_schedule_per_step_is_timms():
  """BOAT on Swin: 20 epochs of warm-up, in steps."""
  rates = dict(peak=1e-3, initial=1e-6, floor=1e-5)
  schedule = optimizer.learning_rate_schedule(**rates, warmup_steps=200, total_steps=3000, warmup_prefix=False)
  steps = np.arange(0, 3100, 7)
  np.testing.assert_allclose(
    schedule(steps), [timm_cosine(t, **rates, warmup=200, total=3000) for t in steps], rtol=1e-5
  )


def test_schedule_per_epoch_is_timms():
  """CSWin: 300 epochs, 20 of them warm-up, and 10 of cool-down; 625.57 steps are no whole epoch."""
  rates, steps_per_epoch = dict(peak=2e-3, initial=1e-6, floor=1e-5), 1_281_167 / 2048
  first_steps = [round(epoch * steps_per_epoch) for epoch in range(311)]
  schedule = optimizer.learning_rate_schedule(
    **rates, warmup_steps=first_steps[20], total_steps=first_steps[310], warmup_prefix=False,
    cooldown_steps=round(10 * steps_per_epoch), steps_per_epoch=steps_per_epoch,
  )  # fmt: skip
  expected = np.array([timm_cosine(epoch, **rates, warmup=20, total=300) for epoch in range(310)])
  firsts, lasts = np.array(first_steps[:-1]), np.array(first_steps[1:]) - 1
  # An epoch begins at the nearest whole step: up to half a step of 626 off.
  np.testing.assert_allclose(jax.vmap(schedule)(firsts), expected, rtol=1e-3)
  np.testing.assert_array_equal(jax.vmap(schedule)(lasts), jax.vmap(schedule)(firsts))


def test_clipping_comes_before_adam():
  params, grads = {"kernel": jnp.zeros((10, 10))}, {"kernel": jnp.full((10, 10), 3.0)}

  def update(clip_norm, grads):
    tx = adamw(clip_norm=clip_norm)
    state = tx.init(params)
    _, state = tx.update(grads, state, params)
    return tx.update({"kernel": jnp.ones((10, 10)) / 100}, state, params)[0]

  # Adam forgets the scale of one gradient but not the ratio of two.
  assert_close(update(1.0, grads), update(None, {"kernel": jnp.full((10, 10), 0.1)}), rtol=1e-6)


def test_warm_up_must_end():
  with pytest.raises(vx.UserError, match=r"warmup_steps 10 .* 10 steps"):
    optimizer.learning_rate_schedule(peak=1.0, initial=0.1, floor=0.2, warmup_steps=10, total_steps=10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_numpy(smoothing):
  rng = np.random.default_rng(0)
  logits, labels = rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
  targets = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
  expected = -np.sum(targets * np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)), axis=-1)
  ours = losses.smoothed_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), smoothing)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("shape", "sizes"),
  [(dict(data=-1, fsdp=1, model=1), (8, 1)), (dict(data=2, fsdp=-1, model=2), (2, 2, 2)),
   (dict(data=1, fsdp=8, model=1), (1, 2, 2, 2, 1))],
)  # fmt: skip
def test_mesh(shape, sizes):
  mesh = sharding.make_mesh(shape)
  assert tuple(mesh.shape.values()) == sizes
  assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize("shape", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
def test_impossible_meshes_are_refused(shape):
  with pytest.raises(vx.UserError, match="8 device"):
    sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))


def test_indivisible_batches_are_refused():
  mesh = sharding.make_mesh(dict(data=8, fsdp=1, model=1))
  with pytest.raises(vx.UserError, match=r"batch_size 100 does not divide by 16 .* 96 and 112"):
    sharding.check_batch_size("batch_size", 100, mesh, multiple_of=2)
