"""The arrows of the house: who may import whom."""

import ast
import itertools
import pathlib
import re
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "vit_jax_ext"
HEAVY = {"tensorflow", "tensorflow_datasets", "clu"}

# Rooms and files from the top of the house to the bottom. Each imports from rows below its own alone; files of a room
# of which the table names none may import each other.
HOUSE = """
__main__
command_line
commands
studies.run
studies.probe
studies.study  studies.figures  studies.mechanisms
studies.statistics
attention.measure  attention.clusters   compare.comparison   training.doctor
plan
attention.similarity  attention.figures  compare.report  compare.benchmark
compare.charts  compare.results  compare.runs  compare.cost
training.train  training.predict  export  publish
training.evaluate  training.ahead
training.multi_label
training.weights
training.experiment
training.train_step  training.mixup  training.faults  training.waiting  training.accelerators
training.partition  training.distributed
training.losses  training.sharding
training.optimizer
pretrained
weight_files  weight_names  inputs
workdir.checkpoint  workdir.writers
workdir.trackers
workdir.config  workdir.metrics  workdir.description  workdir.analysis  workdir.digests  workdir.disk  workdir.lock
data
models.registry
models.boat
models.vit  models.deepvit  models.crossvit  models.swin  models.cswin
models.isotropic  models.pyramid  models.batch_norm
models.layers  models.functional  models.resize
models.fused_mlp  models.fused_projections  models.fused_merging  models.fused_norm
models.token_kernels  models.gelu
models.attention  models.initial  models.dropout  models.fused_clusters
models.fused_windows  models.fused_reattention  models.fused_clustering  models.fused_depthwise
models.fused_attention
models.kernels
compilation_cache
config  console  files  images  hub
config_keys
rules
errors
"""
ROW = {name: number for number, row in enumerate(HOUSE.strip().splitlines()) for name in row.split()}


def imports(path: pathlib.Path) -> set[str]:
  """Returns the names of the modules that a file imports, and of what it imports from them."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def modules() -> dict[str, set[str]]:
  result = {}
  for path in PACKAGE.rglob("*.py"):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    result[name] = imports(path)
  del result["__init__"]  # the package's face
  return result


MODULES = modules()


def place(name: str) -> str | None:
  """Returns the entry of the table that a module is or lies in; None for the docstring of a room that it divides."""
  return next((entry for entry in (name, name.partition(".")[0]) if entry in ROW), None)


def ours(name: str) -> set[str]:
  return {other.removeprefix("vit_jax_ext.") for other in MODULES[name]} & MODULES.keys()


def test_the_table_names_what_there_is():
  assert {entry for entry in ROW if entry not in MODULES} == set()
  for name in MODULES:
    rooms = {entry.partition(".")[0] for entry in ROW}
    assert place(name) or name in rooms, f"{name} has no place in the table"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows(name):
  here = place(name)
  for other in ours(name):
    there = place(other)
    assert here == there or there is None or (here and ROW[here] < ROW[there]), f"{name} imports {other}"


def test_arrows_are_seen():
  """The table and the reading of imports find each other."""
  arrows = {(place(name), place(other)) for name in MODULES for other in ours(name)}
  assert {("models.boat", "models.swin"), ("pretrained", "workdir.checkpoint"), ("commands", "export")} <= arrows
  assert len(arrows) > 100


@pytest.mark.parametrize(
  ("library", "places"),
  [
    ("tensorflow", {"data"}),
    ("tensorflow_datasets", {"data"}),
    ("orbax", {"workdir.checkpoint"}),
    ("clu", {"workdir.writers"}),
    ("wandb", {"workdir.trackers"}),
    ("mlflow", {"workdir.trackers"}),
    ("argparse", {"command_line", "commands", "weight_files"}),  # checkpoints of timm hold its namespaces
  ],
)
def test_libraries_have_their_places(library, places):
  users = {place(name) for name, found in MODULES.items() if library in {f.partition(".")[0] for f in found}}
  assert users == places


def test_the_face_is_for_others():
  """Inside, everything is imported from where it lives."""
  face = {"LoadReport", "UserError", "create_model", "list_models", "load_pretrained", "save_pretrained"}
  assert not {name for name in MODULES if {f"vit_jax_ext.{entry}" for entry in face} & MODULES[name]}


def test_commands_alone_print():
  """Rooms below return what they found, and log."""
  printing = {
    place(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if re.search(r"(?<![\w.])print\(|sys\.stdout|rich\.(console|table)", path.read_text())
  }
  assert printing == {"__main__", "command_line", "commands", "console"}


def test_configs_do_not_import_the_package():
  for path in (PACKAGE.parent / "configs").glob("*.py"):
    assert not {name for name in imports(path) if name.startswith("vit_jax_ext")}, path


@pytest.mark.parametrize("module", ["vit_jax_ext.models.registry", "vit_jax_ext.training.train_step"])
def test_models_and_train_step_need_no_tensorflow(module):
  code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == ""


def test_loading_weights_needs_no_tensorflow():
  absent = ["tensorflow", "clu", "requests", "ml_collections"]
  code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from vit_jax_ext import load_pretrained"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_the_face():
  code = """if True:
    import sys
    import vit_jax_ext as vx
    assert "jax" not in sys.modules
    vx.create_model, vx.list_models()[0]
    from vit_jax_ext import *
    LoadReport, load_pretrained
  """
  subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
  face = ast.literal_eval(
    next(node.value for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
         if isinstance(node, ast.Assign) and node.targets[0].id == "_HOMES")
  )  # fmt: skip
  import vit_jax_ext

  assert sorted([*face, "UserError"]) == vit_jax_ext.__all__
  assert vit_jax_ext.list_models() == vit_jax_ext.models.registry.list_models()
  with pytest.raises(AttributeError, match="creat_model"):
    vit_jax_ext.creat_model  # noqa: B018


def test_no_room_is_entered_twice():
  """The table has one row for each name."""
  names = list(itertools.chain.from_iterable(row.split() for row in HOUSE.splitlines()))
  assert len(names) == len(set(names))
