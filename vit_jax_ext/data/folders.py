"""A folder of images by class: what of it counts, what does not and why."""

import collections
from collections.abc import Iterator, Mapping, Sequence
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
  """A file, its class or labels, and its split: "train" where the folder has none."""

  path: str
  split: str
  labels: tuple[str, ...]
  digest: bytes  # of its name below the root, by which images are ordered


@dataclasses.dataclass(frozen=True)
class Listing:
  """What a folder holds.

  Attributes:
    images: in the order of their digests.
    remarks: on what is left out.
    multi_label: whether an image may have any number of labels, see `labels.py`, or has one class.
  """

  images: Sequence[Image]
  remarks: Sequence[str]
  multi_label: bool = False

  def pack(self) -> bytes:
    """Returns it for other hosts; see `unpack`."""
    rows = [(image.path, image.split, image.labels, image.digest.hex()) for image in self.images]
    return zlib.compress(json.dumps([rows, self.remarks, self.multi_label]).encode(), level=1)

  @classmethod
  def unpack(cls, packed: bytes) -> "Listing":
    """Returns what was packed."""
    rows, remarks, multi_label = json.loads(zlib.decompress(packed))
    images = [Image(path, split, tuple(labels), bytes.fromhex(digest)) for path, split, labels, digest in rows]
    return cls(images, remarks, multi_label)

  def fingerprint(self) -> str:
    """Returns eight letters that tell whether these are the same files of the same classes."""
    whole = hashlib.sha256(b"".join(image.digest for image in self.images))
    if self.multi_label:  # else the names hold the classes
      whole.update(json.dumps([image.labels for image in self.images]).encode())
    return whole.hexdigest()[:8]


def scan(name: str) -> Listing:
  """Returns the images of a folder SPLIT/CLASS/image.jpg or CLASS/image.jpg.

  Links are followed. Hidden files and folders do not count.

  Raises:
    UserError: it is neither.
  """
  root = os.path.expanduser(name)
  found: dict[int, list[tuple[str, ...]]] = collections.defaultdict(list)  # by depth
  skipped = collections.defaultdict(list)
  folders = []
  for parts, kind in walk(root):
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
    examples = some(stray or [example for names in skipped.values() for example in names])
    raise UserError(f"{shape}; move the files{f', such as {examples}' if examples else ''}")
  if len(stray) > STRAY * len(found[depth]):
    here = "/".join(found[depth][0])
    raise UserError(f"{shape}: {here} is {depth - 1} deep, and {len(stray)} are not: {some(stray)}; move them")
  if stray:
    skipped["at another depth than the others"] = stray
  classes = {parts for parts in folders if len(parts) == depth - 1}
  if empty := sorted(classes - {parts[:-1] for parts in found[depth]}):
    skipped["classes without an image"] = ["/".join(parts) for parts in empty]
  images = [
    Image(os.path.join(root, *parts), parts[0] if depth == 3 else "train", parts[-2:-1], digest("/".join(parts)))
    for parts in found[depth]
  ]
  return Listing(sorted(images, key=lambda image: image.digest), left_out(skipped))


def left_out(skipped: Mapping[str, Sequence[str]]) -> list[str]:
  """Returns remarks on what does not count, by the reason."""
  return [f"left out, {why}: {len(names)} ({some(names)})" for why, names in skipped.items()]


def walk(
  folder: str, parts: tuple[str, ...] = (), above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
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
      yield from walk(entry.path, path, (*above, here))
    elif not entry.is_file():
      yield path, "links to nothing"
    elif suffix in SUFFIXES:
      yield path, "image"
    elif suffix in OTHER_IMAGES:
      yield path, f"{suffix} is not decoded here, convert it to PNG or JPEG"
    else:
      yield path, "no images"


def digest(name: str) -> bytes:
  """Returns that of a file's name below the root."""
  return hashlib.sha256(name.encode()).digest()


def some(names: Sequence[str]) -> str:
  """Returns the first of them for a message, and how many more there are."""
  rest = len(names) - NAMED
  return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def compare_splits(images: Sequence[Image]) -> list[str]:
  """Returns remarks on classes that some splits have and others do not."""
  classes = collections.defaultdict(set)
  for image in images:
    classes[image.split].update(image.labels)
  every = set().union(*classes.values())
  return [
    f"{split} has no image of {len(lacking)} of {len(every)} classes ({some(lacking)})"
    for split in sorted(classes)
    if (lacking := sorted(every - classes[split]))
  ]


def hold_out(images: Sequence[Image], split: str) -> list[Image] | None:
  """Returns one part of a stratified division, "holdout:10%:0" or "rest:10%:0"; None if `split` is none.

  The number at the end is the seed. Each class gives its share, and at least one image where it has two; where images
  have several labels, classes are asked from the rarest on for what their share still lacks (Sechidis et al. 2011 in
  its simplest form).
  """
  if not (match := HELD_OUT.fullmatch(split)):
    return None
  which, percent, seed = match[1], int(match[2]), match[3]
  by_class = collections.defaultdict(list)
  for image in images:
    for label in image.labels or (None,):
      by_class[label].append(image)
  held, decided = set(), set()
  for members in sorted(by_class.values(), key=len):  # rare ones first: what has several labels is theirs
    members = sorted(members, key=lambda image: hashlib.sha256(f"{seed}/".encode() + image.digest).digest())
    count = max(round(len(members) * percent / 100), min(1, percent, len(members) - 1))
    free = [image for image in members if image not in decided]
    held.update(free[: max(0, count - len(held.intersection(members)))])
    decided.update(free)
  return [image for image in images if (image in held) == (which == "holdout")]
