"""The search on devices whose speed and memory are made up."""

import dataclasses
import itertools
import os
import sys
import time

import psutil
import pytest

import main
import vit_jax_ext as vx
from vit_jax_ext.console import Countdown
from vit_jax_ext.plan import cases, search

CASE = cases.Case("configs/digits.py:vit", (), "v5e:4x4", 1, 10, 1437)


def made_up(case, room=100.0):
  """Splitting saves memory and costs time; as do more parts, and rematerialisation, which costs most."""
  settings = dict(text.split("=") for text in case.overrides)
  images, fsdp, model, parts = (
    int(settings.get(key, default))
    for key, default in (("batch_size", 64), ("mesh.fsdp", 1), ("mesh.model", 1), ("optimizer.accumulation_steps", 1))
  )
  remat = settings.get("model.overrides.remat") == "True"
  if images > 128:
    return {"error": "too many"}
  needed = 80 / fsdp / model + 60 * images / 64 / parts / (4 if remat else 1)
  rate = images**0.5 / (1 + 0.1 * fsdp + 0.3 * model + 0.05 * parts + 0.2 * remat)
  time = {"images_per_second": rate, "images_per_second_per_chip": rate / 16, "step": images / rate,
          "share_of_peak": 0.1, "training_hours": 1.0}  # fmt: skip
  memory = {"total": needed * 2**30, "limit": room * 2**30}
  return {"fits": needed <= room, "memory": memory, "time": time, "batch_size": images, "chips": 16}


@pytest.fixture
def compiled(monkeypatch):
  """The search with `made_up` for a compiler; a list of what it compiled."""
  asked = []

  def make(case, folder, countdown):
    asked.append(case)
    return made_up(case)

  monkeypatch.setattr(search, "make_plan", make)
  pytest.importorskip("libtpu")
  return asked


def test_it_finds_the_best_way_of_a_batch_and_then_better_batches(compiled):
  trials = search.search(CASE, "")
  ways = itertools.product((1, 4, 16), (1, 2, 4), (1, 2, 4), ("False", "True"))
  keys = ("mesh.fsdp", "mesh.model", "optimizer.accumulation_steps", "model.overrides.remat")
  every = [
    made_up(dataclasses.replace(CASE, overrides=tuple(f"{key}={value}" for key, value in zip(keys, way, strict=True))))
    for way in ways
    if way[0] == 1 or way[1] == 1
  ]
  rates = [trial.plan["time"]["images_per_second"] for trial in trials if trial.fits]
  same_batch = [trial for trial in trials if trial.fits and trial.plan["batch_size"] == 64]
  assert same_batch[0].plan["time"]["images_per_second"] == max(
    plan["time"]["images_per_second"] for plan in every if plan["fits"]
  )
  assert rates == sorted(rates, reverse=True) and trials[0].plan["batch_size"] == 128
  assert not any(trial.fits for trial in trials[len(rates) :])
  assert len(compiled) == len(trials) <= 5 + 10 + 4


def test_memory_is_not_bought_where_there_is_room(monkeypatch):
  """Splits, then larger batches; in parts only the one that is refused, and never with rematerialisation."""
  pytest.importorskip("libtpu")
  monkeypatch.setattr(search, "make_plan", lambda case, *_: made_up(case, room=1000.0))
  trials = search.search(CASE, "")
  assert len(trials) == 5 + 1 + 2
  assert not any("model.overrides.remat=True" in trial.overrides for trial in trials)
  assert [trial.overrides[-1] for trial in trials if "optimizer.accumulation_steps=4" in trial.overrides] == [
    "batch_size=256"
  ]


def test_a_table_has_a_row_for_each_trial(compiled):
  trials = search.search(CASE, "")
  titles, *rows = search.table(trials)
  assert len(rows) == len(trials) and all(len(row) == len(titles) for row in rows)
  assert any("too many" in row for row in rows) and any(cell.startswith("no: ") for row in rows for cell in row)


@pytest.mark.parametrize("devices", ["here", "cpu:8"])
def test_what_has_no_published_speed_is_not_searched(devices):
  with pytest.raises(vx.UserError, match="v5e:4x4"):
    search.search(cases.Case("configs/digits.py:vit", (), devices, 1, 10, 1437), "")


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--search"], "--output=DIR"),
    (["--search", "--output=x", "--program=predict"], "--program"),
    (["--all", "--output=x", "--devices=v5e:4x4"], "--devices"),
    (["--all", "--output=x", "--measure"], "--measure"),
  ],
)
def test_flags_that_do_not_go_together(run, flags, words):
  status, _, err = run("plan", *flags)
  assert (status, err.count("\n")) == (2, 1) and words in err


def test_a_key_knows_what_a_plan_depends_on():
  assert CASE.key() == cases.Case(*dataclasses.astuple(CASE)).key()
  others = [
    cases.Case("configs/digits.py:swin", (), "v5e:4x4", 1, 10, 1437),
    cases.Case("configs/digits.py:vit", ("batch_size=32",), "v5e:4x4", 1, 10, 1437),
    cases.Case("configs/digits.py:vit", (), "v5e:2x2", 1, 10, 1437),
    cases.Case("configs/digits.py:vit", (), "v5e:4x4", 2, 10, 1437),
    cases.Case("configs/digits.py:vit", (), "v5e:4x4", 1, 11, 1437),
  ]
  assert len({case.key() for case in [CASE, *others]}) == 6


def _crash(case):
  import os

  os.abort()


@pytest.mark.slow
def test_plans_are_made_once_and_survive_a_crash(tmp_path, monkeypatch):
  """In processes of their own."""
  case = cases.Case("configs/digits.py:vit", ("model.overrides.depth=1",), "cpu:2", 1, 10, 1437)
  with Countdown({"plan": (3, 1.0)}) as countdown:
    plan = cases.make_plan(case, str(tmp_path), countdown)
    assert plan["mesh"] == {"data": 2, "fsdp": 1, "model": 1} and len(list(tmp_path.iterdir())) == 1
    bad = cases.Case("configs/digits.py:vit", ("mesh.data=3",), "cpu:2", 1, 10, 1437)
    assert "does not fit 2 device" in cases.make_plan(bad, str(tmp_path), countdown)["error"]
    monkeypatch.setattr(cases, "_plan", _crash)
    assert cases.make_plan(case, str(tmp_path), countdown) == plan
    assert cases.make_plan(bad, str(tmp_path), countdown) == {"error": "the compiler crashed"}


PLANNED = """
import sys
from vit_jax_ext.console import Countdown
from vit_jax_ext.plan import cases
with Countdown({"plan": (1, 1.0)}) as countdown:
  cases.make_plan(cases.Case("configs/digits.py:vit", (), "cpu:2", 1, 10, 1437), sys.argv[1], countdown)
"""


def test_a_compilation_ends_with_its_parent(tmp_path):
  """A compiler may be in the midst of minutes when the command is killed."""
  process = psutil.Popen([sys.executable, "-c", PLANNED, tmp_path], cwd=os.path.dirname(main.__file__))
  compilers = []
  while not compilers:
    time.sleep(0.1)
    assert process.poll() is None
    compilers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
  time.sleep(3)  # until it watches
  process.kill()
  process.wait()
  gone, left = psutil.wait_procs(compilers, timeout=20)
  for each in left:
    each.kill()
  assert gone and not left
