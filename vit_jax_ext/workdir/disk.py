"""Failures of the disk, told in one line."""

from collections.abc import Iterator
import contextlib
import os
import re

from vit_jax_ext.errors import RunError


@contextlib.contextmanager
def writing(workdir: str, failure: type[Exception] = Exception) -> Iterator[None]:
  """Turns the `failure` of what writes into `workdir` into a RunError: libraries raise whatever they stumble over."""
  try:
    yield
  except failure as error:
    while error.__cause__:
      error = error.__cause__
    number = re.search(r"os_error_code='(\d+)'", str(error))  # of TensorStore, at the end of a long story
    why = os.strerror(int(number[1])) if number else " ".join(str(error).split())[:200] or type(error).__name__
    raise RunError(
      f"workdir {workdir} cannot be written ({why}); mend the disk, and the same command continues from the last "
      "complete checkpoint"
    ) from None
