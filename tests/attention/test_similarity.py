"""Similarity of attention maps against direct NumPy, its limits, streaming, bad input."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext.attention import similarity

forward = jax.jit(lambda model, x: model(x))
SMALL = dict(image_size=32, num_classes=5, embed_dim=24, depth=4, num_heads=3)


def cosine(x, y, axis):
  return (x * y).sum(axis) / np.sqrt((x * x).sum(axis) * (y * y).sum(axis))


def random_out(blocks=4, batch=3, heads=3, tokens=6, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  out = {}
  for i in range(blocks):
    out[f"blocks.{i}.attn"] = jax.nn.softmax(2 * rng.standard_normal((batch, heads, tokens, tokens))).astype(dtype)
    out[f"blocks.{i}"] = jnp.asarray(rng.standard_normal((batch, tokens, 8)), dtype)
  return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_sums_equal_numpy(dtype):
  out = random_out(dtype=dtype)
  mask = np.array([True, False, True])
  sums = jax.jit(similarity.batch_similarity)(out, mask, 0.8, 0.5)
  maps = np.stack([np.asarray(out[f"blocks.{i}.attn"], np.float64) for i in range(4)])[:, mask]
  tokens = np.stack([np.asarray(out[f"blocks.{i}"], np.float64) for i in range(4)])[:, mask]
  assert sums["images"] == 2
  for k in (1, 2, 3):
    blocks = np.stack([cosine(maps[p], maps[p + k], -2) for p in range(4 - k)])  # (L - k, B, H, T)
    np.testing.assert_allclose(sums[f"similarity.{k}"], blocks.mean((2, 3)).sum(1), atol=1e-5)
    np.testing.assert_allclose(sums[f"ratio.{k}"], (blocks >= 0.8).mean((2, 3)).sum(1), atol=1e-5)
    features = np.stack([cosine(tokens[p], tokens[p + k], -1) for p in range(4 - k)])
    np.testing.assert_allclose(sums[f"features.{k}"], features.mean(2).sum(1), atol=1e-5)
  heads = cosine(maps[:, :, :, None], maps[:, :, None], -2)  # (L, B, H, H, T)
  np.testing.assert_allclose(sums["heads"], heads.mean(-1).sum(1), atol=1e-5)
  pairs = np.stack([heads[:, :, h, g] for h, g in ((0, 1), (0, 2), (1, 2))], -1)
  np.testing.assert_allclose(sums["head_ratio"], (pairs >= 0.5).mean((2, 3)).sum(1), atol=1e-5)
  np.testing.assert_allclose(sums["maps"], maps.mean(2).sum(1), atol=1e-5)
  assert all(value.dtype == jnp.float32 for value in sums.values())


def test_identical_maps_are_one_and_disjoint_maps_zero():
  maps = random_out()["blocks.0.attn"]
  np.testing.assert_allclose(similarity.block_similarity(maps, maps), 1, atol=1e-6)
  even = jnp.zeros((1, 2, 4, 4)).at[:, :, ::2].set(0.5)
  odd = jnp.zeros((1, 2, 4, 4)).at[:, :, 1::2].set(0.5)
  np.testing.assert_array_equal(similarity.block_similarity(even, odd), 0)
  np.testing.assert_array_equal(similarity.block_similarity(jnp.zeros_like(even), odd), 0)
  heads = jnp.concatenate([even[:, :1], odd[:, :1]], axis=1)
  np.testing.assert_allclose(similarity.head_similarity(heads)[0, ..., 0], np.eye(2), atol=1e-6)


@pytest.mark.parametrize("name", ["vit_16b", "deepvit_s"])
def test_the_split_into_batches_does_not_matter(name):
  overrides = SMALL if name == "vit_16b" else SMALL | {"reattention_blocks": (2, 3)}
  model = vx.create_model(name, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, **overrides)
  image = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
  batch = {"image": image, "label": np.array([0, 1, 2, 3]), "mask": np.array([True, True, True, False])}

  def normalize(x):
    return x.astype(jnp.float32) / 255

  whole, maps = similarity.measure_similarity(model, [batch], normalize=normalize)
  halves = [jax.tree.map(lambda x, i=i: x[i : i + 2], batch) for i in (0, 2)]
  parts, part_maps = similarity.measure_similarity(model, halves, normalize=normalize)
  np.testing.assert_allclose(maps, part_maps, atol=1e-5)
  assert maps.shape == (4, 5, 5)
  best = jnp.argmax(forward(model, normalize(image))[0], axis=-1)
  assert whole["top1"] == parts["top1"] == np.mean(best[:3] == batch["label"][:3])
  assert (whole["images"], whole["blocks"], whole["heads"], whole["tokens"]) == (3, 4, 3, 5)
  for k in "123":
    np.testing.assert_allclose(whole["similarity"][k], parts["similarity"][k], atol=1e-5)
  assert [len(whole["ratio"][k]) for k in "123"] == [3, 2, 1]


def test_blocks_with_equal_maps_are_similar_and_with_different_ones_not():
  out = random_out()
  out["blocks.1.attn"] = out["blocks.0.attn"]
  sums = similarity.batch_similarity(out, np.ones(3, bool), 0.99, 0.5)
  summary = similarity.summarize(sums | {"top1": 1}, 0.99, 0.5)
  assert summary["similar_blocks"] == 1
  np.testing.assert_allclose(summary["ratio"]["1"][0], 1)


def test_a_model_without_such_maps_is_refused(random_model):
  overrides = dict(image_size=48, embed_dim=(24, 48), depth=((1, 1),))
  model = random_model("crossvit_tiny_224", **overrides)
  with pytest.raises(vx.UserError, match=r"choose one of deepvit_16b, .*vit_32b"):
    batch = {"image": np.zeros((1, 48, 48, 3)), "label": np.zeros(1), "mask": np.ones(1, bool)}
    similarity.measure_similarity(model, [batch])
  different = random_out() | {"blocks.2.attn": jnp.ones((3, 3, 4, 4))}
  with pytest.raises(vx.UserError, match="attention maps of one size"):
    similarity.attention_maps(different)


@pytest.mark.parametrize("thresholds", [{"threshold": 0.0}, {"threshold": 1.2}, {"head_threshold": -0.5}])
def test_bad_thresholds(thresholds, random_model):
  model = random_model("vit_16b", **SMALL)
  with pytest.raises(vx.UserError, match=r"choose one in \(0, 1\]"):
    similarity.measure_similarity(model, [], **thresholds)


def test_no_images(random_model):
  model = random_model("vit_16b", **SMALL)
  with pytest.raises(vx.UserError, match="no images"):
    similarity.measure_similarity(model, [])
