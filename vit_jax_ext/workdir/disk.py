"""Failures of the disk, told in one line."""

from collections.abc import Iterator
import contextlib
import os
import re

from vit_jax_ext.errors import RunError, UserError


@contextlib.contextmanager
def writing(workdir: str, failure: type[Exception] = Exception) -> Iterator[None]:
  """Turns the `failure` of what writes into `workdir` into a RunError: libraries raise whatever they stumble over.

  Raises:
    RunError: it cannot be written.
    UserError: it may not be written.
  """
  try:
    yield
  except failure as error:
    while error.__cause__:
      error = error.__cause__
    number = re.search(r"os_error_code='(\d+)'", str(error))  # of TensorStore, at the end of a long story
    why = os.strerror(int(number[1])) if number else " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, PermissionError) or re.search("permission|read-only", why.lower()):
      remedy = "make it writable, or choose another --workdir"
      raise UserError(f"workdir {workdir} cannot be written ({why}); {remedy}") from None
    raise RunError(
      f"workdir {workdir} cannot be written ({why}); mend the disk, and the same command continues from the last "
      "complete checkpoint"
    ) from None
