"""The export command: programs and weights that others can use."""

import json
import shutil

from flax import nnx
import jax
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext import export as exporting
from vit_jax_ext.models import registry
from vit_jax_ext.training.train import train

SMALL = {
  "crossvit_tiny_224": dict(image_size=48, depth=((1, 1),), embed_dim=(8, 16), num_heads=(2, 2)),
  "deepvit_s": dict(image_size=32, depth=2, embed_dim=8, num_heads=2, reattention_blocks=(1,)),
  "boat_swin_tiny": dict(image_size=56, depths=(2, 1), num_heads=(1, 1), embed_dim=8),
  "cswin_tiny": dict(image_size=56, depth=(1, 1), num_heads=(2, 2), embed_dim=8, split_size=(1, 7)),
}


def sizes(overrides):
  return [f"--config.model.overrides.{key}={value}" for key, value in overrides.items()]


@pytest.mark.parametrize("name", SMALL)
def test_each_family(run, name, tmp_path):
  """The program, in a JAX that knows nothing of us, gives the model's logits for any number of images."""
  model = vx.create_model(name, num_classes=5, rngs=nnx.Rngs(1), **SMALL[name])
  vx.save_pretrained(model, tmp_path / "weights.pth")
  source = f"--config.pretrained={tmp_path / 'weights.pth'}"
  status, out, err = run("export", f"--model={name}", source, *sizes(SMALL[name]), f"--output={tmp_path / 'x'}")
  assert (status, err) == (0, "")
  facts = json.loads((tmp_path / "x" / f"{name}.json").read_text())
  side = SMALL[name]["image_size"]
  assert facts["input"] == {"dtype": "uint8", "shape": ["batch", side, side, 3], "channels": "RGB"}
  assert facts["output"] == {"dtype": "float32", "shape": ["batch", 5]}
  assert "loaded back" in out and out.count("wrote") == 3

  program = jax.export.deserialize((tmp_path / "x" / f"{name}.stablehlo").read_bytes())
  assert set(program.platforms) == {"cpu", "cuda", "tpu"}
  variant = registry.get_variant(name)
  images = np.random.default_rng(2).integers(0, 256, (4, side, side, 3), np.uint8)
  expected, _ = jax.jit(lambda model, x: model(x))(model, (images / 255 - variant.mean) / np.float32(variant.std))
  for batch in (1, 4):
    np.testing.assert_allclose(program.call(images[:batch]), expected[:batch], rtol=1e-4, atol=1e-5)


def test_a_run(run, tiny_config, tmp_path):
  tiny_config.total_steps, tiny_config.eval_every_steps, tiny_config.optimizer.warmup_steps = 2, 2, 1
  train(tiny_config, str(tmp_path / "run"))
  status, out, _ = run("export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'x'}")
  assert status == 0 and "step 2, ema" in out
  facts = json.loads((tmp_path / "x" / "crossvit_tiny_224.json").read_text())
  assert facts["output"]["shape"] == ["batch", 10]
  assert "central 1;" in facts["preparation"]
  status, _, err = run("export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'x'}")
  assert status == 2 and "exists and is not overwritten" in err


def test_files_that_do_not_belong_together_are_found_out(run, tmp_path):
  name, overrides = "deepvit_s", SMALL["deepvit_s"]
  for folder, seed in (("a", 0), ("b", 1)):
    model = vx.create_model(name, num_classes=3, rngs=nnx.Rngs(seed), **overrides)
    weights = tmp_path / f"{folder}.safetensors"
    vx.save_pretrained(model, weights)
    place = f"--output={tmp_path / folder}"
    assert run("export", f"--model={name}", f"--config.pretrained={weights}", *sizes(overrides), place)[0] == 0
  shutil.copy(tmp_path / "b" / f"{name}.safetensors", tmp_path / "a")
  with pytest.raises(RuntimeError, match="do not use them"):
    exporting.compare_logits(
      tmp_path / "a" / f"{name}.stablehlo", tmp_path / "a" / f"{name}.safetensors",
      {"name": name, "overrides": overrides}, 3,
    )  # fmt: skip


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--model=swin_tinny", "--output=x"], "swin_tiny"),
    (["--output=x"], "give one of them"),
    (["--model=swin_tiny", "--workdir=y", "--output=x"], "give one of them"),
    (["--model=swin_tiny"], "give --output=DIR"),
    (["--model=swin_tiny", "--output=x", "--config.pretrained=none.pth"], "none.pth do not exist"),
    (["--model=vit_16b", "--output=/proc/x", *sizes(dict(depth=1, embed_dim=8, num_heads=2))], "cannot be written"),
    (["--workdir=/nowhere", "--output=x"], "holds no run"),
  ],
)
def test_mistakes(run, args, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  status, out, err = run("export", *args)
  assert (status, out, err.count("\n")) == (2, "", 1), err
  assert words in err
  assert not list(tmp_path.iterdir())
