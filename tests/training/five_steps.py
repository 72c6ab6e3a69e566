"""Five steps of training on a mesh, in this process or, run as a script, in one of several that see the same images.

Script: python -m tests.training.five_steps FAMILY HOST:PORT PROCESSES ID FILE, which gets losses and state as a pickle.
"""

import pickle
import sys

from flax import nnx
import jax
from jax.experimental import multihost_utils
import numpy as np
import optax

from configs import digits
from tests.training.steps import make_step
import vit_jax_ext as vx
from vit_jax_ext.models.functional import split_model
from vit_jax_ext.training import distributed, sharding, train_step
from vit_jax_ext.training.partition import Layout


def five_steps(family, mesh, **overrides):
  """Trains the small model of a family: (initial parameters, losses, final parameters, statistics and averages).

  Adam divides by the gradient's own size. Where the true gradient is zero (biases of keys, under softmax; biases in
  front of BatchNorm) float32 leaves rounding errors, and Adam's usual epsilon of 1e-8 blows them up to the learning
  rate. 1e-3 is above them, and below most gradients.
  """
  name, options = digits.VARIANTS[family]
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-3))

  def create():
    options_here = {"image_size": 24, "drop_path_rate": 0.1} | options | overrides
    return vx.create_model(name, num_classes=10, rngs=nnx.Rngs(0), **options_here)

  def init():
    return train_step.init_state(create, tx, use_ema=True)

  model = nnx.eval_shape(create)
  layout = Layout(model, mesh)
  places = layout.shardings(jax.eval_shape(init))
  step = jax.jit(
    make_step(split_model(model)[0], tx, mean=(0.5,) * 3, std=(0.5,) * 3, ema_decay=0.9, gather=layout.gather),
    in_shardings=(places, sharding.batch_sharding(mesh)),
    out_shardings=(places, sharding.replicated(mesh)),
    donate_argnums=0,
  )
  state = jax.jit(init, out_shardings=places)()
  first, losses, rng = whole(state.params), [], np.random.default_rng(0)
  for _ in range(5):
    image = rng.integers(0, 256, (16, *model.image_size, 3), dtype=np.uint8)
    batch = {"image": image, "label": rng.integers(0, 10, 16).astype(np.int32)}
    state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
    losses.append(float(metrics["loss"]))
  return first, losses, whole({"params": state.params, "stats": state.stats, "ema": state.ema})


def whole(tree):
  """NumPy arrays of what lies on the devices of all processes."""
  return multihost_utils.process_allgather(tree, tiled=True)


def relative(ours, others):
  """Euclidean distance of two trees of arrays, in lengths of the first."""
  ours, others = (np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)]) for tree in (ours, others))
  return np.linalg.norm(ours - others) / np.linalg.norm(ours)


if __name__ == "__main__":
  family, coordinator, processes, process, file = sys.argv[1:]
  distributed.join(coordinator, int(processes), int(process))
  jax.config.update("jax_enable_x64", family.startswith("boat"))
  dtype = "float64" if family.startswith("boat") else "float32"
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, model=2))
  _, losses, state = five_steps(family, mesh, dtype=dtype, param_dtype=dtype)
  if not jax.process_index():
    with open(file, "wb") as out:
      pickle.dump((losses, state), out)
