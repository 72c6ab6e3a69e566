"""What the tests of several architectures share."""

import json
import pathlib

from flax import nnx
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

import vit_jax_ext as vx
from vit_jax_ext.models import attention

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


@pytest.fixture
def check_golden(golden, x64, tmp_path):
  """Compares a model's logits with the authors', in float64, through a PyTorch file with Swin's masks and all.

  The .safetensors that we write of it has their names, shapes and values, and gives the same model again.
  """

  def load(name, path):
    model = nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0), dtype="float64", param_dtype="float64"))
    report = vx.load_pretrained(model, path)
    assert all(key.endswith(("attn_mask", "relative_position_index", "batches_tracked")) for key in report.unused)
    return model

  def check(name):
    state_dict, images, expected = golden(name)
    torch.save({key: torch.from_numpy(array) for key, array in state_dict.items()}, tmp_path / "x.pth")
    model = load(name, tmp_path / "x.pth")
    logits, _ = jax.jit(lambda model, x: model(x))(model, images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)

    vx.save_pretrained(model, tmp_path / "x.safetensors")
    saved = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    manifest = json.loads((GOLDEN / f"{name}.json").read_text())["state_dict"]
    assert {key: list(array.shape) for key, array in saved.items()} == {key: shape for key, shape, _ in manifest}
    for key, array in state_dict.items():
      if not key.endswith("attn_mask"):
        np.testing.assert_array_equal(saved[key], array)
    again = load(name, tmp_path / "x.safetensors")
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(m)) for m in (model, again)))

  return check


@pytest.fixture
def on_tpu(monkeypatch):
  monkeypatch.setattr(attention, "platform", lambda: "tpu")


@pytest.fixture
def on_a_kind(on_tpu):
  """Returns a context in which programs are for a kind of TPU."""

  def context(kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    auto = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), auto, abstract_device=device))

  return context
