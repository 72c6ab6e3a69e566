"""Results on disk: a file takes its place when all of it is written."""

import base64
from collections.abc import Iterator
import contextlib
import errno
import json
import os
import tempfile
from typing import IO, Any

import humanize

from vit_jax_ext.errors import UserError


def size(count: float) -> str:
  """Returns a number of bytes for people, e.g. "5.10 GiB"."""
  return humanize.naturalsize(count, binary=True, format="%.2f")


def user_cache() -> str:
  """Returns our folder under the user's cache."""
  return os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "vit_jax_ext")


@contextlib.contextmanager
def replace(folder: str, name: str, option: str = "output", *, binary: bool = False) -> Iterator[IO]:
  """Opens a file in `folder`, which is made if needed, for writing; it takes its place when all is written.

  Args:
    folder, name: of the file.
    option: of the command line, which names the folder.
    binary: for bytes, not text.

  Raises:
    UserError: the folder cannot be written.
  """
  path = os.path.join(folder, name)
  try:
    os.makedirs(folder, exist_ok=True)
    with open(f"{path}.part", "wb") if binary else open(f"{path}.part", "w", newline="", encoding="utf-8") as file:
      yield file
    os.replace(f"{path}.part", path)
  except OSError as error:
    raise UserError(f"{path} cannot be written: {error.strerror}; choose another --{option}") from None


def check_new_file(path: str, option: str = "output") -> None:
  """Raises UserError unless a file could be written at `path`; to be asked before the work that it shall hold."""
  folder = os.path.abspath(os.path.dirname(path))
  while not os.path.lexists(folder):
    folder = os.path.dirname(folder)
  try:
    if os.path.isdir(path):
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise UserError(f"{path} cannot be written: {error.strerror}; choose another --{option}") from None


def write_json(folder: str, name: str, content: Any, option: str = "output") -> str:
  """Writes a JSON file as `replace` does, and returns its path."""
  with replace(folder, name, option) as file:
    json.dump(content, file, indent=2)
  return os.path.join(folder, name)


def data_address(path: str) -> str:
  """Returns a PNG file as an address that a page can hold in itself."""
  with open(path, "rb") as file:
    return "data:image/png;base64," + base64.b64encode(file.read()).decode()
