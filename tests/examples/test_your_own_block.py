"""A model from outside of the package: registered, trained and evaluated by the commands, equal to plain NumPy."""

import json

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext.config import load_config
from vit_jax_ext.models import crossvit, registry
from vit_jax_ext.models.vit import VisionTransformer

FILE = "examples/your_own_block.py"


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
  monkeypatch.setattr(registry, "VARIANTS", dict(registry.VARIANTS))
  monkeypatch.setattr(crossvit, "FUSIONS", dict(crossvit.FUSIONS))


def test_trained_and_evaluated(run, tmp_path, data_dir):
  place = f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}"
  assert run(f"--config={FILE}", *place, "--config.total_steps=2")[0] == 0
  assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == {
    "name": "crossvit_gated", "overrides": {},
  }  # fmt: skip
  status, out, err = run("evaluate", f"--config={FILE}", *place)
  assert status == 0 and "360 images" in out, err
  assert "crossvit_gated" in vx.list_models()
  status, out, err = run("compare", "--models=crossvit_gated,vit_16b")
  assert status == 0 and "crossvit_gated" in out, err
  # Another process has not heard of it.
  del registry.VARIANTS["crossvit_gated"]
  status, _, err = run("evaluate", f"--workdir={tmp_path / 'run'}")
  assert status == 2 and "crossvit_gated" in err and err.count("\n") == 1


def test_the_fusion():
  load_config(FILE)
  model = vx.create_model("crossvit_gated", num_classes=10, rngs=nnx.Rngs(0))
  block = model.blocks[0]
  random = np.random.default_rng(0)
  for leaf in nnx.iter_graph(block):
    if isinstance(leaf[1], nnx.Param):
      leaf[1][...] = jnp.asarray(random.normal(size=leaf[1].shape), jnp.float32)
  xs = [random.normal(size=(2, 5, dim)).astype(np.float32) for dim in (32, 64)]
  fused, out = block.fuse([*map(jnp.asarray, xs)], None)
  for b in (0, 1):
    own, other = xs[b][:, :1], xs[1 - b][:, :1]
    gate = block.gates[b]
    gate = 1 / (1 + np.exp(-(own @ np.asarray(gate.kernel) + np.asarray(gate.bias))))
    np.testing.assert_allclose(out[f"fusion.{b}.gate"], gate, atol=1e-5)
    projected = np.asarray(block.projs[b](jnp.asarray(other)))
    np.testing.assert_allclose(fused[b][:, :1], own + gate * projected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(fused[b][:, 1:], xs[b][:, 1:])


def test_a_class_with_an_option_of_its_own():
  class Louder(VisionTransformer):
    def __init__(self, *, volume: float = 1.0, **kw):
      super().__init__(**kw)
      self.volume = volume

    def __call__(self, images, **kw):
      logits, out = super().__call__(images, **kw)
      return self.volume * logits, out

  small = dict(embed_dim=8, depth=1, num_heads=2, mlp_ratio=2, patch_size=8)
  vx.register_model("louder", vx.Variant(Louder, small, image_size=16))
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  plain, loud = (vx.create_model("louder", rngs=nnx.Rngs(0), **kw)(images)[0] for kw in ({}, {"volume": 3.0}))
  np.testing.assert_allclose(loud, 3 * plain, rtol=1e-6)
  with pytest.raises(vx.UserError, match=r"has no option 'volum'; it has .*volume"):
    vx.create_model("louder", rngs=nnx.Rngs(0), volum=3)
  with pytest.raises(vx.UserError, match="is a published one; choose another name"):
    vx.register_model("swin_tiny", vx.Variant(Louder, small, image_size=16))
