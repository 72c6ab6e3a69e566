"""Records in any order: converted, resumed, damaged; TFRecord files beside ArrayRecord files."""

import io
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

import main
from tests.data.test_input_pipeline import train_batches
import vit_jax_ext as vx
from vit_jax_ext.data import datasets, input_pipeline, records

SIZE, FILES = 3000, 2  # of the training split


def png(number):
  """An image of 12x12 pixels that says its number, twelve bits in as many columns, and has 100 bytes and more."""
  columns = np.array([number >> bit & 1 for bit in range(12)], np.uint8) * 255
  file = io.BytesIO()
  PIL.Image.fromarray(np.broadcast_to(columns, (12, 12))).save(file, "PNG")
  return file.getvalue()


def number_of(image):
  return int(sum((int(column) > 127) << bit for bit, column in enumerate(image[6, :, 0])))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A data_dir with the dataset `counted`, as TFDS prepares it by default."""
  folder = tmp_path_factory.mktemp("tfrecord")
  features = tfds.features.FeaturesDict(
    {"image": tfds.features.Image(encoding_format="png"), "label": tfds.features.ClassLabel(num_classes=3)}
  )
  examples = [(i, {"image": png(i), "label": i % 3}) for i in range(SIZE)]
  tfds.disable_progress_bar()
  builder = tfds.dataset_builders.store_as_tfds_dataset(
    name="counted", version="1.2.0", data_dir=folder, features=features,
    split_datasets={"train": examples, "test": examples[:7]},
  )  # fmt: skip
  assert builder.info.file_format == tfds.core.FileFormat.TFRECORD
  return folder


@pytest.fixture
def data_dir(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path / "data")
  return tmp_path / "data"


def flags(data_dir):
  return ["--config.dataset.name=counted", f"--config.dataset.data_dir={data_dir}"]


def listed(dataset, split="train", *share):
  return [(int(index), example["image"], int(example["label"]))
          for index, example in dataset.examples(split, *share).as_numpy_iterator()]  # fmt: skip


@pytest.mark.parametrize("elsewhere", [False, True])
def test_prepare_makes_the_same_dataset_readable_in_any_order(elsewhere, data_dir, tmp_path, run):
  before = datasets.open_dataset("counted", str(data_dir))
  in_order = listed(before)
  assert before.lookup("train") is None and "the command prepare" in before.remarks[0]
  output = [f"--output={tmp_path / 'new'}"] if elsewhere else []
  status, out, _ = run("prepare", *flags(data_dir), *output)
  assert status == 0 and out.startswith("counted is ready")
  if elsewhere:
    assert datasets.open_dataset("counted", str(data_dir)).lookup("train") is None
    shutil.rmtree(data_dir)
  after = datasets.open_dataset("counted", str(tmp_path / "new" if elsewhere else data_dir))
  assert not after.remarks and after.version == before.version == "counted/1.2.0"
  assert after.class_names == before.class_names
  assert sorted(image for _, image, _ in listed(after, "test")) == sorted(map(png, range(7)))
  whole = listed(after)
  assert whole == in_order and sorted(image for _, image, _ in whole) == sorted(map(png, range(SIZE)))
  assert listed(after, "train[40%:60%]", 1, 2) == [(i - 1200, *rest) for i, *rest in whole[1500:1800]]
  found = after.lookup("train")(np.array([5, 2999, 5]))
  assert found["image"].numpy().tolist() == [whole[i][1] for i in (5, 2999, 5)]
  there = flags(tmp_path / "new" if elsewhere else data_dir)
  assert run("prepare", *there)[0] == 0  # again, nothing to do
  if elsewhere:
    status, _, error = run("prepare", *there, f"--output={tmp_path / 'third'}")
    assert status == 2 and "has ArrayRecord files already" in error


def test_what_trains_is_each_image_once(data_dir, run):
  run("prepare", *flags(data_dir))
  batches = train_batches(datasets.open_dataset("counted", str(data_dir)), 60, image_size=(12, 12))
  numbers = [number_of(image) for batch in batches for image in batch["image"]]
  assert sorted(numbers) == [*range(SIZE)] and numbers != sorted(numbers)
  assert [label for batch in batches for label in batch["label"].tolist()] == [number % 3 for number in numbers]


def test_an_interrupted_prepare_goes_on(data_dir, run, monkeypatch):
  convert = records._convert_shard

  def fails(source, *rest):
    if "train" in source:
      time.sleep(1)  # the other one is finished
      raise KeyboardInterrupt
    return convert(source, *rest)

  monkeypatch.setattr(records, "_convert_shard", fails)
  assert run("prepare", *flags(data_dir))[0] == 1
  (done,) = data_dir.glob("counted/*/*.array_record-*")
  written = done.stat().st_mtime_ns
  assert datasets.open_dataset("counted", str(data_dir)).lookup("train") is None
  monkeypatch.undo()
  assert run("prepare", *flags(data_dir))[0] == 0
  assert done.stat().st_mtime_ns == written and len(listed(datasets.open_dataset("counted", str(data_dir)))) == SIZE
  assert not [*data_dir.rglob("*.part")]


KILLED = """
import os, signal, sys
from vit_jax_ext.data import datasets, records
written = []
class Writer(records.array_record_module.ArrayRecordWriter):
  def write(self, record):
    super().write(record)
    written.append(record)
    if len(written) == 1000:
      os.kill(os.getpid(), signal.SIGKILL)
records.array_record_module.ArrayRecordWriter = Writer
for _ in datasets.convert("counted", sys.argv[1], None):
  pass
"""


def test_a_prepare_that_was_killed_leaves_nothing_to_the_next(data_dir):
  """The part that a living process writes, and that of another host, stays."""
  done = subprocess.run([sys.executable, "-c", KILLED, data_dir])
  (part,) = data_dir.rglob("*train*.part")
  assert done.returncode == -9 and f".{socket.gethostname()}-" in part.name
  others = [part.with_name(f"x.{owner}.part") for owner in (f"{socket.gethostname()}-{os.getpid()}", "elsewhere-1")]
  for other in others:
    other.touch()
  assert [*datasets.convert("counted", str(data_dir), None)]
  assert set(data_dir.rglob("*.part")) == set(others)
  assert len(listed(datasets.open_dataset("counted", str(data_dir)))) == SIZE


def test_digits_that_cannot_be_written_are_read_in_their_order(tmp_path, monkeypatch):
  def refuses(*_):
    raise PermissionError

  with monkeypatch.context() as patch:
    patch.setattr(records, "convert", refuses)
    dataset = datasets.open_dataset("digits", str(tmp_path))
    assert dataset.lookup("train") is None and len(train_batches(dataset, 2)) == 2
  assert datasets.open_dataset("digits", str(tmp_path)).lookup("train")


def test_mistakes_are_one_line(data_dir, tmp_path, run, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
  status, _, error = run("prepare", *flags(data_dir))
  assert status == 2 and re.search(r"has 1 Byte.* free, and .*KiB are needed; .*--output", error), error
  monkeypatch.undo()
  (tmp_path / "pets" / "cat").mkdir(parents=True)
  status, _, error = run("prepare", f"--config.dataset.name={tmp_path}/pets")
  assert status == 2 and "needs no preparing" in error
  (source,) = data_dir.glob("counted/*/*train*")
  whole = source.read_bytes()
  source.write_bytes(whole[: len(whole) // 2])
  status, _, error = run("prepare", *flags(data_dir))
  assert status == 1 and len(error.splitlines()) == 1 and source.name in error and "start again" in error, error


def test_damaged_records_are_named_and_replaced(data_dir, caplog):
  assert [*datasets.convert("counted", str(data_dir), None)]
  (path,) = data_dir.glob("counted/*/*train.array_record*")
  whole = bytearray(path.read_bytes())
  whole[150_000:150_400] = b"\xff" * 400
  path.write_bytes(whole)
  dataset = datasets.open_dataset("counted", str(data_dir))
  missing = {index for index, image, _ in listed(dataset) if not image}
  assert 1 <= len(missing) < 20
  batches = train_batches(dataset, 60, image_size=(12, 12), max_unreadable=0.01)
  numbers = [number_of(image) for batch in batches for image in batch["image"]]
  named = [message for message in caplog.messages if "cannot be decoded" in message]
  assert len(named) == len(missing) == SIZE - len(set(numbers))
  assert all(f"number {index} of {path.name}" in " ".join(named) for index in missing)
  assert [label for batch in batches for label in batch["label"].tolist()] == [number % 3 for number in numbers]
  for damage in (whole[: len(whole) // 2], b"", None):
    path.write_bytes(damage) if damage is not None else path.unlink()
    with pytest.raises(vx.UserError, match=rf"of 3000 images of counted/train.*{path.name}"):
      train_batches(datasets.open_dataset("counted", str(data_dir)), 1, image_size=(12, 12))


def test_a_run_goes_on_with_the_same_dataset_alone(data_dir, tmp_path, run):
  """Refused with both names; the order of another file format is no other dataset."""
  tiny = [f"--workdir={tmp_path / 'run'}", "--config.dataset.eval_split=test", "--config.smoke=True",
          "--config.model.overrides.image_size=8", "--config.model.overrides.patch_size=(2,4)",
          "--config.model.overrides.embed_dim=(8,16)", "--config.model.overrides.num_heads=(2,2)",
          "--config.model.overrides.depth=((1,1),)", "--config.model.overrides.mlp_ratio=(1,1)"]  # fmt: skip
  status, _, error = run(*flags(data_dir), *tiny)
  assert status == 0, error
  assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]["dataset_version"] == "counted/1.2.0"
  run("prepare", *flags(data_dir))
  assert run(*flags(data_dir), *tiny, "--config.total_steps=3")[0] == 0
  folder = data_dir / "counted"
  (folder / "1.2.0").rename(folder / "1.3.0")
  info = folder / "1.3.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("1.2.0", "1.3.0"))
  status, _, error = run(*flags(data_dir), *tiny, "--config.total_steps=4")
  assert status == 2 and "counted/1.3.0" in error and "counted/1.2.0" in error


def many(folder):
  """Prepares the dataset `many` of 20,000 images, and of 200,000, which are those by ten names; returns the folders."""
  size, image, noise = 20_000, png(7), np.random.default_rng(0).bytes(6000)
  features = tfds.features.FeaturesDict(
    {"image": tfds.features.Image(encoding_format="png"), "label": tfds.features.ClassLabel(num_classes=3)}
  )
  builder = tfds.dataset_builders.store_as_tfds_dataset(
    name="many", version="1.0.0", data_dir=folder, features=features, disable_shuffling=True,
    split_datasets={"train": [(i, {"image": image + noise, "label": i % 3}) for i in range(size)]},
  )  # fmt: skip
  for _ in records.convert(builder, str(folder / "one")):
    pass
  ten = folder / "ten" / "many" / "1.0.0"
  shutil.copytree(folder / "one" / "many" / "1.0.0", ten, copy_function=os.link)
  paths = sorted(ten.glob("*.array_record*"))
  for number, path in enumerate(10 * paths):
    os.link(path, ten / f"many-train.array_record-{number:05}-of-{10 * len(paths):05}.new")
  for path in paths:
    path.unlink()
  for path in ten.glob("*.new"):
    path.rename(path.with_suffix(""))
  facts = json.loads((ten / "dataset_info.json").read_text())
  facts["splits"][0]["shardLengths"] *= 10
  (ten / "dataset_info.json").unlink()
  (ten / "dataset_info.json").write_text(json.dumps(facts))
  return str(folder / "one"), str(folder / "ten")


def batches_of_many(folder, first_step, steps):
  augment = input_pipeline.train_augmentation(
    dict(crop_scale=(), interpolation="bicubic", flip=0.0, randaugment="", color_jitter=0.0), (12, 12), (0.5,) * 3, 0, 0
  )
  return input_pipeline.train_batches(
    datasets.open_dataset("many", folder), "train", batch_size=100, rows=range(100), image_size=(12, 12), seed=0,
    first_step=first_step, total_steps=first_step + steps, shuffle_buffer=50_000, augment=augment,
  )  # fmt: skip


@pytest.mark.slow
def test_resuming_reads_a_hundredth_of_the_bytes(tmp_path):
  """At a random step of 200,000 images, within three seconds."""
  _, folder = many(tmp_path)
  stored = sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*.array_record*"))
  for step in [0, *np.random.default_rng(0).integers(0, 5 * 200_000 // 100, 3).tolist()]:
    began, read = time.monotonic(), _bytes_read()
    batches = batches_of_many(folder, step, 10**6)
    next(batches)
    seconds, share = time.monotonic() - began, (_bytes_read() - read) / stored
    batches.close()
    print(f"step {step}: {seconds:.2f} s, {share:.2%} of {stored:,} bytes")
    assert seconds < 3 and (share < 0.01 or not step)  # the first time Python reads its modules


@pytest.mark.slow
def test_memory_does_not_depend_on_the_dataset(tmp_path):
  """The peak of 1,000 batches, of 20,000 images and of 200,000; the interpreter and TensorFlow are in it."""
  code = """
import resource, sys
from tests.data.test_records import batches_of_many
for batch in batches_of_many(sys.argv[1], 0, 1000):
  pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
  peaks = []
  for folder in many(tmp_path):
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.path.dirname(main.__file__))
    peaks.append(int(done.stdout) / 2**10)
  print(f"{peaks[0]:.0f} and {peaks[1]:.0f} MiB")
  assert max(peaks) < 2**11 and abs(peaks[1] - peaks[0]) < 64


def _bytes_read():
  with open("/proc/self/io") as file:
    return int(re.search(r"rchar: (\d+)", file.read())[1])
