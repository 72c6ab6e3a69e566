"""The programs that a training starts with, compiled ahead: their file, and whether it fits the training at hand.

`jax.experimental.serialize_executable` pickles what JAX knows of a program beside it. Here the training lowers its own
programs, as any training does, and these have to be those of the file. So that holds nothing that is unpickled: a
digest, a line of JSON, and the programs as XLA serialises them. They are machine code, though, and run as whoever loads
them: a file has to be one's own.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import hashlib
from importlib import metadata
import json
import os
import pathlib
import platform
from typing import Any
from unittest import mock

from absl import logging
import jax
from jax._src.interpreters import pxla  # where programs are compiled; no public way leads past that
from jax.experimental.compilation_cache import compilation_cache
import ml_collections

from vit_jax_ext.config import flatten
from vit_jax_ext.errors import UserError
from vit_jax_ext.files import replace
from vit_jax_ext.training import distributed
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.training.sharding import axis_sizes

KIND = "programs of vit_jax_ext, compiled"
COMPILERS = {"tpu": "libtpu", "gpu": "jax-cuda12-pjrt"}  # packages, by platform; jaxlib has that for CPUs
# Keys of the config of which no program depends.
FREE_KEYS = ("config.checkpoint", "config.compilation_cache", "config.dataset", "config.eval_every_steps",
             "config.log_every_steps", "config.pretrained", "config.when_smoke")  # fmt: skip


class _UnfitError(Exception):
  """A file does not fit; says why."""


def lower(experiment: Experiment, batch_size: int) -> dict[str, jax.stages.Lowered]:
  """Returns what there is to compile before the first step, `init` and `train_step`; nothing is allocated."""
  return {
    "init": experiment.init.func.lower(*experiment.init.args),
    "train_step": lower_train_step(experiment, batch_size),
  }


def lower_train_step(experiment: Experiment, batch_size: int) -> jax.stages.Lowered:
  """Returns the training step, to be compiled; nothing is allocated."""
  return experiment.train_step.lower(jax.eval_shape(experiment.init), experiment.abstract_batch(batch_size))


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
  """While open, JAX's cache on disk is not asked: XLA's programs for CPUs that come from it cannot be saved again."""
  enabled = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # it looks only once whether it is enabled
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def save(path: str, experiment: Experiment, config: ml_collections.ConfigDict, num_classes: int, examples: int) -> None:
  """Compiles the programs for the experiment's devices, which need not be at hand, and writes them.

  Args:
    path: of the file.
    experiment: of `config`, `num_classes` and `examples`.

  Raises:
    UserError: the file cannot be written.
  """
  lowered = lower(experiment, config.batch_size)
  with without_cache():
    programs = {name: program.compile().runtime_executable().serialize() for name, program in lowered.items()}
  header = {
    "circumstances": _circumstances(experiment),
    "settings": _settings(config, num_classes, examples, experiment.multi_label),
    "programs": {name: {"stablehlo": _digest(lowered[name]), "bytes": len(programs[name])} for name in programs},
  }
  content = b"\n".join([json.dumps(header).encode(), b"".join(programs.values())])
  with replace(os.path.dirname(path) or ".", os.path.basename(path), "save", binary=True) as file:
    file.write(f"{KIND} {hashlib.sha256(content).hexdigest()}\n".encode())
    file.write(content)


def load(
  path: str, experiment: Experiment, config: ml_collections.ConfigDict, num_classes: int, examples: int
) -> tuple[Callable, Callable]:
  """Returns `experiment.init` and `experiment.train_step` as `path` has them, compiled.

  Where that does not fit in one of the processes, the experiment's own are returned, and the log says why.

  Raises:
    UserError: there is no such file.
  """
  try:
    content = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(
      f"--compiled={path} cannot be read: {error.strerror}; make it with `plan --save={path}`, or leave it out"
    ) from None
  try:
    settings = _settings(config, num_classes, examples, experiment.multi_label)
    compiled = _load(content, experiment, config.batch_size, settings)
    reason = "it does not fit another process"
  except _UnfitError as error:
    compiled, reason = None, str(error)
  if not distributed.all_agree(compiled is not None):
    logging.warning("%s is not used and the training step is compiled, for %s", path, reason)
    return experiment.init, experiment.train_step
  logging.info("%s has the compiled training step", path)
  return functools.partial(compiled["init"], *experiment.init.args), compiled["train_step"]


def _load(content: bytes, experiment: Experiment, batch_size: int, settings: dict) -> dict[str, jax.stages.Compiled]:
  """Returns the programs of a file by name."""
  first, _, content = content.partition(b"\n")
  kind, _, digest = first.decode(errors="replace").rpartition(" ")
  if kind != KIND:
    raise _UnfitError("it was not made by `plan --save`")
  if digest != hashlib.sha256(content).hexdigest():
    raise _UnfitError("it is damaged")
  line, _, content = content.partition(b"\n")
  header = json.loads(line)
  if difference := _difference(header["circumstances"], _circumstances(experiment)):
    raise _UnfitError(difference)
  compiled, devices = {}, list(experiment.mesh.devices.flat)
  for name, program in lower(experiment, batch_size).items():
    described = header["programs"][name]
    if described["stablehlo"] != _digest(program):
      difference = _difference(header["settings"], settings)
      raise _UnfitError(difference or "it was made of other code")
    try:
      executable = devices[0].client.deserialize_executable(content[: described["bytes"]], devices)
    except jax.errors.JaxRuntimeError as error:
      raise _UnfitError(f"it does not load: {str(error).splitlines()[0]}") from None
    content = content[described["bytes"] :]
    with mock.patch.object(pxla, "_cached_compilation", lambda *_, executable=executable: executable):
      compiled[name] = program.compile()
  return compiled


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
  """Returns the first difference between a file and the training at hand, in words."""
  for name in [*ours, *theirs]:
    if theirs.get(name) != ours.get(name):
      return f"it was made with {name} {theirs.get(name)}, this is {ours.get(name)}"
  return None


def _settings(config: ml_collections.ConfigDict, num_classes: int, examples: int, multi_label: bool) -> dict[str, Any]:
  """Returns what the programs are made of."""
  values = flatten({"config": json.loads(config.to_json_best_effort())})
  values = {key: value for key, value in values.items() if not key.startswith(FREE_KEYS)}
  return {"--num-classes": num_classes, "--examples": examples, "several labels": multi_label} | values


def _circumstances(experiment: Experiment) -> dict[str, Any]:
  """Returns what has to be the same where the programs are compiled and where they run."""
  devices = list(experiment.mesh.devices.flat)
  packages = ["jax", "jaxlib", "vit_jax_ext", *filter(None, [COMPILERS.get(devices[0].platform)])]
  flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
  places = [(device.id, device.process_index, getattr(device, "coords", None)) for device in devices]
  found = {package: _version(package) for package in packages} | {
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "processes": len({device.process_index for device in devices}),
    "mesh": ", ".join(f"{axis}={size}" for axis, size in axis_sizes(experiment.mesh).items()),
    "XLA_FLAGS": " ".join(sorted(flags)),
    "devices' places": hashlib.sha256(repr(places).encode()).hexdigest()[:12],
  }
  return found | ({"processor": _processor()} if devices[0].platform == "cpu" else {})


def _processor() -> str:
  """Returns this host's kind of CPU; XLA compiles for the instructions that it finds."""
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def _digest(program: jax.stages.Lowered) -> str:
  return hashlib.sha256(program.as_text().encode()).hexdigest()
