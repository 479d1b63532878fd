"""The binaries, each in a process of its own, forked from one that has imported what takes them seconds to import.

What that hides (imports that are missing, processes that do not end well, functions of `atexit`, an order of hashes
that matters: theirs is one and the same) tests by `python -m` would show: there are two in train_test.py, one slow.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELOADED = ("experiments.job", "experiments.runs")  # no binary: `runpy` has each run anew
# Libraries of macOS may not be forked, and Windows does not fork.
_context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
_context.set_forkserver_preload(list(PRELOADED))


def _run(binary: str, arguments: Sequence[str], cwd: Path, output: Path, environment: Mapping[str, str]) -> None:
  os.environ.clear()
  os.environ.update(environment)  # which was the server's
  for number, name in enumerate(("stdout", "stderr"), 1):
    with open(output / name, "wb") as file:
      os.dup2(file.fileno(), number)
  gc.set_threshold(100_000, 50, 10)  # as in conftest.py
  os.chdir(cwd)
  sys.path.insert(0, str(cwd))
  sys.argv[1:] = arguments
  if binary.endswith(".py"):
    runpy.run_path(binary, run_name="__main__")
  else:
    runpy.run_module(binary, run_name="__main__", alter_sys=True)


def start(binary: str, *arguments: str, output: Path, cwd: Path = ROOT) -> BaseProcess:
  """As `run`, without waiting; what it prints goes to files `stdout` and `stderr` of the folder `output`."""
  process = _context.Process(target=_run, args=(binary, arguments, cwd, output, dict(os.environ)))
  process.start()
  return process


def run(binary: str, *arguments: str, cwd: Path = ROOT, timeout: float = 600) -> subprocess.CompletedProcess[str]:
  """As `python -m BINARY ARGUMENTS`, or `python BINARY ARGUMENTS` if that is a file; modules are found from `cwd`.

  The environment is that of the call, but for what JAX reads when it is imported. After `timeout` seconds it is killed.
  """
  with tempfile.TemporaryDirectory() as output:
    process = start(binary, *arguments, output=Path(output), cwd=cwd)
    try:
      process.join(timeout)
    finally:
      process.kill()
      process.join()
    said = [Path(output, name).read_text() for name in ("stdout", "stderr")]
  return subprocess.CompletedProcess([binary, *arguments], process.exitcode, *said)
