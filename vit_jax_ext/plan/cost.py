"""What instructions of a compiled program cost: FLOPs, and cycles where the compiler estimates none."""

from collections.abc import Sequence
import functools
import math
import re

from vit_jax_ext.plan.hlo import Array, Instruction, Program
from vit_jax_ext.plan.kinds import Kind

# Opcodes that compute each element of their result from one of each operand.
ARITHMETIC = re.compile(
  r"add|subtract|multiply|divide|maximum|minimum|power|remainder|negate|abs|sqrt|rsqrt|cbrt|exponential"
  r"|exponential-minus-one|log|log-plus-one|logistic|tanh|tan|sine|cosine|erf|atan2|and|or|not|xor|compare|select|clamp"
  r"|floor|ceil|round-nearest-even|round-nearest-afz|sign"
)
LANES = 4096  # elements that a sort compares in `SORT_CYCLES`
SORT_CYCLES = 4


def flops(program: Program, instruction: Instruction) -> tuple[int, int]:
  """Returns the FLOPs of one execution, and those of them that are in products of matrices and convolutions.

  A fusion does what its parts do. A multiplication with addition is two.
  """
  return _flops(program, instruction.computation, instruction.name)


@functools.lru_cache(maxsize=1_000_000)
def _flops(program: Program, computation: str, name: str) -> tuple[int, int]:
  instruction = program.computations[computation][name]
  elements = sum(math.prod(array.shape) for array in instruction.results)
  match instruction.opcode:
    case "fusion":
      parts = [_flops(program, inner, part) for inner in instruction.called() for part in program.computations[inner]]
      return sum(part[0] for part in parts), sum(part[1] for part in parts)
    case "dot":
      products = 2 * elements * _contracted(program, instruction)
      return products, products
    case "convolution":
      products = 2 * _convolution(instruction, *program.operands(instruction)[:2], instruction.results[0])
      return products, products
    case "reduce" | "reduce-window":
      return sum(math.prod(array.shape) for array in program.operands(instruction)[: len(instruction.results)]), 0
    case "custom-call" if instruction.target.startswith("__cu"):  # NVIDIA's libraries
      return (_library_flops(program, instruction),) * 2
    case "custom-call":
      found = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.rest)
      return (int(found[1]) if found else 0,) * 2
    case opcode:
      return (elements if ARITHMETIC.fullmatch(opcode) else 0), 0


def _contracted(program: Program, instruction: Instruction) -> int:
  """Returns how many products each element of a product of matrices sums up."""
  left = program.operands(instruction)[0]
  found = re.search(r'lhs_contracting_dim(?:s|ensions)"?[=:][{\[]([\d,"]*)', instruction.rest)
  return math.prod(left.shape[int(i)] for i in re.findall(r"\d+", found[1])) if found else 1


def _library_flops(program: Program, instruction: Instruction) -> int:
  arrays, result = program.operands(instruction), instruction.results[0]
  if "gemm_backend_config" in instruction.rest:
    return 2 * math.prod(result.shape) * _contracted(program, instruction)
  if "dim_labels" not in instruction.rest:
    return 0
  # What a gradient computes, another pass reads; the shapes are those of the forward pass.
  image, kernel, out = {
    "__cudnn$convBackwardFilter": (arrays[0], result, arrays[1]),
    "__cudnn$convBackwardInput": (result, arrays[1], arrays[0]),
  }.get(instruction.target, (arrays[0], arrays[1], result))
  return 2 * _convolution(instruction, image, kernel, out)


def _convolution(instruction: Instruction, image: Array, kernel: Array, result: Array) -> int:
  """Returns the multiplications: pairs of positions that lie on padding or between dilated elements do not count."""
  left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
  window = dict(re.findall(r"(\w+)=([\w-]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or ["", ""])[1]))
  groups = {name: int(number) for name, number in re.findall(r"(feature|batch)_group_count=(\d+)", instruction.rest)}
  count = image.shape[left.index("b")] // groups.get("batch", 1)
  count *= kernel.shape[right.index("i")] * result.shape[out.index("f")]
  for i, spatial in enumerate(sorted(set(left) - set("bf"))):
    per = {name: values.split("x")[i] for name, values in window.items()}
    count *= _positions(
      image.shape[left.index(spatial)],
      kernel.shape[right.index(spatial)],
      result.shape[out.index(spatial)],
      int(per.get("stride", 1)),
      int(per.get("pad", "0_0").split("_")[0]),
      int(per.get("lhs_dilate", 1)),
      int(per.get("rhs_dilate", 1)),
    )
  return count


@functools.cache
def _positions(image: int, kernel: int, out: int, stride: int, pad: int, image_dilation: int, dilation: int) -> int:
  """Returns the pairs of places in kernel and result, along one dimension, that meet an element of the image."""
  places = (o * stride + k * dilation - pad for o in range(out) for k in range(kernel))
  return sum(place % image_dilation == 0 and 0 <= place // image_dilation < image for place in places)


def counted_cycles(program: Program, instruction: Instruction, kind: Kind) -> int:
  """Returns the cycles that we count on a TPU for one execution of what the compiler does not estimate.

  A sort: bitonic, on n' = 2^k elements a row, k (k + 1) / 2 rounds in which 4,096 of them are compared in 4 cycles.
  All else, kernels included: what memory or matrix units take at their published speed, at least one.
  """
  if instruction.opcode == "sort":
    (dimension,) = re.search(r"dimensions=\{(\d+)\}", instruction.rest).groups()
    return _sort_cycles(instruction.results[0].shape, int(dimension))
  return max(
    1,
    round(program.memory_bytes(instruction) / kind.bandwidth * kind.clock),
    round(flops(program, instruction)[0] / kind.peak * kind.clock),
  )


def _sort_cycles(shape: Sequence[int], dimension: int) -> int:
  rows, rounds = math.prod(shape) // shape[dimension], math.ceil(math.log2(max(shape[dimension], 1)))
  return math.ceil(rows * 2**rounds * rounds * (rounds + 1) / 2 * SORT_CYCLES / LANES)
