"""Generated images of several labels: coloured shapes side by side."""

import csv
import pathlib

import numpy as np
import PIL.Image
import PIL.ImageDraw

LABELS = {"blue disc": "blue", "green triangle": "lime", "red square": "red"}


def draw(path: pathlib.Path, labels, rng: np.random.Generator) -> None:
  """Writes an image of 64x32 pixels, (height, width), with one shape for each label, each in a third of its own."""
  image = PIL.Image.fromarray(rng.integers(0, 60, (64, 32, 3), np.uint8))
  pen = PIL.ImageDraw.Draw(image)
  thirds = rng.permutation(3)
  for third, label in zip(thirds, sorted(labels), strict=False):
    left, top = rng.integers(0, 16), 21 * third + rng.integers(0, 6)
    box = [(left, top), (left + 15, top + 15)]
    if label == "green triangle":
      pen.polygon([*box, (left, top + 15)], fill=LABELS[label])
    else:
      (pen.ellipse if label == "blue disc" else pen.rectangle)(box, fill=LABELS[label])
  path.parent.mkdir(parents=True, exist_ok=True)
  image.save(path)


def write(folder: pathlib.Path, count: int, seed: int) -> None:
  """Writes a folder of images and its labels.csv; every fifth image or so has no label."""
  rng = np.random.default_rng(seed)
  rows = []
  for i in range(count):
    labels = [label for label in LABELS if rng.random() < 0.45]
    draw(folder / "images" / f"{i}.png", labels, rng)
    rows.append([f"images/{i}.png", ";".join(labels)])
  with open(folder / "labels.csv", "w", newline="") as file:
    csv.writer(file).writerows([["file", "labels"], *rows])
