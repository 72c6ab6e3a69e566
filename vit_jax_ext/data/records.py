"""ArrayRecord files of TFDS datasets: any record at once, and how they are made of TFRecord files."""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import contextlib
import os
import shutil
import socket
import threading

from array_record.python import array_record_module
from etils import epath
import numpy as np
import psutil
import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax_ext.errors import RunError, UserError
from vit_jax_ext.files import size

SUFFIX = "array_record"
# Each record for itself; what is in it, JPEG or PNG, is compressed already.
WRITER = "group_size:1,uncompressed"
# A record at once, and of the index what there is of it: a megabyte for each file otherwise.
READER = {
  "options": "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0",
  "file_reader_buffer_size": 2**12,
}
THREADS = 8  # files that are converted at once


def are_there(builder: tfds.core.DatasetBuilder) -> bool:
  """Tells whether a prepared dataset has ArrayRecord files, its own or `convert`'s."""
  if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
    return True
  # The builder forgets the alternatives, the file does not.
  facts = tfds.core.dataset_info.read_proto_from_builder_dir(builder.data_dir)
  return SUFFIX in facts.alternative_file_formats


class Records:
  """Records of a split by their index. Threads may share it.

  Args:
    instructions: TFDS's, for the split: files, and which of their records.
  """

  def __init__(self, instructions: Sequence[tfds.core.utils.shard_utils.FileInstruction]):
    self._files = [_path(instruction.filename) for instruction in instructions]
    self._skipped = [instruction.skip for instruction in instructions]
    self._ends = np.cumsum([instruction.take for instruction in instructions])
    self._readers: dict[str, array_record_module.ArrayRecordReader] = {}
    self._lock = threading.Lock()

  def __call__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the records, bytes (n,), b"" where they cannot be read, and what to call them, bytes (n,)."""
    files = np.searchsorted(self._ends, indices, side="right")
    within = indices - np.concatenate([[0], self._ends])[files] + np.array(self._skipped)[files]
    records, names = np.empty(len(indices), object), np.empty(len(indices), object)
    for file in np.unique(files):
      (here,) = np.nonzero(files == file)
      path = self._files[file]
      records[here] = self._read(path, within[here].tolist())
      names[here] = [f"number {number} of {os.path.basename(path)}".encode() for number in within[here]]
    return records, names

  def _read(self, path: str, numbers: list[int]) -> list[bytes]:
    try:
      return self._reader(path).read(numbers)
    except (OSError, RuntimeError):  # of the file, or of one record
      return [b""] if len(numbers) == 1 else [record for number in numbers for record in self._read(path, [number])]

  def _reader(self, path: str) -> array_record_module.ArrayRecordReader:
    with self._lock:
      if path not in self._readers:
        os.stat(path)  # the reader ends the process where there is no file
        self._readers[path] = array_record_module.ArrayRecordReader(path, **READER)
      return self._readers[path]


def lookup(
  builder: tfds.core.DatasetBuilder, split: str, spec: dict[str, tf.io.FixedLenFeature | tf.io.VarLenFeature]
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
  """Returns a function of indices, int64 (n,), to the features that `spec` describes, and `record`, their names."""
  records = Records(builder.info.splits[split].file_instructions)

  def find(indices):
    serialized, names = tf.numpy_function(records, [indices], (tf.string, tf.string), stateful=False)
    serialized, names = tf.ensure_shape(serialized, [None]), tf.ensure_shape(names, [None])
    return tf.io.parse_example(serialized, spec) | {"record": names}

  return find


def _path(tfrecord: os.PathLike | str) -> str:
  """Returns the ArrayRecord file beside a TFRecord file, or itself."""
  return os.fspath(tfrecord).replace(".tfrecord-", f".{SUFFIX}-")


def convert(builder: tfds.core.DatasetBuilder, folder: str | None) -> Iterator[tuple[int, int]]:
  """Makes ArrayRecord files of a prepared dataset's TFRecord files; yields bytes done and in all, file by file.

  Files that an interrupted conversion has finished stay; what a killed one had begun goes. Each is counted before it
  takes its place, and the dataset's description names the new ones when all are there.

  Args:
    builder: of the dataset.
    folder: TFDS's data_dir in which a dataset of the new files alone is made; None to put them beside the old ones.

  Raises:
    UserError: too little disk, or a folder on which array_record cannot write.
    RunError: a file that cannot be read or written, or that lacks records.
  """
  source = epath.Path(builder.data_dir)
  target = epath.Path(folder, *source.parts[-len(builder.info.full_name.split("/")) :]) if folder else source
  if "://" in os.fspath(target):
    raise UserError(f"{target} is a bucket, and ArrayRecord files are read and written on file systems alone; give "
                    "one, or the bucket mounted as one, with --output")  # fmt: skip
  if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
    raise UserError(f"{source} has ArrayRecord files already, and no others; copy it to {target} if it shall be there")
  target.mkdir(parents=True, exist_ok=True)
  _remove_parts(target)
  shards = []
  for split in builder.info.splits.values():
    for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
      shards.append((os.fspath(path), _path(target / path.name), length, path.stat().length))
  missing = [shard for shard in shards if not os.path.exists(shard[1])]
  needed, free = sum(shard[3] for shard in missing), shutil.disk_usage(target).free
  if needed > free:
    raise UserError(f"{target} has {size(free)} free, and {size(needed)} are needed; make room, or give another folder "
                    "with --output")  # fmt: skip
  whole = sum(shard[3] for shard in shards)
  done = whole - needed
  yield done, whole
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    try:
      for future in concurrent.futures.as_completed([pool.submit(_convert_shard, *shard) for shard in missing]):
        done += future.result()
        yield done, whole
    finally:
      pool.shutdown(wait=True, cancel_futures=True)
  _describe(builder, source, target)


def _remove_parts(folder: epath.Path) -> None:
  """Removes what processes of this host that are gone had begun; another host's may be at work."""
  for path in folder.glob(f"*.{socket.gethostname()}-*.part"):
    if not psutil.pid_exists(int(path.stem.rpartition("-")[2])):
      path.unlink()


def _convert_shard(source: str, target: str, length: int, bytes_in_all: int) -> int:
  part = f"{target}.{socket.gethostname()}-{os.getpid()}.part"
  try:
    writer, count = array_record_module.ArrayRecordWriter(part, WRITER), 0
    for record in tf.data.TFRecordDataset(source).as_numpy_iterator():
      writer.write(record)
      count += 1
    writer.close()
  except (OSError, RuntimeError, tf.errors.OpError) as error:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(part)
    why = " ".join(str(error).split())[:160]
    raise RunError(f"{source} cannot be converted ({why}); mend it or prepare the dataset again, then start again to "
                   "continue") from None  # fmt: skip
  if count != length:
    os.unlink(part)
    raise RunError(f"{source} has {count} records instead of {length}; prepare the dataset again")
  os.replace(part, target)
  return bytes_in_all


def _describe(builder: tfds.core.DatasetBuilder, source: epath.Path, target: epath.Path) -> None:
  """Writes into the dataset's description which files there are now."""
  facts = tfds.core.dataset_info.read_proto_from_builder_dir(source)
  if source == target:
    if SUFFIX not in facts.alternative_file_formats:
      facts.alternative_file_formats.append(SUFFIX)
  else:
    for file in source.iterdir():
      if file.suffix in (".json", ".txt"):
        file.copy(target / file.name, overwrite=True)
    facts.file_format = SUFFIX
  tfds.core.dataset_info.write_dataset_info_proto(facts, dataset_info_dir=target)
