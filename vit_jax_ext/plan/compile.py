"""The programs of an experiment, compiled for devices that need not be there. Nothing is computed or allocated."""

import dataclasses
import re
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from vit_jax_ext.training import sharding
from vit_jax_ext.training.evaluate import jit_eval_step
from vit_jax_ext.training.experiment import Experiment
from vit_jax_ext.training.predict import jit_probabilities

PROGRAMS = ("train", "evaluate", "predict")
GIB = 2**30


class DoesNotFitError(Exception):
  """The compiler does not find room for a program.

  Attributes:
    needed, limit: bytes on a device, of all that it holds.
  """

  def __init__(self, message: str):
    super().__init__(message)
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    sizes = [float(size) * units[unit] for size, unit in re.findall(r"([\d.]+)([KMGT])\b", message)]
    self.needed, self.limit = (round(size) for size in [*sizes, 0, 0][:2])


@dataclasses.dataclass(frozen=True)
class Compilation:
  """A compiled program.

  Attributes:
    compiled: by XLA.
    held: bytes on each device of what goes into it, by what it is.
    seconds: that lowering and compiling took.
    peak_memory: bytes of the process up to then.
  """

  compiled: jax.stages.Compiled
  held: dict[str, int]
  seconds: float
  peak_memory: int


def compile_program(config: ml_collections.ConfigDict, experiment: Experiment, program: str = "train") -> Compilation:
  """Compiles one of PROGRAMS: a step of the training or of an evaluation, or the classification of a batch.

  Raises:
    DoesNotFitError: it has no room on the devices, and their compiler checks that (those of TPUs do).
    jax.errors.JaxRuntimeError: the compiler fails otherwise.
  """
  start = time.monotonic()
  function, arguments, held = find_program(config, experiment, program)
  try:
    compiled = function.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      raise DoesNotFitError(str(error)) from None
    raise
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return Compilation(compiled, held, time.monotonic() - start, peak)


def find_program(config: ml_collections.ConfigDict, experiment: Experiment, program: str) -> tuple[Any, tuple, dict]:
  """Returns a jitted function, its abstract arguments, and the bytes of their parts on each device."""
  state, places = jax.eval_shape(experiment.init), experiment.places
  batch = experiment.abstract_batch(config.batch_size)
  parts = {"parameters": [(state.params, places.params), (state.stats, places.stats)]}
  if program == "train":
    parts["optimizer"] = [(state.opt_state, places.opt_state), (state.step, places.step)]
    parts["averages"] = [(state.ema, places.ema)]
    function, arguments = experiment.train_step, (state, batch)
  elif program == "evaluate":
    batch["mask"] = jax.ShapeDtypeStruct((config.batch_size,), jnp.bool)
    function = jit_eval_step(experiment.variant, experiment.model, experiment.layout, experiment.multi_label)
    arguments = (state.params, state.stats, batch)
  else:
    batch = {"image": batch["image"]}
    function = jit_probabilities(experiment.variant, experiment.model, experiment.layout)
    arguments = (state.params, state.stats, batch["image"])
  where = sharding.replicated(experiment.mesh) if program == "predict" else experiment.by_batch
  parts["batch"] = [(batch, jax.tree.broadcast(where, batch))]
  held = {name: sum(sharding.bytes_per_device(*pair) for pair in pairs) for name, pairs in parts.items()}
  return function, arguments, held
