"""The library's face for other people's programs: inputs, names, runs; without TensorFlow."""

import subprocess
import sys

from flax import nnx
import jax
import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import tensorflow as tf

import vit_jax_ext as vx
from vit_jax_ext.data import preprocess
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import normalize

CHINA = sklearn.datasets.load_sample_image("china.jpg")


def test_list_models():
  assert vx.list_models() == sorted(registry.VARIANTS)
  assert vx.list_models("swin*") == [name for name in vx.list_models() if name.startswith("swin")] != []
  assert vx.list_models("nothing*") == []


def test_version():
  assert vx.__version__.count(".") == 2


@pytest.mark.parametrize(
  ("name", "size", "crop"), [("crossvit_15_dagger_224", 240, 0.875), ("swin_base", 224, 0.9), ("swin_tiny", 224, 0.875)]
)
def test_data_config(name, size, crop):
  variant = registry.get_variant(name)
  config = vx.data_config(name)
  assert config["image_size"] == (variant.image_size,) * 2 and config["crop"] == variant.crop
  assert (config["mean"], config["std"], config["interpolation"]) == (variant.mean, variant.std, "bicubic")
  if name == "swin_base":
    model = vx.create_model(name, image_size=384, window_size=12, embed_dim=8, num_heads=(1, 1, 1, 1), depths=(1,) * 4,
                            rngs=nnx.Rngs(0))  # fmt: skip
    assert vx.data_config(model) == config | {"image_size": (384, 384), "crop": 1.0}
  with pytest.raises(vx.UserError, match="did you mean"):
    vx.data_config(name + "x")


def test_preprocess_is_the_evaluation_transform(tmp_path):
  """Of files and of arrays, against TensorFlow's, to the bit."""
  PIL.Image.fromarray(CHINA).save(tmp_path / "china.png")
  config = vx.data_config("deit_small_patch16_224")
  encoded = tf.constant((tmp_path / "china.png").read_bytes())
  expected = preprocess.resize_and_center_crop(encoded, (224, 224), config["crop"]).numpy()
  expected = np.asarray(normalize(expected[None], config["mean"], config["std"]))
  for images in (tmp_path / "china.png", str(tmp_path / "china.png"), CHINA, CHINA[None], [CHINA]):
    found = vx.preprocess(images, "deit_small_patch16_224")
    assert found.dtype == np.float32 and found.shape == (1, 224, 224, 3)
    np.testing.assert_allclose(found, expected, atol=1e-6)
  assert vx.preprocess([CHINA, tmp_path / "china.png"], config).shape == (2, 224, 224, 3)


@pytest.mark.parametrize(
  ("images", "words"),
  [("none.png", "none.png does not exist"), (CHINA.astype(np.float32), "type float32"), (CHINA[..., 0], "shape"),
   ([CHINA[..., :2]], r"\(427, 640, 2\)")],
)  # fmt: skip
def test_what_is_no_image(images, words):
  with pytest.raises(vx.UserError, match=words):
    vx.preprocess(images, "swin_tiny")


def test_class_names():
  names, synsets = vx.class_names(), vx.class_names("imagenet", synsets=True)
  assert len(set(names)) == len(set(synsets)) == 1000 and synsets == sorted(synsets)
  assert (names[0], names[285], names[999]) == ("tench", "Egyptian cat", "toilet tissue")
  assert (synsets[0], synsets[999]) == ("n01440764", "n15075141")
  with pytest.raises(vx.UserError, match="cifar10"):
    vx.class_names("cifar10")


def test_nothing_of_it_needs_tensorflow():
  code = """
import sys, numpy as np, vit_jax_ext as vx
vx.list_models("swin*"), vx.data_config("swin_tiny"), vx.class_names(), vx.__version__
vx.preprocess(np.zeros((8, 8, 3), np.uint8), "swin_tiny")
print({"tensorflow", "torch", "matplotlib", "clu"} & set(sys.modules))
"""
  done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("ema", [None, False])
def test_load_run(ema, tmp_path, tiny_config):
  """Its logits are those that its evaluation counted."""
  from vit_jax_ext.data import datasets, input_pipeline
  from vit_jax_ext.training.train import train

  tiny_config.ema_decay = 0.9
  results = train(tiny_config, str(tmp_path))
  model, info = vx.load_run(str(tmp_path), ema=ema)
  assert info["ema"] == (ema is None) and info["step"] in (3, 6)
  assert info["class_names"] == [str(digit) for digit in range(10)] and info["starts"][-1]["dataset"] == "digits"
  dataset = datasets.open_dataset("digits", tiny_config.dataset.data_dir)
  batches = input_pipeline.eval_batches(dataset, "test", batch_size=360, image_size=(8, 8), crop=1.0)
  (batch,) = batches
  images = np.stack([vx.preprocess(image, info | {"crop": 1.0})[0] for image in batch["image"]])
  top1 = np.mean(np.argmax(jax.jit(lambda x: model(x)[0])(images), axis=-1) == batch["label"])
  if info["step"] == 6:
    np.testing.assert_allclose(top1, results["eval_ema/top1" if ema is None else "eval/top1"], atol=1e-6)
  with pytest.raises(vx.UserError, match="holds no run"):
    vx.load_run(str(tmp_path / "none"))
