"""The arrows of the design: who may import whom."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "vit_jax_ext"
FAMILIES = {f"models.{name}" for name in ("vit", "deepvit", "crossvit", "swin", "cswin", "boat")}
HEAVY = {"tensorflow", "tensorflow_datasets", "clu"}


def imports(path: pathlib.Path) -> set[str]:
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
  return result


MODULES = modules()


def ours(name: str) -> set[str]:
  return {other.removeprefix("vit_jax_ext.") for other in MODULES[name] if other.startswith("vit_jax_ext.")}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows(name):
  allowed_families = {"models.boat": {"models.swin", "models.cswin"}, "models.registry": FAMILIES}
  if name in FAMILIES | {"models.registry", "models.layers"}:
    assert ours(name) & FAMILIES <= allowed_families.get(name, set())
    assert not {other for other in ours(name) if other.split(".")[0] in ("data", "training", "analysis", "pretrained")}
    assert "ml_collections" not in MODULES[name]
  if not name.startswith("analysis"):
    assert not {other for other in ours(name) if other.startswith("analysis")}
  if not name.startswith(("training", "analysis")):  # our own checkpoints are a source of weights like any other
    allowed = {"training", "training.checkpoint"} if name == "pretrained" else set()
    allowed |= {"training", "training.train_step"} if name == "export" else set()
    assert {other for other in ours(name) if other.startswith("training")} <= allowed
  if not name.startswith("data"):
    assert not {other for other in MODULES[name] if other.split(".")[0] == "tensorflow"}
  if name != "training.checkpoint":
    assert not {other for other in MODULES[name] if other.split(".")[0] == "orbax"}


def test_configs_do_not_import_the_package():
  for path in (PACKAGE.parent / "configs").glob("*.py"):
    assert not {name for name in imports(path) if name.startswith("vit_jax_ext")}, path


@pytest.mark.parametrize("module", ["vit_jax_ext", "vit_jax_ext.training.train_step"])
def test_models_and_train_step_need_no_tensorflow(module):
  code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == ""


def test_loading_weights_needs_no_tensorflow():
  absent = ["tensorflow", "clu", "requests", "ml_collections"]
  code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import vit_jax_ext"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
