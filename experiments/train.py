"""Trains one method on one federation and leaves a run directory: `python -m experiments.train --workdir=DIR`.

With no other flag it is the main job: AP-FL on digits, 60 % of the clients never there, two classes held by them alone.
`--helpfull` lists every setting, `--algorithm=help` the methods; `--flagfile=DIR/flags.txt` repeats a run.
"""

import sys
from collections.abc import Sequence

import jax
from absl import flags

from apfl_jax import report
from experiments import config, job


def main(arguments: Sequence[str]) -> None:
  """Runs the job that the flags describe and prints the table that ends it."""
  del arguments
  if "help" in (flags.FLAGS.algorithm, flags.FLAGS.wrappers):
    print(config.table_of_methods())
    return
  settings = config.from_flags()  # what is wrong is one line and no note
  config.note_unused([settings.algorithm])
  config.note_choices([settings.algorithm])
  summary = job.run(settings)
  if jax.process_index():
    return
  print("\n" + report.table(summary))
  print(f"\nrun directory: {summary['workdir']}" + (f", look at {summary['report']}" if summary["report"] else ""))


def command_line() -> None:
  """The binary. A file that registers a method of its own ends with it, and is then one with that method."""
  config.define_flags()
  for field in config.fields():  # --help shows these; methods' own settings come with --helpfull
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[field.name])
  config.main(main)


if __name__ == "__main__":
  command_line()
