"""README and docs: the parser takes every command, every flag stands somewhere, every link leads somewhere."""

import argparse
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests.command_line import execute
from vit_jax_ext import command_line
from vit_jax_ext import config as configs
from vit_jax_ext.config_keys import KEYS
from vit_jax_ext.models import registry
from vit_jax_ext.studies.study import find_studies

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


def commands(text):
  """Yields the command lines of a page, those in its code blocks and those in running text."""
  for block in FENCED.findall(text):
    yield from re.findall(r"^\$? ?(python main\.py.*)$", block, re.M)
  for line in re.findall(r"`(python main\.py[^`]*)`", FENCED.sub("", text)):
    yield " ".join(line.split())


LINES = sorted({line for text in TEXTS.values() for line in commands(text)})


def anchors(text):
  """Returns the places in a page that links may name, as GitHub makes them of headings."""
  headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("line", LINES)
def test_every_command_is_understood(line, monkeypatch):
  monkeypatch.chdir(ROOT)
  argv = shlex.split(line)[2:]
  if {"-h", "--help"} & set(argv):
    assert execute(*argv) == 0
    return
  args = command_line.parse_args(argv)
  spec = getattr(args, "config", None)
  if spec and pathlib.Path(spec.partition(":")[0]).is_file():  # some stand for any config
    configs.override(configs.load_config(spec), args.overrides)
  for option in ("models", "model"):
    for name in (getattr(args, option, None) or "").split(","):
      assert name in ("", "NAME", *registry.VARIANTS)
  if args.command == "study" and args.study != "FILE.py":
    find_studies(args.study)
  assert all((ROOT / path).is_file() for path in argv if path.startswith("docs/"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_exists(page):
  """Of a recipe's config; keys below model.overrides are the models' own."""
  config = configs.load_config("configs/crossvit.py")
  known = set(configs.flatten(config.to_dict())) | {"KEY", "model.overrides.KEY"}
  for key in re.findall(r"--config\.([\w.]*\w)", page.read_text()):
    assert key in known or key.startswith("model.overrides."), f"{page.name} names config.{key}"


def test_the_page_of_keys_is_the_table():
  rows = [line for line in TEXTS["config.md"].splitlines() if line.startswith("| `")]
  assert rows == [f"| `{name}` | {key.rule} | {key.meaning} |" for name, key in KEYS.items()]


def test_commands_are_found():
  assert len(LINES) > 25
  found = [command_line.parse_args(shlex.split(line)[2:]).command for line in LINES if "help" not in line]
  assert set(found) == set(PARSERS)


@pytest.mark.parametrize("bad", ["python main.py predikt x", "python main.py train --wrkdir=x"])
def test_a_wrong_command_would_be_seen(bad):
  assert execute(*shlex.split(bad)[2:]) == 2


def parsers():
  (choices,) = (a for a in command_line.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
  return choices.choices


PARSERS = parsers()
FLAGS = [
  (name, flag)
  for name, parser in PARSERS.items()
  for action in parser._actions
  for flag in action.option_strings
  if flag not in ("-h", "--help")
]


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_every_flag_is_documented(command, flag):
  pages = [text for text in TEXTS.values() if re.search(rf"{re.escape(flag)}(?![\w-])", text)]
  assert any(re.search(rf"\b{command}\b", text) for text in pages), f"{flag} of {command} stands on no page about it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
  for target in re.findall(r"\]\(([^)]+)\)", FENCED.sub("", page.read_text())):
    if not target.startswith("https://"):
      path, _, anchor = target.partition("#")
      linked = page.parent / path if path else page
      assert linked.exists(), f"{page.name} links to {target}"
      assert not anchor or anchor in anchors(linked.read_text()), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_is_long(page):
  assert len(page.read_text().splitlines()) <= 200


def test_every_page_is_linked():
  assert not [page.name for page in PAGES[1:] if f"(docs/{page.name}" not in TEXTS["README.md"]]


def test_the_tree_names_every_file():
  """A file of a room stands in a line that begins with the room, or in the one below."""
  (tree,) = (block for block in FENCED.findall(TEXTS["README.md"]) if "main.py   " in block)
  entries = re.findall(r"^ *(\S.*(?:\n {20,}\S.*)*)", tree, re.M)
  missing = []
  for path in [
    *(ROOT / "vit_jax_ext").rglob("*.py"),
    *(ROOT / "configs").glob("*.py"),
    *(ROOT / "examples").glob("*.py"),
    *(ROOT / "launch").iterdir(),
  ]:
    room = path.parent.name
    name = re.escape(path.stem if room == "commands" else path.name)
    own = [entry for entry in entries if room == "vit_jax_ext" or entry.startswith(f"{room}/")]
    if path.name != "__init__.py" and not any(re.search(rf"(?<![\w.]){name}(?!\w)", entry) for entry in own):
      missing.append(str(path.relative_to(ROOT)))
  assert not missing
  existing = {path.name for path in ROOT.rglob("*.py")} | {"test_FILE.py"}
  assert set(re.findall(r"\w+\.py\b", tree)) <= existing


def test_help_is_quick():
  """0.04 s on an idle machine: nothing heavy is imported before a command runs."""
  heavy = {"jax", "numpy", "tensorflow", "ml_collections", "rich"}
  code = f"import sys; from vit_jax_ext import command_line as c; c.make_parser(); print({heavy} & set(sys.modules))"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
  assert done.stdout.strip() == "set()"
