"""The binaries, each in a process of its own, forked from one that has imported what takes them seconds to import."""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["experiments.job", "experiments.runs"])  # no binary: each runs as if never imported


def _run(binary: str, arguments: Sequence[str], cwd: Path, output: Path) -> None:
  for number, name in enumerate(("stdout", "stderr"), 1):
    with open(output / name, "wb") as file:
      os.dup2(file.fileno(), number)
  gc.set_threshold(100_000, 50, 10)  # as in conftest.py
  os.chdir(cwd)
  sys.path.insert(0, str(cwd))
  sys.argv[1:] = arguments
  if binary.endswith(".py"):
    sys.argv[0] = binary
    runpy.run_path(binary, run_name="__main__")
  else:
    runpy.run_module(binary, run_name="__main__", alter_sys=True)


def start(binary: str, *arguments: str, output: Path, cwd: Path = ROOT) -> ForkServerProcess:
  """As `run`, without waiting; what it prints goes to files `stdout` and `stderr` of the folder `output`."""
  process = _context.Process(target=_run, args=(binary, arguments, cwd, output))
  process.start()
  return process


def run(binary: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
  """As `python -m BINARY ARGUMENTS`, or `python BINARY ARGUMENTS` if that is a file."""
  with tempfile.TemporaryDirectory() as output:
    process = start(binary, *arguments, output=Path(output), cwd=cwd)
    process.join()
    said = [Path(output, name).read_text() for name in ("stdout", "stderr")]
  return subprocess.CompletedProcess([binary, *arguments], process.exitcode, *said)
