"""Draws what a recipe's host transforms make of two photographs: docs/augmented.jpg.

Run: python tests/benchmarks/augmented_samples.py FILE.jpg
"""

import io
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from PIL import Image
import sklearn.datasets
import tensorflow as tf

from configs import boat
from vit_jax_ext.data import input_pipeline
from vit_jax_ext.models import registry
from vit_jax_ext.models.functional import normalize
from vit_jax_ext.training import mixup

SIZE, COLUMNS = 160, 8


def main(path: str) -> None:
  """Writes the picture: rows of each photograph's augmentations, then a batch as the training step mixes it."""
  config, variant = boat.get_config("swin_tiny"), registry.get_variant("swin_tiny")
  augment = tf.function(input_pipeline.train_augmentation(config.augment, (SIZE, SIZE), variant.mean, 0.0, 0.0))
  rows = []
  for name in ("china.jpg", "flower.jpg"):
    buffer = io.BytesIO()
    Image.fromarray(sklearn.datasets.load_sample_image(name)).save(buffer, "JPEG", quality=95)
    for i in range(2):
      seeds = (tf.constant((i, column), tf.int64) for column in range(COLUMNS))
      rows.append(np.stack([augment(buffer.getvalue(), seed).numpy() for seed in seeds]))
  images = normalize(np.concatenate([rows[0][::2], rows[2][1::2]]), variant.mean, variant.std)
  for seed in (1, 4):
    mixed, _ = mixup.augment(
      jax.random.key(seed), images, np.arange(COLUMNS), num_classes=COLUMNS, mixup=0.8, cutmix=1.0, erasing=0.5
    )
    pixels = 255 * (np.asarray(mixed) * np.array(variant.std) + np.array(variant.mean))
    rows.append(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
  Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])).save(path, quality=75)
  print(f"wrote {path}")


if __name__ == "__main__":
  main(*sys.argv[1:])
