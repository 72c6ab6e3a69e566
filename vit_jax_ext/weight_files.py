"""Weight files to flat dicts of NumPy arrays with PyTorch's names and layouts: every published format, and downloads.

Files come from outside: no pickled code runs, and what is damaged is refused in one line.
"""

import argparse
from collections.abc import Callable, Mapping
import fcntl
import hashlib
import os
import pathlib
import pickle
import re
import shutil
import textwrap
import types
from typing import Any
import urllib.parse
import zipfile

from etils import epath
import numpy as np
import safetensors.numpy

from vit_jax_ext import hub
from vit_jax_ext.console import transfer_bar
from vit_jax_ext.errors import UserError
from vit_jax_ext.files import user_cache

Weights = dict[str, np.ndarray]

# Where training checkpoints keep their state dict: the averaged one first.
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
# Bytes that an .npz may unpack to, 25 times ViT-L; a few kilobytes can be made to unpack to any number.
LARGEST_NPZ = 32 * 2**30
# What is no weights at all, by its first bytes in small letters.
TEXTS = {
  b"<!doctype": "a web page, not the file; open the address in a browser, and fetch the file behind it",
  b"<html": "a web page, not the file; open the address in a browser, and fetch the file behind it",
  b"<?xml": "an XML text, probably a server's answer; fetch the file again",
  b"version https://git-lfs": "a pointer of git-lfs, not the file; fetch it with git lfs pull",
}
CHUNK = 2**16  # bytes of a download that may be lost when it breaks off


def read_weights(
  source: str, largest: int | None = None, check_names: Callable[[Weights], None] | None = None
) -> tuple[Weights, str]:
  """Reads a file of PyTorch (.pth, .pt, .pth.tar), .safetensors or .npz (Google's ViT too), told apart by content.

  Args:
    source: a local path, of a file or of a repository's folder; https://... or a bucket's address such as gs://...,
      which are kept in `weights_cache()`; hf://..., see `hub`.
    largest: bytes that an .npz may unpack to; None for LARGEST_NPZ.
    check_names: called before an .npz is unpacked, with arrays of one number each under the names of its own; raises
      UserError.

  Returns:
    The arrays, and where they are from: the source and, in a training checkpoint, the entry that was chosen.

  Raises:
    UserError: the file is missing, empty, damaged, in no known format, or holds pickled code.
  """
  path = pathlib.Path(source).expanduser()
  if source.startswith(("http://", "https://")):
    path = download(source)
  elif source.startswith(hub.PREFIX):
    path = hub.fetch(source)
  elif "://" in source:
    path = _copy_from_bucket(source)
  if not path.exists():
    raise UserError(f"weights {source} do not exist; check the path")
  if path.is_dir():
    path = hub.in_folder(path)
    if path is None:
      raise UserError(
        f"weights {source} are a directory without checkpoints of ours, and without {' or '.join(hub.FILES)}; give a "
        "file, or a run's workdir"
      )
  try:
    with path.open("rb") as file:
      head = file.read(64)
  except OSError as error:
    raise UserError(f"weights {source} cannot be read: {error.strerror}; check its permissions") from None
  if not head:
    raise UserError(f"weights {source} are an empty file; fetch them again")
  if text := next((what for start, what in TEXTS.items() if head.lstrip().lower().startswith(start)), None):
    raise UserError(f"weights {source} are {text}")
  if path.suffix == ".safetensors" and head[8:9] != b"{" and not head.startswith((b"PK", b"\x80")):
    raise UserError(f"weights {source} are damaged, or no .safetensors file at all; fetch them again")
  entry = None
  try:
    if head[8:9] == b"{":
      content = safetensors.numpy.load_file(path)
    elif _is_npz(path):
      content = _read_npz(path, largest or LARGEST_NPZ, check_names)
    else:
      content, entry = _find_state_dict(_read_torch(path), source)
  except UserError:
    raise
  except Exception as error:  # the parsers raise whatever they stumble over in a damaged file
    why = " ".join(f"{type(error).__name__}: {error}".split())
    why = textwrap.shorten(why.partition(". ")[0], 160, placeholder=" ...")
    raise UserError(
      f"weights {source} are damaged, truncated or in no known format ({why}); fetch them again"
    ) from None
  return content, f"{source}, {entry}" if entry else source


def _is_npz(path: pathlib.Path) -> bool:
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return all(name.endswith(".npy") for name in archive.namelist())


def _read_npz(path: pathlib.Path, largest: int, check_names: Callable[[Weights], None] | None) -> Weights:
  with zipfile.ZipFile(path) as archive:
    size = sum(member.file_size for member in archive.infolist())
    stand_ins = {name.removesuffix(".npy"): _stand_in(archive, name) for name in archive.namelist()}
  if size > largest:
    raise UserError(
      f"weights {path} would unpack to {size:,} bytes, not at most {largest:,}; they are not this model's"
    )
  if check_names:
    check_names(stand_ins)
  with np.load(path, allow_pickle=False) as archive:
    return dict(archive)


def _stand_in(archive: zipfile.ZipFile, name: str) -> np.ndarray:
  """Returns one number in as many dimensions as an array has, of which the beginning alone is read."""
  with archive.open(name) as file:
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    return np.zeros((1,) * len(read_header(file)[0]))


def import_torch(path: pathlib.Path) -> types.ModuleType:
  """Returns PyTorch, which only its own files need.

  Raises:
    UserError: it is not installed.
  """
  try:
    import torch
  except ImportError:
    raise UserError(
      f"{path} is a PyTorch file, and PyTorch is not installed; pip install 'vit_jax_ext[torch]', or use .safetensors"
    ) from None
  return torch


def _read_torch(path: pathlib.Path) -> Any:
  torch = import_torch(path)
  try:
    # Training scripts keep their argparse.Namespace beside the weights; to rebuild one runs no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
      # Archives are mapped into memory, not read; files from before PyTorch 1.6 are no archives.
      return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
  except pickle.UnpicklingError as error:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code is None:
      raise
    raise UserError(
      f"weights {path} hold pickled code, {code[1]}; it was not run and never is: get a file that holds tensors alone"
    ) from None


def _find_state_dict(content: Any, source: str) -> tuple[Weights, str | None]:
  """Returns the arrays of a PyTorch file, and the name of the entry that holds them if they are not at the top."""
  import torch

  def has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values())

  entry = next((entry for entry in ENTRIES if isinstance(content, Mapping) and has_tensors(content.get(entry))), None)
  content = content[entry] if entry else content
  if not has_tensors(content):
    raise UserError(f"weights {source} hold no state dict, neither at the top nor under {', '.join(ENTRIES)}")
  weights = {}
  for name, tensor in content.items():
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
      raise UserError(f"weights {source}: {name} is no dense tensor; give a plain state dict")
    # NumPy has no bfloat16; every bfloat16 number is a float32 number.
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    weights[str(name)] = tensor.detach().numpy()
  return weights, entry


def save_torch(arrays: Weights, path: pathlib.Path) -> None:
  """Writes a checkpoint as the authors' training scripts do, {"model": state dict}."""
  torch = import_torch(path)

  def tensor(array: np.ndarray):
    # NumPy has no bfloat16 of its own, PyTorch does not know that of JAX: they share the bits.
    bfloat16 = array.dtype.name == "bfloat16"
    copied = torch.from_numpy(np.array(array.view(np.uint16) if bfloat16 else array))
    return copied.view(torch.bfloat16) if bfloat16 else copied

  with path.open("wb") as file:
    torch.save({"model": {name: tensor(array) for name, array in arrays.items()}}, file)


def weights_cache() -> pathlib.Path:
  """Returns the folder of downloaded weights."""
  return pathlib.Path(user_cache(), "weights")


def cached(address: str, version: str = "") -> pathlib.Path:
  """Returns where the copy of a file is kept, which may have a version."""
  name = urllib.parse.unquote(urllib.parse.urlsplit(address).path).rpartition("/")[2]
  return weights_cache() / f"{hashlib.sha256((address + version).encode()).hexdigest()[:8]}-{name}"


def download(url: str) -> pathlib.Path:
  """Returns the file behind an address; downloads it once, and goes on where an earlier download was cut off.

  A name such as deit_tiny-a1311bcf.pth holds the beginning of the file's SHA-256, as in torch.hub: it is checked.

  Raises:
    UserError: there is no network, or the server answers with an error, a web page, too few bytes or other content.
  """
  import requests  # a part of tensorflow-datasets, which loading local weights can do without

  path = cached(url)
  if path.exists():
    return path
  part = path.with_name(path.name + ".part")
  by_hand = f"download it where that works and put it at {path}"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
      fcntl.flock(file, fcntl.LOCK_EX)  # another process of this machine may be at it
      if path.exists():
        return path
      size = _fetch(url, file, by_hand)
      if size is not None and file.tell() != size:
        raise UserError(f"{url} stopped after {file.tell():,} of {size:,} bytes; start again to continue, or {by_hand}")
      _check_digest(url, part)
      part.rename(path)
  except (requests.RequestException, OSError) as error:
    raise UserError(f"{url} cannot be downloaded ({type(error).__name__}); {by_hand}, or start again") from None
  return path


def _fetch(url: str, file: Any, by_hand: str) -> int | None:
  """Appends what is missing to `file`, opened for appending; returns the size of the whole, if the server tells."""
  import requests

  headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={file.tell()}-"} if file.tell() else {})
  with requests.get(url, stream=True, timeout=30, headers=headers) as response:
    if response.status_code == 416:  # nothing is missing, or the remote file is another one now
      file.seek(0)
      file.truncate()
      return _fetch(url, file, by_hand)
    response.raise_for_status()
    if "text/html" in response.headers.get("Content-Type", ""):
      raise UserError(f"{url} answers with a web page instead of the weights; open it in a browser, or {by_hand}")
    if response.status_code != 206:
      file.seek(0)
      file.truncate()
    length = response.headers.get("Content-Length")
    size = file.tell() + int(length) if length else None
    with transfer_bar() as bar:
      task = bar.add_task(url.rpartition("/")[2], total=size, completed=file.tell())
      for chunk in response.iter_content(CHUNK):
        file.write(chunk)
        bar.update(task, completed=file.tell())
  file.flush()
  return size


def _check_digest(url: str, path: pathlib.Path) -> None:
  expected = re.search(r"-([0-9a-f]{8,64})\.\w+$", urllib.parse.urlsplit(url).path)
  if expected is None:
    return
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  if not digest.startswith(expected[1]):
    path.unlink()
    raise UserError(f"{url} has the SHA-256 {digest[:16]}... instead of {expected[1]}; it was deleted: start again")


def _copy_from_bucket(address: str) -> pathlib.Path:
  """Returns a local copy of a file in a bucket; what has changed there is copied anew."""
  try:
    remote = epath.Path(address)
    stat = remote.stat()
    path = cached(address, f"{stat.length} {stat.mtime}")
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      part = path.with_name(f"{path.name}.{os.getpid()}.part")
      with remote.open("rb") as source, part.open("wb") as target:
        shutil.copyfileobj(source, target, 2**24)
      part.rename(path)
    return path
  except Exception as error:  # each bucket's client has errors of its own
    why = " ".join(str(error).split())[:160]
    raise UserError(f"weights {address} cannot be read ({why}); check the address and your credentials") from None
