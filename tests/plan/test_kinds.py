"""Names of devices, good and bad."""

import importlib.util
import math

import jax
import pytest

import vit_jax_ext as vx
from vit_jax_ext.plan import kinds


@pytest.mark.parametrize(
  ("name", "slices", "words"),
  [
    ("v5x:2x2", 1, ["'v5x'", "did you mean v5"]),
    ("tpu", 1, ["did you mean tpu7x"]),
    ("xyz", 1, ["did you mean", "cpu", "here", "h100"]),
    ("v5e", 1, ["no shape", "v5e:4x4"]),
    ("v5p:", 1, ["no shape", "v5p:2x2x4"]),
    ("h100", 1, ["h100:1x8"]),
    ("cpu:eight", 1, ["cpu:8"]),
    ("cpu:0", 1, ["cpu:8"]),
    ("cpu:2x2", 1, ["cpu:4"]),
    ("cpu:1000", 1, ["8 CPU devices"]),
    ("h100:8", 1, ["HOSTSxGPUS", "h100:1x8"]),
    ("cpu:4", 2, ["--slices=2", "only TPUs"]),
    ("v5e:2x2", 0, ["--slices=0"]),
  ],
)
def test_bad_names_are_told_in_a_line(name, slices, words):
  assert len(jax.devices()) == 8  # from here on; as the first test of a process it would simulate 1,000
  with pytest.raises(vx.UserError) as error:
    kinds.open_target(name, slices)
  assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v5e:3x5", ["4x4", "largest has 256"]),
    ("v5e:32x32", ["16x16"]),
    ("v5p:4x4", ["2x2x4"]),
    ("v5e:2x2x1", ["2x2"]),
  ],
)
def test_shapes_that_do_not_exist(name, words):
  pytest.importorskip("libtpu")
  with pytest.raises(vx.UserError) as error:
    kinds.open_target(name)
  assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("h100:1x8", "cuda")])
def test_a_compiler_that_is_missing(name, extra, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(vx.UserError, match=rf"vit_jax_ext\[{extra}\]"):
    kinds.open_target(name)


@pytest.mark.parametrize("kind", ["v3", "v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_every_shape_that_is_offered_exists(kind):
  pytest.importorskip("libtpu")
  known = kinds.KINDS[kind]
  for shape in kinds._shapes(known)[:8]:
    target = kinds.open_target(f"{kind}:{shape}")
    chips = math.prod(map(int, shape.split("x")))
    assert (target.chips, len(target.devices)) == (chips, chips * known.per_chip)


def test_clocks_agree_with_the_matrix_units():
  """Peak over clock is what whole matrix units do in a cycle: 128 x 128 multiply-adds each."""
  for name, kind in kinds.KINDS.items():
    if kind.clock:
      units = kind.peak / kind.clock / (2 * 128 * 128)
      assert abs(units / round(units) - 1) < 0.01, name
