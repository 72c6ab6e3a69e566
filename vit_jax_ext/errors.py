"""The exceptions that are no defects of ours, each told in one line; `status` is the exit status of the command."""


class UserError(ValueError):
  """A mistake in the user's input, told in one line: the thing, the value, the remedy.

  The command line prints the message alone; exceptions that are not in this file are defects of ours.
  """

  status = 2


class RunError(RuntimeError):
  """What no change of the command mends: a host that does not come, a full disk, a loss that is not finite."""

  status = 1


class Stopped(RunError):
  """Somebody wanted the command to end. Nothing is wrong, and the same command continues."""


class Preempted(Stopped):
  """The machine is about to be taken away. All is saved."""

  status = 75  # EX_TEMPFAIL of sysexits.h: try again
