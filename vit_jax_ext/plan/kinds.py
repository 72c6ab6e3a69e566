"""Kinds of devices: what is published about them, and as many of them as a program is to be compiled for."""

from collections.abc import Sequence
import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os

import jax

from vit_jax_ext.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
  """What is published about a kind, for each device as JAX counts them: a TPU v3 and a TPU7x chip are two.

  Attributes:
    peak: bfloat16 FLOP/s.
    memory: bytes.
    bandwidth: of the memory, bytes/s.
    link: bytes/s that a device sends to the others of its slice (TPU) or host (GPU), over all links, one way.
    network: bytes/s that it sends to other slices or hosts; None: not published.
    clock: Hz of a TPU; None: the compiler estimates no cycles.
    per_chip: devices of a chip.
    dimensions: of the shape of a slice.
    largest: devices' chips of the largest slice.
  """

  peak: float
  memory: float
  bandwidth: float
  link: float
  network: float | None
  clock: float | None = None
  per_chip: int = 1
  dimensions: int = 2
  largest: int = 0


GIB, GB = 2**30, 1e9

# TPUs: cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}, "System architecture"; links are half of the published
# two-way bandwidth. Clocks of v3 and v4: Jouppi et al. 2023 (2304.01433), Table 4. The others' are peak over what the
# matrix units do in a cycle: 4 x 128 x 128 x 2 FLOP (v5e), twice that (v5p), 4 x 256 x 256 x 2 (v6e, half a TPU7x).
# GPUs: the SXM cards' data sheets, dense; memory and its bandwidth as XLA has them (openxla/xla, target_config/specs);
# network: that of NVIDIA's DGX, one 200 (A100) or 400 Gb/s adapter for each GPU.
KINDS = {
  "v3": Kind(61.5e12, 16 * GIB, 450 * GB, 164 * GB, None, clock=0.94e9, per_chip=2, largest=1024),
  "v4": Kind(275e12, 32 * GIB, 1228 * GB, 300 * GB, None, clock=1.05e9, dimensions=3, largest=4096),
  "v5e": Kind(197e12, 16 * GIB, 819 * GB, 200 * GB, 3.1 * GB, clock=1.5e9, largest=256),
  "v5p": Kind(459e12, 95 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, clock=1.75e9, dimensions=3, largest=8960),
  "v6e": Kind(918e12, 32 * GIB, 1638 * GB, 400 * GB, 12.5 * GB, clock=1.75e9, largest=256),
  "tpu7x": Kind(
    1153.5e12, 96 * GIB, 3690 * GB, 300 * GB, 6.25 * GB, clock=2.2e9, per_chip=2, dimensions=3, largest=9216
  ),
  "a100": Kind(312e12, 85_100_068_864, 2039 * GB, 300 * GB, 25 * GB),
  "h100": Kind(989.4e12, 84_942_979_072, 3352 * GB, 450 * GB, 50 * GB),
  "h200": Kind(989.4e12, 151_397_597_184, 4800 * GB, 450 * GB, 50 * GB),
  "b200": Kind(2250e12, 191_514_411_008, 7672 * GB, 900 * GB, 50 * GB),
}

# What XLA's compiler asks of a GPU beside that: compute capability, cores, shared memory of a core and of a block, L2,
# clock in GHz, arithmetic units of a core, name. From the same specs.
_GPUS = {
  "a100": ("major: 8", 108, 167_936, 166_912, 41_943_040, 1.41, 64, "NVIDIA A100-SXM4-80GB"),
  "h100": (
    "major: 9 feature_extension: ACCELERATED_FEATURES", 132, 233_472, 232_448, 52_428_800, 1.98, 128,
    "NVIDIA H100 80GB HBM3",
  ),
  "h200": (
    "major: 9 feature_extension: ACCELERATED_FEATURES", 132, 233_472, 232_448, 52_428_800, 1.98, 128,
    "NVIDIA H200 141GB HBM3e",
  ),
  "b200": (
    "major: 10 feature_extension: ACCELERATED_FEATURES", 148, 233_472, 232_448, 132_644_864, 1.965, 128, "NVIDIA B200"
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for.

  Attributes:
    name: as the command line has it.
    devices: in JAX's order.
    kind: what is published about them; None: nothing.
  """

  name: str
  devices: Sequence[jax.Device]
  kind: Kind | None

  @property
  def chips(self) -> int:
    """How many chips the devices are."""
    return len(self.devices) // (self.kind.per_chip if self.kind else 1)


def open_target(name: str, slices: int = 1) -> Target:
  """Returns the devices that a name means. TPUs and GPUs need not be there, their compiler has to.

  Args:
    name: KIND:SHAPE, such as v5e:4x4, h100:HOSTSxGPUS or cpu:N; or "here". All but "here" keep JAX from the
      accelerators of this machine, and have to come before JAX is used.
    slices: of TPUs, each of this shape, that a network connects.

  Raises:
    UserError: there is no such kind or shape, or its compiler is not installed.
  """
  kind, _, shape = name.partition(":")
  if kind not in (*KINDS, "cpu", "here"):
    nearest = difflib.get_close_matches(kind, [*KINDS, "cpu", "here"], n=2) or [*KINDS, "cpu", "here"]
    raise UserError(f"--devices={name}: kind {kind!r} is unknown; did you mean {' or '.join(nearest)}?")
  if slices < 1 or (slices > 1 and (kind not in KINDS or kind in _GPUS)):
    raise UserError(f"--slices={slices} of {name}: only TPUs have slices, and at least one")
  if kind == "here":
    return Target(name, jax.devices(), _kind_of(jax.devices()[0]))
  jax.config.update("jax_platforms", "cpu")
  sizes = [int(size) for size in shape.split("x") if size.isdecimal()]
  if not sizes or min(sizes) < 1 or "x".join(map(str, sizes)) != shape:
    example = "8" if kind == "cpu" else "1x8" if kind in _GPUS else _shapes(KINDS[kind])[2]
    raise UserError(f"--devices={name} has no shape; write numbers with x between them, such as {kind}:{example}")
  if kind == "cpu":
    return Target(name, _simulate(name, sizes), None)
  return Target(name, _gpus(name, kind, sizes) if kind in _GPUS else _tpus(name, kind, sizes, slices), KINDS[kind])


def _kind_of(device: jax.Device) -> Kind | None:
  """Returns what is published about a device at hand."""
  aliases = {"TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
             "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}  # fmt: skip
  if device.device_kind in aliases:
    return KINDS[aliases[device.device_kind]]
  return next((KINDS[gpu] for gpu in _GPUS if gpu.upper() in device.device_kind), None)


def _simulate(name: str, sizes: Sequence[int]) -> Sequence[jax.Device]:
  if len(sizes) > 1:
    raise UserError(f"--devices={name}: CPU devices are simulated in a row; write cpu:{math.prod(sizes)}")
  with contextlib.suppress(RuntimeError):  # JAX has started
    jax.config.update("jax_num_cpu_devices", sizes[0])
  devices = jax.devices("cpu")
  if len(devices) < sizes[0]:
    raise UserError(
      f"--devices={name}: JAX has started with {len(devices)} CPU devices; set it in a process of its own"
    )
  return devices[: sizes[0]]


def _shapes(kind: Kind) -> list[str]:
  """Returns the shapes of slices of a kind of TPU, the smallest first."""
  powers = [2**i for i in range(8)]
  if kind.dimensions == 2:
    found = [(a, b) for a in powers for b in (a, 2 * a) if 4 <= a * b <= kind.largest]
  else:
    found = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    found += [(a, b, c) for a in powers[2:] for b in (a, 2 * a) for c in (b, 2 * b) if a * b * c <= kind.largest]
  return ["x".join(map(str, shape)) for shape in sorted(found, key=math.prod)]


def _tpus(name: str, kind: str, sizes: Sequence[int], slices: int) -> Sequence[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(f"--devices={name} needs the TPU compiler, libtpu; pip install 'vit_jax_ext[tpu]'")
  os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")  # it looks for no TPU, and takes no lock
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # so that it does not warn
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  options = {"num_slices": slices} if slices > 1 else {}
  if kind == "v4":
    options["chip_config_name"] = "megacore"  # a chip is one device
  from jax.experimental import topologies

  known = KINDS[kind]
  try:
    if len(sizes) != known.dimensions or math.prod(sizes) > known.largest:
      raise ValueError
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
  except (ValueError, jax.errors.JaxRuntimeError):
    chips = math.prod(sizes)
    nearest = sorted(_shapes(known), key=lambda shape: abs(math.log(math.prod(map(int, shape.split("x"))) / chips)))
    raise UserError(
      f"--devices={name}: {kind} has no such slice; near are {', '.join(nearest[:4])}, "
      f"the largest has {known.largest} chips"
    ) from None


def _gpus(name: str, kind: str, sizes: Sequence[int]) -> Sequence[jax.Device]:
  if len(sizes) != 2:
    raise UserError(f"--devices={name}: GPUs come as HOSTSxGPUS; write {kind}:{math.prod(sizes[:-1])}x{sizes[-1]}")
  if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (13, 12)):
    raise UserError(f"--devices={name} needs the GPU compiler, JAX's CUDA plugin; pip install 'vit_jax_ext[cuda]'")
  # With devices that are described, not there, XLA's Triton kernels cannot be tuned.
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false"
  from jax.experimental import topologies

  hosts, gpus = sizes
  description = topologies.get_topology_desc(
    platform="cuda", topology_name=kind, target_config=_gpu_description(kind), topology=f"1x{hosts}x{gpus}"
  )
  return description.devices


def _gpu_description(kind: str) -> str:
  """Returns a GpuTargetConfig, as XLA reads it."""
  capability, cores, shared, shared_of_block, l2, clock, units, name = _GPUS[kind]
  return f"""gpu_device_info {{
    threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: {units}
    shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_of_block}
    core_count: {cores} registers_per_core_limit: 65536 registers_per_block_limit: 65536
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
    memory_bandwidth: {KINDS[kind].bandwidth:.0f} l2_cache_size: {l2} clock_rate_ghz: {clock}
    device_memory_size: {KINDS[kind].memory} cuda_compute_capability {{ {capability} }}
    driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
  }}
  platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
  """
