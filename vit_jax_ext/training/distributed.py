"""Several processes as one program: how they find each other, and what only one of them does."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import socket
import threading
import time
from typing import Any

from absl import logging
import jax
from jax._src import clusters  # what jax.distributed.initialize asks; it has no public name
from jax._src import distributed as _distributed  # nor has the client that it makes
from jax.experimental import multihost_utils
import numpy as np

from vit_jax_ext.errors import RunError, Stopped, UserError

GO = "go"
FAILURE = "vit_jax_ext/failure"  # key under which a process tells the others of an error
POLL = 1.0  # seconds between looks at it


def join(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  hosts: Sequence[str] = (),
  wait: int = 300,
) -> None:
  """Joins the other processes of a run; from then on JAX sees the devices of all. To be called before JAX is used.

  Args:
    coordinator: HOST:PORT of process 0, reachable from all; the port is free there.
    num_processes, process_id: how many there are, and which one this is, from 0. Whatever is None of the three is found
      out from SLURM, Open MPI, a Cloud TPU or Kubernetes.
    hosts: names of the processes' hosts in their order, for messages.
    wait: seconds until all have to be there.

  Raises:
    UserError: what is None cannot be found out, or does not fit.
    RunError: some did not come in time; says which.
  """
  if None in (coordinator, num_processes, process_id):
    coordinator, num_processes, process_id, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      coordinator, num_processes, process_id, None, None, wait
    )
  if None in (coordinator, num_processes, process_id):
    raise UserError(
      "neither SLURM, Open MPI, Cloud TPU nor Kubernetes is here to say which processes belong together; "
      "give --coordinator=HOST:PORT --num-processes=N --process-id=I"
    )
  if not 0 <= process_id < num_processes:
    raise UserError(f"--process-id={process_id} is not one of {num_processes} processes, which count from 0")
  meet(coordinator, num_processes, process_id, hosts=hosts, wait=wait)
  # Cluster detection would give a SLURM task the one GPU of its number; here a process has all devices of its host.
  jax.distributed.initialize(coordinator, num_processes, process_id, cluster_detection_method="deactivate")
  if process_id:
    logging.set_verbosity(logging.WARNING)  # one process tells what all do
  logging.info("%d processes, %d devices of which %d here", num_processes, jax.device_count(), jax.local_device_count())


def meet(coordinator: str, num_processes: int, process_id: int, *, hosts: Sequence[str] = (), wait: float) -> None:
  """Returns when all processes have come to the coordinator's address.

  jax.distributed.initialize would abort after a time limit without saying who is missing.

  Raises:
    UserError: the address is no HOST:PORT, or the port is taken.
    RunError: some did not come within `wait` seconds.
  """
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal():
    raise UserError(f"--coordinator={coordinator} is no HOST:PORT; give one like 10.0.0.1:8476")
  if process_id == 0:
    verdict = _gather_processes(int(port), num_processes, hosts, wait)
  else:
    verdict = _report_to((host, int(port)), f"{process_id} {num_processes} {socket.gethostname()}", wait)
  if verdict != GO:
    raise RunError(verdict)


def _gather_processes(port: int, num_processes: int, hosts: Sequence[str], wait: float) -> str:
  """Waits for all others and gives them the verdict, which is also returned: GO, or what is wrong."""
  deadline, came, connections, verdict = time.monotonic() + wait, {0: socket.gethostname()}, [], GO
  try:
    server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=num_processes)
  except OSError as error:
    raise UserError(f"port {port} cannot be used on {came[0]}: {error.strerror}; give another --coordinator") from None
  with server:
    while len(came) < num_processes and verdict == GO:
      try:
        server.settimeout(max(deadline - time.monotonic(), 1e-3))
        connection, _ = server.accept()
        connections.append(connection)
        connection.settimeout(5)
        other, total, name = connection.makefile().readline().split()
        other, total = int(other), int(total)
      except TimeoutError:
        if time.monotonic() >= deadline:
          verdict = _missing(came, num_processes, hosts, wait)
      except (OSError, ValueError):
        pass  # whoever that was, it is none of ours
      else:
        came[other] = name
        if total != num_processes:
          verdict = f"process {other} on {name} has --num-processes={total}, process 0 has {num_processes}"
    for connection in connections:
      with contextlib.suppress(OSError), connection:
        connection.sendall(f"{verdict}\n".encode())
  return verdict


def _missing(came: dict[int, str], num_processes: int, hosts: Sequence[str], wait: float) -> str:
  missing = [i for i in range(num_processes) if i not in came]
  names = [f"{i} ({hosts[i]})" if i < len(hosts) else str(i) for i in missing]
  here = ", ".join(f"{i} ({name})" for i, name in sorted(came.items()))
  return f"process {', '.join(names)} of {num_processes} did not come within {wait:g} s; there are {here}"


def _report_to(address: tuple[str, int], report: str, wait: float) -> str:
  """Tells process 0 who is here and returns its verdict."""
  deadline = time.monotonic() + wait
  while True:
    try:
      with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(f"{report}\n".encode())
        connection.settimeout(wait + 5)  # process 0 decides within `wait` seconds of its own start
        if verdict := connection.makefile().readline().strip():
          return verdict
    except OSError:
      pass
    if time.monotonic() >= deadline:
      return f"process 0 did not come within {wait:g} s: no answer at {address[0]}:{address[1]}"
    time.sleep(0.2)


@contextlib.contextmanager
def together() -> Iterator[None]:
  """While open, an error of one process ends all of them within seconds; JAX alone would miss it after minutes."""
  client = _distributed.global_state.client
  if client is None:
    yield
    return
  over = threading.Event()
  threading.Thread(target=_watch, args=(client, over), daemon=True).start()
  try:
    yield
  except Stopped:  # all have agreed on it
    raise
  except Exception as error:
    over.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has told of its own
      client.key_value_set(FAILURE, f"process {jax.process_index()} on {socket.gethostname()} ends: {error}")
    _let_others_read()
    raise
  finally:
    over.set()


def _watch(client: Any, over: threading.Event) -> None:
  while not over.wait(POLL):
    try:
      failure = client.key_value_try_get(FAILURE)
    except jax.errors.JaxRuntimeError:  # there is none
      continue
    if not over.is_set():
      logging.error("%s", failure)
      _let_others_read()
      os._exit(RunError.status)


def _let_others_read() -> None:
  """Process 0, which keeps the keys, waits until the others have seen them."""
  if not jax.process_index():
    time.sleep(3 * POLL)


def all_agree(yes: bool) -> bool:
  """Returns whether all processes say yes."""
  return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


def told_by_first(make: Callable[[], bytes]) -> bytes:
  """Returns what `make` returns in process 0 of several, where alone it is called: one lists a folder, not thousands.

  Raises:
    UserError: `make` did, in all processes.
  """
  content, failed = b"", False
  if not jax.process_index():
    try:
      content = make()
    except UserError as error:
      content, failed = str(error).encode(), True
  size, failed = multihost_utils.broadcast_one_to_all(np.array([len(content), failed], np.int32)).tolist()
  content = np.frombuffer(content or bytes(size), np.uint8)
  content = multihost_utils.broadcast_one_to_all(content).tobytes()
  if failed:
    raise UserError(content.decode())
  return content


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
  """Process 0 goes through the block before the others, for instance to write files that all read.

  Args:
    name: of the meeting point, the same in all processes.
  """
  if jax.process_index():
    multihost_utils.sync_global_devices(name)
  try:
    yield
  finally:  # the others shall not wait for a process that failed, but see for themselves
    if not jax.process_index():
      multihost_utils.sync_global_devices(name)
