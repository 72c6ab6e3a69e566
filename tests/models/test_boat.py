"""BOAT: the released code's logits, clustering against its definition, any size and batch, the ablations, bad input."""

import functools
import itertools

from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext.compare import cost
from vit_jax_ext.models import attention as attention_module
from vit_jax_ext.models import boat, fused_clustering, registry

# Two stages: at 224 pixels 3136 and 784 tokens.
SMALL = {
  "boat_swin_tiny": dict(embed_dim=8, depths=(2, 1), num_heads=(1, 2)),
  "boat_cswin_tiny": dict(embed_dim=8, depth=(1, 1), num_heads=(2, 2), split_size=(1, 2)),
}
# Two stages of 8x8 and 4x4 tokens, in clusters of 4.
TINY = {
  "boat_swin_tiny": dict(embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=4),
  "boat_cswin_tiny": dict(embed_dim=8, depth=(2, 1), num_heads=(2, 2), split_size=(2, 2)),
}
TINY = {name: dict(image_size=32, num_classes=5, cluster_size=4, overlap=2) | kw for name, kw in TINY.items()}
BOTH = pytest.mark.parametrize("name", SMALL)


@jax.jit
def forward(model, x):
  return model(x)


def images(batch, height=32, width=32):
  return jax.random.normal(jax.random.key(1), (batch, height, width, 3))


@BOTH
def test_logits_are_the_released_codes(name, check_golden):
  check_golden(name)


@functools.cache
def multiply_adds(name):
  return cost.model_cost(name)[1]


SIZES = [f"boat_{base}_{size}" for size in ("tiny", "small", "base") for base in ("swin", "cswin")]


@pytest.mark.parametrize("name", SIZES[:2] + [pytest.param(name, marks=pytest.mark.slow) for name in SIZES[2:]])
def test_multiply_adds_are_the_published(name):
  assert multiply_adds(name) / 1e9 == pytest.approx(registry.get_variant(name).multiply_adds, rel=0.02)


def test_nothing_is_computed_twice():
  assert multiply_adds("boat_swin_tiny") / multiply_adds("swin_tiny") == pytest.approx(5.2 / 4.5, rel=0.05)


@pytest.mark.slow
def test_nothing_is_computed_twice_in_the_compiled_program():
  """XLA's own count, which has elementwise work in it."""

  def flops(name):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0))))
    compiled = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)[0]).lower(state, images(1, 224, 224)).compile()
    return compiled.cost_analysis()["flops"]

  assert flops("boat_swin_tiny") / flops("swin_tiny") == pytest.approx(5.2 / 4.5, rel=0.05)


def normalise(x):
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def transcription(features, levels, iterations=2):
  """Balanced hierarchical clustering of (tokens, features), one group after another.

  Returns the order of the tokens, and the smallest difference between unequal ratios, by which they were ordered.
  """
  groups, least = [np.arange(len(features))], np.inf
  for _ in range(levels):
    halves = []
    for group in groups:
      x, middle = features[group], len(group) // 2
      centroids = normalise(np.stack([x[:middle].mean(0), x[middle:].mean(0)]))
      for _ in range(iterations):
        weights = np.exp(100 * normalise(x) @ centroids.T)
        weights /= weights.sum(1, keepdims=True)
        centroids = normalise(weights.T @ x)
      # Equal tokens have equal ratios, to the last bit.
      different, which = np.unique(x, axis=0, return_inverse=True)
      s = normalise(different) @ centroids.T
      ratio = (s[:, 0] + 1) / (s[:, 1] + 1)
      least = min([least, *np.diff(np.sort(ratio))])
      group = group[np.argsort(ratio[which], kind="stable")]
      halves += [group[:middle], group[middle:]]
    groups = halves
  return np.concatenate(groups), least


cluster = jax.jit(boat.balanced_clusters, static_argnums=(1, 2))


@pytest.mark.parametrize(("tokens", "levels", "iterations"), [(784, 4, 2), (140, 1, 2), (64, 6, 1), (96, 5, 0)])
def test_clustering_is_the_papers(tokens, levels, iterations):
  features = np.random.default_rng(tokens).standard_normal((2, 3, tokens, 16))
  with jax.enable_x64(True):
    order, clusters = cluster(features, levels, iterations)
  for index in np.ndindex(2, 3):
    expected, _ = transcription(features[index], levels, iterations)
    np.testing.assert_array_equal(order[index], expected)
    np.testing.assert_array_equal(clusters[index][expected], np.arange(tokens) // (tokens >> levels))


@settings(max_examples=50, deadline=None)
@given(
  kinds=hnp.arrays(np.int8, (2, 24), elements=st.integers(0, 9)),
  levels=st.integers(1, 3),
  seed=st.integers(0, 999),
)
def test_equal_tokens_keep_their_order(kinds, levels, seed):
  features = np.random.default_rng(seed).standard_normal((10, 4))[kinds]
  expected, least = zip(*(transcription(x, levels) for x in features), strict=True)
  assume(min(least) > 1e-9)  # else rounding decides
  with jax.enable_x64(True):
    order, _ = cluster(features, levels, 2)
  np.testing.assert_array_equal(order, expected)


@pytest.fixture
def interpreted():
  with pltpu.force_tpu_interpret_mode():
    yield


def side_by_side(x):
  """(B, heads, tokens, features) to (B, tokens, C)."""
  return jnp.asarray(x).swapaxes(1, 2).reshape(len(x), x.shape[2], -1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  ("heads", "tokens", "width", "levels", "iterations"), [(3, 48, 48, 3, 2), (5, 56, 8, 1, 1), (2, 40, 4, 2, 0)]
)
def test_clustering_by_kernels_is_the_same(heads, tokens, width, levels, iterations, dtype, interpreted, monkeypatch):
  monkeypatch.setattr(fused_clustering, "GROUPS", 2)  # the four of the last of three levels take two turns
  features = jnp.asarray(np.random.default_rng(0).standard_normal((2, heads, tokens, width)), dtype)
  features = features.at[0, 0, 3:6].set(features[0, 0, :3])  # equal tokens keep their order
  found = fused_clustering.cluster_order(side_by_side(features), heads, levels, iterations, boat.SHARPNESS)
  for index in np.ndindex(2, heads):
    expected, least = transcription(np.asarray(features[index], np.float64), levels, iterations)
    assert least > 3e-6  # else rounding decides
    order, place = (np.asarray(x[index]) for x in found)
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(order[place], np.arange(tokens))


@pytest.mark.parametrize(("heads", "tokens", "width"), [(3, 32, 48), (2, 8, 4)])
def test_permutations_and_their_gradients(heads, tokens, width):
  rng = np.random.default_rng(0)
  order = rng.permuted(np.broadcast_to(np.arange(tokens, dtype=np.int32), (2, heads, tokens)), axis=-1)
  place = np.argsort(order, axis=-1).astype(np.int32)
  x, g = rng.standard_normal((2, 2, 2, heads, tokens, width)).astype(np.float32)
  arrays, dy = ([side_by_side(a) for a in pair] for pair in (x, g))
  y, vjp = jax.vjp(lambda arrays: boat.permute(arrays, order, place), arrays)
  for found, a, index in ((y, x, order), (vjp(dy)[0], g, place)):
    expected = [side_by_side(np.take_along_axis(part, index[..., None], -2)) for part in a]
    np.testing.assert_array_equal(found, expected)


def test_tpu_has_two_sorts_for_all_levels_and_nothing_is_gathered():
  module = nnx.eval_shape(lambda: attention(dtype=jnp.bfloat16))
  step = jax.jit(jax.grad(lambda module, x: module(x)[0].astype(jnp.float32).sum()))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(attention_module, "platform", lambda: "tpu")
    traced = step.trace(module, jax.ShapeDtypeStruct((1, 24, 8), jnp.float32))
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("stablehlo.sort") == 2
  assert "gather" not in text
  assert "scatter" not in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=50, deadline=None)
@given(
  data=hnp.arrays(
    np.float32,
    (2, 24, 3),
    elements=st.sampled_from([0, 1, -1, 1e-30, 1e30]) | st.floats(-9, 9, width=32),
    fill=st.just(0),
  )
)
def test_clustering_is_a_permutation(dtype, data):
  order, clusters = cluster(jnp.asarray(data, dtype), 3, 2)
  np.testing.assert_array_equal(np.sort(order, -1), np.broadcast_to(np.arange(24), (2, 24)))
  np.testing.assert_array_equal([np.bincount(c, minlength=8) for c in clusters], 3)


def test_clustering_costs_the_same_for_each_token():
  costs = [
    cost.multiply_adds(lambda x: boat.balanced_clusters(x, 4), jax.ShapeDtypeStruct((n, 32), jnp.float32))
    for n in (256, 512, 1024)
  ]
  assert costs[1] / costs[0] == pytest.approx(2, rel=0.01)
  assert costs[2] / costs[1] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
  ("height", "width", "sizes"),
  [(224, 224, [49] * 4), (256, 256, [64] * 4), (384, 384, [72] * 4), (320, 448, [70] * 4), (480, 480, [225] * 4)],
)
def test_cluster_size_follows_from_the_tokens(height, width, sizes):
  tokens = [height * width // stride**2 for stride in (4, 8, 16, 32)]
  assert [n >> boat.cluster_levels(n) for n in tokens] == sizes


def attention(clustering="balanced", overlap=2, grid=(4, 6), dtype=jnp.float64):
  options = boat.BilateralOptions("both", clustering, overlap, 2, 3)
  kw = dict(dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
  module = boat.FeatureAttention(8, 2, grid, 0.5, options, **kw)
  # A kernel of one number in the middle: the position term is the value of the token itself.
  module.get_v.kernel[...] = jnp.zeros((3, 3, 1, 8)).at[1, 1].set(1.0)
  module.get_v.bias[...] = jnp.zeros(8)
  return module


def packed_qkv(module, x):
  """Queries, keys and values side by side, each head after head: (tokens, 3 * 8)."""
  return np.asarray(x) @ np.asarray(module.qkv.kernel[...]) + np.asarray(module.qkv.bias[...])


def expected_attention(module, x, groups):
  """FSLA from its definition; `groups` gives for each head pairs (queries, keys) of token indices."""
  q, k, v = (part.reshape(-1, 2, 4) for part in np.split(packed_qkv(module, x), 3, axis=-1))
  y = v.copy()
  for head in range(2):
    for queries, keys in groups[head]:
      logits = 0.5 * q[queries, head] @ k[keys, head].T
      weights = np.exp(logits - logits.max(1, keepdims=True))
      y[queries, head] += weights / weights.sum(1, keepdims=True) @ v[keys, head]
  return module.proj(y.reshape(len(x), 8))


@pytest.mark.parametrize("overlap", [0, 2, 99])
def test_feature_attention_is_its_definition(overlap):
  with jax.enable_x64(True):
    module = attention(overlap=overlap)
    x = jax.random.normal(jax.random.key(0), (1, 24, 8), jnp.float64)
    y, clusters = forward(module, x)
    q = packed_qkv(module, x[0])[:, :8].reshape(24, 2, 4)
    lent, groups = min(overlap, 3), []
    for head in range(2):
      order = transcription(q[:, head], 3)[0].reshape(4, 2, 3)
      groups.append([])
      for cluster, (first, second) in enumerate(order):
        np.testing.assert_array_equal(clusters[0, head][first], 2 * cluster)
        groups[head].append((first, np.concatenate([first, second[:lent]])))
        groups[head].append((second, np.concatenate([second, first[3 - lent :]])))
    np.testing.assert_allclose(y[0], expected_attention(module, x[0], groups), rtol=0, atol=1e-12)


def test_kmeans_attention_is_its_definition():
  with jax.enable_x64(True):
    module = attention("kmeans")
    x = jax.random.normal(jax.random.key(0), (1, 24, 8), jnp.float64)
    y, clusters = forward(module, x)
    members = [[np.flatnonzero(clusters[0, head] == c) for c in range(8)] for head in range(2)]
    assert len({len(m) for m in members[0]}) > 1
    groups = [[(m, m) for m in of_head if len(m)] for of_head in members]
    np.testing.assert_allclose(y[0], expected_attention(module, x[0], groups), rtol=0, atol=1e-12)
    grads = jax.jit(jax.grad(lambda x: (module(x)[0] ** 2).sum()))(x)
  assert np.isfinite(grads).all()


@BOTH
def test_output_does_not_depend_on_the_batch(name, random_model, x64):
  """In float64: a program for another batch rounds otherwise, which moves tokens between clusters in float32."""
  model = random_model(name, **TINY[name], dtype="float64", param_dtype="float64")
  batch = images(3).astype(jnp.float64)
  together, out = forward(model, batch)
  check_clusters(name, out)
  alone, _ = forward(model, batch[:1])
  np.testing.assert_allclose(alone[0], together[0], rtol=0, atol=1e-9)
  others, _ = forward(model, batch.at[1:].set(0))
  np.testing.assert_array_equal(others[0], together[0])


def check_clusters(name, out):
  clusters = {key: value for key, value in out.items() if key.endswith("clusters")}
  key = "layers.0.blocks.1.attnC.clusters" if name == "boat_swin_tiny" else "stage1.0.content_attn.clusters"
  assert list(clusters) == ([key] if name == "boat_swin_tiny" else [key, "stage2.0.content_attn.clusters"])
  assert jnp.issubdtype(clusters[key].dtype, jnp.integer)
  np.testing.assert_array_equal([np.bincount(c) for c in clusters[key][0]], np.full((2, 16), 4))
  assert out["stages.0"].shape == (3, 8, 8, 8)


@BOTH
@pytest.mark.parametrize("mode", ["image", "feature", "both"])
def test_ablations_of_local_attention(name, mode):
  model = nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0), **TINY[name], local_attention=mode))
  _, out = jax.eval_shape(lambda model, x: model(x), model, images(2))
  count = sum(key.endswith("clusters") for key in out)
  assert count == {"image": 0, "feature": 3, "both": 1 if name == "boat_swin_tiny" else 2}[mode]
  if mode == "image":
    options = {key: value for key, value in TINY[name].items() if key not in ("cluster_size", "overlap")}
    plain = nnx.eval_shape(lambda: vx.create_model(name.removeprefix("boat_"), rngs=nnx.Rngs(0), **options))
    assert cost.count_params(model) == cost.count_params(plain)


@pytest.mark.parametrize(
  ("name", "image_size"),
  [
    ("boat_swin_tiny", 224),
    *(
      pytest.param(name, size, marks=pytest.mark.slow)
      for name, size in [("boat_cswin_tiny", 224), *itertools.product(SMALL, [384, (320, 448)])]
    ),
  ],
)
def test_bfloat16_is_finite(name, image_size, random_model):
  options = SMALL[name] | dict(image_size=image_size, dtype="bfloat16", drop_path_rate=0.5)
  graphdef, params = nnx.split(random_model(name, **options))
  height, width = nnx.merge(graphdef, params).image_size

  def loss(params):
    logits, _ = nnx.merge(graphdef, params)(images(1, height, width), train=True, rngs=nnx.Rngs(0))
    return (logits.astype(jnp.float32) ** 2).sum(), logits

  grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert logits.dtype == jnp.float32
  assert jnp.isfinite(logits).all()
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("image_size", [(224, 224), (256, 256), (384, 384), (320, 448)])
def test_any_size(name, image_size, random_model):
  logits, out = forward(random_model(name, image_size=image_size), images(1, *image_size))
  assert logits.shape == (1, 1000)
  assert jnp.isfinite(logits).all()
  dim = 96 if name == "boat_swin_tiny" else 64
  for i in range(4):
    assert out[f"stages.{i}"].shape == (1, *(side // (4 << i) for side in image_size), dim << i)


def test_refuses_what_does_not_fit():
  for option, value in dict(local_attention="all", clustering="spectral", overlap=-1, cluster_size=0).items():
    with pytest.raises(vx.UserError, match=option):
      vx.create_model("boat_swin_tiny", rngs=nnx.Rngs(0), **{option: value})
  with pytest.raises(vx.UserError, match="nearest sizes are 224 and 256"):
    vx.create_model("boat_cswin_tiny", rngs=nnx.Rngs(0), image_size=225)
