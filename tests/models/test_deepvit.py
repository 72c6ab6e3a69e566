"""DeepViT: re-attention against its definition, batch statistics, remat, bad input."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext.models.deepvit import ReAttention
from vit_jax_ext.models.layers import Attention

SMALL = dict(image_size=32, num_classes=5, embed_dim=24, depth=3, num_heads=3)
KW = dict(dtype=jnp.float32, param_dtype=jnp.float32)


@jax.jit
def forward(model, x):
  return model(x)


def images(batch=4):
  return jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))


def reattention(norm, dtype=jnp.float32, **options):
  options = {"reatten_scale": 1.0} | options
  return ReAttention(24, 3, 0.0, 0.0, norm=norm, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), **options)


def set_identity(module):
  module.reatten_matrix.kernel[...] = jnp.eye(3)[None, None]
  module.reatten_matrix.bias[...] = jnp.zeros(3)


def test_identity_mixing_without_norm_is_plain_attention():
  module, plain = reattention("none"), Attention(24, 3, rngs=nnx.Rngs(0), **KW)
  set_identity(module)
  plain.qkv, plain.proj = module.qkv, module.proj
  x = jax.random.normal(jax.random.key(0), (2, 7, 24))
  for ours, theirs in zip(module(x), plain(x), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_reattention_equals_a_torch_transcription(train):
  torch = pytest.importorskip("torch")
  with jax.enable_x64(True):
    module = reattention("batch", jnp.float64, reatten_scale=None)
    state = nnx.state(module)
    rng = np.random.default_rng(0)
    nnx.update(module, jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.1, 1, a.shape), a.dtype), state))
    x = rng.standard_normal((2, 7, 24))

    def tensor(param):
      return torch.from_numpy(np.array(param[...], np.float64))

    conv, norm = torch.nn.Conv2d(3, 3, 1).double(), torch.nn.BatchNorm2d(3).double().train(train)
    with torch.no_grad():
      conv.weight.copy_(tensor(module.reatten_matrix.kernel).permute(3, 2, 0, 1))
      conv.bias.copy_(tensor(module.reatten_matrix.bias))
      norm.weight.copy_(tensor(module.var_norm.scale))
      norm.bias.copy_(tensor(module.var_norm.bias))
      norm.running_mean.copy_(tensor(module.var_norm.mean))
      norm.running_var.copy_(tensor(module.var_norm.var))
      qkv = torch.from_numpy(x) @ tensor(module.qkv.kernel) + tensor(module.qkv.bias)
      q, k, v = qkv.reshape(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
      attn = norm(conv((q @ k.mT * 8**-0.5).softmax(-1))) * 8**-0.5
      y = (attn @ v).transpose(1, 2).reshape(2, 7, 24)
      y = y @ tensor(module.proj.kernel) + tensor(module.proj.bias)
    ours, our_attn = module(x, train=train)
    np.testing.assert_allclose(our_attn, attn, atol=1e-6)
    np.testing.assert_allclose(ours, y, atol=1e-6)
    np.testing.assert_allclose(module.var_norm.mean[...], norm.running_mean, atol=1e-6)
    # torch's running variance is the unbiased one: a share of 1 / (2 * 7 * 7) of 0.1 of a small variance.
    np.testing.assert_allclose(module.var_norm.var[...], norm.running_var, rtol=1e-3)


def test_layer_norm_is_over_the_heads():
  _, attn = reattention("layer")(jax.random.normal(jax.random.key(0), (2, 7, 24)))
  np.testing.assert_allclose(attn.mean(1), 0, atol=1e-5)


def test_training_uses_and_updates_the_batch_statistics(random_model):
  model = random_model("deepvit_s", **SMALL, reattention_blocks=(1, 2))
  before = nnx.clone(nnx.state(model, nnx.BatchStat))
  norms = {path[:-1] for path in nnx.to_flat_state(before).paths}
  assert norms == {("patch_embed", "bn1"), ("patch_embed", "bn2")} | {("blocks", i, "attn", "var_norm") for i in (1, 2)}
  evaluated = forward(model, images())[0]
  jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.BatchStat))
  trained, _ = model(images(), train=True)
  assert jnp.any(trained != evaluated)
  for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model, nnx.BatchStat)), strict=True):
    assert jnp.any(old != new)
  conv1 = model.patch_embed.conv1(images())
  np.testing.assert_allclose(model.patch_embed.bn1.mean[...], 0.1 * conv1.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_finite_and_statistics_float32(dtype):
  gradients, stats = loss_gradients(dtype, remat=True)
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
  assert all(jnp.isfinite(s).all() and s.dtype == jnp.float32 for s in jax.tree.leaves(stats))


@functools.cache
def loss_gradients(dtype, *, remat):
  """Returns the gradients and new statistics of one training step's forward and backward pass."""
  overrides = SMALL | {"reattention_blocks": (0, 2), "drop_path_rate": 0.2, "drop_rate": 0.1, "remat": remat}
  param_dtype = jnp.promote_types(dtype, jnp.float32)
  model = vx.create_model("deepvit_l", rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype, **overrides)
  graphdef, *state = nnx.split(model, nnx.Param, nnx.BatchStat)

  @jax.jit
  def gradients(params, stats):
    def loss(params):
      model = nnx.merge(graphdef, params, stats)
      logits, _ = model(images(), train=True, rngs=nnx.Rngs(3))
      return jnp.sum(logits**2), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return jax.grad(loss, has_aux=True)(params)

  return gradients(*map(nnx.to_pure_dict, state))


def test_remat_changes_neither_gradients_nor_statistics(x64):
  plain, rematerialised = (loss_gradients(jnp.float64, remat=remat) for remat in (False, True))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), plain, rematerialised)
  assert jnp.any(jax.tree.leaves(rematerialised[1])[0] != 0)


def test_scale_adjustment_one_half_sees_half_the_stream(random_model):
  model = random_model("deepvit_s", **SMALL, reattention_blocks=())
  block, x = model.blocks[0], jax.random.normal(jax.random.key(0), (1, 5, 24))
  y = x + block.attn(block.norm1(x / 2))[0] * 2
  np.testing.assert_allclose(block(x)[0], y + block.mlp(block.norm2(y / 2)) * 2, rtol=1e-5, atol=1e-6)


def test_width_expansion():
  overrides = SMALL | {"embed_dim": 48, "reattention_blocks": (2,)}
  model = nnx.eval_shape(lambda: vx.create_model("deepvit_s", rngs=nnx.Rngs(0), **overrides))
  assert model.blocks[2].attn.reatten_scale == 16**-0.5
  assert jax.eval_shape(forward, model, images(1))[0].shape == (1, 5)


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"reattention_norm": "group"}, "choose one of batch, layer, none"),
    ({"reattention_blocks": (3,)}, r"\(3,\) do not fit; the blocks are 0 to 2"),
    ({"conv_stem": True, "patch_size": 1}, "choose an even one"),
    ({"reattention": (1,)}, "has no option 'reattention'"),
  ],
)
def test_bad_overrides(overrides, message):
  with pytest.raises(vx.UserError, match=message):
    vx.create_model("deepvit_16b", rngs=nnx.Rngs(0), **SMALL | overrides)
