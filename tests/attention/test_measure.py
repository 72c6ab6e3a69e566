"""The commands `study` and `analyze`: what they write, continue and refuse."""

import json
import pathlib
import sys

import numpy as np
import pytest

import main
from vit_jax_ext.attention import figures
from vit_jax_ext.config import claim_workdir

STUDY = """
from configs import digits_depth

STUDY = ("vit,2", "deepvit,3")


def get_config(argument):
  config = digits_depth.get_config(argument)
  config.model.overrides.update(image_size=8, patch_size=4, embed_dim=8, num_heads=2)
  config.batch_size, config.total_steps, config.optimizer.warmup_steps = 64, 2, 0
  return config
"""


def run(monkeypatch, *argv):
  monkeypatch.setattr(sys, "argv", ["main.py", *map(str, argv)])
  return main.main()


@pytest.fixture(scope="module")
def study(tmp_path_factory, data_dir):
  """Returns the command's arguments and the workdir of a study that has run."""
  folder = tmp_path_factory.mktemp("study")
  (folder / "tiny_depth.py").write_text(STUDY)
  argv = ("study", f"--config={folder}/tiny_depth.py", f"--workdir={folder}/run",
          f"--config.dataset.data_dir={data_dir}")  # fmt: skip
  with pytest.MonkeyPatch.context() as monkeypatch:
    assert run(monkeypatch, *argv) == 0
  return argv, folder / "run"


def is_png(path: pathlib.Path) -> bool:
  return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


FIGURES = ("similarity_against_depth.png", "heads_of_last_block.png", "attention_maps.png")


def test_study_writes_a_table_and_every_models_figures(study):
  _, workdir = study
  analysis = workdir / "analysis"
  rows = json.loads((analysis / "table.json").read_text())
  assert [(row["model"], row["blocks"]) for row in rows] == [("VisionTransformer", 2), ("DeepViT", 3)]
  assert is_png(analysis / "similar_blocks.png")
  for row, name in zip(rows, ("vit_2", "deepvit_3"), strict=True):
    assert all(is_png(analysis / name / figure) for figure in FIGURES)
    summary = json.loads((analysis / name / "similarity.json").read_text())
    assert summary["images"] == 360
    assert {key: summary[key] for key in row} == row
    np.testing.assert_allclose(summary["mean_similarity"], np.mean(summary["similarity"]["1"]))
    scalars = [json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
    assert summary["top1"] == pytest.approx(scalars[-1]["eval/top1"])


def test_study_trains_only_what_is_missing(study, monkeypatch, capsys):
  argv, workdir = study
  before = (workdir / "vit_2" / "metrics.jsonl").read_text()
  table = (workdir / "analysis" / "table.json").read_text()
  assert run(monkeypatch, *argv) == 0
  assert (workdir / "vit_2" / "metrics.jsonl").read_text() == before
  assert (workdir / "analysis" / "table.json").read_text() == table
  assert "blocks similar to the next" in capsys.readouterr().out


def test_analyze_one_run(study, monkeypatch, capsys):
  workdir = study[1] / "deepvit_3"
  assert run(monkeypatch, "analyze", f"--workdir={workdir}", "--threshold=0.3") == 0
  out = capsys.readouterr().out
  for name in ("similarity.json", *FIGURES):
    assert f"wrote {workdir / 'analysis' / name}" in out
  summary = json.loads((workdir / "analysis" / "similarity.json").read_text())
  assert summary["threshold"] == 0.3
  assert {path.name for path in (workdir / "analysis").iterdir()} == {"similarity.json", *FIGURES}


def test_analyze_several_runs_into_a_folder(study, monkeypatch, tmp_path):
  workdirs = [f"--workdir={study[1] / name}" for name in ("vit_2", "deepvit_3")]
  assert run(monkeypatch, "analyze", *workdirs, f"--output={tmp_path}", "--config.dataset.eval_split=test[:20]") == 0
  assert is_png(tmp_path / "similar_blocks.png")
  assert json.loads((tmp_path / "vit_2" / "similarity.json").read_text())["images"] == 20


@pytest.mark.parametrize("option", ["--threshold=0", "--threshold=1.1", "--head-threshold=-1", "--threshold=nan"])
def test_impossible_thresholds(option, study, monkeypatch, capsys):
  assert run(monkeypatch, "analyze", f"--workdir={study[1] / 'vit_2'}", option) == 2
  assert "choose one in (0, 1]" in capsys.readouterr().err


def test_a_study_with_an_impossible_threshold_does_not_train_first(study, monkeypatch, tmp_path):
  argv = [*study[0][:2], f"--workdir={tmp_path / 'run'}", "--threshold=7"]
  assert run(monkeypatch, *argv) == 2
  assert not (tmp_path / "run").exists()


def test_a_model_without_maps(tiny_config, monkeypatch, capsys, tmp_path):
  claim_workdir(str(tmp_path), tiny_config)
  assert run(monkeypatch, "analyze", f"--workdir={tmp_path}") == 2
  assert "choose one of deepvit_16b" in capsys.readouterr().err
  assert not (tmp_path / "analysis").exists()


@pytest.mark.parametrize(
  "argv, message",
  [
    (("analyze", "--workdir=/nowhere"), "holds no run"),
    (("study", "--config=configs/digits.py"), "is no study"),
    (("train", "--config=configs/digits_depth.py:swin,3"), "give FAMILY,DEPTH"),
    (("train", "--config=configs/digits_depth.py:vit,0"), "give FAMILY,DEPTH"),
  ],
)
def test_bad_input(argv, message, monkeypatch, capsys):
  assert run(monkeypatch, *argv) == 2
  assert message in capsys.readouterr().err


def test_figures_of_one_block():
  """No neighbour, no pair of heads: the figures are still drawn."""
  summary = dict(model="VisionTransformer", blocks=1, heads=1, tokens=2, images=3, threshold=0.8, head_threshold=0.5,
                 similarity={}, ratio={}, similar_blocks=0, head_similarity=[[[1.0]]], head_ratio=[0.0])  # fmt: skip
  figures.similarity_against_depth(summary)
  figures.heads_of_last_block(summary)
  figures.similar_blocks_against_depth([summary])
  figures.attention_maps(summary, np.ones((1, 2, 2)))
