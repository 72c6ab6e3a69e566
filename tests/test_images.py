"""Image files of prediction: found as they are meant, and read as evaluation reads them: no pixel may differ."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tensorflow as tf

from tests.data.test_preprocess import CHINA, ODD, encode
import vit_jax_ext as vx
from vit_jax_ext import images
from vit_jax_ext.data import preprocess
from vit_jax_ext.images import read_image


def assert_as_in_evaluation(path, encoded, size, crop):
  path.write_bytes(encoded)
  expected = preprocess.resize_and_center_crop(tf.constant(encoded), size, crop)
  pixels = read_image(str(path), size, crop)
  assert pixels.dtype == np.uint8
  np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("kind", ODD)
def test_every_kind_of_file(kind, tmp_path):
  assert_as_in_evaluation(tmp_path / "image", ODD[kind], (224, 224), 0.875)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  return tmp_path_factory.mktemp("images") / "image"


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  shape=st.tuples(st.integers(1, 700), st.integers(1, 700)),
  size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
  crop=st.floats(0.1, 1.0),
  options=st.sampled_from([{"kind": "PNG"}, {"quality": 90}, {"quality": 60, "subsampling": 0}]),
)
def test_any_shape_size_and_crop(file, shape, size, crop, options):
  assert_as_in_evaluation(file, encode(CHINA.resize(shape), **options), size, crop)


@pytest.mark.parametrize("start", [b"", b"\x89", b"\x89PNG", b"\xff\xd8\xff", b"no image", ODD["JPEG"][:20_000]])
def test_what_is_no_image(start, tmp_path):
  (tmp_path / "x.png").write_bytes(start)
  with pytest.raises(vx.UserError, match=r"x\.png cannot be decoded"):
    read_image(str(tmp_path / "x.png"), (8, 8), 1.0)


def test_missing_file(tmp_path):
  with pytest.raises(vx.UserError, match=r"none\.png does not exist"):
    read_image(str(tmp_path / "none.png"), (8, 8), 1.0)


def test_sources(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("a/x.png", "a/deep/y.JPG", "a/.hidden/z.png", "a/.w.png", "a/notes.txt", "b.png", "c.webp"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
  (tmp_path / "list.txt").write_text("b.png\n\n a/x.png \n")
  for sources, found in [
    (["a"], ["a/deep/y.JPG", "a/x.png"]),
    (["*.png"], ["b.png"]),
    (["**/*.png"], ["a/x.png", "b.png"]),
    (["list.txt"], ["b.png", "a/x.png"]),
    (["c.webp", "none.png", "b.png"], ["c.webp", "none.png", "b.png"]),
  ]:
    assert images.find_images(sources) == found
  for source in ("*.gif", "a/.hidden/none", "a/deep/*.png"):
    if "*" in source:
      with pytest.raises(vx.UserError, match="holds no image"):
        images.find_images([source])
  (tmp_path / "empty").mkdir()
  with pytest.raises(vx.UserError, match="empty holds no image"):
    images.find_images(["empty"])
