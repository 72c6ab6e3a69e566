"""Compiled programs kept on disk: where, when, and that a part of one does no harm."""

import logging
import pathlib
import subprocess
import sys

import jax
from jax._src import compilation_cache as jax_cache
import jax.numpy as jnp
import ml_collections
import pytest

from vit_jax_ext import compilation_cache
from vit_jax_ext import config as configs


@pytest.fixture
def unset(monkeypatch, tmp_path):
  """JAX as commands find it, without a folder; afterwards it has that of the tests again."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  monkeypatch.setattr(jax_cache, "get_file_cache", jax_cache.get_file_cache)
  monkeypatch.setattr(compilation_cache, "SHORTEST", 0.0)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


def config(**values):
  return ml_collections.ConfigDict(values)


def run_anew():
  """Compiles and runs a program that this process forgets first; returns how often the cache had it."""
  hits = []

  def listener(event, **kw):
    hits.extend(["hit"] * (event == "/jax/compilation_cache/cache_hits"))

  jax.clear_caches()
  jax.monitoring.register_event_listener(listener)
  try:
    assert jax.jit(lambda x: jnp.sin(x) + 25.0)(jnp.float32(0)) == 25
  finally:
    jax.monitoring.unregister_event_listener(listener)
  return len(hits)


def entries(folder):
  names = sorted(path.name for path in pathlib.Path(folder).iterdir())
  assert all(name.endswith("-cache") for name in names)  # nothing half written
  return names


def test_next_start_compiles_nothing(unset, tmp_path):
  compilation_cache.use(config())
  assert run_anew() == 0
  names = entries(tmp_path / "home/vit_jax_ext/xla")
  assert names and run_anew() == len(names)


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
def test_damaged_entry_is_replaced(unset, tmp_path):
  compilation_cache.use(config(compilation_cache=str(tmp_path / "xla")))
  run_anew()
  names = entries(tmp_path / "xla")
  for name in names:
    path = tmp_path / "xla" / name
    path.write_bytes(path.read_bytes()[:50])
  assert run_anew() == 0
  assert names and run_anew() == len(names)


def test_disk_that_is_full(unset, tmp_path, monkeypatch, caplog):
  compilation_cache.use(config(compilation_cache=str(tmp_path)))

  def write_bytes(path, value):
    path.touch()
    raise OSError(28, "No space left on device")

  jax.jit(lambda x: x + 1)(1)  # JAX opens the folder
  for name in entries(tmp_path):
    (tmp_path / name).unlink()
  monkeypatch.setattr(type(jax_cache._cache.path), "write_bytes", write_bytes)
  with caplog.at_level(logging.WARNING):
    assert run_anew() == 0
  assert not entries(tmp_path)
  assert [record.getMessage() for record in caplog.records if "space" in record.getMessage()] == [
    "compiled programs are not kept: [Errno 28] No space left on device"
  ]


def test_folder_that_cannot_be_written(unset, tmp_path, caplog):
  (tmp_path / "file").touch()
  with caplog.at_level(logging.WARNING):
    compilation_cache.use(config(compilation_cache=str(tmp_path / "file" / "xla")))
  assert jax.config.jax_compilation_cache_dir is None
  (record,) = caplog.records
  assert str(tmp_path / "file/xla") in record.getMessage() and "--config.compilation_cache" in record.getMessage()


@pytest.mark.parametrize(("written", "folder"), [("none", None), ("", ""), ("gs://x/y", "gs://x/y")])
def test_the_command_line_says_where(written, folder):
  experiment = configs.load_config(configs.DEFAULT)
  configs.override(experiment, [f"compilation_cache={written}"])
  configs.check(experiment)
  assert experiment.compilation_cache == folder


@pytest.mark.parametrize("off", ["", None])
def test_switched_off(unset, tmp_path, off):
  compilation_cache.use(config(compilation_cache=off))
  assert jax.config.jax_compilation_cache_dir is None and not list(tmp_path.iterdir())


def test_folder_named_to_jax_wins(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  assert before  # the tests' own, as JAX_COMPILATION_CACHE_DIR
  compilation_cache.use(config(compilation_cache=str(tmp_path)))
  assert jax.config.jax_compilation_cache_dir == before


def test_library_keeps_nothing_by_itself():
  code = """if True:
    import vit_jax_ext as vx
    vx.create_model, vx.load_pretrained
    import jax
    import vit_jax_ext.compilation_cache
    print(jax.config.jax_compilation_cache_dir)
  """
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
  )
  assert done.stdout.strip() == "None", done.stderr
