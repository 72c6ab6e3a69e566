"""`python main.py ARGS...` in this process."""

import sys

import pytest

from vit_jax_ext.command_line import main


def execute(*args):
  """Returns the exit status."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", ["main.py", *map(str, args)])
    try:
      return main()
    except SystemExit as exit:
      return exit.code
