"""Collectives in the ways in which HLO writes them."""

import pytest

from vit_jax_ext.plan.collectives import Collective, find_collectives, replica_groups
from vit_jax_ext.plan.hlo import Program

PROGRAM = """HloModule example, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%start (p: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c.1 = bf16[16,8]{1,0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p: bf16[4,8]) -> bf16[16,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%p.2), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%scatter (p: f32[16,8]) -> f32[4,8] {
  %p.3 = f32[16,8]{1,0} parameter(0)
  %all-reduce.2 = f32[16,8]{1,0} all-reduce(%p.3), channel_id=6, replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %mine = f32[4,8]{1,0} dynamic-slice(%all-reduce.2, %i, %j), dynamic_slice_sizes={4,8}
}

%body (x: f32[4]) -> f32[4] {
  ROOT %all-to-all.1 = (f32[2]{0}, f32[2]{0}) all-to-all(%x), channel_id=7, replica_groups={{0,4},{1,5},{2,6},{3,7}}
}

%condition (x: f32[4]) -> pred[] {
  ROOT %less = pred[] compare(%x, %y), direction=LT
}

ENTRY %main (x: f32[10,10], y: bf16[4,8], z: f32[16,8]) -> f32[10,10] {
  %x = f32[10,10]{1,0} parameter(0)
  %y = bf16[4,8]{1,0} parameter(1)
  %z = f32[16,8]{1,0} parameter(2)
  %all-reduce.1 = f32[10,10]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %fusion.1 = bf16[16,8]{1,0} fusion(%y), kind=kCustom, calls=%start
  %fusion.2 = bf16[16,8]{1,0} fusion(%y), kind=kOutput, calls=%meanwhile
  %fusion.3 = f32[4,8]{1,0} fusion(%z), kind=kCustom, calls=%scatter
  %while.1 = f32[4]{0} while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %collective-permute-start.1 = (f32[16,8]{1,0}, f32[16,8]{1,0}, u32[]) collective-permute-start(%z), source_target_pairs={{0,1},{1,2}}
  %collective-permute-done.1 = f32[16,8]{1,0} collective-permute-done(%collective-permute-start.1)
  ROOT %done = f32[10,10]{1,0} add(%x, %all-reduce.1)
}
"""  # noqa: E501


def test_kinds_axes_bytes_and_what_is_sent():
  found = find_collectives(Program(PROGRAM), {"data": 2, "fsdp": 4, "model": 1}, [0] * 4 + [1] * 4)
  assert found == [
    # Each island of 4 sums up, 2 x 3/4 of the array; then a quarter of it goes to the other and back.
    Collective("all-reduce", "data x fsdp", 400, 1, False, near=2 * 0.75 * 400, far=2 * 100 / 2),
    Collective("all-gather", "fsdp", 256, 1, True, near=0.75 * 256, far=0.0),
    Collective("reduce-scatter", "fsdp", 512, 1, False, near=0.75 * 512, far=0.0),
    Collective("all-to-all", "data", 16, 3, False, near=0.0, far=8.0),
    Collective("collective-permute", "fsdp", 512, 1, True, near=512.0, far=0.0),
  ]


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("source_target_pairs={{0,3},{2,1}}", [[0, 3], [2, 1]]),
    ("replica_groups={}", [[0, 1, 2, 3]]),
  ],
)
def test_groups(text, groups):
  assert replica_groups(text, 4) == groups


@pytest.mark.parametrize("waits", [False, True])
def test_a_gpu_says_itself_whether_it_waits(waits):
  text = f"""HloModule example, num_partitions=8

ENTRY %main (x: f32[10]) -> f32[10] {{
  %x = f32[10]{{0}} parameter(0)
  %all-reduce-start = f32[10]{{0}} all-reduce-start(%x), channel_id=1, replica_groups=mesh['a'=8,'b'=1] {{'a'}}, to_apply=%sum, backend_config={{"collective_backend_config":{{"is_sync":{str(waits).lower()}}}}}
  ROOT %all-reduce-done = f32[10]{{0}} all-reduce-done(%all-reduce-start)
}}
"""  # noqa: E501
  (found,) = find_collectives(Program(text), {"data": 8, "fsdp": 1, "model": 1}, [0] * 4 + [1] * 4)
  assert found == Collective("all-reduce", "data", 40, 1, not waits, near=2 * 0.75 * 40, far=2 * 10 / 2)


def test_slices_that_a_network_connects():
  """The program is that of one slice, and sends to the others what it has summed up."""
  text = """HloModule example, num_partitions=2

ENTRY %main (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %all-reduce.1 = f32[10]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%sum
  %send.1 = (f32[10]{0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""  # noqa: E501
  assert find_collectives(Program(text), {"data": 4, "fsdp": 1, "model": 1}, [0, 0, 1, 1]) == [
    Collective("all-reduce", "data", 40, 1, False, near=40.0, far=0.0),
    Collective("all-reduce", "data", 40, 1, True, near=0.0, far=40.0),
  ]
