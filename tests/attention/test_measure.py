"""`analyze`: what it writes and refuses."""

import json
import pathlib

import numpy as np
import pytest

from configs import digits_depth
from vit_jax_ext.attention import figures
from vit_jax_ext.training.train import train
from vit_jax_ext.workdir.config import claim_workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
  """A folder of two runs, vit_2 and deepvit_3."""
  folder = tmp_path_factory.mktemp("runs")
  for family, depth in (("vit", 2), ("deepvit", 3)):
    config = digits_depth.get_config(f"{family},{depth}")
    config.model.overrides.update(image_size=8, patch_size=4, embed_dim=8, num_heads=2)
    config.batch_size, config.total_steps, config.optimizer.warmup_steps = 64, 2, 0
    config.dataset.data_dir = data_dir
    train(config, str(folder / f"{family}_{depth}"))
  return folder


def is_png(path: pathlib.Path) -> bool:
  return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


FIGURES = ("similarity_against_depth.png", "heads_of_last_block.png", "attention_maps.png")


def test_analyze_one_run(runs, run):
  workdir = runs / "deepvit_3"
  status, out, _ = run("analyze", f"--workdir={workdir}", "--threshold=0.3")
  assert status == 0 and "blocks similar to the next (0.3+)" in out
  for name in ("similarity.json", *FIGURES):
    assert f"wrote {workdir / 'analysis' / name}" in out
  summary = json.loads((workdir / "analysis" / "similarity.json").read_text())
  assert summary["threshold"] == 0.3
  assert {path.name for path in (workdir / "analysis").iterdir()} == {"similarity.json", *FIGURES}


def test_analyze_several_runs_into_a_folder(runs, run, tmp_path):
  workdirs = [f"--workdir={runs / name}" for name in ("vit_2", "deepvit_3")]
  assert run("analyze", *workdirs, f"--output={tmp_path}")[0] == 0
  rows = json.loads((tmp_path / "table.json").read_text())
  assert [(row["model"], row["blocks"]) for row in rows] == [("VisionTransformer", 2), ("DeepViT", 3)]
  assert is_png(tmp_path / "similar_blocks.png")
  for row, name in zip(rows, ("vit_2", "deepvit_3"), strict=True):
    assert all(is_png(tmp_path / name / figure) for figure in FIGURES)
    summary = json.loads((tmp_path / name / "similarity.json").read_text())
    assert summary["images"] == 360
    assert {key: summary[key] for key in row} == row
    np.testing.assert_allclose(summary["mean_similarity"], np.mean(summary["similarity"]["1"]))
    scalars = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert summary["top1"] == pytest.approx(scalars[-1]["eval/top1"])


def test_another_split(runs, run, tmp_path):
  place = (f"--workdir={runs / 'vit_2'}", f"--output={tmp_path}")
  assert run("analyze", *place, "--config.dataset.eval_split=test[:20]")[0] == 0
  assert json.loads((tmp_path / "similarity.json").read_text())["images"] == 20


@pytest.mark.parametrize("option", ["--threshold=0", "--threshold=1.1", "--head-threshold=-1", "--threshold=nan"])
def test_impossible_thresholds(option, runs, run):
  status, _, err = run("analyze", f"--workdir={runs / 'vit_2'}", option)
  assert status == 2 and "choose one in (0, 1]" in err


def test_a_model_without_maps(tiny_config, run, tmp_path):
  claim_workdir(str(tmp_path), tiny_config)
  status, _, err = run("analyze", f"--workdir={tmp_path}")
  assert status == 2 and "choose one of deepvit_16b" in err
  assert not (tmp_path / "analysis").exists()


@pytest.mark.parametrize(
  "argv, message",
  [
    (("analyze", "--workdir=/nowhere"), "holds no run"),
    (("train", "--config=configs/digits_depth.py:swin,3"), "give FAMILY,DEPTH"),
    (("train", "--config=configs/digits_depth.py:vit,0"), "give FAMILY,DEPTH"),
  ],
)
def test_bad_input(argv, message, run):
  status, _, err = run(*argv)
  assert status == 2 and message in err


def test_figures_of_one_block():
  """No neighbour, no pair of heads: the figures are still drawn."""
  summary = dict(model="VisionTransformer", blocks=1, heads=1, tokens=2, images=3, threshold=0.8, head_threshold=0.5,
                 similarity={}, ratio={}, similar_blocks=0, head_similarity=[[[1.0]]], head_ratio=[0.0])  # fmt: skip
  figures.similarity_against_depth(summary)
  figures.heads_of_last_block(summary)
  figures.similar_blocks_against_depth([summary])
  figures.attention_maps(summary, np.ones((1, 2, 2)))
