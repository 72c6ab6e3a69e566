"""How fast the host feeds the devices: our pipeline beside tf.data, Pillow, torchvision v2, timm and grain, in one run.

Run: python tests/benchmarks/input_pipeline.py [--one-thread] [500x400] [1600x1200]
Photographic JPEGs, made of the two photographs that scikit-learn carries, as ArrayRecord; all paths end at 224x224
pixels. The rounds of the paths alternate, so that a noisy machine is fair to all; medians are printed, of images/s and
of the processors' time. What is not installed of torch, torchvision, timm and grain is left out.

--one-thread measures the transforms alone, without loaders: the processor's time for an image, which a busy machine
changes least. It needs them all but grain.
"""

import importlib.util
import io
import multiprocessing
import os
import random
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import psutil
import rich.console
import rich.table
import sklearn.datasets

IMAGES, BATCH, SIZE = 256, 32, 224
ROUNDS, WARM_UP, BATCHES = 3, 10, 40  # what was prefetched in warming up is little of what is measured
RECIPE = dict(crop_scale=(0.08, 1.0), interpolation="bicubic", flip=0.5, randaugment="rand-m9-mstd0.5-inc1",
              color_jitter=0.0)  # fmt: skip
FILL = (124, 116, 104)


def photographs(width: int, height: int) -> list[bytes]:
  """Returns JPEGs, those of 500x400 pixels about 110 KB on average."""
  rng, result = np.random.default_rng(0), []
  zoom = max(1, width / 500)
  pictures = [Image.fromarray(picture) for picture in sklearn.datasets.load_sample_images().images]
  pictures = [picture.resize([round(zoom * side) for side in picture.size], Image.BICUBIC) for picture in pictures]
  for i in range(IMAGES):
    picture = pictures[i % 2]
    x, y = rng.integers(0, picture.width - width), rng.integers(0, picture.height - height)
    buffer = io.BytesIO()
    picture.crop((x, y, x + width, y + height)).save(buffer, "JPEG", quality=97 if zoom == 1 else 90)
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
    name="photographs", version="1.0.0", data_dir=folder, features=features, split_datasets={"train": examples},
    file_format="array_record",
  )  # fmt: skip
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


def pillow_crop(image: Image.Image) -> Image.Image:
  """Crops, resizes and flips at random."""
  width, height = image.size
  area, aspect = random.uniform(0.08, 1) * width * height, np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
  w, h = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
  x, y = random.randint(0, width - w), random.randint(0, height - h)
  image = image.crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.BICUBIC)
  if random.random() < 0.5:
    image = image.transpose(Image.FLIP_LEFT_RIGHT)
  return image


def pillow_image(jpeg: bytes) -> np.ndarray:
  """The full recipe for one image, by Pillow: crop, flip, two random operations."""
  image = pillow_crop(Image.open(io.BytesIO(jpeg)).convert("RGB"))
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


class Photographs:
  """The images for PyTorch's DataLoader and grain, in endless turns."""

  def __init__(self, jpegs: list[bytes], transform):
    self._jpegs, self._transform = jpegs, transform

  def __len__(self) -> int:
    return BATCH * (WARM_UP + BATCHES)

  def __getitem__(self, index) -> np.ndarray:
    return np.array(self._transform(Image.open(io.BytesIO(self._jpegs[index % IMAGES])).convert("RGB")))


def data_loader(dataset: Photographs, workers: int):
  """Yields batches of PyTorch's DataLoader."""
  import torch.utils.data

  yield from torch.utils.data.DataLoader(
    dataset, BATCH, num_workers=workers, prefetch_factor=4, multiprocessing_context="spawn"
  )


def with_grain(dataset: Photographs, workers: int):
  """Yields batches of grain."""
  from absl import flags
  import grain

  flags.FLAGS.mark_as_parsed()  # grain has some of its own
  ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  batches = grain.MapDataset.source(dataset).repeat().batch(BATCH).to_iter_dataset(ahead)
  yield from batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def torchvision_v2():
  """Returns torchvision's crop and flip of Pillow's images."""
  from torchvision.transforms import v2

  crop = v2.RandomResizedCrop(SIZE, interpolation=v2.InterpolationMode.BICUBIC)
  return v2.Compose([crop, v2.RandomHorizontalFlip()])


def timm_recipe():
  """Returns the full recipe by timm, of one magnitude: at some others its posterize fails in Pillow 13."""
  import timm.data

  return timm.data.create_transform(
    SIZE, is_training=True, auto_augment="rand-m9-inc1", color_jitter=None, interpolation="bicubic",
    use_prefetcher=True,
  )  # fmt: skip


def grain_crop(jpegs: list[bytes], workers: int):
  """Yields batches of a random crop and flip by Pillow in grain."""
  return with_grain(Photographs(jpegs, pillow_crop), workers)


def processor_seconds() -> float:
  """Returns what this process and those that it has started have used."""
  this = psutil.Process()
  times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
  return sum(time.user + time.system for time in times)


def rate(batches) -> tuple[float, float]:
  """Returns images/s, and milliseconds of processors for each, of a pipeline that nothing else runs beside."""
  batches = iter(batches)
  for _ in range(WARM_UP):
    next(batches)
  start, used = time.perf_counter(), processor_seconds()
  for _ in range(BATCHES):
    next(batches)
  seconds, used = time.perf_counter() - start, processor_seconds() - used
  batches.close()
  return BATCHES * BATCH / seconds, 1000 * used / (BATCHES * BATCH)


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


def compare(width: int, height: int) -> None:
  """Measures and prints the table of one size."""
  jpegs, cores = photographs(width, height), os.cpu_count()
  with multiprocessing.get_context("spawn").Pool(cores) as pool, tempfile.TemporaryDirectory() as folder:
    dataset = prepare(folder, jpegs)
    crop_and_flip = RECIPE | dict(randaugment="")
    paths = {
      "bare tf.data map: crop, resize": (lambda: bare(dataset), ()),
      "ours: crop, resize, flip": (lambda: ours(dataset, crop_and_flip), ()),
      "ours, scaled while decoding": (lambda: ours(dataset, crop_and_flip | dict(dct_scaling=True)), ()),
      f"torchvision v2, {cores} processes": (
        lambda: data_loader(Photographs(jpegs, torchvision_v2()), cores), ("torch", "torchvision")
      ),
      f"Pillow in grain, {cores} processes": (lambda: grain_crop(jpegs, cores), ("grain",)),
      "ours: full recipe": (lambda: ours(dataset, RECIPE), ()),
      "ours, scaled: full recipe": (lambda: ours(dataset, RECIPE | dict(dct_scaling=True)), ()),
      f"Pillow: full recipe, {cores} processes": (lambda: pillow(pool, jpegs), ()),
      f"timm: full recipe, {cores} processes": (
        lambda: data_loader(Photographs(jpegs, timm_recipe()), cores), ("torch", "torchvision", "timm")
      ),
    }  # fmt: skip
    paths = {name: path for name, (path, needed) in paths.items() if all(map(importlib.util.find_spec, needed))}
    rates = {name: [] for name in paths}
    for _ in range(ROUNDS):
      for name, path in paths.items():
        rates[name].append(rate(path()))
    medians = {name: np.median(values, axis=0) for name, values in rates.items()}
    step_images = int(0.05 * 0.6 * medians["ours: full recipe"][0])  # at 60% of what the host can do
    idle = idle_share(ours(dataset, RECIPE), 0.05, max(step_images, 1))

  print(
    f"JPEGs of {width}x{height} pixels, {np.mean([len(jpeg) for jpeg in jpegs]) / 1e3:.0f} KB, {cores} cores, {ROUNDS} "
    f"rounds of {BATCHES * BATCH} images"
  )
  table = rich.table.Table("path", "images/s (median)", "lowest to highest", "processor ms", "ours in images/s")
  for name, values in rates.items():
    ours_here = medians["ours: full recipe" if "full recipe" in name else "ours: crop, resize, flip"][0]
    lowest, highest = np.min(values, axis=0)[0], np.max(values, axis=0)[0]
    images, milliseconds = medians[name]
    ratio = f"{ours_here / images:.2f} times"
    table.add_row(name, f"{images:.0f}", f"{lowest:.0f} to {highest:.0f}", f"{milliseconds:.2f}", ratio)
  rich.console.Console(width=120).print(table)
  print(f"a step of 50 ms with {step_images} images waits {idle:.1%} of the time")


def one_thread(width: int, height: int) -> None:
  """Prints what the transforms alone take of the processor for an image, in turns, a batch at a time."""
  import tensorflow as tf
  import torch

  from vit_jax_ext.data import input_pipeline, unreadable

  jpegs = photographs(width, height)[: 2 * BATCH]

  def ours(recipe):
    augment = input_pipeline.train_augmentation(recipe, (SIZE, SIZE), (0.485, 0.456, 0.406), 0.0, 0.0)
    decode = unreadable.map_or_flag(lambda example: augment(*example))
    images = tf.data.Dataset.from_tensor_slices(jpegs).enumerate().repeat().batch(BATCH)
    images = images.map(lambda index, encoded: decode((encoded, tf.stack([index, index], axis=1))))
    options = tf.data.Options()
    options.autotune.enabled = False  # it would work ahead, while others are measured
    options.threading.private_threadpool_size = 1
    batches = iter(images.with_options(options))
    return lambda: [next(batches) for _ in range(2)]

  def others(transform):
    return lambda: [np.array(transform(Image.open(io.BytesIO(jpeg)).convert("RGB"))) for jpeg in jpegs]

  tf.config.threading.set_inter_op_parallelism_threads(1)
  tf.config.threading.set_intra_op_parallelism_threads(1)
  torch.set_num_threads(1)
  crop_and_flip = RECIPE | dict(randaugment="")
  paths = {
    "ours: crop, resize, flip": ours(crop_and_flip),
    "ours, scaled while decoding": ours(crop_and_flip | dict(dct_scaling=True)),
    "torchvision v2": others(torchvision_v2()),
    "ours: full recipe": ours(RECIPE),
    "ours, scaled: full recipe": ours(RECIPE | dict(dct_scaling=True)),
    "Pillow: full recipe": lambda: [pillow_image(jpeg) for jpeg in jpegs],
    "timm: full recipe": others(timm_recipe()),
  }
  times = {name: [] for name in paths}
  for _ in range(1 + ROUNDS):  # the first one compiles
    for name, run in paths.items():
      start = time.process_time()
      run()
      times[name].append(1000 * (time.process_time() - start) / len(jpegs))
  print(f"JPEGs of {width}x{height} pixels, one thread, {ROUNDS} rounds of {len(jpegs)} images")
  for name, values in times.items():
    print(f"{name:30} {np.median(values[1:]):6.2f} ms ({min(values[1:]):.2f} to {max(values[1:]):.2f})")


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  measure = one_thread if "--one-thread" in sys.argv else compare
  for size in [argument for argument in sys.argv[1:] if argument[0] != "-"] or ("500x400", "1600x1200"):
    measure(*map(int, size.split("x")))
