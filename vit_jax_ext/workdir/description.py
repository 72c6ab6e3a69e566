"""What a run is: its classes, what it does to images, what made it. Whoever uses its weights needs nothing else.

It lies in the workdir, and goes with exported and converted weights.
"""

from collections.abc import Mapping, Sequence
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

from vit_jax_ext.errors import UserError
from vit_jax_ext.files import write_json
from vit_jax_ext.models import registry
from vit_jax_ext.workdir import CONFIG

FILE = "run.json"
PACKAGES = ("vit_jax_ext", "jax", "flax", "optax")


def describe(
  spec: Mapping[str, Any],
  num_classes: int | None,
  class_names: Sequence[str] | None,
  crop: float | None,
  multi_label: bool = False,
) -> dict[str, Any]:
  """Returns what one has to know of a model's weights to use them.

  Args:
    spec: `name` and `overrides` of the model, as in config.model.
    num_classes: of its classifier, 0 for none; None if nobody knows.
    class_names: in the order of its logits; None if nobody knows.
    crop: share of a side that evaluation sees; None for what was published at the model's size.
    multi_label: whether an image may have any number of labels, not one class.

  Returns:
    model, overrides, num_classes, class_names, multi_label; image_size, (height, width); mean and std of normalisation,
    crop; exif_orientation, whether images are turned as their EXIF data say: they are not, in training as in
    prediction.
  """
  variant = registry.get_variant(spec["name"])
  size = spec["overrides"].get("image_size") or variant.image_size
  image_size = (size, size) if isinstance(size, int) else tuple(size)
  return {
    "model": spec["name"],
    "overrides": json.loads(json.dumps(dict(spec["overrides"]), default=str)),
    "num_classes": num_classes,
    "class_names": None if class_names is None else [*class_names],
    "multi_label": multi_label,
    "image_size": [*image_size],
    "mean": [*variant.mean],
    "std": [*variant.std],
    "crop": crop or variant.crop_at(image_size),
    "exif_orientation": False,
  }


def made_by() -> dict[str, Any]:
  """Returns time, command, git commit and versions of this process."""
  versions = {package: _version(package) for package in PACKAGES} | {"python": platform.python_version()}
  return {
    "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    "command": shlex.join(sys.argv),
    "commit": _commit(),
    "versions": versions,
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """Returns the commit of this code, with a plus if files have changed since; None if it lies in no repository."""

  def git(*args: str) -> str:
    here = pathlib.Path(__file__).parent
    return subprocess.run(
      ["git", *args], cwd=here, check=True, capture_output=True, text=True, timeout=5
    ).stdout.strip()

  try:
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
  except (OSError, subprocess.SubprocessError):
    return None


def read(workdir: str) -> dict[str, Any] | None:
  """Returns what `claim` has written; of a run of before what its config says, None if there is no run.

  Raises:
    UserError: it is damaged.
  """
  path = os.path.join(workdir, FILE)
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
    if not isinstance(content, dict) or not isinstance(content.get("class_names"), list | None):
      raise ValueError("no description of a run")
    return content
  except (FileNotFoundError, NotADirectoryError):
    return _of_config(workdir)
  except (ValueError, OSError) as error:
    raise UserError(
      f"{path} is damaged ({error}); restore it, or remove it, and the dataset is asked instead"
    ) from None


def _of_config(workdir: str) -> dict[str, Any] | None:
  try:
    with open(os.path.join(workdir, CONFIG), encoding="utf-8") as file:
      config = json.load(file)
    return describe(config["model"], None, None, config["dataset"]["crop"])
  except (OSError, ValueError, TypeError, KeyError):  # whoever reads the config will say what is wrong
    return None


def claim(workdir: str, description: dict[str, Any], step: int, dataset: str, version: str) -> None:
  """Writes a new run's description, or checks that the run in `workdir` has the same images; adds this start.

  Raises:
    UserError: it has others, or the folder cannot be written.
  """
  saved = read(workdir)
  if saved:
    check_classes(saved, description["class_names"], description["multi_label"], "this run")
    was = next((start["dataset_version"] for start in saved.get("starts", []) if "dataset_version" in start), None)
    if step and was and was != version:
      raise UserError(
        f"dataset {dataset} is {version}, and the run in {workdir} was trained on {was}; restore that, or "
        "train anew in another workdir"
      )
  start = {"step": step, "dataset": dataset, "dataset_version": version} | made_by()
  starts = [*(saved.get("starts", []) if saved else []), start]
  kept = {"thresholds": saved["thresholds"]} if saved and "thresholds" in saved else {}
  write_json(workdir, FILE, description | kept | {"starts": starts}, option="workdir")


def keep_thresholds(workdir: str, found: Mapping[str, Any]) -> None:
  """Adds to the description of a run from which probability on an image has a label, in the order of the classes.

  Args:
    workdir: of the run, whose lock is held.
    found: step and split of the evaluation, and the thresholds of its weights: eval and, of averaged ones, eval_ema.

  Raises:
    UserError: it cannot be written.
  """
  write_json(workdir, FILE, read(workdir) | {"thresholds": found}, option="workdir")


def thresholds(description: Mapping[str, Any], step: int | None = None, *, ema: bool = False) -> list[float] | None:
  """Returns the thresholds that `evaluate` has found of weights; None if it has not, or of those of another step.

  Args:
    description: of a run, or of the weights in a file, which are the only ones.
    step, ema: which weights of a run.
  """
  found = description.get("thresholds")
  if isinstance(found, Mapping):
    found = found.get("eval_ema" if ema else "eval") if found.get("step") == step else None
  fits = isinstance(found, list) and len(found) == len(description.get("class_names") or ())
  return found if fits and all(isinstance(threshold, float) for threshold in found) else None


def check_classes(
  description: Mapping[str, Any] | None, class_names: Sequence[str], multi_label: bool, what: str
) -> None:
  """Raises UserError if a dataset's classes are not those of the run; labels would mean something else.

  Args:
    description: of the run; None if there is none.
    class_names, multi_label: of the dataset.
    what: it is, for the message.
  """
  known = description and description["class_names"]
  if known and description.get("multi_label", False) != multi_label:
    one, other = ("labels.csv", "one class an image") if multi_label else ("one class an image", "labels.csv")
    raise UserError(
      f"{what} has {one}, and the weights know {other}; restore the dataset, or train anew in another workdir"
    )
  if not known or [*class_names] == [*known]:
    return
  differences = [
    f"{word} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
    for word, names in (
      ("without", sorted(set(known) - set(class_names))),
      ("with", sorted(set(class_names) - set(known))),
    )
    if names
  ]
  raise UserError(
    f"the classes of {what} are not those that the weights know: {len(class_names)} in place of {len(known)}, "
    f"{' and '.join(differences) or 'in another order'}; restore the dataset, or train anew in another workdir"
  )
