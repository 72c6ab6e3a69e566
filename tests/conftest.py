"""Eight simulated CPU devices, one compilation cache for the whole run, and what several rooms' tests share."""

import os

# Compilation is most of the tests' time. Level 0 halves it, and without the emitters of fusions it is a quarter again.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
  ]
)
# What compiles in less is not kept; said here, so that the commands that tests start keep it too.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import contextlib
import importlib.util
import io
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from tests.command_line import execute
import vit_jax_ext as vx
from vit_jax_ext.data.datasets import open_dataset

GOLDEN = pathlib.Path(__file__).parent / "golden"
ROOT = GOLDEN.parent.parent


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Identical programs of different tests compile once, also in other processes of pytest-xdist and of commands."""
  folder = tmp_path_factory.getbasetemp()
  folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
  folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla_cache"))
  jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture
def run(capsys):
  """Returns a function that runs `python main.py ARGS...` in this process: (status, stdout, stderr)."""

  def call(*args):
    return execute(*args), *capsys.readouterr()

  return call


@pytest.fixture
def x64():
  """Double precision for one test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def compiled():
  """Returns a list that gets the name of each program that the compiler, or its cache on disk, is asked for."""
  names = []

  def listener(event, _, fun_name=None, **kw):
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(listener)
  yield names
  jax.monitoring.unregister_event_duration_listener(listener)


@pytest.fixture(scope="session")
def golden():
  """Returns a function: name -> (state dict, images (2, H, W, 3) float64, logits (2, 1000)) of the authors' model."""
  spec = importlib.util.spec_from_file_location("synth", GOLDEN / "synth.py")
  synth = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(synth)

  def load(name):
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    images = synth.images(facts["resolution"]).transpose(0, 2, 3, 1).astype(np.float64)
    return synth.state_dict(facts["state_dict"]), images, np.load(GOLDEN / f"{name}.npz")["logits"]

  return load


@pytest.fixture(scope="session")
def random_model():
  """Returns a function: create_model's arguments -> a model with weights from NumPy, which takes no compilation."""

  def create(name, **kw):
    model = nnx.eval_shape(lambda: vx.create_model(name, rngs=nnx.Rngs(0), **kw))
    rng = np.random.default_rng(0)

    def weight(p):
      spread = 0.3 if p.ndim == 1 else np.prod(p.shape[:-1]) ** -0.5
      return jnp.asarray(rng.normal(0, spread, p.shape), p.dtype)

    def statistic(path, p):
      return jnp.asarray(np.full(p.shape, path[-2].key == "var", p.dtype))

    nnx.update(model, jax.tree.map(weight, nnx.state(model, nnx.Param)))
    nnx.update(model, jax.tree_util.tree_map_with_path(statistic, nnx.state(model, nnx.BatchStat)))
    return model

  return create


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """A folder in which `digits` is prepared."""
  folder = str(tmp_path_factory.mktemp("data"))
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells about it
    open_dataset("digits", folder)
  return folder


@pytest.fixture
def tiny_config(data_dir):
  """Digits with a CrossViT of a few thousand parameters: seconds, not minutes."""
  config = digits.get_config("crossvit")
  config.dataset.data_dir = data_dir
  config.model.overrides.update(
    image_size=8, patch_size=(2, 4), embed_dim=(8, 16), num_heads=(2, 2), depth=((1, 1),), mlp_ratio=(1, 1)
  )
  config.batch_size = 64
  config.total_steps = 6
  config.log_every_steps = 2
  config.eval_every_steps = 3
  config.checkpoint.every_steps = 2
  config.optimizer.warmup_steps = 2
  return config
