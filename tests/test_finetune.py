"""What a user does with weights: convert, evaluate, analyze and fine-tune, on the command line."""

import json

from flax import nnx
import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import torch

from configs import finetune
from tests.command_line import execute
import vit_jax_ext as vx
from vit_jax_ext.models import registry
from vit_jax_ext.workdir import checkpoint
from vit_jax_ext.workdir.config import read_workdir_config

SIZES = [
  "--config.model.overrides.image_size=8", "--config.model.overrides.patch_size=4", "--config.model.overrides.depth=2",
  "--config.model.overrides.embed_dim=8", "--config.model.overrides.num_heads=2",
]  # fmt: skip
SMALL = {
  "crossvit_tiny_224": dict(depth=((1, 1),), embed_dim=(8, 16), num_heads=(2, 2)),
  "deit_tiny_patch16_224": dict(depth=1, embed_dim=8, num_heads=2),
  "deepvit_s": dict(depth=2, embed_dim=8, num_heads=2, reattention_blocks=(1,)),
  "swin_tiny": dict(depths=(2, 2), num_heads=(1, 1), embed_dim=8),
  "cswin_tiny": dict(depth=(1, 1), num_heads=(2, 2), embed_dim=8, split_size=(1, 7)),
  "boat_swin_tiny": dict(depths=(2, 2), num_heads=(1, 1), embed_dim=8),
  "boat_cswin_tiny": dict(depth=(1, 1), num_heads=(2, 2), embed_dim=8, split_size=(1, 7)),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir):
  """A small ViT, a few steps on digits."""
  path = tmp_path_factory.mktemp("vit")
  args = [f"--workdir={path}", "--config=configs/digits.py:vit", f"--config.dataset.data_dir={data_dir}", *SIZES]
  assert execute(*args, "--config.total_steps=60", "--config.eval_every_steps=60") == 0
  return path


@pytest.mark.parametrize("name", SMALL)
def test_convert_each_family(run, tmp_path, name, random_model):
  """From a PyTorch training checkpoint to .safetensors; the report is a table."""
  overrides = {"image_size": 240 if name.startswith("crossvit") else 224} | SMALL[name]
  model = random_model(name, num_classes=3, **overrides)
  vx.save_pretrained(model, tmp_path / "weights.pth")
  state_dict = torch.load(tmp_path / "weights.pth")["model"]
  torch.save({"state_dict": {f"module.{k}": v for k, v in state_dict.items()}}, tmp_path / "training.pth.tar")
  sizes = [f"--config.model.overrides.{key}={value}" for key, value in SMALL[name].items()]
  status, out, err = run(
    "convert", tmp_path / "training.pth.tar", tmp_path / "x.safetensors", f"--model={name}", *sizes
  )
  assert (status, err) == (0, "")
  parameters = len(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
  assert any(line.split("│")[1:3] == [" loaded        ", f" {parameters:<6} "] for line in out.splitlines()), out
  assert f"wrote {tmp_path}/x.safetensors: {name} from {tmp_path}/training.pth.tar, state_dict" in out.replace("\n", "")
  saved = safetensors.numpy.load_file(tmp_path / "x.safetensors")
  assert set(saved) == set(state_dict)
  for key, array in saved.items():
    np.testing.assert_array_equal(array, state_dict[key].numpy())


def test_convert_tells_what_differs(run, tmp_path, random_model):
  vx.save_pretrained(random_model("crossvit_tiny_224", **SMALL["crossvit_tiny_224"]), tmp_path / "a.pth")
  sizes = [f"--config.model.overrides.{key}={value}" for key, value in SMALL["crossvit_tiny_224"].items()]
  sizes += ["--config.model.overrides.image_size=384", "--num-classes=7"]
  status, out, _ = run("convert", tmp_path / "a.pth", tmp_path / "b.pth", "--model=crossvit_tiny_224", *sizes)
  assert status == 0
  for words in ("resized", "pos_embed.0", "pos_embed.1", "reinitialized", "head.0.bias", "head.1.weight"):
    assert words in out
  saved = torch.load(tmp_path / "b.pth")["model"]
  assert saved["head.1.bias"].shape == (7,)
  assert saved["pos_embed.0"].shape == (1, 1 + 32 * 32, 8)


def test_a_runs_weights_in_and_out(run, workdir, tmp_path):
  """Evaluating the file that a run was converted to repeats the run's numbers, those of its averaged weights."""
  assert run("convert", f"--workdir={workdir}", tmp_path / "x.safetensors")[0] == 0
  assert run("evaluate", f"--workdir={workdir}", f"--output={tmp_path / 'run'}")[0] == 0
  place = ["--config=configs/digits.py:vit", *SIZES]
  data_dir = read_workdir_config(str(workdir)).dataset.data_dir
  for source in (tmp_path / "x.safetensors", workdir, workdir / "checkpoints" / "60"):
    status, out, _ = run("evaluate", *place, f"--config.dataset.data_dir={data_dir}", f"--config.pretrained={source}",
                         f"--output={tmp_path / 'file'}")  # fmt: skip
    assert status == 0
    assert str(source) in out
    scores = {name: json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("run", "file")}
    assert scores["file"]["eval/loss"] == scores["run"]["eval_ema/loss"]
    assert scores["file"]["eval/top1"] == scores["run"]["eval_ema/top1"]
  place += [f"--config.dataset.data_dir={data_dir}", f"--config.pretrained={tmp_path / 'x.safetensors'}"]
  status, out, _ = run("analyze", *place, f"--output={tmp_path / 'analysis'}")
  assert status == 0
  assert json.loads((tmp_path / "analysis" / "similarity.json").read_text())["blocks"] == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Images of two classes, dark and light."""
  root = tmp_path_factory.mktemp("shades")
  rng = np.random.default_rng(0)
  for i in range(64):
    (root / ("light" if i % 2 else "dark")).mkdir(exist_ok=True)
    image = np.clip(rng.normal(200 if i % 2 else 50, 20, (12, 16, 3)), 0, 255).astype(np.uint8)
    PIL.Image.fromarray(image).save(root / ("light" if i % 2 else "dark") / f"{i}.png")
  return root


def test_linear_probe_on_a_folder_at_another_resolution(run, workdir, folder, tmp_path):
  args = [
    f"--config=configs/finetune.py:vit_16b,{folder}", f"--workdir={tmp_path / 'run'}", *SIZES,
    "--config.model.overrides.mlp_ratio=2", "--config.model.overrides.image_size=12", "--config.batch_size=16",
    "--config.total_steps=20", "--config.optimizer.warmup_steps=2", "--config.linear_probe=True",
    "--config.optimizer.learning_rate=3e-2",
  ]  # fmt: skip
  # Weights that do not fit leave no workdir behind that refuses the right ones.
  status, out, err = run(*args, f"--config.pretrained={tmp_path / 'none.pth'}")
  assert (status, out) == (2, "")
  assert err.endswith("do not exist; check the path\n")
  status, _, err = run(*args, f"--config.pretrained={workdir}")
  assert status == 0
  assert "1 resized: pos_embed" in err
  assert "2 reinitialized: head.bias, head.weight" in err
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert rows[-1]["eval/top1"] == 1.0  # light and dark, to random features

  config = read_workdir_config(str(tmp_path / "run"))
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  model = registry.abstract_model(config.model, 2)
  _, tuned = checkpoint.restore_weights(str(tmp_path / "run"), model, here, ema=False)
  source = nnx.eval_shape(lambda: vx.create_model("vit_16b", num_classes=2, rngs=nnx.Rngs(0), **config.model.overrides))
  vx.load_pretrained(source, workdir)
  np.testing.assert_array_equal(tuned["params"]["pos_embed"], source.pos_embed[...])
  np.testing.assert_array_equal(
    tuned["params"]["blocks"][1]["mlp"]["fc1"]["kernel"], source.blocks[1].mlp.fc1.kernel[...]
  )


def test_fine_tuning_starts_from_the_weights(run, workdir, tmp_path):
  """On the digits that they know they begin where they left off."""
  data_dir = read_workdir_config(str(workdir)).dataset.data_dir
  status, *_ = run(
    "--config=configs/finetune.py:vit_16b,digits", f"--workdir={tmp_path}", f"--config.dataset.data_dir={data_dir}",
    *SIZES, "--config.model.overrides.mlp_ratio=2", f"--config.pretrained={workdir}", "--config.total_steps=3",
    "--config.optimizer.warmup_steps=1", "--config.optimizer.layer_decay=0.75", "--config.dataset.crop=1.0",
    "--config.optimizer.learning_rate=1e-6",
  )  # fmt: skip
  assert status == 0
  tuned, trained = (
    [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()][-1] for path in (tmp_path, workdir)
  )
  np.testing.assert_allclose(tuned["eval/loss"], trained["eval_ema/loss"], rtol=1e-3)


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["evaluate", "--config.pretrained=none.pth"], "none.pth do not exist"),
    (["evaluate", "--config=configs/finetune.py:swin_tiny,digits"], "holds no run"),
    (
      ["evaluate", "--config=configs/finetune.py:deepvit_16b,digits", "--config.pretrained=True"],
      "no weights were pub",
    ),
    (["evaluate", "--workdir=x", "--config.pretrained=none.pth"], "give one of them"),
    (["convert", "none.pth", "x.safetensors"], "--model=NAME"),
    (["convert", "none.pth", "x.safetensors", "--model=swin_tiny"], "do not exist"),
    (["convert", "none.pth", "x.safetensors", "--model=swin_tinny"], "swin_tiny"),
    (["--config=configs/finetune.py:swin_tiny"], "VARIANT,DATASET"),
  ],
)
def test_mistakes_end_with_one_line_and_status_2(run, args, words, data_dir, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  place = [] if args[0] == "convert" else [f"--config.dataset.data_dir={data_dir}"]
  status, out, err = run(*args, *place)
  assert (status, out, err.count("\n")) == (2, "", 1), err
  assert words in err


def test_a_classifier_of_other_classes_is_not_evaluated(run, tmp_path, data_dir, random_model):
  model = random_model("vit_16b", num_classes=7, image_size=8, patch_size=4, depth=2, embed_dim=8, num_heads=2)
  vx.save_pretrained(model, tmp_path / "x.pth")
  place = [f"--config.dataset.data_dir={data_dir}", "--config.model.overrides.mlp_ratio=3", *SIZES]
  status, _, err = run(
    "evaluate", "--config=configs/digits.py:vit", *place, f"--config.pretrained={tmp_path / 'x.pth'}"
  )
  assert status == 2
  assert "head.bias has shape (7,) instead of (10,)" in err


def test_the_config_finds_a_folders_splits(folder, tmp_path):
  assert finetune.get_config(f"swin_tiny,{folder}").dataset.train_split == "train[:90%]"
  for split in ("train", "val"):
    (tmp_path / split).mkdir()
  config = finetune.get_config(f"swin_tiny,{tmp_path}")
  assert (config.dataset.train_split, config.dataset.eval_split) == ("train", "val")
