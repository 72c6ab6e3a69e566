"""What a machine with an accelerator that JAX does not use is told; its device files are made in a folder."""

import pathlib
import subprocess
import sys

import jax
import pytest

from vit_jax_ext.training import accelerators

ROOT = pathlib.Path(__file__).parents[2]
CUDA, TPU = "pip install 'vit_jax_ext[cuda]'", "pip install 'vit_jax_ext[tpu]'"
GOOGLE, INTEL = "0x1ae0\n", "0x8086\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """Returns a function that makes files, from path to content, and says what is then told."""
  monkeypatch.setattr(accelerators, "ROOT", tmp_path)
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  chosen = jax.config.jax_platforms
  jax.config.update("jax_platforms", None)

  def told(files):
    for path, content in files.items():
      (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / path).write_text(content)
    return accelerators.unused()

  yield told
  jax.config.update("jax_platforms", chosen)


@pytest.mark.parametrize(
  ("files", "remedy"),
  [
    ({}, None),
    ({"dev/nvidia0": ""}, CUDA),
    ({"dev/nvidia7": "", "dev/nvidiactl": ""}, CUDA),
    ({"dev/nvidiactl": "", "proc/driver/nvidia/version": ""}, None),  # a container that was given no GPU
    ({"usr/lib/wsl/lib/libcuda.so.1": ""}, CUDA),
    ({"dev/accel0": "", "sys/bus/pci/devices/0000:00:04.0/vendor": GOOGLE}, TPU),
    ({"dev/vfio/0": "", "sys/bus/pci/devices/0000:00:05.0/vendor": GOOGLE}, TPU),
    ({"dev/vfio/vfio": "", "sys/bus/pci/devices/0000:00:05.0/vendor": GOOGLE}, None),  # Google's network card
    ({"dev/accel/accel0": "", "sys/bus/pci/devices/0000:00:0b.0/vendor": INTEL}, None),  # Intel's NPU
    ({"dev/vfio/12": "", "sys/bus/pci/devices/0000:00:0b.0/vendor": INTEL}, None),  # lent to a virtual machine
  ],
)
def test_what_is_told(machine, files, remedy):
  line = machine(files)
  assert line is None if remedy is None else line.endswith(remedy) and "\n" not in line


def test_who_chose_the_cpu_is_told_nothing(machine, monkeypatch):
  gpu = {"dev/nvidia0": ""}
  for hidden in ("", "-1"):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert machine(gpu) is None
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
  assert machine(gpu)
  jax.config.update("jax_platforms", "cpu")
  assert machine(gpu) is None


def test_a_plugin_that_fails_needs_no_installation(machine, monkeypatch):
  monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin" or None)
  line = machine({"dev/nvidia0": ""})
  assert "nvidia-smi" in line and "pip" not in line


def test_commands_tell(machine, run, tiny_config, data_dir, tmp_path):
  machine({"dev/nvidia0": ""})
  flags = f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}"
  status, out, err = run("doctor", *flags)
  (line,) = (line for line in out.splitlines() if line.startswith("WRONG"))
  assert status == 2 and line.split()[1] == "devices" and CUDA in line
  # Something else ends the training at once.
  status, out, err = run("train", *flags, "--config.dataset.eval_split=val")
  first, *others = err.splitlines()
  assert first.startswith("warning: ") and CUDA in first
  assert status == 2 and not [line for line in others if "GPU" in line]


def test_jax_tells_nothing_beside(tmp_path):
  """JAX has its own line, without a remedy, where it finds these files."""
  code = f"""if True:
    import pathlib, sys
    from jax._src import hardware_utils
    from vit_jax_ext.training import accelerators
    gpu = pathlib.Path({str(tmp_path)!r}, "dev", "nvidia0")
    gpu.parent.mkdir()
    gpu.touch()
    hardware_utils._NVIDIA_GPU_DEVICES = [str(gpu)]
    accelerators.ROOT = gpu.parents[1]
    print(accelerators.unused())
  """
  environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
  assert done.returncode == 0
  # libtpu, which is here for plans, may say that it finds no TPU.
  assert "GPU" not in done.stderr
  assert CUDA in done.stdout


def test_jax_that_does_not_start(tmp_path):
  environment = {"PATH": "", "JAX_PLATFORMS": "cpuu", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
  done = subprocess.run([sys.executable, ROOT / "main.py"], capture_output=True, text=True, env=environment)
  assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "cpuu" in done.stderr
