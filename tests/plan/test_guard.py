"""Cycles, temporaries and collectives of a small model of each family on v5e:2x2, against those that are recorded.

A refactoring that changes them shows. Compare: pytest -m slow tests/plan/test_guard.py
Renew, and say in the commit why: python -m tests.plan.test_guard
"""

import importlib.metadata
import json
import pathlib

import pytest

from configs import digits
from vit_jax_ext.plan.kinds import open_target
from vit_jax_ext.plan.report import plan

RECORDED = pathlib.Path(__file__).parent / "recorded.json"


def versions():
  return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def measured(family):
  """Returns what a training step of a family's small model takes on four chips, in bfloat16 as on them."""
  config = digits.get_config(family)
  config.model.overrides.dtype = "bfloat16"
  result = plan(config, open_target("v5e:2x2"), 10, 1437)
  rows = ("kind", "axes", "asynchronous", "operations", "bytes")
  return {
    "estimated_cycles": result["work"]["estimated_cycles"],
    "counted_cycles": sum(row["cycles"] for row in result["work"]["counted"]),
    "temporaries": result["memory"]["temporaries"],
    "collectives": [{name: row[name] for name in rows} for row in result["collectives"]],
  }


@pytest.mark.slow
@pytest.mark.parametrize("family", digits.VARIANTS)
def test_no_family_has_changed(family):
  pytest.importorskip("libtpu")
  recorded = json.loads(RECORDED.read_text())
  assert versions() == recorded["versions"], "another compiler counts otherwise; renew on the commit before"
  assert measured(family) == recorded[family]


if __name__ == "__main__":
  found = {"versions": versions()} | {family: measured(family) for family in digits.VARIANTS}
  RECORDED.write_text(json.dumps(found, indent=2) + "\n")
