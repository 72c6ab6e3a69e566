"""How fast the host feeds the devices: our pipeline beside a bare tf.data map and beside Pillow, in one run.

Run: python tests/benchmarks/input_pipeline.py
Photographic JPEGs of about 110 KB, crops of the two photographs that scikit-learn carries, as TFDS records; all paths
end at 224x224 pixels. The rounds of the paths alternate, so that a noisy machine is fair to all; medians are printed.
"""

import io
import multiprocessing
import os
import random
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import rich.console
import rich.table
import sklearn.datasets

IMAGES, BATCH, SIZE = 256, 32, 224
ROUNDS, WARM_UP, BATCHES = 5, 10, 20  # what was prefetched in warming up is little of what is measured
RECIPE = dict(crop_scale=(0.08, 1.0), interpolation="bicubic", flip=0.5, randaugment="rand-m9-mstd0.5-inc1",
              color_jitter=0.0)  # fmt: skip
FILL = (124, 116, 104)


def photographs() -> list[bytes]:
  """Returns JPEGs of 375x500 pixels, about 110 KB on average."""
  rng, result = np.random.default_rng(0), []
  pictures = sklearn.datasets.load_sample_images().images
  for i in range(IMAGES):
    picture = pictures[i % 2]
    y, x = rng.integers(0, picture.shape[0] - 375), rng.integers(0, picture.shape[1] - 500)
    buffer = io.BytesIO()
    Image.fromarray(picture[y : y + 375, x : x + 500]).save(buffer, "JPEG", quality=97 if i % 2 == 0 else 98)
    result.append(buffer.getvalue())
  return result


def prepare(folder: str, jpegs: list[bytes]):
  """Stores the images as a TFDS dataset and opens it as the trainer does."""
  import tensorflow_datasets as tfds

  from vit_jax_ext.data import datasets

  tfds.disable_progress_bar()
  features = tfds.features.FeaturesDict(
    {"image": tfds.features.Image(encoding_format="jpeg"), "label": tfds.features.ClassLabel(num_classes=2)}
  )
  examples = [(i, {"image": jpeg, "label": i % 2}) for i, jpeg in enumerate(jpegs)]
  builder = tfds.dataset_builders.store_as_tfds_dataset(
    name="photographs", version="1.0.0", data_dir=folder, features=features, split_datasets={"train": examples}
  )
  return datasets.TfdsDataset("photographs", builder)


def ours(dataset, augment: dict):
  """Yields the trainer's batches."""
  from vit_jax_ext.data import input_pipeline

  augmentation = input_pipeline.train_augmentation(augment, (SIZE, SIZE), (0.485, 0.456, 0.406), 0.0, 0.0)
  yield from input_pipeline.train_batches(
    dataset, "train", batch_size=BATCH, rows=range(BATCH), image_size=(SIZE, SIZE), seed=0, first_step=0,
    total_steps=10**6, shuffle_buffer=IMAGES, augment=augmentation,
  )  # fmt: skip


def bare(dataset):
  """Yields batches of the shortest map that one would write: decode a random crop, resize it."""
  import tensorflow as tf

  def load(_, example):
    shape = tf.image.extract_jpeg_shape(example["image"])
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      shape, tf.zeros((0, 0, 4)), area_range=(0.08, 1.0), min_object_covered=0.0, use_image_if_no_bounding_boxes=True
    )
    box = tf.concat([begin[:2], size[:2]], axis=0)
    image = tf.image.decode_and_crop_jpeg(example["image"], box, channels=3)
    image = tf.image.resize(image, (SIZE, SIZE), "bicubic", antialias=True)
    return {"image": tf.saturate_cast(tf.round(image), tf.uint8), "label": example["label"]}

  examples = dataset.examples("train").repeat().shuffle(IMAGES)
  yield from examples.map(load, tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def pillow_image(jpeg: bytes) -> np.ndarray:
  """The full recipe for one image, by Pillow: crop, flip, two random operations."""
  image = Image.open(io.BytesIO(jpeg)).convert("RGB")
  width, height = image.size
  area, aspect = random.uniform(0.08, 1) * width * height, np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
  w, h = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
  x, y = random.randint(0, width - w), random.randint(0, height - h)
  image = image.crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.BICUBIC)
  if random.random() < 0.5:
    image = image.transpose(Image.FLIP_LEFT_RIGHT)
  for _ in range(2):
    if random.random() < 0.5:
      level = min(max(random.gauss(9, 0.5), 0), 10) / 10 * random.choice((1, -1))
      image = random.choice(OPERATIONS)(image, level)
  return np.asarray(image)


def affine(matrix):
  return lambda image, x: image.transform(image.size, Image.AFFINE, matrix(x), Image.BICUBIC, fillcolor=FILL)


OPERATIONS = [
  lambda image, x: ImageOps.autocontrast(image),
  lambda image, x: ImageOps.equalize(image),
  lambda image, x: ImageOps.invert(image),
  lambda image, x: image.rotate(30 * x, Image.BICUBIC, fillcolor=FILL),
  lambda image, x: ImageOps.posterize(image, max(1, 4 - int(4 * abs(x)))),
  lambda image, x: ImageOps.solarize(image, 256 - int(256 * abs(x))),
  lambda image, x: image.point([min(255, i + int(110 * abs(x))) if i < 128 else i for i in range(256)] * 3),
  *(
    lambda image, x, kind=kind: kind(image).enhance(1 + 0.9 * x)
    for kind in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)
  ),
  affine(lambda x: (1, 0.3 * x, 0, 0, 1, 0)),
  affine(lambda x: (1, 0, 0, 0.3 * x, 1, 0)),
  affine(lambda x: (1, 0, 0.45 * x * SIZE, 0, 1, 0)),
  affine(lambda x: (1, 0, 0, 0, 1, 0.45 * x * SIZE)),
]


def pillow(pool, jpegs: list[bytes]):
  """Yields batches of the full recipe from as many processes as there are cores, working ahead of what is asked for."""
  images = pool.imap(pillow_image, (jpegs[i % IMAGES] for i in range(BATCH * (WARM_UP + BATCHES))), chunksize=8)
  for _ in range(WARM_UP + BATCHES):
    yield np.stack([next(images) for _ in range(BATCH)])


def rate(batches) -> float:
  """Returns images/s of a pipeline that nothing else runs beside."""
  for _ in range(WARM_UP):
    next(batches)
  start = time.perf_counter()
  for _ in range(BATCHES):
    next(batches)
  seconds = time.perf_counter() - start
  batches.close()
  return BATCHES * BATCH / seconds


def idle_share(batches, step_seconds: float, images: int) -> float:
  """Returns the share of the time that a step of `step_seconds` waits for its `images`."""
  waited, held, begin = 0.0, 0, None
  for step in range(60):
    start = time.perf_counter()
    while held < images:
      next(batches)
      held += BATCH
    held -= images
    waited += time.perf_counter() - start
    time.sleep(step_seconds)
    if step == 9:  # started up
      waited, begin = 0.0, time.perf_counter()
  return waited / (time.perf_counter() - begin)


def main() -> None:
  """Measures and prints the table."""
  jpegs = photographs()
  cores = os.cpu_count()
  with multiprocessing.get_context("spawn").Pool(cores) as pool, tempfile.TemporaryDirectory() as folder:
    dataset = prepare(folder, jpegs)
    crop_and_flip = RECIPE | dict(randaugment="")
    paths = {
      "bare tf.data map: crop, resize": lambda: bare(dataset),
      "ours: crop, resize, flip": lambda: ours(dataset, crop_and_flip),
      "ours: full recipe": lambda: ours(dataset, RECIPE),
      f"Pillow: full recipe, {cores} processes": lambda: pillow(pool, jpegs),
    }
    rates = {name: [] for name in paths}
    for _ in range(ROUNDS):
      for name, path in paths.items():
        rates[name].append(rate(path()))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    step_images = int(0.05 * 0.6 * medians["ours: full recipe"])  # at 60% of what the host can do
    idle = idle_share(ours(dataset, RECIPE), 0.05, max(step_images, 1))

  base, ours_cropped, ours_full, theirs_full = medians.values()
  print(
    f"JPEGs of {np.mean([len(jpeg) for jpeg in jpegs]) / 1e3:.0f} KB, {cores} cores, {ROUNDS} rounds of "
    f"{BATCHES * BATCH} images"
  )
  table = rich.table.Table("path", "images/s (median)", "lowest to highest", "ratio")
  ratios = ["", f"{ours_cropped / base:.2f} of the bare map", f"{ours_full / theirs_full:.2f} of Pillow", ""]
  for (name, values), ratio in zip(rates.items(), ratios, strict=True):
    table.add_row(name, f"{medians[name]:.0f}", f"{min(values):.0f} to {max(values):.0f}", ratio)
  rich.console.Console(width=110).print(table)
  print(f"a step of 50 ms with {step_images} images waits {idle:.1%} of the time")


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
