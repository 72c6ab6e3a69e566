"""Weights of timm and Transformers, and of what wraps models, against these libraries themselves in float64."""

import re

from flax import nnx
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from tests.references import perturb, random_images, run
import vit_jax_ext as vx
from vit_jax_ext import weight_names
from vit_jax_ext.models import registry

VIT = dict(embed_dim=24, depth=2, num_heads=3, image_size=48, num_classes=5)
SWIN = dict(embed_dim=12, depths=(2, 2), num_heads=(1, 2), window_size=4, image_size=64, num_classes=5)
CROSSVIT = dict(embed_dim=(12, 24), depth=((1, 2), (1, 1)), num_heads=(2, 3), image_size=120, num_classes=5)


def abstract(name, **kw):
  return nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0), dtype="float64", param_dtype="float64", **kw))


def logits(name, source, images, **kw):
  """Returns our logits with weights of which all have to fit."""
  model = abstract(name, **kw)
  report = vx.load_pretrained(model, source)
  assert not report.resized and not report.reinitialized
  assert not [name for name in report.unused if not name.endswith(("attn_mask", "relative_position_index"))]
  return jax.jit(lambda model, images: model(images)[0])(model, images)


def arrays(model):
  return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def transformers_model(kind, **kw):
  transformers = pytest.importorskip("transformers")
  common = dict(num_labels=5, attn_implementation="eager") | kw
  if kind == "swin":
    options = dict(image_size=64, embed_dim=12, depths=[2, 2], num_heads=[1, 2], window_size=4)
    return perturb(transformers.SwinForImageClassification(transformers.SwinConfig(**options | common)))
  options = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=48,
                 layer_norm_eps=1e-6)  # fmt: skip
  if kind.startswith("deit"):
    config = transformers.DeiTConfig(**options | common)
    heads = {"deit": "DeiTForImageClassificationWithTeacher", "deit, one head": "DeiTForImageClassification"}
    return perturb(getattr(transformers, heads[kind])(config))
  config = transformers.ViTConfig(**options | common)
  return perturb((transformers.ViTForImageClassification if kind == "vit" else transformers.ViTModel)(config))


@pytest.mark.parametrize(
  ("kind", "name", "options"),
  [
    ("vit", "deit_tiny_patch16_224", VIT),
    ("deit", "deit_tiny_distilled_patch16_224", VIT),
    ("deit, one head", "deit_tiny_distilled_patch16_224", VIT | {"dist_head": False}),
    ("swin", "swin_tiny", SWIN),
  ],
)
def test_transformers(kind, name, options, x64, tmp_path):
  """Names of modules and of files, which differ since Transformers 5."""
  model = transformers_model(kind)
  images = random_images(options["image_size"])
  expected = run(model, images).logits.numpy()
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(logits(name, arrays(model), images, **options), expected, rtol=0, atol=1e-6)
  model.save_pretrained(tmp_path)
  in_file = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert set(in_file) != set(arrays(model))
  np.testing.assert_allclose(logits(name, tmp_path, images, **options), expected, rtol=0, atol=1e-6)


def test_transformers_without_a_head(x64, tmp_path):
  """The pooler is not needed, the classifier begins anew, and nobody may be told that it was loaded."""
  model, images = transformers_model("base"), random_images(48)
  expected = run(model, images).last_hidden_state[:, 0].numpy()
  model.save_pretrained(tmp_path)
  for source in (arrays(model), tmp_path):
    ours = abstract("deit_tiny_patch16_224", **VIT | {"num_classes": 0})
    report = vx.load_pretrained(ours, source)
    assert sorted(report.unused) == ["pooler.dense.bias", "pooler.dense.weight"]
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x)[0])(ours, images), expected, rtol=0, atol=1e-6)
  ours = vx.create_model("deit_tiny_patch16_224", rngs=nnx.Rngs(0), **VIT)
  before = np.asarray(ours.head.kernel[...])
  assert sorted(vx.load_pretrained(ours, tmp_path).reinitialized) == ["head.bias", "head.weight"]
  np.testing.assert_array_equal(ours.head.kernel[...], before)
  with pytest.raises(vx.UserError, match=r"2 missing: head\."):
    vx.load_pretrained(ours, tmp_path, keep_classifier=True)


TIMM = [
  ("crossvit_9_240", "crossvit_9_224", CROSSVIT | {"mlp_ratio": (3, 3)},
   dict(img_size=120, img_scale=(1, 112 / 120), depth=[[1, 2, 0], [1, 1, 0]], num_heads=[2, 3], embed_dim=[12, 24])),
  ("deit_tiny_patch16_224", "deit_tiny_patch16_224", VIT, dict(img_size=48, embed_dim=24, depth=2, num_heads=3)),
  ("deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224", VIT,
   dict(img_size=48, embed_dim=24, depth=2, num_heads=3)),
  ("swin_tiny_patch4_window7_224", "swin_tiny", SWIN,
   dict(img_size=64, embed_dim=12, depths=[2, 2], num_heads=[1, 2], window_size=4)),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "name", "options", "model_args"), TIMM, ids=[row[0] for row in TIMM])
def test_timm(theirs, name, options, model_args, x64, tmp_path):
  model = perturb(pytest.importorskip("timm").create_model(theirs, num_classes=5, **model_args))
  images = random_images(options["image_size"])
  expected = run(model, images).numpy()
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(logits(name, arrays(model), images, **options), expected, rtol=0, atol=1e-6)
  ours = weight_names.to_timm(weight_names.to_authors(arrays(model)))
  assert set(ours) == set(arrays(model))


def test_one_head_of_two_says_what_to_create():
  weights = arrays(transformers_model("deit, one head"))
  model = vx.create_model("deit_tiny_distilled_patch16_224", rngs=nnx.Rngs(0), **VIT)
  with pytest.raises(vx.UserError, match=r"2 missing: head_dist\.bias, head_dist\.weight; .*dist_head=False$"):
    vx.load_pretrained(model, weights)


def test_features_of_one_head_are_the_class_tokens(x64):
  theirs, images = transformers_model("deit, one head"), random_images(48)
  ours = abstract("deit_tiny_distilled_patch16_224", **VIT | {"dist_head": False, "num_classes": 0})
  assert len(vx.load_pretrained(ours, arrays(theirs)).unused) == 2
  with torch.no_grad():
    expected = theirs.deit(torch.from_numpy(images.transpose(0, 3, 1, 2)))[0][:, 0].numpy()
  np.testing.assert_allclose(ours(images)[0], expected, rtol=0, atol=1e-6)


def test_distilled_heads_are_those_of_timm_in_training(x64):
  model = perturb(
    pytest.importorskip("timm").create_model("deit_tiny_distilled_patch16_224", num_classes=5, **TIMM[2][3])
  )
  images, ours = random_images(48), abstract("deit_tiny_distilled_patch16_224", **VIT)
  vx.load_pretrained(ours, arrays(model))
  mean, out = ours(images)
  model.set_distilled_training(True)
  for name, expected in zip(("logits.0", "logits.1"), run(model.train(), images), strict=True):
    np.testing.assert_allclose(out[name], expected.numpy(), rtol=0, atol=1e-6)
  np.testing.assert_allclose(mean, (out["logits.0"] + out["logits.1"]) / 2)
  features = abstract("deit_tiny_distilled_patch16_224", **VIT | {"num_classes": 0})
  assert len(vx.load_pretrained(features, arrays(model)).unused) == 4
  with torch.no_grad():
    tokens = model.eval().forward_features(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    expected = model.forward_head(tokens, pre_logits=True).numpy()
  np.testing.assert_allclose(features(images)[0], expected, rtol=0, atol=1e-6)


def test_what_timm_publishes_is_what_variants_say():
  """Repositories on the Hub exist by timm's own word; architectures have the same number of parameters."""
  timm = pytest.importorskip("timm")
  mirrored = {name: variant for name, variant in registry.VARIANTS.items() if variant.hub}
  assert len(mirrored) == 20
  for name, variant in mirrored.items():
    architecture, tag = variant.hub.removeprefix("timm/").split(".")
    published = timm.get_pretrained_cfg(f"{architecture}.{tag}")
    assert published.hf_hub_id == variant.hub
    assert published.url in ("", variant.url)
    assert published.input_size == (3, variant.image_size, variant.image_size)
    assert (published.mean, published.std) == (variant.mean, variant.std)
    if re.search("tiny|crossvit_9", name):
      with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(architecture).parameters()) == variant.params


class Lightning(torch.nn.Module):
  def __init__(self, model):
    super().__init__()
    self.model = model


@pytest.mark.parametrize(
  ("wrap", "prefix"),
  [
    (torch.compile, "_orig_mod."),
    (torch.nn.DataParallel, "module."),
    (lambda model: torch.nn.DataParallel(torch.compile(model)), "module._orig_mod."),
    (Lightning, "model."),
    (lambda model: Lightning(torch.compile(model)), "model._orig_mod."),
  ],
)
def test_wrappers(wrap, prefix, tmp_path):
  """What they call the entries, under an entry of a training checkpoint or not."""
  model = pytest.importorskip("timm").create_model("deit_tiny_patch16_224", num_classes=5, **TIMM[1][3])
  state_dict = wrap(model).state_dict()
  assert all(name.startswith(prefix) for name in state_dict)
  torch.save({"state_dict": state_dict, "epoch": 3}, tmp_path / "x.pth")
  ours = vx.create_model("deit_tiny_patch16_224", rngs=nnx.Rngs(0), **VIT)
  assert len(vx.load_pretrained(ours, tmp_path / "x.pth").loaded) == len(state_dict)
  np.testing.assert_array_equal(ours.blocks[1].mlp.fc1.kernel[...], model.blocks[1].mlp.fc1.weight.detach().numpy().T)


def test_two_entries_of_one_name_are_refused():
  weights = {"module.head.bias": np.zeros(3), "head.bias": np.ones(3)}
  with pytest.raises(vx.UserError, match=r"both module\.head\.bias and head\.bias, which are one"):
    weight_names.to_authors(weights)


KEY = "vit.layers.0.attention.k_proj.weight"


@pytest.mark.parametrize("damage", [lambda w: w.pop(KEY), lambda w: w.update({KEY: w[KEY][:, :9]})])
def test_parts_of_qkv_that_do_not_fit_are_named(damage):
  weights = arrays(transformers_model("vit"))
  damage(weights)
  with pytest.raises(vx.UserError, match=r"missing: blocks\.0\.attn\.qkv\.weight; [23] that.*attn\.q\.weight") as error:
    vx.load_pretrained(vx.create_model("deit_tiny_patch16_224", rngs=nnx.Rngs(0), **VIT), weights)
  assert "\n" not in str(error.value)
