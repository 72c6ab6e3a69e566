"""Weights from the Hugging Face Hub, against a server on this machine that answers as the Hub does."""

import functools
import hashlib
import http.server
import threading

from flax import nnx
import huggingface_hub
import jax
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext import hub

THIN = dict(embed_dim=8, depth=1, num_heads=2, num_classes=5, image_size=32)
COMMIT = "a" * 40


def thin(seed):
  return vx.create_model("deit_tiny_patch16_224", rngs=nnx.Rngs(seed), **THIN)


@pytest.fixture
def server(tmp_path, monkeypatch):
  """The requests that a Hub has got; it has owner/thin, with .safetensors at main and a .bin at v1, and a gated one."""
  vx.save_pretrained(thin(1), str(tmp_path / "thin.safetensors"))
  vx.save_pretrained(thin(2), str(tmp_path / "thin.pth"))
  files = {
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
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
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
