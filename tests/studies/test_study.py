"""Studies: their numbers, their cells, how they continue and what they refuse."""

import base64
import json
import pathlib
import shutil

import numpy as np
import pytest

from tests.command_line import execute
from vit_jax_ext import config as configs
from vit_jax_ext.attention import measure
from vit_jax_ext.compare import report
from vit_jax_ext.compare.cost import TABLE_6
from vit_jax_ext.console import Countdown
from vit_jax_ext.models import registry
from vit_jax_ext.studies import run as running
from vit_jax_ext.studies import study as studies

FILE = '''"""Does a second block help?"""

from configs import digits_depth

STUDY = {"vit,1": "one block", "vit,2": "two blocks"}


def get_config(argument):
  config = digits_depth.get_config(argument)
  config.model.overrides.update(image_size=8, patch_size=4, embed_dim=8, num_heads=2)
  config.batch_size, config.total_steps, config.optimizer.warmup_steps = 64, 4, 0
  config.log_every_steps = config.checkpoint.every_steps = 2
  return config
'''
RUNS = [f"vit_{blocks}/seed_{seed}" for seed in (0, 1) for blocks in (1, 2)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("file") / "tiny.py"
  path.write_text(FILE)
  return path


@pytest.fixture(scope="module")
def argv(file, data_dir):
  return "study", str(file), "--seeds=2", f"--config.dataset.data_dir={data_dir}"


@pytest.fixture(scope="module")
def output(argv, tmp_path_factory):
  """The folder of a study that has run undisturbed."""
  folder = tmp_path_factory.mktemp("output")
  assert execute(*argv, f"--output={folder}") == 0
  return folder


@pytest.fixture
def steps(monkeypatch):
  """Steps as they are made, and their largest number, after which the user interrupts."""
  made, made_at_most, original = [], [None], running._Bar.step

  def step(self, step):
    made.append(step)
    original(self, step)
    if len(made) == made_at_most[0]:
      raise KeyboardInterrupt

  monkeypatch.setattr(running._Bar, "step", step)
  return made, made_at_most


def metrics(output, name):
  return [json.loads(line) for line in (output / "studies" / "tiny" / name / "metrics.jsonl").read_text().splitlines()]


def table(output):
  return json.loads((output / "studies" / "tiny.json").read_text())


def files(folder):
  return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (folder / "studies" / "tiny").rglob("*") if p.is_file()}


def test_mean_and_spread(output):
  rows = table(output)["rows"]
  assert [row[0] for row in rows] == ["one block", "two blocks"]
  for blocks, (_, top1, similar, params, _, rate) in enumerate(rows, 1):
    runs = [metrics(output, f"vit_{blocks}/seed_{seed}") for seed in (0, 1)]
    assert all(lines[-1]["step"] == 4 for lines in runs)
    scores = [100 * lines[-1]["eval/top1"] for lines in runs]
    np.testing.assert_allclose(top1, [np.mean(scores), np.std(scores, ddof=1)], rtol=1e-6)
    rates = [line["train/images_per_second"] for lines in runs for line in lines if "train/images_per_second" in line]
    assert len(rates) == 4 and rate == round(np.median(rates))
    assert 0 <= similar[0] <= blocks - 1
    # ViT: 4x4x3 pixels, class token, positions; blocks of norm, qkv, projection, norm, MLP; norm, classifier.
    block = 16 + (8 * 24 + 24) + (8 * 8 + 8) + 16 + (8 * 16 + 16) + (16 * 8 + 8)
    assert params == pytest.approx((48 * 8 + 8 + 8 + 5 * 8 + blocks * block + 16 + 8 * 10 + 10) / 1e6, rel=5e-3)


def test_seeds_differ(output):
  losses = {name: metrics(output, name)[-1]["eval/loss"] for name in RUNS}
  assert len(set(losses.values())) == 4
  saved = [json.loads((output / "studies" / "tiny" / name / "config.json").read_text())["seed"] for name in RUNS]
  assert saved == [0, 0, 1, 1]


def test_the_page_shows_them(output):
  text = (output / "report.html").read_text()
  content = table(output)
  assert content["title"] == "Does a second block help?" and "Not finished" not in content["text"]
  for words in (content["title"], content["text"].split("; ")[0], *(row[0] for row in content["rows"])):
    assert words in text
  for _, (mean, spread), _, _, _, rate in content["rows"]:
    decimals = 2 if spread < 1 else 1 if spread < 10 else 0  # two digits of the spread
    assert spread == 0 or spread >= 0.1
    assert f"{mean:.{decimals}f} ± {spread:.{decimals}f}" in text and f"{rate:,}" in text


def test_a_finished_study_is_only_read(argv, output, monkeypatch, capsys):
  before, content = files(output), table(output)
  monkeypatch.setattr(running, "train", lambda *args: pytest.fail("trained again"))
  monkeypatch.setattr(measure, "measure", lambda *args, **kw: pytest.fail("measured again"))
  assert execute(*argv, f"--output={output}") == 0
  assert files(output) == before and table(output) == content
  out = capsys.readouterr().out
  assert "two blocks" in out and f"wrote {output}/studies/tiny.json" in out and f"wrote {output}/report.html" in out


def test_an_interrupted_study_goes_on(argv, output, steps, tmp_path, monkeypatch, capsys):
  left, leave = [], Countdown.__exit__

  def leave_and_tell(self, *exception):
    left.append(self.seconds_left())
    leave(self, *exception)

  monkeypatch.setattr(Countdown, "__exit__", leave_and_tell)
  made, at_most = steps
  at_most[0] = 7  # in the second run, after its checkpoint
  assert execute(*argv, f"--output={tmp_path}") == 1
  assert "the same command continues" in capsys.readouterr().err
  content = table(tmp_path)
  assert content["text"].endswith("Not finished: 1 of 4 runs are in.")
  assert [row[1] for row in content["rows"]] == [round(100 * metrics(output, RUNS[0])[-1]["eval/top1"], 2), None]
  assert "Not finished: 1 of 4" in (tmp_path / "report.html").read_text()
  first = {path: value for path, value in files(tmp_path).items() if RUNS[0] in str(path)}

  made.clear()
  at_most[0] = None
  assert execute(*argv, f"--output={tmp_path}") == 0
  assert made == [3, 4, *[1, 2, 3, 4] * 2]
  assert {path: value for path, value in files(tmp_path).items() if RUNS[0] in str(path)} == first
  for name in RUNS:
    for line, expected in zip(metrics(tmp_path, name), metrics(output, name), strict=True):
      assert {k: v for k, v in line.items() if "second" not in k} == {
        k: v for k, v in expected.items() if "second" not in k
      }
  assert [row[:5] for row in table(tmp_path)["rows"]] == [row[:5] for row in table(output)["rows"]]
  assert left[0] > 0 and left[1] == pytest.approx(0, abs=1e-6)


def test_killed_before_the_last_checkpoint_or_the_analysis(argv, output, steps, tmp_path):
  shutil.copytree(output, tmp_path, dirs_exist_ok=True)
  run_0, run_1 = (tmp_path / "studies" / "tiny" / name for name in RUNS[:2])
  shutil.rmtree(run_0 / "checkpoints" / "4")
  (run_1 / "analysis" / "similarity.json").unlink()
  assert execute(*argv, f"--output={tmp_path}") == 0
  assert steps[0] == [3, 4]
  assert [row[:5] for row in table(tmp_path)["rows"]] == [row[:5] for row in table(output)["rows"]]


def test_runs_of_another_config_are_refused(argv, output, capsys):
  before = files(output)
  assert execute(*argv, "--config.total_steps=5", f"--output={output}") == 2
  assert "made with config.total_steps=4, this run has 5; choose another --output" in capsys.readouterr().err
  assert files(output) == before


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["fusoin"], "study 'fusoin' is unknown; did you mean fusion?"),
    (["x"], "did you mean fusion, depth, boat, scales, twins, chains, all?"),
    (["boat", "--seeds=0"], "--seeds=0 is no positive number"),
    (["boat", "--seeds=two"], "--seeds=two is no positive number"),
    (["depth", "--threshold=7"], "choose one in (0, 1]"),
    (["configs/digits.py"], "is no study"),
    (["/nowhere/study.py"], "does not exist"),
    (["fusion", "--config.batchsize=3"], "did you mean batch_size"),
    (["fusion", "--config.model.overrides.overlap=3"], "has no option 'overlap'"),
    (["fusion", "--config.model.overrides.fusion=pairwise"], "'no fusion' and 'all-attention' do not differ"),
    (["fusion", "--config.dataset.name=/nowhere/images"], "/nowhere/images"),
  ],
)
def test_mistakes(args, words, data_dir, tmp_path, capsys):
  assert execute("study", f"--config.dataset.data_dir={data_dir}", *args, f"--output={tmp_path / 'x'}") == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("error: ") and words in error
  assert not (tmp_path / "x").exists()


def test_a_study_that_lists_nothing(file, tmp_path, capsys):
  (tmp_path / "empty.py").write_text(file.read_text().replace("STUDY = {", "STUDY = {} and {"))
  assert execute("study", tmp_path / "empty.py", f"--output={tmp_path / 'x'}") == 2
  assert "is no study" in capsys.readouterr().err


def test_the_folder(argv, capsys):
  assert execute(*argv) == 2
  assert "give --output=DIR" in capsys.readouterr().err
  assert execute(*argv, "--output=/proc/x") == 2
  assert "cannot be written" in capsys.readouterr().err


FIGURES = ("similarity_against_depth.png", "heads_of_last_block.png", "attention_maps.png")


def test_figures_of_similarity(output):
  """Of each run as `analyze` draws them, and one of the study, which the page shows."""
  study = output / "studies" / "tiny"
  for name in RUNS:
    assert all((study / name / "analysis" / figure).read_bytes().startswith(b"\x89PNG") for figure in FIGURES)
  encoded = base64.b64encode((output / "studies" / "tiny.png").read_bytes()).decode()
  assert encoded in (output / "report.html").read_text()


def test_other_thresholds_are_measured_anew(argv, output, steps, tmp_path):
  shutil.copytree(output, tmp_path, dirs_exist_ok=True)
  assert execute(*argv, "--threshold=0.001", f"--output={tmp_path}") == 0
  assert not steps[0]  # nothing is trained
  assert [row[2][0] for row in table(tmp_path)["rows"]] == [0, 1]  # all blocks that have a next one
  assert "a cosine of 0.001 or more" in table(tmp_path)["text"]


VARIED = {
  "fusion": {"model.overrides.fusion"},
  "depth": {"model.name", "model.overrides.depth"},
  "boat": {"model.overrides.local_attention", "model.overrides.overlap", "model.overrides.clustering"},
}


@pytest.mark.parametrize("name", studies.STUDIES)
def test_cells_of_the_shipped_studies(name):
  title, labels = configs.read_study(studies.STUDIES[name])
  assert title.endswith(".") and "?" in title
  assert len(labels) >= 5 and len(set(labels.values())) == len(labels)
  found = []
  for argument in labels:
    config = configs.load_config(f"{studies.STUDIES[name]}:{argument}")
    registry.abstract_model(config.model, 10)
    found.append({key: str(value) for key, value in configs.flatten(config.to_dict()).items()})
  keys = set().union(*found)
  assert {key for key in keys if len({config.get(key) for config in found}) > 1} == VARIED[name]


def test_fusion_has_the_rows_of_table_6():
  assert list(configs.read_study("configs/digits_fusion.py")[1]) == list(TABLE_6)


def test_cells_of_a_table_as_text():
  cells = [None, "none", 1234, 0.25, [98.2, 0.31], [70.0, 12.0]]
  assert [report.study_cell(cell) for cell in cells] == ["", "none", "1,234", "0.25", "98.20 ± 0.31", "70 ± 12"]


def test_studies_are_found_from_anywhere(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert all(pathlib.Path(spec).is_file() for spec in studies.find_studies("all").values())
