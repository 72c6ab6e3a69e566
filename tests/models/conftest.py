import json
from pathlib import Path
import runpy

from flax import nnx
import jax
import numpy as np
import pytest

import vit_jax_ext as vx

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def check_golden():
  """Compares a model's logits with the authors', in float64, through their state dict, buffers included."""

  def check(name):
    synth = runpy.run_path(str(GOLDEN / "synth.py"))
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    weights = synth["state_dict"](golden["state_dict"])
    indices = {key: np.zeros(shape, dtype) for key, shape, dtype in golden["state_dict"] if dtype != "float32"}
    with jax.enable_x64(True):
      model = nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0), dtype="float64", param_dtype="float64"))
      report = vx.load_pretrained(model, weights | indices)
      images = synth["images"](golden["resolution"]).transpose(0, 2, 3, 1).astype(np.float64)
      logits, _ = jax.jit(lambda model, x: model(x))(model, images)
    assert all(key.endswith(("attn_mask", "relative_position_index")) for key in report.unused)
    np.testing.assert_allclose(logits, np.load(GOLDEN / f"{name}.npz")["logits"], rtol=0, atol=1e-6)

  return check
