"""Input pipelines; TensorFlow lives here and nowhere else."""

import contextlib
import importlib.util
import os
import sys

from vit_jax_ext.errors import UserError

for _name in ("tensorflow", "tensorflow_datasets", "clu", "sklearn"):  # before any is imported
  if importlib.util.find_spec(_name) is None:
    raise UserError(f"reading datasets and training need {_name}, which is not there; pip install 'vit_jax_ext[train]'")

# TensorFlow goes on without Keras, which nothing here needs and which takes a third of its import with it.
_keras = sys.modules.setdefault("keras", None)
import tensorflow as tf  # noqa: E402

if _keras is None:
  del sys.modules["keras"]

tf.config.set_visible_devices([], "GPU")  # the accelerators belong to JAX
with contextlib.suppress(RuntimeError):  # too late if TensorFlow is in use already; then it is only slower
  tf.config.threading.set_intra_op_parallelism_threads(1)  # the cores work on different images, not on parts of one

# XLA_FLAGS are meant for JAX. TensorFlow's own, older XLA ends the process over a flag that it does not know, so it
# compiles its first program, which is when it reads them, without any.
if _flags := os.environ.pop("XLA_FLAGS", None):
  tf.function(tf.identity, autograph=False, jit_compile=True)(0)
  os.environ["XLA_FLAGS"] = _flags
