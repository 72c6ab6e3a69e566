"""Digests of a folder's files: orbax does not notice a bit that has changed, and falters over files cut short."""

import json
import os
import zlib

from etils import epath

FILE = "digests.json"  # in the folder: length and CRC-32 of every other file
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # written by orbax when it commits, after the digests


def write(folder: epath.Path) -> None:
  """Writes the digests of what is in `folder`, local or in a bucket."""
  (folder / f"{FILE}.tmp").write_text(json.dumps(_digests(folder)))
  (folder / f"{FILE}.tmp").replace(folder / FILE)


def damage(folder: epath.Path) -> str | None:
  """Returns what is not as it was when the digests were written; None if all is. Files may have been added since."""
  if not (folder / FILE).exists():
    return f"{FILE} is missing"
  try:
    written = dict(json.loads((folder / FILE).read_text()))
  except (ValueError, TypeError):
    return f"{FILE} cannot be read"
  try:
    found = _digests(folder)
  except FileNotFoundError as error:  # a run that is still training has put the checkpoint out of the way
    return f"{error.filename or folder} has just been removed"
  for name, digest in written.items():
    if found.get(name) != digest:
      return f"{name} is not what was written" if name in found else f"{name} is missing"
  return None


def _digests(folder: epath.Path) -> dict[str, list[int]]:
  digests, folders = {}, [folder]
  for below in folders:
    for path in below.iterdir():
      if path.is_dir():
        folders.append(path)
      elif path.parent != folder or path.name not in (FILE, *LATER):
        length = crc = 0
        with path.open("rb") as file:
          while piece := file.read(2**22):
            length, crc = length + len(piece), zlib.crc32(piece, crc)
        digests[os.fspath(path.relative_to(folder))] = [length, crc]
  return digests
