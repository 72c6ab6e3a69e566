"""Image files of prediction: found as they are meant, and read as evaluation reads them."""

import numpy as np
import PIL.Image
import pytest

import vit_jax_ext as vx
from vit_jax_ext import images
from vit_jax_ext.data import input_pipeline


@pytest.mark.parametrize("shape", [(300, 400), (8, 8), (231, 77), (20, 300)])
@pytest.mark.parametrize(("size", "crop"), [((64, 64), 0.875), ((32, 48), 1.0)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp"])
def test_pixels_are_those_of_evaluation(shape, size, crop, suffix, tmp_path):
  small = np.random.default_rng(0).integers(0, 256, (shape[0] // 4 + 2, shape[1] // 4 + 2, 3), np.uint8)
  PIL.Image.fromarray(small).resize(shape[::-1]).save(tmp_path / f"x.{suffix}")
  path = str(tmp_path / f"x.{suffix}")
  ours, theirs = images.read_image(path, size, crop), input_pipeline.read_image(path, size, crop)
  assert ours.shape == (*size, 3) and ours.dtype == np.uint8
  difference = np.abs(ours.astype(int) - theirs)
  assert difference.max() <= 2 and difference.mean() < (
    0.4 if shape == (8, 8) else 0.01
  )  # halves of levels, where few are drawn out


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1", "CMYK"])
def test_modes(mode, tmp_path):
  values = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
  image = PIL.Image.fromarray(values[..., 0].astype(np.uint16)) if mode == "I;16" else PIL.Image.fromarray(values)
  image = image if image.mode == mode else image.convert(mode)
  path = str(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
  image.save(path)
  np.testing.assert_allclose(
    images.read_image(path, (7, 7), 1.0).astype(int), input_pipeline.read_image(path, (7, 7), 1.0), atol=1
  )


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
