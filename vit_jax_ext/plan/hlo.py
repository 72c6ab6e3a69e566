"""Reads optimised HLO, the text of a compiled program: which instructions run, how often, and where they come from.

The text is that of `jax.stages.Compiled.as_text`: tables of files, functions and stack frames, then computations, one
instruction a line. https://openxla.org/xla/terminology has its words.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
import re

# Names for values that are there anyway; parts of asynchronous operations after their start.
FREE = re.compile(
  r"parameter|constant|get-tuple-element|tuple|bitcast|after-all|partition-id|replica-id|opt-barrier|iota|.*-(done|update)"
)
_HEADER = re.compile(r"(ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(\S+) = (.+?) ([a-z][a-z0-9-]*)\((.*)")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_TABLE = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n((?:\d+ .*\n)*)", re.M)


@dataclasses.dataclass(frozen=True)
class Array:
  """A part of an instruction's type.

  Attributes:
    dtype, shape: such as bf16, (128, 197, 384).
    order: dimensions from the fastest to the slowest in memory.
    tile: shape in multiples of which the slowest dimensions are kept, as on TPUs; () for none.
    on_chip: not in the device's main memory.
  """

  dtype: str
  shape: tuple[int, ...]
  order: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  on_chip: bool = False

  @property
  def itemsize(self) -> float:
    """Bytes of an element."""
    return 1 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype)[0]) / 8

  @property
  def size(self) -> int:
    """Bytes without padding."""
    return math.ceil(math.prod(self.shape) * self.itemsize)

  @property
  def padded_size(self) -> int:
    """Bytes that the array takes up in memory."""
    sizes = [self.shape[i] for i in reversed(self.order)] if self.order else list(self.shape)
    for i, tile in enumerate(reversed(self.tile[-len(sizes) :] if sizes else ()), 1):
      sizes[-i] = -(-sizes[-i] // tile) * tile
    return math.ceil(math.prod(sizes) * self.itemsize)


@functools.lru_cache(maxsize=100_000)
def read_type(text: str) -> tuple[Array, ...]:
  """Returns the arrays of a type, such as `(f32[8,4]{1,0:T(8,128)}, bf16[])`."""
  arrays = []
  for dtype, shape, order, layout in _ARRAY.findall(text):
    tile = re.search(r"T\(([\d,]+)\)", layout)
    space = re.search(r"S\((\d+)\)", layout)
    arrays.append(
      Array(dtype, _numbers(shape), _numbers(order), _numbers(tile[1]) if tile else (), bool(space and space[1] != "0"))
    )
  return tuple(arrays)


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(",") if number)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name, opcode: such as fusion.3, fusion.
    type: of its result, as text.
    operands: names.
    rest: of the line, from the operands on.
    computation: name of the one that it stands in.
  """

  name: str
  opcode: str
  type: str
  operands: tuple[str, ...]
  rest: str
  computation: str

  @property
  def results(self) -> tuple[Array, ...]:
    """The arrays of its result."""
    return read_type(self.type)

  @property
  def cycles(self) -> int | None:
    """The compiler's estimate of one execution; None if it gives none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return int(found[1]) if found else None

  @property
  def target(self) -> str:
    """What a custom call calls."""
    found = re.search(r'custom_call_target="([^"]*)"', self.rest)
    return found[1] if found else ""

  def called(self, attribute: str = "calls|to_apply") -> list[str]:
    """Returns the computations that an attribute names."""
    found = re.search(rf"\b(?:{attribute})=(\{{[^}}]*\}}|%?[\w.-]+)", self.rest)
    return re.findall(r"[\w.-]+", found[1]) if found else []


class Program:
  """A compiled program.

  Args:
    text: optimised HLO.
    ours: part of the paths of the files whose lines count as places.

  Attributes:
    computations: name -> instructions by name.
    entry: name of the one that the program starts with.
    partitions: devices that it is for; of several TPU slices those of one.
    unknown_loops: names of loops whose rounds the compiler does not know; they count once.
  """

  def __init__(self, text: str, ours: str = "vit_jax_ext/"):
    self._ours = ours
    self._tables = {name: dict(line.split(" ", 1) for line in rows.splitlines()) for name, rows in _TABLE.findall(text)}
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.unknown_loops: list[str] = []
    self.partitions = int((re.search(r"num_partitions=(\d+)", text.partition("\n")[0]) or ["", 1])[1])
    inside = ""
    for line in text.splitlines():
      if line.startswith("  "):
        if inside and (found := _INSTRUCTION.match(line)):
          name, type_, opcode, rest = found.groups()
          operands = tuple(re.findall(r"%([\w.-]+)", rest.partition("), ")[0])) if opcode != "constant" else ()
          self.computations[inside][name] = Instruction(name, opcode, type_, operands, rest, inside)
      elif header := _HEADER.match(line):
        inside = header[2]
        self.computations[inside] = {}
        self.entry = inside if header[1] else getattr(self, "entry", "")

  def operands(self, instruction: Instruction) -> list[Array]:
    """Returns the arrays that an instruction reads."""
    here = self.computations[instruction.computation]
    return [array for name in instruction.operands if name in here for array in here[name].results]

  def executed(self) -> list[tuple[Instruction, int]]:
    """Returns what one execution runs, and how often: loops as often as they turn, the dearest of branches.

    A fusion is one instruction. Names of values that cost nothing are left out.
    """
    self.unknown_loops.clear()
    return list(self._walk(self.entry, 1))

  def _walk(self, computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
    for instruction in self.computations[computation].values():
      match instruction.opcode:
        case "while":
          rounds = self._rounds(instruction)
          if rounds is None:
            self.unknown_loops.append(instruction.name)
          yield from self._walk(instruction.called("body")[0], times * (1 if rounds is None else rounds))
        case "conditional":
          names = instruction.called("branch_computations") or (
            instruction.called("true_computation") + instruction.called("false_computation")
          )
          yield from max(([*self._walk(name, times)] for name in names), key=self._weight)
        case "call" | "async-start":
          for name in instruction.called():
            yield from self._walk(name, times)
        case opcode if not FREE.fullmatch(opcode):
          yield instruction, times

  def _rounds(self, loop: Instruction) -> int | None:
    """Returns how often a loop turns, as the compiler says, or if its counter runs to a constant as in `lax.scan`."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    (name,) = loop.called("condition")
    condition = self.computations[name]
    goes_on = [*condition.values()][-1]
    if goes_on.opcode != "compare" or "direction=LT" not in goes_on.rest or goes_on.operands[0] not in condition:
      return None
    counter, end = condition[goes_on.operands[0]], self._constant(name, goes_on.operands[1])
    carried = self.computations[loop.computation].get(loop.operands[0])
    if counter.opcode != "get-tuple-element" or end is None or carried is None or carried.opcode != "tuple":
      return None
    start = self._constant(loop.computation, carried.operands[int(re.search(r"index=(\d+)", counter.rest)[1])])
    return None if start is None else end - start

  def _constant(self, computation: str, name: str) -> int | None:
    """Returns the value of an integer constant, or of a copy of one."""
    while instruction := self.computations[computation].get(name):
      if instruction.opcode == "constant" and (number := re.match(r"-?\d+(?=\))", instruction.rest)):
        return int(number[0])
      if instruction.opcode not in ("copy", "bitcast"):
        return None
      name = instruction.operands[0]
    return None

  def _weight(self, executed: Sequence[tuple[Instruction, int]]) -> tuple[int, int]:
    cycles = sum((instruction.cycles or 0) * times for instruction, times in executed)
    return cycles, sum(self.memory_bytes(instruction) * times for instruction, times in executed)

  def memory_bytes(self, instruction: Instruction) -> int:
    """Returns what one execution reads from main memory and writes there, with padding; of a slice only the slice."""
    arrays = list(instruction.results)
    match instruction.opcode:
      case "copy-start" | "slice-start":  # whose result is destination and source
        arrays = arrays[:2]
      case "slice" | "dynamic-slice" | "gather":
        arrays *= 2
      case "dynamic-update-slice" | "scatter":
        update = instruction.operands[1 if instruction.opcode == "dynamic-update-slice" else 2]
        arrays = [*self.computations[instruction.computation][update].results] * 2
      case "custom-call" if instruction.target.startswith("__cu"):  # the rest of the result is scratch space
        arrays = arrays[:1] + self.operands(instruction)
      case "fusion":
        arrays = [array for parts in self._through(instruction) for array in parts]
      case _:
        arrays += self.operands(instruction)
    return sum(array.padded_size for array in arrays if not array.on_chip)

  def _through(self, fusion: Instruction) -> Iterator[Sequence[Array]]:
    """Yields what a fusion reads of each operand, and what it writes: not all where it slices or updates in place."""
    here, inner = self.computations[fusion.computation], self.computations[fusion.called()[0]]
    aliases = {part.name: part.operands[0] for part in inner.values() if part.opcode == "bitcast"}
    users = collections.defaultdict(list)
    for part in inner.values():
      for operand in part.operands:
        while operand in aliases:
          operand = aliases[operand]
        if part.name not in aliases:
          users[operand].append((part, part.operands[0] == operand or aliases.get(part.operands[0]) == operand))
    for part in inner.values():
      if part.opcode == "parameter":
        number = int(part.rest.partition(")")[0])
        whole = here[fusion.operands[number]].results if number < len(fusion.operands) else ()
        found = users[part.name]
        if found and all(first and user.opcode in ("slice", "dynamic-slice", "gather") for user, first in found):
          sliced = [array for user, _ in found for array in user.results]
          yield [dataclasses.replace(array, on_chip=any(w.on_chip for w in whole)) for array in sliced]
        elif not all(first and user.opcode == "dynamic-update-slice" for user, first in found):
          yield whole
    root = [*inner.values()][-1]
    parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for part, result in zip(parts, fusion.results, strict=False):
      while part.name in aliases:
        part = inner[aliases[part.name]]
      written = inner[part.operands[1]].results[0] if part.opcode == "dynamic-update-slice" else result
      yield [dataclasses.replace(written, on_chip=result.on_chip)]

  def source(self, instruction: Instruction) -> Instruction:
    """Returns the instruction that says where this one comes from: itself, a part of a fusion, what a copy copies."""
    for _ in range(8):
      if "stack_frame_id=" in instruction.rest:
        break
      if instruction.opcode == "fusion":
        parts = reversed(self.computations[instruction.called()[0]].values())
        instruction = next((part for part in parts if "stack_frame_id=" in part.rest), instruction)
        break
      here = self.computations[instruction.computation]
      if not instruction.operands or instruction.operands[0] not in here:
        break
      instruction = here[instruction.operands[0]]
    return instruction

  def direction(self, instruction: Instruction) -> str:
    """Returns forward or backward for the parts of a gradient, else nothing."""
    found = re.search(r'op_name="([^"]*)"', self.source(instruction).rest)
    name = found[1] if found else ""
    return "backward" if "transpose(" in name else "forward" if "jvp(" in name else ""

  def place(self, instruction: Instruction) -> tuple[str, str]:
    """Returns the innermost line of our source that an instruction comes from, and the classes that it runs in.

    Such as ("models/layers.py:120", "Attention/Linear"), of which there are at most two; a function where there is no
    class; "elsewhere" for what the compiler adds.
    """
    found = re.search(r"stack_frame_id=(\d+)", self.source(instruction).rest)
    line, classes, function = self._place(int(found[1])) if found else ("", (), "")
    return line or "elsewhere", "/".join(classes[-2:]) or function or "elsewhere"

  @functools.cache  # noqa: B019 (a program lives as long as the command)
  def _place(self, frame: int) -> tuple[str, tuple[str, ...], str]:
    if not frame:
      return "", (), ""
    fields = self._row("StackFrames", frame)
    location = self._row("FileLocations", fields["file_location_id"])
    # The number of the parent is one too large, so that 0 can stand for none.
    line, classes, outer = self._place(fields.get("parent_frame_id", 1) - 1)
    path = self._tables["FileNames"][str(location["file_name_id"])].strip('"')
    if self._ours not in path:
      return line, classes, outer
    function = self._tables["FunctionNames"][str(location["function_name_id"])].strip('"').split(".")[0]
    if function[:1].isupper() and classes[-1:] != (function,):
      classes += (function,)
    return f"{path.rpartition(self._ours)[2]}:{location['line']}", classes, function

  def _row(self, table: str, number: int) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", self._tables[table][str(number)])}
