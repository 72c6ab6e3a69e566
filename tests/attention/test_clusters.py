"""`analyze --clusters`: what it draws and refuses."""

import numpy as np
from PIL import Image
import pytest

from tests.command_line import execute
from vit_jax_ext.attention import clusters
from vit_jax_ext.config import CONFIGS

SMALL = ["--config.model.overrides.image_size=(16,32)", "--config.model.overrides.embed_dim=8",
         "--config.model.overrides.cluster_size=4", "--config.model.overrides.overlap=1"]  # fmt: skip
SWIN = [*SMALL, "--config.model.overrides.depths=(2,1)", "--config.model.overrides.num_heads=(2,2)",
        "--config.model.overrides.window_size=4"]  # fmt: skip
CSWIN = [*SMALL, "--model=boat_cswin_tiny", "--config.model.overrides.depth=(2,1)",
         "--config.model.overrides.num_heads=(2,2)", "--config.model.overrides.split_size=(2,2)"]  # fmt: skip


@pytest.fixture(scope="module")
def image(tmp_path_factory):
  path = tmp_path_factory.mktemp("images") / "noise.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)).save(path)
  return path


@pytest.fixture
def analyze(run, tmp_path):
  """Returns a function: arguments of `analyze` -> (status, stdout, stderr); writes into tmp_path."""
  return lambda *args: run("analyze", f"--output={tmp_path}", *args)


@pytest.fixture
def drawn(monkeypatch):
  """What the picture shows: title -> labels."""
  shown = {}
  picture = clusters.picture

  def record(image, labels):
    shown.update(labels)
    return picture(image, labels)

  monkeypatch.setattr(clusters, "picture", record)
  return shown


def test_draws_windows_and_clusters(analyze, image, drawn, tmp_path):
  status, out, _ = analyze("--clusters", image, "--heads=1,0", *SWIN)
  assert status == 0
  assert out == f"wrote {tmp_path}/clusters.png\n"
  assert Image.open(tmp_path / "clusters.png").width > 1000
  assert list(drawn) == ["3 shifted windows", "head 1, 8 clusters", "head 0, 8 clusters"]
  windows, *heads = drawn.values()
  np.testing.assert_array_equal(windows, np.tile([0, 0, 1, 1, 1, 1, 2, 2], (4, 1)))
  for labels in heads:
    assert labels.shape == (4, 8)
    np.testing.assert_array_equal(np.bincount(labels.ravel()), [4] * 8)


def test_stripes_of_half_of_the_heads(analyze, image, drawn):
  status, _, _ = analyze("--clusters", image, "--block=stage1.0", "--heads=0", *CSWIN)
  assert status == 0
  assert list(drawn) == ["4 columns, half of the heads", "2 rows, half of the heads", "head 0, 8 clusters"]
  np.testing.assert_array_equal(drawn["2 rows, half of the heads"][:, 0], [0, 0, 1, 1])


def test_weights_of_a_run(analyze, image, drawn, data_dir, tmp_path):
  workdir = tmp_path / "run"
  small = [argument.replace("(16,32)", "16") for argument in SWIN]
  assert execute(
    f"--config={CONFIGS / 'digits.py'}:boat_swin", f"--workdir={workdir}", f"--config.dataset.data_dir={data_dir}",
    "--config.total_steps=1", "--config.optimizer.warmup_steps=0", *small,
  ) == 0  # fmt: skip
  status, _, _ = analyze("--clusters", image, f"--workdir={workdir}")
  assert status == 0
  assert list(drawn) == ["one window", "head 0, 4 clusters", "head 1, 4 clusters"]


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--model=swin_tiny"], ["swin_tiny", "boat_swin_tiny"]),
    (["--model=boat_swin_huge"], ["boat_swin_huge", "boat_swin_base"]),
    (["--block=layers.0.blocks.0", *SWIN], ["layers.0.blocks.0", "layers.0.blocks.1"]),
    (["--heads=2", *SWIN], ["head 2", "0 to 1"]),
    (["--heads=a", *SWIN], ["--heads=a", "0,1,2"]),
    (["--config.model.overrides.local_attention=image", *SWIN], ["local_attention"]),
    (["--model=boat_swin_tiny", "--workdir=nowhere"], ["one model", "nowhere"]),
    (["--workdir=nowhere"], ["nowhere", "holds no run"]),
  ],
)
def test_bad_input(analyze, image, args, words):
  status, _, err = analyze("--clusters", image, *args)
  assert status == 2
  assert err.count("\n") == 1
  assert all(word in err for word in words)


@pytest.mark.parametrize(("content", "words"), [(None, "does not exist"), (b"text", "cannot be decoded")])
def test_unreadable_images(analyze, tmp_path, content, words):
  path = tmp_path / "picture.png"
  if content:
    path.write_bytes(content)
  status, _, err = analyze("--clusters", path, *SWIN)
  assert status == 2
  assert words in err
