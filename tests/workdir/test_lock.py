"""One process writes into a workdir, whichever host it is on; whoever is gone stands in nobody's way."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.command_line import execute
import vit_jax_ext as vx
from vit_jax_ext.workdir import lock

HOLDER = """
import sys, time
from vit_jax_ext.workdir import lock
with lock.hold(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that has the lock of tmp_path."""
  process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def test_a_second_writer_is_told_who_the_first_is(holder, tmp_path, capsys, data_dir):
  began = time.monotonic()
  assert execute(f"--workdir={tmp_path}", f"--config.dataset.data_dir={data_dir}") == 2
  assert time.monotonic() - began < 5
  (line,) = capsys.readouterr().err.splitlines()
  assert f"{tmp_path} is being written by process {holder.pid} on {os.uname().nodename}" in line
  with pytest.raises(vx.UserError, match="is being written"), lock.hold(str(tmp_path)):
    pass
  assert os.listdir(tmp_path) == [lock.FILE]


def test_a_file_is_no_workdir(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(vx.UserError, match="file is a file; choose another --workdir"), lock.hold(str(tmp_path / "file")):
    pass


def test_it_survives_kill_9_and_is_taken_over(holder, tmp_path, caplog):
  holder.send_signal(signal.SIGKILL)
  time.sleep(0.2)  # nobody has asked for its status yet
  with lock.hold(str(tmp_path)):
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    with lock.hold(str(tmp_path)):  # the same process
      pass
    assert (tmp_path / lock.FILE).exists()
  assert f"left behind by process {holder.pid}" in caplog.text
  assert not (tmp_path / lock.FILE).exists()


def test_a_number_that_was_given_again(tmp_path):
  with lock.hold(str(tmp_path)):
    left = (tmp_path / lock.FILE).read_text()
  (tmp_path / lock.FILE).write_text(json.dumps(json.loads(left) | {"pid": 1, "began": 1}))
  with lock.hold(str(tmp_path)):
    pass


def test_another_host_is_watched(holder, tmp_path, monkeypatch):
  """A living one touches its file; one that does not is gone."""
  monkeypatch.setattr(lock, "DEAD", 3.0)
  monkeypatch.setattr(lock, "_machine", lambda: "another")
  began = time.monotonic()
  with pytest.raises(vx.UserError, match=f"process {holder.pid} on"):
    lock.check(str(tmp_path))
  assert time.monotonic() - began < 4
  holder.kill()
  holder.wait()
  lock.check(str(tmp_path))
  os.utime(tmp_path / lock.FILE, (1, 1))
  with lock.hold(str(tmp_path)):
    pass


IN_A_BUCKET = """
import sys, time
import fsspec
from fsspec.implementations.local import LocalFileSystem
class Bucket(LocalFileSystem):
  def __init__(self, finalize_on_close, **kw):
    super().__init__(**kw)
  @classmethod
  def _strip_protocol(cls, path):
    return str(path).replace("gs://bucket", sys.argv[1])
  def info(self, path, **kw):  # as those of S3
    return {key: value for key, value in super().info(path, **kw).items() if key != "mtime"}
fsspec.register_implementation("gcs", Bucket, clobber=True)
from vit_jax_ext.errors import UserError
from vit_jax_ext.workdir import lock
lock.DEAD, machine = 4.0, sys.argv[2]
lock._machine = lambda: machine
try:
  with lock.hold("gs://bucket/run"):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
except UserError as error:
  print(error)
"""


def test_in_a_bucket_as_well(tmp_path):
  """Objects that are written as a whole, at times that nobody tells; a folder stands for them."""

  def start(machine, seconds):
    command = [sys.executable, "-c", IN_A_BUCKET, tmp_path, machine, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"EPATH_USE_TF": "0"})

  with start("here", 600) as holder:
    assert holder.stdout.readline() == "held\n"
    with start("there", 0) as second:
      assert f"gs://bucket/run is being written by process {holder.pid} on" in second.communicate()[0]
    holder.kill()
  assert (tmp_path / "run" / lock.FILE).exists()
  with start("there", 0) as third:
    assert third.communicate()[0] == "held\n"
  assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"host": "x"}'])
def test_a_file_cut_short(content, tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "DEAD", 0.3)
  (tmp_path / lock.FILE).write_text(content)
  with lock.hold(str(tmp_path)):
    pass


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
  with lock.hold(str(tmp_path / "run")):
    assert (tmp_path / "run").is_dir()
  assert not (tmp_path / "run").exists()


def test_of_many_at_once_one_has_it(tmp_path):
  """Also when all find the file of one that is gone."""
  for i in range(3):
    if i:
      (tmp_path / lock.FILE).write_text(json.dumps(lock._me() | {"pid": 2**22 - i, "began": 1}))
    command = [sys.executable, "-c", HOLDER, tmp_path]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    time.sleep(0.1)
    deadline = time.monotonic() + 30
    while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < deadline:
      time.sleep(0.05)
    living = [process for process in processes if process.poll() is None]
    assert len(living) == 1 and living[0].stdout.readline() == "held\n"
    living[0].kill()
    for process in processes:
      process.communicate()
    (tmp_path / lock.FILE).unlink()
