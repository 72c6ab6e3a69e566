"""A fusion of CrossViT's branches that is not in the package, trained on the digits.

Run: python examples/your_own_block.py --workdir=DIR
Hardware: 2 CPU cores, about a minute of processor time.

The class token of each branch takes from the other's as much as a gate lets through, channel by channel. The file is a
config, too: `python main.py --config=examples/your_own_block.py --workdir=DIR` does the same, and so does every other
command, such as `python main.py evaluate --config=examples/your_own_block.py --workdir=DIR`; run by itself, it is the
command line of `python main.py` that knows one model more.
"""

import sys

from flax import nnx
import jax
import jax.numpy as jnp

import vit_jax_ext as vx
from vit_jax_ext.__main__ import run
from vit_jax_ext.config import load_config
from vit_jax_ext.models.crossvit import FUSIONS, CrossViT, MultiScaleBlock, projection
from vit_jax_ext.models.layers import Linear


class GatedFusion(MultiScaleBlock):
  """z_b = [x_b,cls + sigmoid(W x_b,cls) * f_b(x_a,cls) || x_b,patch], where a is the other branch."""

  def add_fusion(self, dim, num_heads, *, drop_rate, attn_drop_rate, drop_path_rate, **kw):
    """Creates W and f of both branches."""
    self.gates = nnx.List(Linear(dim[b], dim[b], **kw) for b in (0, 1))
    self.projs = nnx.List(projection(dim[1 - b], dim[b], **kw) for b in (0, 1))

  def fuse(self, xs, rngs):
    """Returns the new tokens, and the gates (B, 1, C) as intermediates."""
    fused, out = [], {}
    for b in (0, 1):
      own, other = xs[b][:, :1], xs[1 - b][:, :1]
      out[f"fusion.{b}.gate"] = gate = jax.nn.sigmoid(self.gates[b](own))
      token = own + gate * self.projs[b](other)
      fused.append(jnp.concatenate([token.astype(own.dtype), xs[b][:, 1:]], axis=1))
    return fused, out


FUSIONS["gated"] = GatedFusion  # and so `--config.model.overrides.fusion=gated` of any CrossViT
SIZE = dict(patch_size=(4, 6), embed_dim=(32, 64), num_heads=(2, 2), depth=((1, 2), (1, 2)), mlp_ratio=(2, 2))
vx.register_model("crossvit_gated", vx.Variant(CrossViT, SIZE | {"fusion": "gated"}, image_size=24))


def get_config():
  """Returns the config that CrossViT's own fusions are compared with, for this one."""
  config = load_config("configs/digits_fusion.py")
  config.model.name = "crossvit_gated"
  config.model.overrides = {}
  return config


if __name__ == "__main__":
  if len(sys.argv) == 1 or sys.argv[1].startswith("--"):
    sys.argv[1:1] = ["train", f"--config={__file__}"]
  run()
