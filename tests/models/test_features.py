"""What docs/models.md says of `out` and of pooled features, of every family."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from vit_jax_ext.models import registry

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()
FUSIONS = [("crossvit_9_dagger_224", {"fusion": fusion}) for fusion in ("pairwise", "class_token", "none")]
# Model, overrides, width of the pooled features, rows of the table that describe its `out`.
FAMILIES = [
  *((name, overrides, 128 + 256, "CrossViT") for name, overrides in [*FUSIONS, ("crossvit_9_224", {})]),
  ("crossvit_9_224", {"fusion": "all_attention"}, 128 + 256, "CrossViT"),
  ("deit_tiny_patch16_224", {}, 192, "ViT, DeiT, DeepViT"),
  ("deepvit_s", {}, 396, "ViT, DeiT, DeepViT"),
  ("swin_tiny", {}, 768, "Swin, CSWin, BOAT"),
  ("cswin_tiny", {}, 512, "Swin, CSWin, BOAT"),
  ("boat_swin_tiny", {}, 768, "Swin, CSWin, BOAT|BOAT besides"),
  ("boat_cswin_tiny", {}, 512, "Swin, CSWin, BOAT|BOAT besides"),
]


def documented(rows: str) -> list[str]:
  """Returns the names that the page's table has for a model, as regular expressions."""
  names = []
  for row in rows.split("|"):
    (line,) = re.findall(rf"^\| {row} \|[^|]*\|(.*)\|$", DOCS, re.M)
    names += [re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(name)) for name in re.findall(r"`([^`]+)`", line)]
  return names


@functools.cache
def call(name, num_classes, **overrides):
  model = registry.abstract_model({"name": name, "overrides": overrides}, num_classes)
  images = jax.ShapeDtypeStruct((3, *model.image_size, 3), jnp.float32)
  return jax.eval_shape(lambda model, x: model(x), model, images)


@pytest.mark.parametrize(("name", "overrides", "width", "rows"), FAMILIES)
def test_all_that_is_in_out_is_documented(name, overrides, width, rows):
  logits, out = call(name, 10, **overrides)
  features, bare = call(name, 0, **overrides)
  assert (logits.shape, features.shape) == ((3, 10), (3, width))
  assert (logits.dtype, features.dtype) == (jnp.float32, jnp.float32)
  names = documented(rows)
  assert not [key for key in out if not any(re.fullmatch(name, key) for name in names)]
  assert out.keys() - bare.keys() == {key for key in out if key.startswith("logits")}
  pooled = [value.shape for key, value in bare.items() if key.startswith("pre_logits")]
  assert sum(shape[-1] for shape in pooled) == width


@pytest.mark.parametrize("rows", sorted({rows for *_, rows in FAMILIES}))
def test_all_that_is_documented_is_in_out(rows):
  keys = {key for name, overrides, _, r in FAMILIES if r == rows for key in call(name, 10, **overrides)[1]}
  for name in documented(rows):
    assert any(re.fullmatch(name, key) for key in keys), name


@pytest.mark.parametrize(
  ("name", "width"), [("swin_tiny", 96), ("boat_swin_base", 128), ("cswin_tiny", 64), ("boat_cswin_base", 96)]
)
def test_stages_of_pyramids(name, width):
  _, out = call(name, 0, image_size=(224, 448))
  for i in range(4):
    assert out[f"stages.{i}"].shape == (3, 56 >> i, 112 >> i, width << i)
  assert "stages.4" not in out


def test_shapes_of_attention_and_clusters():
  _, out = call("crossvit_9_224", 10)
  assert out["blocks.2.blocks.1.2.attn"].shape == (3, 4, 197, 197)
  assert out["blocks.0.fusion.0.attn"].shape == (3, 4, 1, 197)  # branch 0 asks the 196 patches of branch 1
  assert out["blocks.0.fusion.1.attn"].shape == (3, 4, 1, 401)
  assert out["logits.1"].shape == (3, 10)
  _, out = call("crossvit_9_224", 10, fusion="all_attention")
  assert out["blocks.0.fusion.attn"].shape == (3, 4, 401 + 197, 401 + 197)
  _, out = call("deepvit_s", 10)
  assert (out["blocks.15.attn"].shape, out["blocks.15"].shape) == ((3, 12, 197, 197), (3, 197, 396))
  _, out = call("boat_swin_tiny", 10)
  assert out["layers.0.blocks.1.attnC.clusters"].shape == (3, 3, 3136)
  _, out = call("boat_cswin_tiny", 10)
  assert out["stage2.0.content_attn.clusters"].shape == (3, 4, 784)
