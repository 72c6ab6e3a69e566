"""Files of weights: every container, hostile and damaged ones, downloads that break off."""

import argparse
import hashlib
import http.server
import os
import pathlib
import pickle
import sys
import threading

from flax import nnx
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

import vit_jax_ext as vx
from vit_jax_ext import export, pretrained, weight_files

SIZES = dict(image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, mlp_ratio=2, num_classes=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
  return vx.create_model("deit_tiny_patch16_224", rngs=nnx.Rngs(0), **SIZES)


@pytest.fixture(scope="module")
def weights():
  """A state dict that fits the model."""
  rng = np.random.default_rng(0)
  shapes = {"patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,), "cls_token": (1, 1, 8)}
  shapes |= {"pos_embed": (1, 5, 8), "norm.weight": (8,), "norm.bias": (8,), "head.weight": (3, 8), "head.bias": (3,)}
  block = {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.fc1": (16, 8), "mlp.fc2": (8, 16)}
  shapes |= {f"blocks.0.{name}.weight": shape for name, shape in block.items()}
  shapes |= {f"blocks.0.{name}.bias": shape[:1] for name, shape in block.items()}
  shapes |= {f"blocks.0.{norm}.{leaf}": (8,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def tensors(weights, factor=1):
  return {name: torch.from_numpy(factor * array) for name, array in weights.items()}


def check(model, source, weights, where=""):
  """Loads and compares; returns the report."""
  report = vx.load_pretrained(model, source)
  assert set(report.loaded) == set(weights)
  np.testing.assert_array_equal(model.head.kernel[...], weights["head.weight"].T)
  np.testing.assert_array_equal(
    model.patch_embed.proj.kernel[...], weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
  )
  np.testing.assert_array_equal(model.blocks[0].attn.qkv.kernel[...], weights["blocks.0.attn.qkv.weight"].T)
  assert report.source.endswith(where)
  return report


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar"])
@pytest.mark.parametrize("legacy", [False, True])
def test_flat_torch_files(tmp_path, model, weights, suffix, legacy):
  path = tmp_path / f"x{suffix}"
  torch.save(tensors(weights), path, _use_new_zipfile_serialization=not legacy)
  check(model, path, weights)


@pytest.mark.parametrize(
  ("entries", "chosen"),
  [
    (("model",), "model"),
    (("state_dict",), "state_dict"),
    (("state_dict", "state_dict_ema"), "state_dict_ema"),
    (("model_ema", "model"), "model_ema"),
  ],
)
def test_nested_torch_files(tmp_path, model, weights, entries, chosen):
  """As training scripts save them: beside counters, optimizer states and the command line's Namespace."""
  content = {
    entry: {f"module.{k}": v for k, v in tensors(weights, 1 if entry == chosen else 2).items()} for entry in entries
  }
  extra = {
    "epoch": 3,
    "arch": "deit",
    "args": argparse.Namespace(lr=1.0, data="x"),
    "optimizer": {"state": {}, "n": [1]},
  }
  torch.save(content | extra | {"state_dict_ema": content.get("state_dict_ema")}, tmp_path / "x.pth.tar")
  check(model, tmp_path / "x.pth.tar", weights, where=f", {chosen}")


def test_bfloat16_and_parameters(tmp_path, model, weights):
  rounded = {name: tensor.bfloat16() for name, tensor in tensors(weights).items()}
  torch.save({name: torch.nn.Parameter(tensor) for name, tensor in rounded.items()}, tmp_path / "x.pth")
  check(model, tmp_path / "x.pth", {name: tensor.float().numpy() for name, tensor in rounded.items()})


def test_safetensors_and_npz(tmp_path, model, weights):
  safetensors.numpy.save_file(weights, tmp_path / "a.safetensors")
  np.savez(tmp_path / "b.npz", **weights)
  check(model, tmp_path / "a.safetensors", weights)
  check(model, str(tmp_path / "b.npz"), weights)
  os.rename(tmp_path / "b.npz", tmp_path / "c.bin")  # the content counts, not the name
  check(model, tmp_path / "c.bin", weights)


def test_googles_vit(tmp_path, model, weights):
  """Written from the description of google-research/vision_transformer: Flax layouts, heads apart."""
  google = {
    "cls": weights["cls_token"],
    "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
    "embedding/kernel": np.einsum("oihw->hwio", weights["patch_embed.proj.weight"]),
    "embedding/bias": weights["patch_embed.proj.bias"],
    "Transformer/encoder_norm/scale": weights["norm.weight"],
    "Transformer/encoder_norm/bias": weights["norm.bias"],
    "head/kernel": weights["head.weight"].T,
    "head/bias": weights["head.bias"],
  }
  ours, theirs = "blocks.0.", "Transformer/encoderblock_0/"
  for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
    google[f"{theirs}{name}/scale"] = weights[f"{ours}{norm}.weight"]
    google[f"{theirs}{name}/bias"] = weights[f"{ours}{norm}.bias"]
  for i, part in enumerate(("query", "key", "value")):
    rows = slice(8 * i, 8 * i + 8)
    attention = f"{theirs}MultiHeadDotProductAttention_1/{part}"
    google[f"{attention}/kernel"] = weights[f"{ours}attn.qkv.weight"][rows].T.reshape(8, 2, 4)
    google[f"{attention}/bias"] = weights[f"{ours}attn.qkv.bias"][rows].reshape(2, 4)
  google[f"{theirs}MultiHeadDotProductAttention_1/out/kernel"] = weights[f"{ours}attn.proj.weight"].T.reshape(2, 4, 8)
  google[f"{theirs}MultiHeadDotProductAttention_1/out/bias"] = weights[f"{ours}attn.proj.bias"]
  for i in (0, 1):
    google[f"{theirs}MlpBlock_3/Dense_{i}/kernel"] = weights[f"{ours}mlp.fc{i + 1}.weight"].T
    google[f"{theirs}MlpBlock_3/Dense_{i}/bias"] = weights[f"{ours}mlp.fc{i + 1}.bias"]
  np.savez(tmp_path / "B_16.npz", **google)
  check(model, tmp_path / "B_16.npz", weights)
  np.testing.assert_array_equal(model.blocks[0].attn.proj.kernel[...], weights["blocks.0.attn.proj.weight"].T)
  np.testing.assert_array_equal(model.blocks[0].attn.qkv.bias[...], weights["blocks.0.attn.qkv.bias"])
  np.savez(tmp_path / "big.npz", **google, **{"pre_logits/kernel": np.zeros((8, 8), np.float32)})
  with pytest.raises(vx.UserError, match=r"does not have: pre_logits\.weight"):
    vx.load_pretrained(model, tmp_path / "big.npz")


def test_buckets(tmp_path, model, weights, monkeypatch):
  """A bucket stands for a folder; a changed file there is fetched anew."""
  path = weight_files.epath.Path
  monkeypatch.setattr(weight_files.epath, "Path", lambda p: path(str(p).replace("gs://bucket", str(tmp_path))))
  for factor in (1, 2):
    np.savez(tmp_path / "x.npz", **{name: factor * array for name, array in weights.items()})
    os.utime(tmp_path / "x.npz", (factor, factor))
    check(model, "gs://bucket/x.npz", {name: factor * array for name, array in weights.items()})
  with pytest.raises(vx.UserError, match=r"gs://bucket/none\.npz cannot be read"):
    weight_files.read_weights("gs://bucket/none.npz")


class Planted:
  """Unpickling it creates a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path(self.path),)


class Subclass(argparse.Namespace):
  pass


def truncate(path, share=0.6):
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])


def bad_file(kind, folder, weights):
  path = folder / "x.pth"
  if kind in ("truncated torch", "truncated old torch"):
    torch.save(tensors(weights), path, _use_new_zipfile_serialization=kind == "truncated torch")
    truncate(path)
  elif kind == "truncated safetensors":
    safetensors.numpy.save_file(weights, path)
    truncate(path)
  elif kind == "truncated header":
    path.write_bytes(b"\xff" * 8 + b'{"a"')
  elif kind == "truncated npz":
    np.savez(path.with_suffix(".npz"), **weights)
    path = path.with_suffix(".npz")
    truncate(path)
  elif kind == "damaged npz":
    np.savez_compressed(path.with_suffix(".npz"), **weights)
    path = path.with_suffix(".npz")
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
  elif kind == "pickled npz":
    np.savez(path.with_suffix(".npz"), **weights | {"head.bias": np.array([Planted(folder / "ran")], object)})
    path = path.with_suffix(".npz")
  elif kind in ("malicious", "malicious beside weights", "malicious Namespace", "Namespace subclass"):
    planted = {
      "malicious": Planted(folder / "ran"),
      "malicious beside weights": {"model": tensors(weights), "args": Planted(folder / "ran")},
      "malicious Namespace": {"model": tensors(weights), "args": argparse.Namespace(x=Planted(folder / "ran"))},
      "Namespace subclass": {"model": tensors(weights), "args": Subclass(x=1)},
    }
    torch.save(planted[kind], path)
  elif kind == "bare pickle":
    path.write_bytes(pickle.dumps(Planted(folder / "ran")))
  elif kind == "empty":
    path.touch()
  elif kind == "directory":
    path.mkdir()
  elif kind == "text":
    path.write_text("<html>404</html>")
  elif kind == "no state dict":
    torch.save({"epoch": 3, "model": {}}, path)
  elif kind == "a tensor":
    torch.save(torch.zeros(3), path)
  elif kind == "not all tensors":
    torch.save(tensors(weights) | {"norm.bias": [1.0]}, path)
  elif kind == "sparse":
    torch.save(tensors(weights) | {"norm.bias": torch.zeros(8).to_sparse()}, path)
  elif kind == "nan":
    torch.save(tensors(weights | {"norm.bias": np.full(8, np.nan, np.float32)}), path)
  return path


@pytest.mark.parametrize(
  ("kind", "words"),
  [
    ("truncated torch", "damaged"),
    ("truncated old torch", "damaged"),
    ("truncated safetensors", "damaged"),
    ("truncated header", "damaged"),
    ("truncated npz", "damaged"),
    ("damaged npz", "damaged"),
    ("pickled npz", "damaged"),
    ("malicious", "was not run"),
    ("malicious beside weights", "was not run"),
    ("malicious Namespace", "was not run"),
    ("Namespace subclass", "Subclass"),
    ("bare pickle", ""),
    ("empty", "empty"),
    ("directory", "directory"),
    ("text", "a web page"),
    ("no state dict", "no state dict"),
    ("a tensor", "no state dict"),
    ("not all tensors", "norm.bias"),
    ("sparse", "norm.bias"),
    ("nan", "not finite"),
    ("missing", "do not exist"),
  ],
)
def test_bad_files_are_one_line_and_change_nothing(tmp_path, model, weights, kind, words):
  path = bad_file(kind, tmp_path, weights)
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
  with pytest.raises(vx.UserError) as error:
    vx.load_pretrained(model, path)
  assert words in str(error.value)
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 500
  assert not (tmp_path / "ran").exists()
  jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


def test_the_planted_code_would_run(tmp_path):
  """Or the tests above proved nothing."""
  path = bad_file("malicious beside weights", tmp_path, {})
  torch.load(path, weights_only=False)
  assert (tmp_path / "ran").exists()


def test_archives_that_unpack_to_too_much(tmp_path, monkeypatch):
  np.savez_compressed(tmp_path / "x.npz", a=np.zeros(10**6))
  monkeypatch.setattr(weight_files, "LARGEST_NPZ", 10**6)
  with pytest.raises(vx.UserError, match="unpack"):
    weight_files.read_weights(str(tmp_path / "x.npz"))


def test_names_are_looked_at_before_anything_is_unpacked(tmp_path, model, weights, monkeypatch):
  """Also those of Google's ViT, and what convert and export read before there is a model."""
  np.savez_compressed(tmp_path / "x.npz", **weights, planted=np.zeros(10**6))
  names = ("posembed_input/pos_embedding", *(f"encoderblock_7/MultiHeadDotProductAttention_1/{part}/kernel"
                                             for part in ("query", "key", "value")))  # fmt: skip
  np.savez_compressed(tmp_path / "google.npz", **{f"Transformer/{name}": np.zeros((8, 2, 4)) for name in names})
  spec = {"name": "deit_tiny_patch16_224", "overrides": {k: v for k, v in SIZES.items() if k != "num_classes"}}

  def fails(*_, **__):
    raise AssertionError("it is read")

  monkeypatch.setattr(np, "load", fails)
  for name, foreign in (("x", "planted"), ("google", r"blocks\.7\.attn\.qkv\.weight")):
    for load in (
      lambda path: vx.load_pretrained(model, path),
      lambda path: pretrained.convert(path, tmp_path / "new.safetensors", spec, None),
      lambda path: export.export(spec, path, str(tmp_path / "new")),
    ):
      with pytest.raises(vx.UserError, match=f"1 that the model does not have: {foreign}"):
        load(tmp_path / f"{name}.npz")


def test_without_torch(tmp_path, weights, monkeypatch):
  torch.save(tensors(weights), tmp_path / "x.pth")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(vx.UserError, match=r"\[torch\]"):
    weight_files.read_weights(str(tmp_path / "x.pth"))


class Server(http.server.ThreadingHTTPServer):
  """Serves `content` with ranges; breaks off after `limit` bytes of each answer."""

  content, limit, kind, ranges, status = b"", None, "application/octet-stream", True, None


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server = self.server
    start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if server.ranges else 0
    server.starts.append(start)
    if server.status or start >= len(server.content):
      self.send_response(server.status or 416)
      self.end_headers()
      return
    self.send_response(206 if start else 200)
    self.send_header("Content-Type", server.kind)
    self.send_header("Content-Length", str(len(server.content) - start))
    self.end_headers()
    self.wfile.write(server.content[start : start + server.limit if server.limit else None])

  def log_message(self, *args):
    pass


@pytest.fixture
def server(tmp_path, weights):
  np.savez(tmp_path / "served.npz", **weights)
  server = Server(("127.0.0.1", 0), Handler)
  server.content, server.starts = (tmp_path / "served.npz").read_bytes(), []
  server.url = f"http://127.0.0.1:{server.server_port}/x.npz"
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server
  server.shutdown()


def test_download_once(server, model, weights):
  check(model, server.url, weights)
  check(model, server.url, weights)
  assert server.starts == [0]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(server, model, weights, ranges, monkeypatch):
  monkeypatch.setattr(weight_files, "CHUNK", 100)
  server.limit, server.ranges = 1000, ranges
  with pytest.raises(vx.UserError, match=r"start again"):
    vx.load_pretrained(model, server.url)
  server.limit = None
  check(model, server.url, weights)
  assert server.starts == [0, 1000 if ranges else 0]


def test_a_finished_part_of_another_file_starts_again(server, model, weights):
  server.limit = 1000
  with pytest.raises(vx.UserError):
    vx.load_pretrained(model, server.url)
  (part,) = weight_files.weights_cache().glob("*.part")
  part.write_bytes(bytes(len(server.content)))
  server.limit = None
  check(model, server.url, weights)


def test_checksums(server, model, weights):
  digest = hashlib.sha256(server.content).hexdigest()[:8]
  check(model, server.url.replace("x.npz", f"x-{digest}.npz"), weights)
  with pytest.raises(vx.UserError, match="SHA-256"):
    vx.load_pretrained(model, server.url.replace("x.npz", "x-00000000.npz"))
  assert not list(weight_files.weights_cache().glob("*00000000*"))


def test_answers_that_are_no_weights(server, model):
  server.kind = "text/html; charset=utf-8"
  with pytest.raises(vx.UserError, match="web page"):
    vx.load_pretrained(model, server.url)
  server.status = 404
  with pytest.raises(vx.UserError, match="put it at"):
    vx.load_pretrained(model, server.url)


def test_offline_says_what_to_put_where(model, weights, monkeypatch):
  url = "http://127.0.0.1:9/deit_tiny_patch16_224.npz"
  with pytest.raises(vx.UserError) as error:
    vx.load_pretrained(model, url)
  assert url in str(error.value)
  assert "\n" not in str(error.value)
  path = pathlib.Path(str(error.value).partition("put it at ")[2].partition(",")[0])
  np.savez(path, **weights)
  check(model, url, weights)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"\n <!DOCTYPE html><html>", "a web page, not the file"),
    (b"<HTML><head>", "a web page, not the file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
    (b"<?xml version='1.0'?><Error/>", "an XML text"),
    (b"nothing that is known", "or no .safetensors file at all"),
  ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_what_is_no_weights_at_all_is_called_by_its_name(name, content, words, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(vx.UserError) as error:
    weight_files.read_weights(str(tmp_path / name))
  assert "PyTorch" not in str(error.value)
  assert words in str(error.value) or (name == "x.pth" and "in no known format" in str(error.value))
  assert "\n" not in str(error.value) and len(str(error.value)) < 400
