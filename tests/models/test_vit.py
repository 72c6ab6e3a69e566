"""ViT and DeiT: the authors' logits, published facts, bad input."""

import json
from pathlib import Path
import runpy

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.benchmarks import precision
import vit_jax_ext as vx
from vit_jax_ext.compare.cost import count_params
from vit_jax_ext.models.functional import normalize
from vit_jax_ext.models.isotropic import IsotropicTransformer
from vit_jax_ext.models.registry import VARIANTS

GOLDEN = Path(__file__).parent.parent / "golden"
forward = jax.jit(lambda model, x: model(x))
SMALL = dict(image_size=32, num_classes=5, embed_dim=24, depth=3, num_heads=3)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deepvit_16b", "deepvit_s"])
def test_logits_are_the_authors(name):
  synth = runpy.run_path(str(GOLDEN / "synth.py"))
  golden = json.loads((GOLDEN / f"{name}.json").read_text())
  weights = synth["state_dict"](golden["state_dict"])
  counters = [key for key, _, dtype in golden["state_dict"] if dtype != "float32"]
  with jax.enable_x64(True):
    model = nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0), dtype="float64", param_dtype="float64"))
    report = vx.load_pretrained(model, weights | dict.fromkeys(counters, np.int64(7)))
    images = synth["images"](golden["resolution"]).transpose(0, 2, 3, 1).astype(np.float64)
    logits, _ = forward(model, images)
    assert logits.dtype == np.float64
  assert report.unused == counters
  np.testing.assert_allclose(logits, np.load(GOLDEN / f"{name}.npz")["logits"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(n for n, v in VARIANTS.items() if issubclass(v.model, IsotropicTransformer)))
def test_parameter_count_is_exact(name):
  model = nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0)))
  assert count_params(model) == VARIANTS[name].params


def test_intermediates(random_model):
  model = random_model("vit_16b", **SMALL)
  logits, out = forward(model, jnp.ones((2, 32, 32, 3)))
  assert logits.shape == (2, 5)
  assert model.image_size == (32, 32)
  for i in range(3):
    assert out[f"blocks.{i}"].shape == (2, 5, 24)
    assert out[f"blocks.{i}.attn"].shape == (2, 3, 5, 5)
    np.testing.assert_allclose(out[f"blocks.{i}.attn"].sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(logits, model.head(out["pre_logits"]), rtol=1e-4, atol=1e-6)


def test_without_classes_gives_the_normalised_class_token(random_model):
  model = random_model("deit_tiny_patch16_224", **SMALL | {"num_classes": 0})
  features, out = forward(model, jnp.ones((2, 32, 32, 3)))
  assert features.shape == (2, 24)
  np.testing.assert_array_equal(features, out["pre_logits"])


def test_bfloat16_logits_are_float32():
  model = nnx.eval_shape(lambda: vx.create_model("vit_16b", rngs=nnx.Rngs(0), dtype=jnp.bfloat16, **SMALL))
  logits, out = jax.eval_shape(forward, model, jnp.ones((2, 32, 32, 3)))
  assert logits.dtype == jnp.float32
  assert out["blocks.2"].dtype == jnp.float32  # the residual stream
  assert out["blocks.2.attn"].dtype == jnp.float32


def test_dropped_paths_differ_by_key_and_only_in_training(random_model):
  model = random_model("vit_16b", **SMALL, drop_path_rate=0.5)
  x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
  a, b = (model(x, train=True, rngs=nnx.Rngs(seed))[0] for seed in (1, 2))
  assert jnp.any(a != b)
  np.testing.assert_array_equal(model(x, rngs=nnx.Rngs(1))[0], model(x)[0])


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"image_size": 230}, "the nearest sizes are 224 and 240"),
    ({"num_heads": 5}, "embed_dim 24 does not divide into 5 heads"),
  ],
)
def test_bad_overrides(overrides, message):
  with pytest.raises(vx.UserError, match=message):
    vx.create_model("vit_16b", rngs=nnx.Rngs(0), **SMALL | overrides)


def test_bad_calls(random_model):
  model = random_model("vit_16b", **SMALL, drop_rate=0.1)
  with pytest.raises(vx.UserError, match=r"takes \(batch, 32, 32, 3\)"):
    model(jnp.ones((1, 48, 48, 3)))
  with pytest.raises(vx.UserError, match="needs randomness"):
    model(jnp.ones((1, 32, 32, 3)), train=True)


def torch_vit(weights, images, num_heads):
  """ViT's forward pass in plain torch functions, from a state dict of timm's names."""
  F = torch.nn.functional

  def linear(x, name):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

  def norm(x, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

  patches = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=16)
  x = patches.flatten(2).mT
  x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1) + weights["pos_embed"]
  batch, tokens, dim = x.shape
  for i in range(sum(name.endswith("norm1.weight") for name in weights)):
    qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    attn = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    x = x + linear((attn @ v).transpose(1, 2).reshape(batch, tokens, dim), f"blocks.{i}.attn.proj")
    x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
  return linear(norm(x, "norm")[:, 0], "head")


def test_mixed_precision_is_that_of_torch_autocast(tmp_path):
  """The same weights and images: the loss within 2e-3, the length of every tensor's gradient within 2%."""
  name, options = "deit_tiny_patch16_224", dict(image_size=64, embed_dim=96, depth=2, num_heads=3)
  model = vx.create_model(name, num_classes=10, rngs=nnx.Rngs(0), **options)
  vx.save_pretrained(model, tmp_path / "x.pth")
  weights = {name: w.requires_grad_() for name, w in torch.load(tmp_path / "x.pth")["model"].items()}
  images = normalize(jnp.asarray(precision.crops(32, 64)), (0.5,) * 3, (0.25,) * 3)
  labels = np.random.default_rng(0).integers(0, 10, 32)

  with torch.autocast("cpu", torch.bfloat16):
    logits = torch_vit(weights, torch.tensor(np.array(images)).permute(0, 3, 1, 2), 3)
  expected = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(labels), label_smoothing=0.1)
  expected.backward()

  loss, gradients = precision.gradients(name, options, "bfloat16", images, jnp.asarray(labels))
  np.testing.assert_allclose(loss, expected.item(), atol=2e-3)
  for name, gradient in gradients.items():
    theirs = weights[name.replace("kernel", "weight").replace("scale", "weight")].grad
    np.testing.assert_allclose(np.linalg.norm(gradient), theirs.norm().item(), rtol=0.02, err_msg=name)
