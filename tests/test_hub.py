"""Weights from the Hugging Face Hub, against a server on this machine that answers as the Hub does."""

import functools
import hashlib
import http.server
import os
import subprocess
import sys
import threading

from flax import nnx
import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

import vit_jax_ext as vx
from vit_jax_ext import hub, pretrained, weight_files
from vit_jax_ext.models import registry
from vit_jax_ext.workdir import description

NAME = "deit_tiny_patch16_224"
THIN = dict(embed_dim=8, depth=1, num_heads=2, num_classes=5, image_size=32)
COMMIT = "a" * 40


def thin(seed):
  return vx.create_model(NAME, rngs=nnx.Rngs(seed), **THIN)


@pytest.fixture
def server(tmp_path, monkeypatch):
  """The requests that a Hub has got; it has owner/thin, with .safetensors at main and a .bin at v1, and a gated one.

  At v3 the .bin holds code; of owner/damaged other content comes than what the Hub has recorded; timm's has a mirror.
  """
  about = description.describe({"name": NAME, "overrides": {}}, 5, [*"abcde"], 0.9, False)
  vx.save_pretrained(thin(1), str(tmp_path / "thin.safetensors"), about)
  vx.save_pretrained(thin(2), str(tmp_path / "thin.pth"))
  torch.save({"code": os.getcwd}, tmp_path / "code.bin")
  files = {
    f"/{registry.get_variant(NAME).hub}/resolve/main/model.safetensors": (tmp_path / "thin.safetensors").read_bytes(),
    "/owner/damaged/resolve/main/model.safetensors": (tmp_path / "thin.safetensors").read_bytes(),
    "/owner/thin/resolve/v3/pytorch_model.bin": (tmp_path / "code.bin").read_bytes(),
    "/owner/thin/resolve/main/model.safetensors": (tmp_path / "thin.safetensors").read_bytes(),
    "/owner/thin/resolve/v1/pytorch_model.bin": (tmp_path / "thin.pth").read_bytes(),
    "/owner/thin/resolve/main/more/other.safetensors": (tmp_path / "thin.safetensors").read_bytes(),
  }
  requests = []

  class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
      pass

    def do_HEAD(self):
      requests.append((self.command, self.path))
      content = files.get(self.path)
      if content is not None:
        self.send_response(200)
        recorded = "0" * 64 if "damaged" in self.path else hashlib.sha256(content).hexdigest()
        self.send_header("ETag", f'"{recorded}"')
        self.send_header("Content-Length", str(len(content)))
      else:
        why = "GatedRepo" if "gated" in self.path else "EntryNotFound" if "owner/thin" in self.path else "RepoNotFound"
        why = "RevisionNotFound" if "resolve/v9" in self.path else why
        self.send_response(403 if why == "GatedRepo" else 404)
        self.send_header("X-Error-Code", why)
        self.send_header("Content-Length", "0")
      self.send_header("X-Repo-Commit", COMMIT)
      self.end_headers()
      if content is not None and self.command == "GET":
        self.wfile.write(content)

    do_GET = do_HEAD

  with http.server.ThreadingHTTPServer(("localhost", 0), Hub) as http_server:
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    here = dict(endpoint=f"http://localhost:{http_server.server_address[1]}", cache_dir=tmp_path / "cache")
    download = functools.partial(huggingface_hub.hf_hub_download, **here)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    yield requests
    http_server.shutdown()


def same(one, other):
  return all(map(np.array_equal, *(jax.tree.leaves(nnx.state(model, nnx.Param)) for model in (one, other))))


@pytest.mark.parametrize(
  ("address", "seed"),
  [("hf://owner/thin", 1), ("hf://owner/thin@v1", 2), ("hf://owner/thin/more/other.safetensors", 1)],
)
def test_addresses(address, seed, server):
  model = thin(0)
  report = vx.load_pretrained(model, address)
  assert report.loaded and not report.reinitialized and address in str(report)
  assert same(model, thin(seed)) and not same(model, thin(0))
  before = len(server)
  vx.load_pretrained(thin(0), address)
  assert not [path for command, path in server[before:] if command == "GET" and "resolve" in path]  # once


def test_what_weights_tell_of_themselves_is_read(server):
  about = pretrained.read_description("hf://owner/thin")
  assert about["model"] == NAME and about["class_names"] == [*"abcde"]
  assert pretrained.read_description("hf://owner/thin@v1") is None
  with pytest.raises(vx.UserError, match="no repository owner/none"):
    pretrained.read_description("hf://owner/none")


def test_without_a_network_the_cache_counts(server, monkeypatch):
  vx.load_pretrained(thin(0), "hf://owner/thin")
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  model = thin(0)
  vx.load_pretrained(model, "hf://owner/thin")
  assert same(model, thin(1))
  page = r"huggingface\.co/owner/other/resolve/main/model\.safetensors"
  with pytest.raises(vx.UserError, match=rf"cannot be reached.*download https://{page} .*file's path"):
    vx.load_pretrained(model, "hf://owner/other")


@pytest.mark.parametrize(
  ("address", "words"),
  [
    ("hf://owner", "write hf://OWNER/NAME"),
    ("hf://owner/thin/../../x", "write hf://OWNER/NAME"),
    ("hf://owner/none", "no repository owner/none, or it is private.*token"),
    ("hf://gated/thin", "is gated; accept its terms.*token"),
    ("hf://owner/thin@v9", "has no revision v9"),
    ("hf://owner/thin/x.npz", r"has no x\.npz; name the file"),
    ("hf://owner/thin@v3", r"hold pickled code, posix\.getcwd; it was not run"),
    ("hf://owner/damaged", r"has the SHA-256 \w{16}\.\.\. instead of 0{16}.*it was deleted: start again"),
    ("hf://owner/thin@v2", r"owner/thin at v2 has no model\.safetensors and no pytorch_model\.bin"),
  ],
)
def test_mistakes_are_one_line(address, words, server):
  with pytest.raises(vx.UserError, match=words) as error:
    vx.load_pretrained(thin(0), address)
  assert len(str(error.value).splitlines()) == 1


def test_a_downloaded_folder(tmp_path):
  folder = tmp_path / "thin"
  folder.mkdir()
  (folder / "config.json").write_text('{"architecture": "deit_tiny_patch16_224"}')
  with pytest.raises(vx.UserError, match=r"without model\.safetensors or pytorch_model\.bin"):
    vx.load_pretrained(thin(0), str(folder))
  vx.save_pretrained(thin(3), str(folder / hub.FILES[0]))
  model = thin(0)
  vx.load_pretrained(model, folder)
  assert same(model, thin(3))


def test_what_is_damaged_does_not_stay(server, tmp_path):
  """It is downloaded anew; and what is damaged on the disk later is found too."""
  for _ in range(2):
    with pytest.raises(vx.UserError, match="it was deleted"):
      vx.load_pretrained(thin(0), "hf://owner/damaged")
  assert [command for command, path in server if "damaged" in path].count("GET") == 2
  vx.load_pretrained(thin(0), "hf://owner/thin")
  (path,) = (tmp_path / "cache").glob("models--owner--thin/snapshots/*/model.safetensors")
  blob = path.resolve()
  blob.write_bytes(blob.read_bytes()[:-1] + b"x")
  with pytest.raises(vx.UserError, match="it was deleted"):
    vx.load_pretrained(thin(0), "hf://owner/thin")
  vx.load_pretrained(thin(0), "hf://owner/thin")


def test_published_weights_are_those_of_the_mirror(server, tmp_path, monkeypatch):
  """Where there is one; an authors' file that is here already is taken."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  model = thin(0)
  assert "hf://timm/deit_tiny_patch16_224.fb_in1k" in str(vx.load_pretrained(model, True))
  assert same(model, thin(1))
  path = weight_files.cached(registry.get_variant(NAME).url)
  path.parent.mkdir(parents=True)
  vx.save_pretrained(thin(2), path)
  assert "dl.fbaipublicfiles.com" in str(vx.load_pretrained(model, True))
  assert same(model, thin(2))


def test_memory_of_a_base_model(tmp_path):
  """At most 2.1 times the file, of Transformers too, where query, key and value lie apart: 86.6 M parameters."""
  model = registry.abstract_model({"name": "deit_base_patch16_224", "overrides": {}}, 1000)
  rng, arrays = np.random.default_rng(0), {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    *module, leaf = map(str, path)
    name = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    shape = variable.shape if len(variable.shape) < 4 else (variable.shape[3], 3, 16, 16)
    array = rng.standard_normal(shape[::-1] if len(shape) == 2 else shape, np.float32)
    arrays[".".join([*module, name])] = array
  for name in [name for name in arrays if ".qkv." in name]:
    for part, array in zip(("query", "key", "value"), np.split(arrays.pop(name), 3), strict=True):
      arrays[name.replace("blocks", "vit.encoder.layer").replace("attn.qkv", f"attention.attention.{part}")] = array
  arrays["vit.embeddings.patch_embeddings.projection.weight"] = arrays.pop("patch_embed.proj.weight")
  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
  code = """
import os, re, sys, psutil
from flax import nnx
import jax
import vit_jax_ext as vx
model = nnx.eval_shape(lambda: vx.create_model("deit_base_patch16_224", rngs=nnx.Rngs(0)))
load, _ = vx.load_pretrained, jax.device_put(0.0)  # imports what it needs
before = psutil.Process().memory_info().rss
load(model, sys.argv[1])
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print((peak - before) / os.path.getsize(sys.argv[1] + "/model.safetensors"))
"""
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
  print(f"memory {float(done.stdout):.3f} of the file")
  assert 1 < float(done.stdout) <= 2.1
