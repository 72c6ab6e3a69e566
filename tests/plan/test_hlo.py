"""Reading of optimised HLO, against counts by hand."""

import pytest

from vit_jax_ext.plan.hlo import Program, read_type

# A loop of 3 rounds with one of 5 in it; a branch; a call; a fusion with a slice and an update in place.
PROGRAM = """HloModule example, is_scheduled=true, num_partitions=2

FileNames
1 "/home/me/run.py"
2 "/home/me/vit_jax_ext/models/layers.py"
3 "/lib/flax/linear.py"

FunctionNames
1 "<module>"
2 "Block.__call__"
3 "Attention.__call__.<locals>.heads"
4 "dot"
5 "softmax"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=2 end_column=9}
2 {file_name_id=2 function_name_id=2 line=40 end_line=40 column=2 end_column=9}
3 {file_name_id=2 function_name_id=3 line=30 end_line=30 column=2 end_column=9}
4 {file_name_id=3 function_name_id=4 line=99 end_line=99 column=2 end_column=9}
5 {file_name_id=2 function_name_id=5 line=20 end_line=20 column=2 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=4}
5 {file_location_id=5 parent_frame_id=5}

%fused (p0: bf16[12,8,128], p1: f32[12,8,128], p2: s32[]) -> f32[12,8,128] {
  %p0 = bf16[12,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = f32[12,8,128]{2,1,0:T(8,128)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %slice.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p2, %p2, %p2), dynamic_slice_sizes={1,8,128}
  %convert.1 = f32[1,8,128]{2,1,0:T(8,128)} convert(%slice.1), metadata={op_name="transpose(jvp())/x" stack_frame_id=5}
  ROOT %update.1 = f32[12,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p1, %convert.1, %p2, %p2, %p2)
}

%inner (x: f32[4]) -> f32[4] {
  ROOT %copy.1 = f32[4]{0:T(128)} copy(%x), backend_config={"estimated_cycles":"10"}
}

%condition (x: f32[4]) -> pred[] {
  ROOT %less = pred[] compare(%x, %y), direction=LT
}

%outer (x: f32[4]) -> f32[4] {
  %while.1 = (s32[], s8[]) while(%x), condition=%condition, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %copy.2 = f32[4]{0} copy(%x), backend_config={"estimated_cycles":"7"}
}

%cheap (x: f32[4]) -> f32[4] {
  ROOT %copy.3 = f32[4]{0} copy(%x), backend_config={"estimated_cycles":"1"}
}

%dear (x: f32[4]) -> f32[4] {
  ROOT %copy.4 = f32[4]{0} copy(%x), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (a: bf16[12,8,128], b: f32[12,8,128]) -> (f32[9,100]) {
  %a = bf16[12,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[12,8,128]{2,1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %fusion.1 = f32[12,8,128]{2,1,0:T(8,128)} fusion(%a, %b, %zero), kind=kLoop, calls=%fused
  %while.2 = f32[4]{0} while(%x), condition=%condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %conditional.1 = f32[4]{0} conditional(%x), branch_computations={%cheap, %dear}
  %call.1 = f32[4]{0} call(%x), to_apply=%cheap
  %dot.1 = f32[9,100]{1,0:T(8,128)} dot(%a, %b), metadata={op_name="f/jvp()/dot" stack_frame_id=4}
  %copy.5 = f32[9,100]{0,1:T(8,128)} copy(%dot.1)
  ROOT %tuple.1 = (f32[9,100]{0,1:T(8,128)}) tuple(%copy.5)
}
"""


@pytest.fixture(scope="module")
def program():
  return Program(PROGRAM)


def test_loops_turn_and_only_the_dearest_branch_counts(program):
  assert {instruction.name: times for instruction, times in program.executed()} == {
    "fusion.1": 1, "copy.1": 15, "copy.2": 3, "copy.4": 1, "copy.3": 1, "dot.1": 1, "copy.5": 1,
  }  # fmt: skip
  assert sum((i.cycles or 0) * times for i, times in program.executed()) == 15 * 10 + 3 * 7 + 1000 + 1
  assert program.unknown_loops == [] and program.partitions == 2


def test_a_loop_of_unknown_rounds_is_named_and_counted_once():
  program = Program(PROGRAM.replace('"n":"5"', '"n":"?"'))
  assert {i.name: times for i, times in program.executed()}["copy.1"] == 3
  assert program.unknown_loops == ["while.1"]


@pytest.mark.parametrize(
  ("condition", "start", "rounds"),
  [
    ("compare(%i, %n), direction=LT", 0, 4),
    ("compare(%i, %n), direction=LT", 1, 3),
    ("compare(%n, %i), direction=LT", 0, None),
    ("compare(%i, %i), direction=LT", 0, None),
    ("and(%i, %n)", 0, None),
  ],
)
def test_rounds_of_a_loop_as_jax_writes_it(condition, start, rounds):
  program = Program(f"""HloModule m

%body (x: (s32[], f32[4])) -> (s32[], f32[4]) {{
  ROOT %copy.1 = f32[4]{{0}} copy(%x)
}}

%condition (x: (s32[], f32[4])) -> pred[] {{
  %x.1 = (s32[], f32[4]) parameter(0)
  %n = s32[] constant(4)
  %i = s32[] get-tuple-element(%x.1), index=0
  ROOT %less = pred[] {condition}
}}

ENTRY %main (y: f32[4]) -> (s32[], f32[4]) {{
  %y = f32[4]{{0}} parameter(0)
  %c = s32[] constant({start})
  %copy.2 = s32[]{{:S(6)}} copy(%c)
  %tuple.1 = (s32[], f32[4]) tuple(%copy.2, %y)
  ROOT %while.1 = (s32[], f32[4]) while(%tuple.1), condition=%condition, body=%body
}}
""")
  assert {i.name: times for i, times in program.executed()}["copy.1"] == (rounds or 1)
  assert program.unknown_loops == ([] if rounds else ["while.1"])


def test_places_are_our_innermost_lines(program):
  entry = program.computations["main"]
  # Through flax to the line of Attention that calls it; a copy belongs to what it copies, a fusion to its parts.
  assert program.place(entry["dot.1"]) == ("models/layers.py:30", "Block/Attention")
  assert program.place(entry["copy.5"]) == ("models/layers.py:30", "Block/Attention")
  assert program.place(entry["fusion.1"]) == ("models/layers.py:20", "Block/Attention")
  assert program.place(entry["call.1"]) == ("elsewhere", "elsewhere")
  assert [program.direction(entry[name]) for name in ("dot.1", "fusion.1", "call.1")] == ["forward", "backward", ""]


def test_bytes_are_those_of_slices_and_padded_tiles(program):
  entry = program.computations["main"]
  assert program.memory_bytes(entry["fusion.1"]) == 8 * 128 * (2 + 4)  # a slice in, one out
  assert program.memory_bytes(entry["copy.5"]) == 4 * (16 * 128) + 4 * (104 * 128)  # transposed, so padded otherwise


@pytest.mark.parametrize(
  ("text", "size", "padded"),
  [
    ("bf16[37,12]{1,0:T(8,128)(2,1)}", 888, 2 * 40 * 128),
    ("f32[2,197,3]{1,2,0:T(4,128)}", 4728, 4 * 2 * 4 * 256),
    ("pred[10]{0}", 10, 10),
    ("s4[10]", 5, 5),
    ("(f32[], bf16[3,5]{1,0}, /*index=2*/f64[2])", 4 + 30 + 16, 4 + 30 + 16),
    ("f32[]{:T(128)}", 4, 4),
  ],
)
def test_sizes(text, size, padded):
  assert sum(array.size for array in read_type(text)) == size
  assert sum(array.padded_size for array in read_type(text)) == padded


def test_memory_on_the_chip_is_known():
  on_chip, in_memory = read_type("(f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)S(0)})")
  assert on_chip.on_chip and not in_memory.on_chip
