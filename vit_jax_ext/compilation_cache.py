"""Compiled programs on disk for the next start: JAX's persistent compilation cache, used by commands alone.

JAX's name of an entry has in it all that the program depends on, versions, flags, devices and a CPU's instructions too,
so hosts may share a folder. Of several processes the first one alone writes.
"""

import os
import uuid

from absl import logging
import jax
from jax._src import compilation_cache, lru_cache  # JAX writes entries in place; no public way leads past that
import ml_collections

from vit_jax_ext.files import user_cache

AUTO = "auto"
SHORTEST = 0.1  # seconds; what is compiled sooner is not kept


class _Entries(lru_cache.LRUCache):
  """JAX's entries, each of which takes its place when all of it is written.

  JAX alone would leave a part of one behind when it is killed, and neither use nor replace it.
  """

  def put(self, key: str, value: bytes) -> None:
    if self.eviction_enabled:  # JAX_COMPILATION_CACHE_MAX_SIZE: under JAX's own lock
      return super().put(key, value)
    part = self.path / f"{key}.{uuid.uuid4().hex}.part"
    try:
      part.write_bytes(value)
      part.replace(self.path / f"{key}{lru_cache._CACHE_SUFFIX}")
    except OSError as error:
      part.unlink(missing_ok=True)
      logging.log_first_n(logging.WARNING, "compiled programs are not kept: %s", 1, error)


def use(config: ml_collections.ConfigDict) -> None:
  """Keeps compiled programs in the folder that a config names, unless JAX_COMPILATION_CACHE_DIR has named one to JAX.

  One that cannot be written is not used, and the log says so.

  Args:
    config: its compilation_cache is a folder, which may be in a bucket (gs://...); "auto", the default, stands for one
      under the user's cache, None or "" for none.
  """
  compilation_cache.get_file_cache = lambda path: (
    _Entries(path, max_size=jax.config.jax_compilation_cache_max_size), path
  )  # fmt: skip
  folder = config.get("compilation_cache", AUTO)
  if not folder or jax.config.jax_compilation_cache_dir:
    return
  folder = os.path.join(user_cache(), "xla") if folder == AUTO else os.path.expanduser(folder)
  if "://" not in folder:
    try:
      os.makedirs(folder, exist_ok=True)
      writable = os.access(folder, os.W_OK)
    except OSError:
      writable = False
    if not writable:
      logging.warning("%s cannot be written, compiled programs are not kept; set --config.compilation_cache", folder)
      return
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
  compilation_cache.reset_cache()  # JAX looks only once where it is
