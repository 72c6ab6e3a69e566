"""Layer-wise decay and linear probing."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.steps import make_step
import vit_jax_ext as vx
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.training import optimizer
from vit_jax_ext.training.train_step import init_state

SMALL = {
  "vit_16b": dict(depth=3, embed_dim=12, num_heads=2),
  "deepvit_s": dict(depth=3, embed_dim=12, num_heads=2, reattention_blocks=(2,)),
  "swin_tiny": dict(depths=(1, 2), num_heads=(1, 1), embed_dim=8, image_size=56),
  "boat_cswin_tiny": dict(depth=(1, 2), num_heads=(2, 2), embed_dim=8, image_size=56, split_size=(1, 7)),
  "crossvit_tiny_224": dict(depth=((1, 2),), embed_dim=(8, 16), num_heads=(2, 2)),
}
# The layers of each, first to last, as a person would count them.
LAYERS = {
  "vit_16b": ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "head"],
  "deepvit_s": ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm"],
  "swin_tiny": [
    "patch_embed",
    "layers.0.blocks.0",
    "layers.0.downsample",
    "layers.1.blocks.0",
    "layers.1.blocks.1",
    "head",
  ],
  "boat_cswin_tiny": ["stage1_conv_embed", "stage1.0", "merge1", "stage2.0", "stage2.1", "norm"],
  "crossvit_tiny_224": ["pos_embed.1", "blocks.0.blocks.1.0", "blocks.0.blocks.1.1", "blocks.0.fusion.0", "head.1"],
}


def params_of(name):
  model = nnx.eval_shape(lambda: vx.create_model(name, num_classes=3, rngs=nnx.Rngs(0), **SMALL[name]))
  return split_model(model)[1]


@pytest.mark.parametrize("name", SMALL)
def test_layer_scales(name):
  scales = {
    ".".join(str(part.key) for part in path): scale
    for path, scale in jax.tree_util.tree_leaves_with_path(optimizer.layer_scales(params_of(name), 0.5))
  }
  layers = LAYERS[name]
  for i, layer in enumerate(layers):
    found = {scale for path, scale in scales.items() if path.startswith(layer + ".") or path == layer}
    assert found == {0.5 ** (len(layers) - 1 - i)}, layer
  assert min(scales.values()) == 0.5 ** (len(layers) - 1)


def test_layer_decay_scales_steps_and_weight_decay():
  params = jax.tree.map(lambda p: jnp.ones(p.shape), params_of("vit_16b"))
  grads = jax.tree.map(jnp.ones_like, params)
  options = dict(weight_decay=0.1, no_decay=(), clip_norm=None)
  plain = optimizer.adamw(optax.constant_schedule(0.1), **options)
  scaled = optimizer.adamw(optax.constant_schedule(0.1), layer_decay=0.5, **options)
  expected, _ = plain.update(grads, plain.init(params), params)
  found, _ = scaled.update(grads, scaled.init(params), params)
  scales = optimizer.layer_scales(params, 0.5)
  jax.tree.map(lambda e, f, s: np.testing.assert_allclose(f, e * s, rtol=1e-6), expected, found, scales)


def test_linear_probe_moves_the_classifier_alone():
  """Of a model with BatchNorm and stochastic depth, which then must not work as in training."""

  def create_model():
    options = SMALL["deepvit_s"] | dict(image_size=32, drop_path_rate=0.5)
    return vx.create_model("deepvit_s", num_classes=3, rngs=nnx.Rngs(0), **options)

  tx = optimizer.adamw(optax.constant_schedule(0.01), weight_decay=0.1, no_decay=(), clip_norm=1.0, linear_probe=True)
  state = init_state(create_model, tx, use_ema=False)
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  assert moments < 3 * (12 * 3 + 3) + 10
  graphdef, *_ = split_model(create_model())
  step = jax.jit(make_step(graphdef, tx, mean=(0.5,) * 3, std=(0.5,) * 3, linear_probe=True))
  rng = np.random.default_rng(0)
  batch = {"image": rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), "label": np.array([0, 1, 2, 0], np.int32)}
  new, metrics = step(state, batch)
  assert metrics["loss"] > step(new, batch)[1]["loss"]
  assert not np.array_equal(new.params["head"]["kernel"], state.params["head"]["kernel"])
  for before, after in ((state.params | {"head": 0}, new.params | {"head": 0}), (state.stats, new.stats)):
    jax.tree.map(np.testing.assert_array_equal, before, after)
  # The loss is that of the model in evaluation.
  logits, _ = create_model()(jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1, train=False)
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_linear_probe_computes_no_other_gradient():
  def create_model():
    return vx.create_model("vit_16b", num_classes=3, image_size=32, rngs=nnx.Rngs(0), **SMALL["vit_16b"])

  def flops(linear_probe):
    tx = optimizer.adamw(
      optax.constant_schedule(0.1), weight_decay=0.1, no_decay=(), clip_norm=None, linear_probe=linear_probe
    )
    graphdef, *_ = split_model(nnx.eval_shape(create_model))
    step = make_step(graphdef, tx, mean=(0.5,) * 3, std=(0.5,) * 3, linear_probe=linear_probe)
    state = jax.eval_shape(lambda: init_state(create_model, tx, False))
    batch = {"image": jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((4,), jnp.int32)}
    return jax.jit(step).lower(state, batch).compile().cost_analysis()["flops"]

  assert flops(True) < 0.5 * flops(False)
