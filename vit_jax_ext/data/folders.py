"""A folder of images by class: what of it counts, what does not and why."""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import os
import re
import zlib

from vit_jax_ext.errors import UserError
from vit_jax_ext.images import SUFFIXES

OTHER_IMAGES = (".tif", ".tiff", ".heic", ".avif", ".jp2", ".svg")  # which nothing here decodes
STRAY = 0.1  # share of the images at another depth than the others, up to which they are left out
NAMED = 3  # of what is left out, in a message
HELD_OUT = re.compile(r"(holdout|rest):(\d{1,2})%:(\d+)")


@dataclasses.dataclass(frozen=True)
class Image:
  """A file, its class, and its split: "train" where the folder has none."""

  path: str
  split: str
  label: str
  digest: bytes  # of its name below the root, by which images are ordered


def scan(name: str) -> tuple[list[Image], list[str]]:
  """Returns the images of a folder SPLIT/CLASS/image.jpg or CLASS/image.jpg, and remarks on what is left out.

  Links are followed. Hidden files and folders do not count.

  Raises:
    UserError: it is neither.
  """
  root = os.path.expanduser(name)
  found: dict[int, list[tuple[str, ...]]] = collections.defaultdict(list)  # by depth
  skipped = collections.defaultdict(list)
  folders = []
  for parts, kind in _walk(root, ()):
    if kind == "image":
      found[len(parts)].append(parts)
    elif kind == "folder":
      folders.append(parts)
    else:
      skipped[kind].append("/".join(parts))
  shape = f"dataset {name} is neither CLASS/image.jpg nor SPLIT/CLASS/image.jpg with images {', '.join(SUFFIXES)}"
  depth = max((2, 3), key=lambda depth: len(found[depth]))
  stray = ["/".join(parts) for other in found if other != depth for parts in found[other]]
  if not found[depth]:
    examples = _some(stray or [example for names in skipped.values() for example in names])
    raise UserError(f"{shape}; move the files{f', such as {examples}' if examples else ''}")
  if len(stray) > STRAY * len(found[depth]):
    here = "/".join(found[depth][0])
    raise UserError(f"{shape}: {here} is {depth - 1} deep, and {len(stray)} are not: {_some(stray)}; move them")
  if stray:
    skipped["at another depth than the others"] = stray
  classes = {parts for parts in folders if len(parts) == depth - 1}
  if empty := sorted(classes - {parts[:-1] for parts in found[depth]}):
    skipped["classes without an image"] = ["/".join(parts) for parts in empty]
  remarks = [f"left out, {why}: {len(names)} ({_some(names)})" for why, names in skipped.items()]
  images = [
    Image(os.path.join(root, *parts), parts[0] if depth == 3 else "train", parts[-2], _digest("/".join(parts)))
    for parts in found[depth]
  ]
  return sorted(images, key=lambda image: image.digest), remarks


def _walk(folder: str, parts: tuple[str, ...], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
  """Yields what lies below a folder: its path in parts and "image", "folder", or why it does not count."""
  here = os.path.realpath(folder)
  if here in above:  # a link to a folder that it lies in
    return
  try:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
  except OSError as error:
    yield parts, f"{error.strerror}"
    return
  for entry in entries:
    path, suffix = (*parts, entry.name), os.path.splitext(entry.name)[1].lower()
    if entry.name.startswith("."):
      yield path, "hidden"
    elif entry.is_dir():
      yield path, "folder"
      yield from _walk(entry.path, path, (*above, here))
    elif not entry.is_file():
      yield path, "links to nothing"
    elif suffix in SUFFIXES:
      yield path, "image"
    elif suffix in OTHER_IMAGES:
      yield path, f"{suffix} is not decoded here, convert it to PNG or JPEG"
    else:
      yield path, "no images"


def _digest(name: str) -> bytes:
  return hashlib.sha256(name.encode()).digest()


def pack(images: Sequence[Image], remarks: Sequence[str]) -> bytes:
  """Returns what `scan` has found, for other hosts; see `unpack`."""
  rows = [(image.path, image.split, image.label, image.digest.hex()) for image in images]
  return zlib.compress(json.dumps([rows, remarks]).encode(), level=1)


def unpack(packed: bytes) -> tuple[list[Image], list[str]]:
  """Returns what `pack` was given."""
  rows, remarks = json.loads(zlib.decompress(packed))
  return [Image(path, split, label, bytes.fromhex(digest)) for path, split, label, digest in rows], remarks


def fingerprint(images: Sequence[Image]) -> str:
  """Returns eight letters that tell whether these are the same files of the same classes."""
  digest = hashlib.sha256(b"".join(image.digest for image in images))
  return digest.hexdigest()[:8]


def _some(names: Sequence[str]) -> str:
  rest = len(names) - NAMED
  return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def compare_splits(images: Sequence[Image]) -> list[str]:
  """Returns remarks on classes that some splits have and others do not."""
  classes = collections.defaultdict(set)
  for image in images:
    classes[image.split].add(image.label)
  every = set().union(*classes.values())
  return [
    f"{split} has no image of {len(lacking)} of {len(every)} classes ({_some(lacking)})"
    for split in sorted(classes)
    if (lacking := sorted(every - classes[split]))
  ]


def hold_out(images: Sequence[Image], split: str) -> list[Image] | None:
  """Returns one part of a stratified division, "holdout:10%:0" or "rest:10%:0"; None if `split` is none.

  The number at the end is the seed. Each class gives its share, and at least one image where it has two.
  """
  if not (match := HELD_OUT.fullmatch(split)):
    return None
  which, percent, seed = match[1], int(match[2]), match[3]
  by_class = collections.defaultdict(list)
  for image in images:
    by_class[image.label].append(image)
  held = set()
  for members in by_class.values():
    members = sorted(members, key=lambda image: hashlib.sha256(f"{seed}/".encode() + image.digest).digest())
    count = max(round(len(members) * percent / 100), min(1, percent, len(members) - 1))
    held.update(members[:count])
  return [image for image in images if (image in held) == (which == "holdout")]
