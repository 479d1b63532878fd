"""Draws the report of an existing run directory again: `python -m experiments.report --workdir=DIR`."""

from collections.abc import Sequence

from absl import flags

from apfl_jax import report
from experiments import config


def main(arguments: Sequence[str]) -> None:
  """Writes the report and prints its path."""
  del arguments
  print(report.write(flags.FLAGS.workdir))


if __name__ == "__main__":
  # Here and not at import: other binaries have a --workdir of their own, and a process may import several of them.
  flags.DEFINE_string("workdir", ".", "the directory of the run, as given to experiments.train")
  config.main(main)
