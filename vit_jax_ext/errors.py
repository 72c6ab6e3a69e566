"""The one exception that means: the user's input is wrong, and here is the remedy."""


class UserError(ValueError):
  """A mistake in the user's input, told in one line: the thing, the value, the remedy.

  The command line prints the message alone and exits with status 2; every other exception is a defect of ours.
  """
