"""Folders that timm loads, with equal logits; the card; uploads, to a server on this machine in place of the Hub."""

import base64
import http.server
import json
import re
import threading

from flax import nnx
from huggingface_hub import constants
import jax
import numpy as np
import pytest
import torch

from tests.references import random_images
from tests.references import run as run_torch
import vit_jax_ext as vx
from vit_jax_ext.publish import FAMILIES
from vit_jax_ext.training.train import train

VIT = dict(embed_dim=24, depth=2, num_heads=3, image_size=48)
CROSSVIT = dict(embed_dim=(12, 24), depth=((1, 2), (1, 1)), num_heads=(2, 3))
SWIN = dict(embed_dim=12, depths=(2, 2), num_heads=(1, 2))


@pytest.fixture
def weights(tmp_path):
  """Returns a function: a name and options -> a file under the authors' names with random float32 in every entry."""

  def write(name, **options):
    model = nnx.eval_shape(lambda: vx.create_model(name, num_classes=5, rngs=nnx.Rngs(0), **options))
    rng = np.random.default_rng(0)

    def draw(p):
      spread = 0.5 if p.ndim == 1 else np.prod(p.shape[:-1]) ** -0.5
      return jax.numpy.asarray(rng.normal(0, spread, p.shape).astype(np.float32))

    nnx.update(model, jax.tree.map(draw, nnx.state(model, (nnx.Param, nnx.BatchStat))))
    vx.save_pretrained(model, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"

  return write


def flags(options):
  return [f"--config.model.overrides.{key}={value}" for key, value in options.items()]


CASES = [
  ("crossvit_9_224", CROSSVIT | dict(image_size=120), "crossvit_9_240"),
  ("crossvit_9_224", CROSSVIT | dict(image_size=60), "crossvit_9_240"),  # 64 = int(60 * factor) takes care
  ("crossvit_9_dagger_224", CROSSVIT | dict(image_size=120), "crossvit_9_dagger_240"),
  ("deit_tiny_patch16_224", VIT, "deit_tiny_patch16_224"),
  ("deit_tiny_distilled_patch16_224", VIT, "deit_tiny_distilled_patch16_224"),
  ("vit_16b", VIT, "vit_small_patch16_224"),
  ("swin_tiny", SWIN | dict(image_size=64, window_size=4), "swin_tiny_patch4_window7_224"),
  ("swin_tiny", SWIN | dict(image_size=96), "swin_tiny_patch4_window7_224"),  # windows of 8 and 6
]


@pytest.mark.parametrize(("name", "options", "architecture"), CASES)
def test_timm_loads_the_folder_with_equal_logits(name, options, architecture, run, weights, x64, tmp_path):
  folder = tmp_path / "out"
  source = weights(name, **options)
  status, out, err = run("convert", source, folder, "--to=timm", f"--model={name}", *flags(options))
  assert (status, err) == (0, ""), err
  assert f"wrote {folder}" in out
  assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
  assert json.loads((folder / "config.json").read_text())["architecture"] == architecture

  timm = pytest.importorskip("timm")
  theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).double().eval()
  images = random_images(options["image_size"])
  expected = run_torch(theirs, images).numpy()
  assert expected.shape == (2, 5) and np.abs(expected).max() > 0.1
  ours = nnx.eval_shape(
    lambda: vx.create_model(name, num_classes=5, rngs=nnx.Rngs(0), dtype="float64", param_dtype="float64", **options)
  )
  for place in (source, folder):
    vx.load_pretrained(ours, place)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x)[0])(ours, images), expected, rtol=0, atol=1e-6)

  prepared = timm.data.resolve_model_data_config(theirs)
  facts = vx.data_config(ours)
  assert prepared["input_size"] == (3, *facts["image_size"])
  assert (tuple(prepared["mean"]), tuple(prepared["std"])) == (facts["mean"], facts["std"])
  assert (prepared["crop_pct"], prepared["interpolation"]) == (facts["crop"], facts["interpolation"])
  # timm changes classifier and first convolution by the names that config.json gives.
  with torch.no_grad():
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3, in_chans=1).eval()
    assert other(torch.zeros(1, 1, *facts["image_size"])).shape == (1, 3)


def test_the_folder_tells_its_model(run, weights, tmp_path):
  """What was written comes back without --model, and as a file with the authors' names."""
  source = weights("swin_tiny", **SWIN, image_size=64)
  arguments = ["--model=swin_tiny", *flags(SWIN | {"image_size": 64})]
  assert run("convert", source, tmp_path / "out", "--to=timm", *arguments)[0] == 0
  assert run("convert", tmp_path / "out", tmp_path / "again.safetensors")[0] == 0
  before, after = (vx.create_model("swin_tiny", num_classes=5, rngs=nnx.Rngs(0), **SWIN, image_size=64) for _ in "ab")
  vx.load_pretrained(before, source)
  vx.load_pretrained(after, tmp_path / "again.safetensors")
  jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (before, after)))


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("deepvit_16b", dict(VIT), "timm has no deepvit_16b; it has crossvit_tiny_224, .*swin_base"),
    ("boat_swin_tiny", dict(SWIN, image_size=64), "timm has no boat_swin_tiny"),
    ("crossvit_9_224", dict(CROSSVIT, image_size=120, fusion="none"), "no fusion=none"),
    ("crossvit_9_224", dict(CROSSVIT, image_size=(60, 120)), "takes two; choose a square image_size"),
    ("swin_tiny", dict(SWIN, image_size=(64, 48)), "no squares; choose a square image_size"),
    ("deit_tiny_distilled_patch16_224", dict(VIT, dist_head=False), "has two heads"),
  ],
)
def test_what_timm_does_not_have(name, options, words, run, weights, tmp_path):
  source = weights(name, **options)
  status, _, err = run("convert", source, tmp_path / "out", "--to=timm", f"--model={name}", *flags(options))
  assert status == 2 and re.search(words, err) and len(err.strip().splitlines()) == 1
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_nothing_is_overwritten(name, run, weights, tmp_path):
  source = weights("deit_tiny_patch16_224", **VIT)
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / name).write_text("mine")
  arguments = ["--to=timm", "--model=deit_tiny_patch16_224", *flags(VIT)]
  status, _, err = run("convert", source, tmp_path / "out", *arguments)
  assert status == 2 and f"{name} exists and is not overwritten" in err
  assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_where_nothing_can_be_written(run, weights, tmp_path):
  source = weights("deit_tiny_patch16_224", **VIT)
  arguments = ["--model=deit_tiny_patch16_224", *flags(VIT)]
  status, _, err = run("convert", source, source / "out", "--to=timm", *arguments)
  assert status == 2 and "cannot be written: Not a directory; choose another --to=timm FOLDER" in err
  status, _, err = run("convert", source, tmp_path / "x.pth", "--license=mit", *arguments)
  assert status == 2 and "--license=mit goes into a card" in err
  assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_the_card_of_a_run(run, tiny_config, tmp_path):
  """Its data and metrics, its license where it is given, and both ways to load it, which work."""
  tiny_config.total_steps, tiny_config.eval_every_steps, tiny_config.optimizer.warmup_steps = 2, 2, 1
  tiny_config.model.name = "vit_16b"
  tiny_config.model.overrides = dict(image_size=8, patch_size=4, embed_dim=8, num_heads=2, depth=1)
  workdir, folder = tmp_path / "run", tmp_path / "out"
  train(tiny_config, str(workdir))
  assert run("convert", folder, "--to=timm", f"--workdir={workdir}", "--license=cc-by-4.0")[0] == 0
  card = (folder / "README.md").read_text()
  assert "\nlicense: cc-by-4.0\n" in card and "on digits" in card and "step 2, ema" in card
  scores = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  assert f"| top1 | {scores['eval_ema/top1']:.4g} |" in card
  config = json.loads((folder / "config.json").read_text())
  assert config["label_names"] == [str(digit) for digit in range(10)]

  theirs, ours = re.findall(r"```python\n(.*?)```", card, re.S)
  theirs, _, _ = theirs.partition("transform =")
  names = {"timm": pytest.importorskip("timm")}
  exec(theirs.replace("import timm\n", ""), names)
  images = random_images(8).astype(np.float32)
  expected = run_torch(names["model"], images).numpy()
  ours, _, _ = ours.partition("logits,")
  exec(ours, names)
  np.testing.assert_allclose(names["model"](images)[0], expected, rtol=0, atol=1e-4)


def test_the_card_of_published_weights(weights, tmp_path, monkeypatch):
  """Their license, and the paper's accuracy, which was not measured."""
  from vit_jax_ext import pretrained, publish

  source = weights("deit_tiny_patch16_224", **VIT)
  monkeypatch.setattr(pretrained, "_published", lambda variant: str(source))
  publish.write_folder(True, tmp_path / "out", {"name": "deit_tiny_patch16_224", "overrides": VIT}, None)
  card = (tmp_path / "out" / "README.md").read_text()
  assert "\nlicense: apache-2.0\n" in card and "72.2%. Not measured anew" in card


def test_all_architectures_of_timm_have_a_license_and_a_name():
  from vit_jax_ext.models.registry import VARIANTS

  for name, variant in VARIANTS.items():
    if variant.hub:
      assert variant.model in FAMILIES and variant.license in ("apache-2.0", "mit"), name


@pytest.fixture
def server(monkeypatch):
  """A Hub that keeps what is uploaded: `files`, {repository: {name: bytes}}; owner/full has a README.md."""
  files, large = {"owner/full": {"README.md": b"mine"}}, {}

  class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
      pass

    def answer(self, content, status=200, **headers):
      body = json.dumps(content).encode()
      self.send_response(status)
      for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
        self.send_header(name.replace("_", "-"), value)
      self.end_headers()
      self.wfile.write(body)

    def body(self):
      return self.rfile.read(int(self.headers["Content-Length"]))

    def do_GET(self):
      match = re.match(r"/api/models/(\w+/\w+)/tree/main", self.path)
      if match:
        names = files.get(match[1], {})
        self.answer([{"type": "file", "path": name, "size": len(c), "oid": "0" * 40} for name, c in names.items()])
      else:
        self.answer({}, 404)

    def do_PUT(self):
      large[self.path.rpartition("/")[2]] = self.body()
      self.answer({})

    def do_POST(self):
      body, here = self.body(), f"http://localhost:{self.server.server_address[1]}"
      if self.headers.get("Authorization") != "Bearer hf_good":
        self.answer({"error": "Invalid username or password."}, 401)
      elif self.path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        known = name in files
        files.setdefault(name, {})
        self.answer({"url": f"{here}/{name}"}, 409 if known else 200)
      elif self.path == "/api/validate-yaml":
        self.answer({"errors": [], "warnings": []})
      elif "/preupload/" in self.path:
        modes = {"model.safetensors": "lfs"}
        self.answer({"files": [{"path": f["path"], "uploadMode": modes.get(f["path"], "regular"), "shouldIgnore": False}
                               for f in json.loads(body)["files"]]})  # fmt: skip
      elif self.path.endswith("/info/lfs/objects/batch"):
        objects = json.loads(body)["objects"]
        self.answer({"transfer": "basic", "objects": [
          o | {"actions": {"upload": {"href": f"{here}/lfs/{o['oid']}"}}} for o in objects
        ]})  # fmt: skip
      elif "/commit/" in self.path:
        name = re.match(r"/api/models/(\w+/\w+)/commit/main", self.path)[1]
        for line in map(json.loads, body.splitlines()):
          if line["key"] == "file":
            files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
          elif line["key"] == "lfsFile":
            files[name][line["value"]["path"]] = large[line["value"]["oid"]]
        self.answer({"success": True, "commitOid": "b" * 40, "commitUrl": f"{here}/{name}/commit/{'b' * 40}"})
      else:
        self.answer({}, 404)

  with http.server.ThreadingHTTPServer(("localhost", 0), Hub) as http_server:
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{http_server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield files
    http_server.shutdown()


def test_upload(run, weights, server, tmp_path):
  source = weights("deit_tiny_patch16_224", **VIT)
  status, out, err = run(
    "convert", source, "owner/thin", "--to=hub", "--model=deit_tiny_patch16_224", "--license=mit", *flags(VIT)
  )
  assert status == 0, err
  assert re.search(r"wrote http://localhost:\d+/owner/thin: deit_tiny_patch16_224", out)
  uploaded = server["owner/thin"]
  assert set(uploaded) == {"config.json", "model.safetensors", "README.md"}
  card = uploaded["README.md"].decode()
  assert "'hf-hub:owner/thin', pretrained=True" in card and "'hf://owner/thin'" in card
  folder = tmp_path / "down"
  folder.mkdir()
  for name, content in uploaded.items():
    (folder / name).write_bytes(content)
  model = vx.create_model("deit_tiny_patch16_224", num_classes=5, rngs=nnx.Rngs(0), **VIT)
  assert len(vx.load_pretrained(model, folder).loaded) == 32
  pytest.importorskip("timm").create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize(
  ("target", "token", "words"),
  [
    ("owner", "hf_good", "owner is no repository on the Hub; write OWNER/NAME"),
    ("owner/full", "hf_good", r"owner/full has README\.md, which would be overwritten"),
    ("other/thin", "hf_bad", r"may not write to other/thin; .*token"),
  ],
)
def test_uploads_that_are_refused(target, token, words, run, weights, server, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", token)
  source = weights("deit_tiny_patch16_224", **VIT)
  status, _, err = run("convert", source, target, "--to=hub", "--model=deit_tiny_patch16_224", *flags(VIT))
  assert status == 2 and re.search(words, err) and len(err.strip().splitlines()) == 1
  assert server["owner/full"] == {"README.md": b"mine"}


def test_upload_without_a_network(run, weights, monkeypatch):
  monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
  monkeypatch.setenv("HF_TOKEN", "hf_good")
  source = weights("deit_tiny_patch16_224", **VIT)
  status, _, err = run("convert", source, "owner/thin", "--to=hub", "--model=deit_tiny_patch16_224", *flags(VIT))
  assert status == 2 and "owner/thin cannot be uploaded (" in err and len(err.strip().splitlines()) == 1
