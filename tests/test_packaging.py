"""What is installed: the library without what trains, the configs from any folder, the wheel away from the checkout."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import vit_jax_ext as vx
from vit_jax_ext import config as configs
from vit_jax_ext.training.train import train

ROOT = pathlib.Path(__file__).parents[1]
TRAIN = "tensorflow", "tensorflow_datasets", "clu", "tensorboard", "sklearn"
# In one process, which takes longest to import JAX, one command line after another without what [train] installs.
WITHOUT = f"""if True:
  import json, sys
  sys.modules.update(dict.fromkeys({TRAIN}))
  from vit_jax_ext.command_line import main
  statuses = []
  for line in json.loads(sys.argv[1]):
    sys.argv[1:] = line
    statuses.append(main())
  print(statuses)
"""
SMALL = [f"--config.model.overrides.{option}" for option in ("depth=1", "embed_dim=8", "num_heads=2")]
PLAN = ["plan", "--config=configs/digits.py:vit", "--devices=cpu:1", "--num-classes=10", "--examples=1437", *SMALL]


def without_train(lines, folder):
  """Returns the statuses of command lines in a folder, and stdout and stderr."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)}
  done = subprocess.run(
    [sys.executable, "-c", WITHOUT, json.dumps(lines)], cwd=folder, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  *out, statuses = done.stdout.splitlines()
  return json.loads(statuses), out, done.stderr.splitlines()


def test_what_works_without_tensorflow(tmp_path):
  lines = [
    PLAN,
    [*PLAN, "--program=evaluate"],
    ["compare", "--fusion"],
    ["export", "--model=vit_16b", "--output=x", "--config.model.overrides.image_size=32", *SMALL],
    ["predict", str(ROOT / "docs" / "seven.png"), "--config.pretrained=x/vit_16b.safetensors"],
    ["convert", "x/vit_16b.safetensors", "y.safetensors"],
  ]
  statuses, out, err = without_train(lines, tmp_path)
  # Weights that are nobody's run know no classes, which only the dataset could tell.
  assert statuses == [0, 0, 0, 0, 2, 0], err
  assert "pip install 'vit_jax_ext[train]'" in "".join(err)
  assert any("train vit_16b" in line for line in out) and (tmp_path / "y.safetensors").exists()


def test_what_needs_it_names_the_extra(tmp_path, finished):
  lines = [[command, f"--workdir={finished}"] for command in ("train", "evaluate", "doctor", "analyze")]
  statuses, out, err = without_train([*lines, ["prepare"], ["study", "all", "--output=x"]], tmp_path)
  assert statuses == [2] * 6 and out == [] and len(err) == 6
  assert all(line.startswith("error: ") and line.endswith("pip install 'vit_jax_ext[train]'") for line in err), err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
  """A tiny run."""
  folder = tmp_path_factory.mktemp("run")
  config = configs.load_config("configs/digits.py:vit")
  config.dataset.data_dir = data_dir
  config.model.overrides.update(depth=1, embed_dim=8, num_heads=2)
  config.total_steps = 2
  train(config, str(folder))
  return folder


def test_the_import_is_light_and_quick(tmp_path):
  """Below 1.5 s, however busy the machine: processor time."""
  code = """if True:
    import sys, time
    import vit_jax_ext as vx
    spent = time.process_time()
    [getattr(vx, name) for name in vx.__all__]
    print(spent, *{"tensorflow", "torch", "matplotlib", "sklearn", "clu"} & set(sys.modules))
  """
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  spent, *heavy = done.stdout.split()
  assert float(spent) < 1.5 and heavy == []


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
  there = configs.load_config("configs/crossvit.py:15_dagger")
  monkeypatch.chdir(tmp_path)
  assert configs.load_config("configs/crossvit.py:15_dagger") == there
  for spec in ("configs/none.py", "../configs/crossvit.py", "crossvit.py"):
    with pytest.raises(vx.UserError, match="does not exist"):
      configs.load_config(spec)
  # A folder of the user's own comes first, and what is not in it is ours.
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "mine.py").write_text(
    "from configs import digits, sizes\n\n\ndef get_config():\n"
    "  config = digits.get_config()\n  config.batch_size = sizes.BATCH\n  return config\n"
  )
  (tmp_path / "configs" / "sizes.py").write_text("BATCH = 7\n")
  before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"}
  assert before and configs.load_config("configs/mine.py").batch_size == 7
  assert before == {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"}


def test_the_extras_are_told():
  """All of them in README, and messages name no other."""
  (extras,) = (
    {key.value for key in node.value.keys}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    if isinstance(node, ast.keyword) and node.arg == "extras_require"
  )
  readme = (ROOT / "README.md").read_text()
  assert [extra for extra in extras if f"`{extra}`" not in readme] == []
  sources = "".join(path.read_text() for path in (ROOT / "vit_jax_ext").rglob("*.py"))
  assert {"train", "torch"} <= set(re.findall(r"vit_jax_ext\[(\w+)\]", sources)) <= extras


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment(tmp_path, finished):
  """Needs a package index; a minute or two, most of it pip's."""
  source, away = tmp_path / "source", tmp_path / "away"
  away.mkdir()
  shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "tests"))
  pip = [sys.executable, "-m", "pip", "--quiet"]
  subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", str(source)], check=True)
  shutil.rmtree(source)
  subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "empty")], check=True)
  bin = tmp_path / "empty" / "bin"
  subprocess.run([bin / "pip", "install", "--quiet", *tmp_path.glob("*.whl")], check=True)

  def run(*args, program="vit-jax-ext"):
    environment = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([bin / program, *args], cwd=away, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

  installed = run("list", program="pip")[1]
  assert "vit_jax_ext" in installed and not {"tensorflow", "torch"} & set(installed.split())
  status, out, _ = run("--help")
  assert status == 0 and out.startswith("usage: vit-jax-ext [-h] COMMAND") and "predict" in out
  status, out, err = run("predict", str(ROOT / "docs" / "seven.png"), f"--workdir={finished}", "--top=10")
  assert (status, err) == (0, "") and len(out.splitlines()) == 11
  status, out, err = run(*PLAN)
  assert status == 0 and "train vit_16b" in out, err
  status, out, err = run("--config=configs/crossvit.py:15_dagger")
  assert (status, out, err.count("\n")) == (2, "", 1) and "pip install 'vit_jax_ext[train]'" in err
