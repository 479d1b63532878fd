"""The one exception that a user is meant to read."""


class InputError(ValueError):
  """Bad input, in one line: what was given, where, what is accepted. Binaries end with it and exit code 2."""
