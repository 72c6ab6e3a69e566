"""The exceptions that are no defects of ours, each told in one line."""


class UserError(ValueError):
  """A mistake in the user's input, told in one line: the thing, the value, the remedy.

  The command line prints the message alone and exits with status 2; exceptions that are not in this
  file are defects of ours.
  """


class ClusterError(RuntimeError):
  """The machines are not as they should be, which no change of the command mends; exit status 1."""
