"""Accelerators that this machine has and JAX does not use."""

import importlib.util
import logging
import os
import pathlib

import jax

from vit_jax_ext.errors import RunError

ROOT = pathlib.Path("/")
GOOGLE = "0x1ae0"  # as PCI vendor, of TPUs and of the network cards and disks of Google's machines
NO_GPU = ("", "-1", "NoDevFiles")  # what CUDA_VISIBLE_DEVICES is set to where GPUs are hidden, by SLURM too


def unused() -> str | None:
  """Returns a line about the GPU or TPU that this machine has while JAX uses the CPU, with the remedy; else None.

  Starts JAX. Who has chosen by JAX_PLATFORMS, or hidden the GPUs, is told nothing.

  Raises:
    RunError: JAX does not start.
  """
  logger = logging.getLogger("jax._src.xla_bridge")
  logger.addFilter(_not_told_below)
  try:
    platform = jax.default_backend()
  except (RuntimeError, AssertionError) as error:  # the latter says nothing, and is about devices that are not there
    reason = str(error) or "it finds none of these devices"
    raise RunError(f"JAX does not start on JAX_PLATFORMS={jax.config.jax_platforms!r}: {reason}") from None
  finally:
    logger.removeFilter(_not_told_below)
  if platform != "cpu" or jax.config.jax_platforms:
    return None
  if _has_gpu() and any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    return "this machine has an NVIDIA GPU, but JAX's plugin for it fails and the CPU is used; does nvidia-smi work?"
  if _has_gpu():
    return "this machine has an NVIDIA GPU, but JAX sees only the CPU; run pip install 'vit_jax_ext[cuda]'"
  if _has_tpu():
    return "this machine has a TPU, but JAX sees only the CPU; run pip install 'vit_jax_ext[tpu]'"
  return None


def _not_told_below(record: logging.LogRecord) -> bool:
  """Leaves out JAX's own line, which names no remedy, and keeps why a plugin fails."""
  return "is not installed" not in record.getMessage()


def _has_gpu() -> bool:
  devices = [*ROOT.glob("dev/nvidia[0-9]*"), *ROOT.glob("usr/lib/wsl/lib/libcuda.so*")]  # the latter under Windows
  return bool(devices) and os.environ.get("CUDA_VISIBLE_DEVICES") not in NO_GPU


def _has_tpu() -> bool:
  devices = [*ROOT.glob("dev/accel[0-9]*"), *ROOT.glob("dev/vfio/[0-9]*")]  # up to v4, from v5 on
  vendors = {path.read_text().strip() for path in ROOT.glob("sys/bus/pci/devices/*/vendor")}
  return bool(devices) and GOOGLE in vendors
