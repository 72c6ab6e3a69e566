"""A folder with labels.csv: images of any number of labels each.

labels.csv lies in the folder, which is then the split "train" as a whole, or one in each of its folders, the splits. It
has the columns file, relative to where it lies, and labels, separated by semicolons; none is an answer too.
"""

from collections import defaultdict
from collections.abc import Iterator
import csv
import io
import os
import pathlib

from vit_jax_ext.data.folders import STRAY, Image, Listing, digest, left_out, some, walk
from vit_jax_ext.errors import UserError

FILE = "labels.csv"
COLUMNS = ["file", "labels"]
SEPARATOR = ";"
MISTAKEN = ",|"  # separators elsewhere, which no label may have: a list of labels would be one label, and nobody saw it


def are_there(name: str) -> bool:
  """Tells whether a folder, or a folder in it, has labels.csv."""
  root = pathlib.Path(name).expanduser()
  return any(path.is_file() for path in (root / FILE, *root.glob(f"[!.]*/{FILE}")))


def scan(name: str) -> Listing:
  """Returns the images of a folder with labels.csv, in the order of their names' hashes, whatever labels they have.

  Raises:
    UserError: a line is wrong, says which; a split has no labels.csv; a tenth of the files or more do not exist.
  """
  root = pathlib.Path(name).expanduser()
  kinds = dict(walk(os.fspath(root)))
  tables = sorted(root.glob(f"[!.]*/{FILE}"))
  if (root / FILE).is_file():
    if tables:
      raise UserError(f"dataset {name} has {FILE} and {tables[0].relative_to(root)}; one in it, or one in each split")
    tables = [root / FILE]
  splits = [path.parent.name for path in tables]
  without = {parts[0] for parts, kind in kinds.items() if kind == "image" and len(parts) > 1} - {*splits}
  if without and root not in [path.parent for path in tables]:
    raise UserError(f"dataset {name} has {FILE} in {some(splits)}, not in {some(sorted(without))}; each split has one")
  images, skipped, empty = [], defaultdict(list), []
  for table in tables:
    above = table.parent.relative_to(root).parts
    for line, parts, labels in _read(table):
      parts = (*above, *parts)
      below = "/".join(parts)
      kind = kinds.pop(parts, "no such file")
      if kind != "image":
        skipped[kind].append(f"{table.relative_to(root)} line {line}: {below}")
        continue
      images.append(Image(os.path.join(root, *parts), above[0] if above else "train", labels, digest(below)))
      if not labels:
        empty.append(below)
  if sum(map(len, skipped.values())) > STRAY * len(images):
    found = "; ".join(left_out(skipped))
    raise UserError(f"dataset {name} has {len(images)} of the images that {FILE} names; {found}; mend the lines")
  if not any(image.labels for image in images):
    raise UserError(f"dataset {name} has no image with a label; write them into the column labels of {FILE}")
  if unlabelled := sorted("/".join(parts) for parts, kind in kinds.items() if kind == "image"):
    skipped[f"without a line in {FILE}"] = unlabelled
  remarks = left_out(skipped)
  if empty:
    remarks.append(f"without a label, and so an example of none: {len(empty)} ({some(empty)})")
  if all(len(image.labels) < 2 for image in images):
    remarks.append(f"no image has two labels; {FILE} separates them by {SEPARATOR}")
  return Listing(sorted(images, key=lambda image: image.digest), remarks, multi_label=True)


def _read(table: pathlib.Path) -> Iterator[tuple[int, tuple[str, ...], tuple[str, ...]]]:
  """Yields number, file in parts and labels of the lines of a labels.csv.

  Raises:
    UserError: a line is wrong.
  """
  lines: dict[tuple[str, ...], int] = {}
  reader = csv.reader(io.StringIO(_text(table), newline=""), strict=True)
  try:
    header = [column.strip() for column in next(reader, [])]
    if header != COLUMNS:
      found = ",".join(header)[:80]
      raise UserError(
        f"{table} line 1 has the columns {found!r}; give {','.join(COLUMNS)!r}, or name the file otherwise if the "
        "folders are the classes"
      )
    for row in reader:
      if not row:
        continue
      line = reader.line_num
      if len(row) != 2:
        raise UserError(f"{table} line {line} has {len(row)} values in place of 2; separate labels by {SEPARATOR!r}")
      parts, labels = _file(row[0]), tuple(sorted(filter(None, map(str.strip, row[1].split(SEPARATOR)))))
      if not parts:
        raise UserError(
          f"{table} line {line} has the file {row[0][:80]!r}; give one below the folder of {FILE}, relative to it"
        )
      if wrong := next((label for label in labels if {*MISTAKEN} & {*label} or not label.isprintable()), None):
        raise UserError(f"{table} line {line} has the label {wrong[:80]!r}; separate labels by {SEPARATOR!r}")
      if len({*labels}) < len(labels):
        raise UserError(f"{table} line {line} has a label twice, {row[1][:80]!r}; leave one out")
      if parts in lines:
        raise UserError(f"{table} line {line} has {row[0][:80]}, as line {lines[parts]} has; give all labels in one")
      lines[parts] = line
      yield line, parts, labels
  except csv.Error as error:
    raise UserError(f"{table} line {reader.line_num} is no CSV: {error}; mend it") from None


def _text(table: pathlib.Path) -> str:
  try:
    content = table.read_bytes()
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = content[: error.start].count(b"\n") + 1
    raise UserError(f"{table} line {line} is not UTF-8 ({error.reason}); save it so") from None
  except OSError as error:
    raise UserError(f"{table} cannot be read: {error.strerror}; check its permissions") from None


def _file(name: str) -> tuple[str, ...]:
  """Returns a relative path in parts; none if it leaves the folder, or is none."""
  path = pathlib.PurePosixPath(name.strip())
  return () if path.is_absolute() or ".." in path.parts or not name.isprintable() else path.parts
