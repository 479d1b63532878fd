"""Many runs in the folders of one root: those that are finished are not computed again, one that fails stops no other.

The same command goes on where it was stopped. Runs that differ in nothing but what personal models read share their
rounds, also with those that another command left in the root, and those of one program, as with other seeds, come one
after another and compile it once; neither changes a number. Several processes may work on one root at once, on the
cores of a machine or on machines that share the folder: each takes the next run that is neither finished nor taken.
"""

import contextlib
import dataclasses
import fcntl
import gc
import itertools
import json
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from apfl_jax.errors import InputError
from apfl_jax.files import replacing
from apfl_jax.report import tables
from experiments import job
from experiments.config import Config


class Outcome(NamedTuple):
  """What became of the runs, by name.

  Attributes:
    summaries: of those that are finished, as `job.run` returns them, in the order of the list.
    failed: why, a line each.
    elsewhere: those that other processes had taken when there was nothing else to do.
  """

  summaries: dict[str, dict[str, Any]]
  failed: dict[str, str]
  elsewhere: tuple[str, ...]


def run(root: str | Path, configs: Mapping[str, Config]) -> Outcome:
  """Runs them all, one after another, each in the folder of its name.

  What fails is told in a line on standard error; where it is no `InputError`, the traceback is in NAME.error.txt.

  Args:
    root: the folder; it is made if need be.
    configs: the runs by name; their own `workdir` has no effect.

  Raises:
    InputError: a name is no name of a folder, or several processes share this program.
  """
  if jax.process_count() > 1:
    raise InputError(
      f"num_processes: got {jax.process_count()} processes that share each run, accepted is one here; for more, start"
      " the same command again, each takes other runs"
    )
  placed = _placed(root, configs)
  Path(root).mkdir(parents=True, exist_ok=True)
  summaries: dict[str, dict[str, Any]] = {}
  failed: dict[str, str] = {}
  seconds: list[float] = []
  identities = {name: frozenset(config.rounds_identity()) for name, config in placed.items()}
  firsts = {identity: name for name, identity in reversed(identities.items())}
  # Those that others share come first, or two processes would both compute the rounds.
  compiled = {name: frozenset(config.program_identity()) for name, config in placed.items()}
  order = list(dict.fromkeys(compiled.values()))
  later = {name for name, identity in identities.items() if identity and firsts[identity] != name}
  todo = sorted(placed, key=lambda name: (name in later, order.index(compiled[name])))
  programs = job.Programs()
  while todo:
    taken = []
    for name in todo:
      config = placed[name]
      with _alone(Path(root) / f".{name}.lock") as alone:
        if not alone:
          taken.append(name)
          continue
        start = time.perf_counter()
        try:
          summary = job.finished(config)
          if summary is None:
            if config.progress:
              settled = len(summaries) + len(failed)
              print(f"[{settled + 1} of {len(placed)}] {name}{_left(seconds, placed, settled)}", file=sys.stderr)
            if programs.job and (config.clock != "rounds" or programs.job.config.program_identity() != compiled[name]):
              _forget(programs)
            summary = job.run(_sharing(config, Path(root)), programs)
            seconds.append(time.perf_counter() - start)
          summaries[name] = summary
          _trace(root, name).unlink(missing_ok=True)
        except Exception as error:  # whatever one run does wrong, the others are still wanted
          failed[name] = _told(root, name, error)
    if taken == todo:
      break
    todo = taken  # meanwhile some were finished, or given up with their process
  _forget(programs)
  return Outcome({name: summaries[name] for name in placed if name in summaries}, failed, tuple(todo))


def listed(root: str | Path, configs: Mapping[str, Config]) -> str:
  """A line for each run: whether it is finished, begun or to be done; nothing is written."""
  lines = []
  for name, config in _placed(root, configs).items():
    try:
      state = "finished" if job.finished(config) else "begun" if (Path(config.workdir) / "flags.txt").is_file() else ""
    except InputError as error:
      state = f"cannot run: {error}"
    lines.append(f"{name}  {state}".rstrip())
  return "\n".join(lines)


def facts(outcome: Outcome, command: str) -> dict[str, str]:
  """What a table of finished runs has to say of them: command, commit, device, time, and which are missing, if any."""
  of_runs = list(outcome.summaries.values())
  joined = lambda key: "; ".join(dict.fromkeys(str(summary[key]) for summary in of_runs if summary[key]))
  total = len(of_runs) + len(outcome.failed) + len(outcome.elsewhere)
  told = {
    "command": command,
    "commit": joined("commit"),
    "device": joined("device"),
    "time": f"{sum(summary['seconds'] for summary in of_runs) / 60:.1f} min in {len(of_runs)} of {total} runs",
    "missing": "; ".join([*outcome.failed, *outcome.elsewhere]),
  }
  return {name: text for name, text in told.items() if text}


def federation(config: Config) -> str:
  """Who learns what together, in a line."""
  shared = {
    "dirichlet": f", alpha {config.alpha:g}",
    "pathological": f", {config.classes_per_client} classes each",
    "clustered": f" in {config.clusters}",
  }
  processes = itertools.starmap(tables.absence, zip(*config.processes, strict=True))
  each = f" of {config.examples_per_client:,} examples" if config.examples_per_client else ""
  drawn = [f"{config.cohort_size:,} a round"] if config.cohort_size else []
  lost = config.monopolistic_classes
  only = f"{lost} monopolistic class{'' if lost == 1 else 'es'} (only clients that drop hold them)"
  return ", ".join(
    [
      config.dataset,
      tables.counted(config.num_clients, "client") + each,
      *drawn,
      f"partition {config.partition}{shared.get(config.partition, '')}",
      f"dropout {' and '.join(processes)}",
      only if lost else "no monopolistic classes",
      tables.counted(config.rounds, "round"),
    ]
  )


def _forget(programs: job.Programs) -> None:
  """Compiled functions of many methods would fill the memory; on disk they are kept."""
  programs.job = None
  jax.clear_caches()
  gc.collect()


def _sharing(config: Config, root: Path) -> Config:
  """With the rounds of a finished run in the root, if there is one that this very code made."""
  for last in sorted(root.glob(f"*/checkpoints/{config.rounds}")):
    there = last.parents[1]
    if config.rounds_identity() and (there / "summary.json").is_file() and not job.differing(config, there):
      found = json.loads((there / "summary.json").read_text())
      if (found["commit"], found["versions"]) == (job.commit(), job.versions()):
        return dataclasses.replace(config, trained=str(there))
  return config


def _placed(root: str | Path, configs: Mapping[str, Config]) -> dict[str, Config]:
  for name in configs:
    if not name or name.startswith(".") or "/" in name:
      raise InputError(f"name of a run: got {name!r}, accepted is the name of a folder that does not begin with a dot")
  return {name: dataclasses.replace(config, workdir=str(Path(root) / name)) for name, config in configs.items()}


def _left(seconds: list[float], placed: Mapping[str, Config], settled: int) -> str:
  """How long the rest may take if it is like what this process has run."""
  if not seconds:
    return ""
  left = statistics.mean(seconds) * (len(placed) - settled)
  return f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"


def _trace(root: str | Path, name: str) -> Path:
  return Path(root) / f"{name}.error.txt"


def _told(root: str | Path, name: str, error: Exception) -> str:
  """The line that says what went wrong, printed."""
  line = str(error).strip().splitlines()[0] if str(error).strip() else ""
  if error.__cause__ is not None or not isinstance(error, InputError):
    with replacing(_trace(root, name)) as path:
      path.write_text("".join(traceback.format_exception(error)))
  if not isinstance(error, InputError):
    line = f"{type(error).__name__}: {line}".rstrip(": ") + f" ({_trace(root, name)})"
  print(f"error: {name}: {line}", file=sys.stderr, flush=True)
  return line


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
  """Whether this process, and no other, holds the file; it says who does.

  The kernel's lock on it counts, not the file: it ends with the process that holds it, however that ends, so that what
  a killed one left is free and no process is taken for another of the same number.
  """
  while True:
    with open(path, "a") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        yield False
        return
      if not _is_at(path, file.fileno()):  # its last holder removed it between the two calls; nobody else will see it
        continue
      try:
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
        yield True
      finally:
        path.unlink(missing_ok=True)
      return


def _is_at(path: Path, descriptor: int) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), path.stat())
  except FileNotFoundError:
    return False
