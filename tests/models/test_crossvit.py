"""CrossViT, against the authors' outputs and the paper's Table 6."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext.compare.cost import TABLE_6, model_cost
from vit_jax_ext.models import crossvit

TINY = dict(image_size=24, patch_size=(4, 8), embed_dim=(16, 32), num_heads=(2, 4), depth=((1, 2),), mlp_ratio=(2, 2))


@pytest.fixture
def tiny(random_model):
  return lambda **kw: random_model("crossvit_tiny_224", **(TINY | dict(num_classes=7) | kw))


@jax.jit
def forward(model, x):
  return model(x)


def images(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("name", ["crossvit_tiny_224", "crossvit_9_dagger_224"])
def test_equals_the_authors_model(name, golden, x64):
  state_dict, x, logits = golden(name)
  model = nnx.eval_shape(lambda: vx.create_model(name, dtype="float64", param_dtype="float64", rngs=nnx.Rngs(0)))
  report = vx.load_pretrained(model, state_dict)
  assert sorted(report.loaded) == sorted(state_dict)
  ours, _ = jax.jit(lambda model, x: model(x))(model, x)
  assert np.abs(np.asarray(ours) - logits).max() < 1e-6


@pytest.mark.parametrize("fusion", TABLE_6)
def test_table_6(fusion):
  _, published_adds, published_params = TABLE_6[fusion]
  params, adds = model_cost("crossvit_small_224", fusion=fusion)
  assert abs(params / (published_params * 1e6) - 1) < 0.02
  assert abs(adds / (published_adds * 1e9) - 1) < 0.03


@pytest.mark.parametrize("size", [(240, 224), (408, 384), (384, 352), (120, 112)])
def test_branch_sizes(size):
  image, large = size
  assert crossvit.branch_sizes((image, 240), (12, 16)) == [(image, 240), (large, 224)]


@pytest.mark.parametrize("fusion", crossvit.FUSIONS)
def test_intermediates(fusion, tiny):
  logits, out = forward(tiny(fusion=fusion, image_size=(24, 32)), images(2, 24, 32, 3))
  assert logits.shape == (2, 7)
  heads, dims, tokens = (2, 4), (16, 32), (1 + 6 * 8, 1 + 3 * 4)
  for b in (0, 1):
    for i in range((1, 2)[b]):
      attn = out[f"blocks.0.blocks.{b}.{i}.attn"]
      assert attn.shape == (2, heads[b], tokens[b], tokens[b])
      np.testing.assert_allclose(attn.sum(axis=-1), 1, atol=1e-5)
      assert out[f"blocks.0.blocks.{b}.{i}.cls_token"].shape == (2, dims[b])
    assert out[f"blocks.0.cls_token.{b}"].shape == (2, dims[b])
    if fusion == "cross_attention":
      assert out[f"blocks.0.fusion.{b}.attn"].shape == (2, heads[1 - b], 1, tokens[1 - b])
  if fusion == "all_attention":
    assert out["blocks.0.fusion.attn"].shape == (2, 4, sum(tokens), sum(tokens))
  np.testing.assert_allclose((out["logits.0"] + out["logits.1"]) / 2, logits, atol=1e-6)
  assert out["pre_logits.0"].shape == (2, 16)


def test_what_each_fusion_exchanges(tiny):
  """Class tokens change unless there is no fusion; patch tokens move with all-attention and pairwise fusion alone."""
  rng = np.random.default_rng(0)
  xs = [jnp.asarray(rng.standard_normal((1, n, c)), jnp.float32) for n, c in ((37, 16), (10, 32))]
  for fusion in crossvit.FUSIONS:
    fused, _ = jax.jit(lambda model, xs: model.blocks[0].fuse(xs, None))(tiny(fusion=fusion), xs)
    for x, y in zip(xs, fused, strict=True):
      assert y.shape == x.shape
      assert np.array_equal(x[:, 0], y[:, 0]) == (fusion == "none")
      assert np.array_equal(x[:, 1:], y[:, 1:]) == (fusion in ("none", "class_token", "cross_attention"))


def test_cross_attention_costs_grow_linearly_with_tokens():
  """A further token costs a key, a value, one attention weight and one use of it: 2 d^2 + 2 d multiply-adds."""

  def fusion_cost(size):
    kw = TINY | dict(image_size=size)
    return model_cost("crossvit_tiny_224", **kw)[1] - model_cost("crossvit_tiny_224", fusion="none", **kw)[1]

  def tokens(size, branch):
    patch = TINY["patch_size"]
    return np.prod(crossvit.branch_sizes((size, size), patch)[branch]) // patch[branch] ** 2

  for size in (96, 192):
    further = [tokens(size, branch) - tokens(48, branch) for branch in (0, 1)]
    expected = sum(n * (2 * d**2 + 2 * d) for n, d in zip(further, TINY["embed_dim"], strict=True))
    assert fusion_cost(size) - fusion_cost(48) == expected


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_one_query_needs_no_keys_and_values_of_all_tokens(rate, x64):
  """Values, maps and gradients are those of attention that has them, also with dropout of weights."""
  kw = dict(dtype=jnp.float64, param_dtype=jnp.float64)
  graphdef, params = nnx.split(crossvit.CrossAttention(24, 3, rate, 0.0, rngs=nnx.Rngs(0), **kw))
  leaves, tree = jax.tree.flatten(params)
  x, dy, dmaps, *leaves = (
    jnp.asarray(np.random.default_rng(0).standard_normal(shape))
    for shape in ((2, 11, 24), (2, 1, 24), (2, 3, 1, 11), *(leaf.shape for leaf in leaves))
  )

  def values(implementation):
    def call(leaves, x):
      module = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
      module.implementation = implementation
      return module(x, nnx.Rngs(1))

    y, back = jax.vjp(call, leaves, x)
    return y, back((dy, dmaps))

  for a, b in zip(*(jax.tree.leaves(values(name)) for name in ("auto", "reference")), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_no_heads_gives_pooled_features(tiny):
  features, out = forward(tiny(num_classes=0), images(2, 24, 24, 3))
  np.testing.assert_array_equal(features, jnp.concatenate([out["pre_logits.0"], out["pre_logits.1"]], axis=-1))


def loss_and_grad(model, x, key=None):
  graphdef, params = nnx.split(model)

  def loss(params):
    logits, _ = nnx.merge(graphdef, params)(x, train=True, rngs=key if key is None else nnx.Rngs(key))
    return jnp.mean(logits**2)

  return jax.jit(jax.value_and_grad(loss))(params)


def test_bfloat16_is_finite_forward_and_backward(tiny):
  model = tiny(dtype=jnp.bfloat16, drop_path_rate=0.1, drop_rate=0.1, attn_drop_rate=0.1)
  logits, out = jax.eval_shape(forward, model, images(2, 24, 24, 3))
  assert logits.dtype == jnp.float32
  assert out["blocks.0.blocks.0.0.attn"].dtype == jnp.float32
  assert {value.dtype for value in out.values()} == {jnp.dtype("float32")}  # the stream as it is
  loss, grads = loss_and_grad(model, images(2, 24, 24, 3), jax.random.key(0))
  assert all(g.dtype == jnp.float32 and bool(jnp.isfinite(g).all()) for g in jax.tree.leaves((loss, grads)))


def test_bfloat16_parameters(tiny):
  model = tiny(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  _, grads = loss_and_grad(model, images(2, 24, 24, 3))
  assert all(g.dtype == jnp.bfloat16 and bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_remat_keeps_the_gradients(tiny):
  """Dropout included: the second pass draws what the first one drew."""
  kw = dict(drop_path_rate=0.5, attn_drop_rate=0.2)
  x, key = images(4, 24, 24, 3), jax.random.key(0)
  plain, remat = (loss_and_grad(tiny(remat=remat, **kw), x, key) for remat in (False, True))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_drop_rates_need_randomness_and_act_in_training_alone(tiny):
  model, x = tiny(drop_path_rate=0.5), images(4, 24, 24, 3)
  np.testing.assert_array_equal(forward(model, x)[0], forward(tiny(), x)[0])
  train = jax.jit(lambda model, key: model(x, train=True, rngs=nnx.Rngs(key))[0])
  first, again, other = (train(model, jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)
  with pytest.raises(vx.UserError, match="rngs"):
    model(x, train=True)


def test_drop_path_rates_are_the_authors(tiny):
  """One ramp over the total depth; it goes on from stage to stage and both branches of a stage share its values."""
  model = tiny(depth=((1, 3), (1, 2)), drop_path_rate=0.4)
  rates = [[[block.drop_path.rate for block in branch] for branch in stage.blocks] for stage in model.blocks]
  np.testing.assert_allclose(rates[0][1] + rates[1][1], np.linspace(0, 0.4, 5))
  assert (rates[0][0], rates[1][0]) == ([rates[0][1][0]], [rates[1][1][0]])
  assert [fusion.drop_path.rate for fusion in model.blocks[0].fusion] == [rates[0][1][-1]] * 2
