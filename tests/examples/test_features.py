"""The example that finds neighbours: pieces of a photograph, a picture, weights that are taken."""

import sys

from flax import nnx
import numpy as np
import PIL.Image
import pytest

from examples import features
import vit_jax_ext as vx

SMALL = dict(image_size=32, embed_dim=16, depth=1, num_heads=2)


def test_pieces_are_the_photographs():
  from sklearn.datasets import load_sample_images

  pieces = features.sample_pieces()
  for photograph, start in zip(load_sample_images().images, (0, 6), strict=True):
    strips = [np.concatenate(pieces[first : first + 3], axis=1) for first in (start, start + 3)]
    np.testing.assert_array_equal(np.concatenate(strips), photograph)


def test_nearest():
  angles = np.radians([0, 50, 10, 95])
  neighbours, similarity = features.nearest(np.stack([np.cos(angles), np.sin(angles)], axis=1), 2)
  assert neighbours.tolist() == [[2, 1], [2, 3], [0, 1], [1, 2]]
  np.testing.assert_allclose(similarity[0], np.cos(np.radians([10, 50])))


def test_features_are_those_of_the_weights(tmp_path):
  model = vx.create_model("vit_16b", rngs=nnx.Rngs(7), **SMALL)
  vx.save_pretrained(model, tmp_path / "x.safetensors")
  pieces = features.sample_pieces()[:3]
  found = features.pooled_features("vit_16b", str(tmp_path / "x.safetensors"), pieces, **SMALL)
  expected = model(vx.preprocess(pieces, model))[1]["pre_logits"]
  assert found.shape == (3, 16)
  np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=-1, keepdims=True), atol=1e-6)


def test_the_picture(tmp_path):
  pieces = features.sample_pieces()[:4]
  features.draw(pieces, *features.nearest(np.eye(4, 3), 2), tmp_path / "x.png")
  width, height = PIL.Image.open(tmp_path / "x.png").size
  assert (width, height) == (576, 624)


@pytest.mark.parametrize(
  "args", [["--model=nothing"], ["none.jpg"], ["--weights=none.pth", "--model=deit_tiny_patch16_224"]]
)
def test_mistakes_are_told_in_a_line(args, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["features.py", *args])
  with pytest.raises(SystemExit, match=r"^error: .*no"):
    features.main()
