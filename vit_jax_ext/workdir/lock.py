"""Who is writing into a workdir: one process of a run, whose host and number stand in a file there.

The file works wherever files do, on shared file systems and in buckets. A process that is killed leaves it behind: on
its own host it is known to be gone, to other hosts because the file is not touched any more.
"""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from typing import IO

from absl import logging
from etils import epath
import psutil

from vit_jax_ext.errors import UserError

FILE = "lock.json"
BEAT = 2.0  # seconds between touches
DEAD = 30.0  # seconds without one, after which a process of another host is taken for gone
SETTLE = 0.5  # seconds in which a file that several write at once has become that of the last


def check(workdir: str) -> dict | None:
  """Returns who has left a lock in `workdir`, None if nobody has.

  Raises:
    UserError: another living process writes into it; says which.
  """
  path = epath.Path(workdir).expanduser() / FILE
  owner = _read(path)
  if owner is not None and owner != _me() and _lives(path, owner):
    raise UserError(
      f"workdir {workdir} is being written by {_name(owner)}; wait for it or end it, or choose another --workdir"
    )
  return owner


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
  """Keeps other processes from writing into `workdir`, which is made if needed, while open; reading is free.

  Raises:
    UserError: another living process writes into it.
  """
  folder = epath.Path(workdir).expanduser()
  path, is_new = folder / FILE, not folder.exists()
  if _read(path) == _me():  # a study has it for its run
    yield
    return
  _take(path, check(workdir))
  check(workdir)  # where files cannot be locked, whoever wrote last has it
  stop = threading.Event()
  beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
  beat.start()
  try:
    yield
  finally:
    stop.set()
    beat.join()
    with contextlib.suppress(OSError):
      if _read(path) == _me():
        path.unlink()
      if is_new:
        os.rmdir(folder)  # if nothing was written


def _take(path: epath.Path, gone: dict | None) -> None:
  """Writes this process into the file, in place of nobody or of the one that is known to be gone."""
  text = json.dumps(_me() | {"since": datetime.datetime.now().astimezone().isoformat(timespec="seconds")})
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(path):
      path.write_text(text)
    else:
      with _alone(path) as file:
        if (owner := _read(path)) and owner != gone:  # another one was faster
          check(os.fspath(path.parent))
        file.truncate(0)
        file.write(text)
  except FileExistsError:
    raise UserError(f"workdir {path.parent} is a file; choose another --workdir") from None
  except OSError as error:
    raise UserError(
      f"workdir {path.parent} cannot be written: {error.strerror or error}; choose another --workdir"
    ) from None
  if gone is not None and gone != _me():
    logging.warning("%s was left behind by %s, which is gone; it is taken over", path, _name(gone))
  time.sleep(SETTLE)


@contextlib.contextmanager
def _alone(path: epath.Path) -> Iterator[IO[str]]:
  """Opens a file, made if needed, that no other process opens so meanwhile, where the file system can do that."""
  while True:
    with open(path, "a+") as file:
      with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
      is_there = False  # or somebody has deleted it meanwhile
      with contextlib.suppress(FileNotFoundError):
        is_there = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
      if is_there:
        yield file
        return


def _beat(path: epath.Path, stop: threading.Event) -> None:
  while not stop.wait(BEAT):
    with contextlib.suppress(Exception):  # each bucket's client has errors of its own; the next touch may succeed
      if (owner := _read(path)) != _me():
        logging.error("%s is now that of %s, which writes there as well; end one of them", path, _name(owner or {}))
        return
      if "://" in os.fspath(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"touched": time.time()}))
      else:
        os.utime(path)


def _me() -> dict:
  return {
    "host": socket.gethostname(),
    "machine": _machine(),
    "pid": os.getpid(),
    "began": round(psutil.Process().create_time()),
  }


def _machine() -> str:
  """Returns what tells machines and containers apart in which a process number means different processes."""
  with contextlib.suppress(OSError):
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
  return ""


def _read(path: epath.Path) -> dict | None:
  """Returns what `_me` is of the process in the file; {} if it is damaged, None if there is no file."""
  try:
    content = json.loads(path.read_text())
    return {key: content[key] for key in ("host", "machine", "pid", "began")}
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (ValueError, TypeError, KeyError):  # cut short, or not ours
    return {}


def _name(owner: dict) -> str:
  return "process {pid} on {host}".format(**owner) if owner else "a process that has not written its name"


def _lives(path: epath.Path, owner: dict) -> bool:
  """Tells whether the process in the file still runs; that of another host is watched for a sign of life."""
  if owner and (owner["host"], owner["machine"]) == (socket.gethostname(), _machine()):
    try:
      process = psutil.Process(owner["pid"])  # the number may be given again
      return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["began"]) < 2
    except psutil.Error:
      return False
  watched = first = _touched(path)
  deadline = time.monotonic() + (2 * BEAT if first and 0 < first[0] < time.time() - 10 * DEAD else DEAD)
  while watched == first and time.monotonic() < deadline:
    time.sleep(BEAT / 10)
    watched = _touched(path)
  return watched is not None and watched != first


def _touched(path: epath.Path) -> tuple[float, str] | None:
  """Returns when the file was touched, 0 if the storage does not tell, and its text; None if it is gone."""
  try:
    text = path.read_text()  # a network file system looks anew when a file is opened
    return path.stat().mtime, text
  except OSError:
    return None
