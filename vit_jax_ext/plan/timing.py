"""A program of an experiment run on the devices at hand, with synthetic images: its time, and a trace of it."""

import statistics
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from vit_jax_ext.plan.compile import find_program
from vit_jax_ext.training import sharding
from vit_jax_ext.training.experiment import Experiment

SECONDS, LEAST, MOST = 5.0, 5, 200  # how long steps are timed, and how many
TRACED = 3


def time_program(
  config: ml_collections.ConfigDict, experiment: Experiment, program: str, trace: str | None = None
) -> dict[str, Any]:
  """Returns what a step takes, each timed until it is done, after two that are not.

  Args:
    config: of the experiment.
    experiment: on devices that are at hand.
    program: one of `compile.PROGRAMS`.
    trace: folder that gets a trace of TRACED more steps, for XProf and TensorBoard.

  Returns:
    steps, how many were timed; step, their median in seconds; fastest, slowest; images_per_second; peak_memory, the
    bytes of the fullest device since the process began, where the devices count them.

  Raises:
    jax.errors.JaxRuntimeError: the devices fail, for instance for want of memory.
  """
  function, arguments, _ = find_program(config, experiment, program)
  compiled, state = function.lower(*arguments).compile(), experiment.init()
  weights = (state,) if program == "train" else (state.params, state.stats)
  batch = _synthetic(arguments[-1], experiment, program)

  def step():
    nonlocal weights
    result = jax.block_until_ready(compiled(*weights, batch))
    if program == "train":  # which consumes the state
      weights = result[:1]

  for _ in range(2):
    step()
  times = []
  while len(times) < LEAST or (sum(times) < SECONDS and len(times) < MOST):
    start = time.perf_counter()
    step()
    times.append(time.perf_counter() - start)
  if trace:
    with jax.profiler.trace(trace):
      for number in range(TRACED):
        with jax.profiler.StepTraceAnnotation(program, step_num=number):
          step()
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in experiment.mesh.devices.flat]
  median = statistics.median(times)
  return {
    "steps": len(times),
    "step": median,
    "fastest": min(times),
    "slowest": max(times),
    "images_per_second": config.batch_size / median,
    "peak_memory": None if None in peaks else max(peaks),
  }


def _synthetic(like: Any, experiment: Experiment, program: str) -> Any:
  """Returns a batch of noise of class 0, all of which counts, where the program wants it."""
  rng = np.random.default_rng(0)
  place = sharding.replicated(experiment.mesh) if program == "predict" else experiment.by_batch

  def fill(leaf):
    match leaf.dtype.name:
      case "uint8":
        values = rng.integers(0, 256, leaf.shape, np.uint8)
      case "int32":
        values = np.zeros(leaf.shape, np.int32)
      case "bool":
        values = np.ones(leaf.shape, bool)
    return jax.device_put(values, place)

  return jax.tree.map(fill, like)
