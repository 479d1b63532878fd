"""Draws the report of an existing run directory again: `python -m experiments.report --workdir=DIR`."""

import sys
from collections.abc import Sequence

from absl import app, flags

from apfl_jax import report
from apfl_jax.errors import InputError


def main(argv: Sequence[str]) -> None:
  """Writes the report and prints its path; exit code 2 and one line where there is nothing to report."""
  try:
    if len(argv) > 1:
      raise InputError(f"{argv[1]!r} is not a flag; give the run directory as --workdir=DIR")
    print(report.write(flags.FLAGS.workdir))
  except InputError as error:
    print(f"report: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  # Here and not at import: other binaries have a --workdir of their own, and a process may import several of them.
  flags.DEFINE_string("workdir", ".", "The directory of the run, as given to experiments.train.")
  app.run(main)
