"""Other simulators doing the work of our benchmark, each a script with pinned dependencies in its own environment.

A script names its Python and its packages in a comment at its top (PEP 723). Its environment is made on first use, in
the folder of `APFL_JAX_CACHE`, and kept until the comment changes. A `Peer` is a process in it that waits for specs;
see `worker.py` for what passes between. A spec is a dict:

  case: a name, the same for the same work
  model: mlp, cnn_small or cnn; image_shape: [height, width, channels]; classes: C
  examples: images that clients draw theirs from
  train, test: sizes, one a client; `test` is empty where nobody is scored
  steps: SGD steps a client, 0 for an epoch; batch: B; learning_rate; seed
  samples: examples that a round must have trained on, those read twice counted twice
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from apfl_jax.files import cache_dir

PEERS = ("pytorch", "pytorch/plain", "pfllib", "fedjax", "pfl_research")  # a script, and its variant if it has any
_HERE = Path(__file__).parent


class PeerError(Exception):
  """One line on why a peer did not do something; the others go on."""


class Metadata(NamedTuple):
  """What a script says that it needs.

  Attributes:
    requires_python: e.g. '>=3.11,<3.13'.
    dependencies: each 'name==version'.
  """

  requires_python: str
  dependencies: tuple[str, ...]

  @property
  def versions(self) -> dict[str, str]:
    """name -> pinned version."""
    return dict(pin.split("==") for pin in self.dependencies)

  def accepts(self, version: tuple[int, int]) -> bool:
    """Whether this Python will do; bounds are '>=X.Y' and '<X.Y'."""
    for bound in filter(None, self.requires_python.replace(" ", "").split(",")):
      found = re.fullmatch(r"(>=|<)(\d+)\.(\d+)", bound)
      if not found:
        raise PeerError(f"requires-python: got {bound!r}, accepted are bounds like >=3.11 and <3.13")
      limit = (int(found[2]), int(found[3]))
      if (version < limit) if found[1] == ">=" else (version >= limit):
        return False
    return True


def metadata(script: Path) -> Metadata:
  """The inline metadata of a script. Raises PeerError if there is none."""
  found = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", script.read_text(), re.MULTILINE)
  if not found:
    raise PeerError(f"{script.name}: no inline metadata, a comment from `# /// script` to `# ///`")
  table = tomllib.loads("".join(line[2:] + "\n" for line in found[1].splitlines()))
  return Metadata(table["requires-python"], tuple(table["dependencies"]))


def environment(script: Path) -> Path:
  """The Python of a script's environment, which is made if it is not there.

  By `venv` from the Python that runs, if the script takes it, else by `uv venv`, if uv is installed; filled by pip.

  Raises:
    PeerError: no Python that fits, or an installation that failed.
  """
  wants = metadata(script)
  text = json.dumps([wants, sys.version_info[:2]])
  folder = cache_dir() / "peers" / f"{script.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
  python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
  complete = folder / "complete"
  if complete.exists():
    return python
  print(f"installing {script.stem}'s environment in {folder}", file=sys.stderr, flush=True)
  if wants.accepts(sys.version_info[:2]):
    make = [sys.executable, "-m", "venv", "--clear", str(folder)]
  elif uv := shutil.which("uv"):
    make = [uv, "venv", "--seed", "--clear", "--python", wants.requires_python, str(folder)]
  else:
    this = ".".join(map(str, sys.version_info[:2]))
    raise PeerError(
      f"needs Python {wants.requires_python}; this is {this}, and uv, which finds others, is not installed"
    )
  for command in (make, [str(python), "-m", "pip", "install", "--quiet", *wants.dependencies]):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      raise PeerError(f"not installed: {_last_line(done.stderr)}")
  complete.touch()
  return python


class Peer:
  """A process that does rounds when it is asked to, and else waits."""

  def __init__(self, name: str, script: Path, variant: str = "", python: Path | None = None):
    """Starts it. Raises PeerError.

    Args:
      name: for people.
      script: see `worker.py`.
      variant: handed to the script.
      python: that of its environment; made if it is not given.
    """
    self.name = name
    self.versions = metadata(script).versions
    self.variant = variant
    self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed by `close`
    # What shapes our JAX, like a number of host devices, must not shape a peer's.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    self.process = subprocess.Popen(
      [str(python or environment(script)), "-I", str(_HERE / "worker.py"), str(script)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self.errors,
      env=inherited,
      text=True,
    )

  def turn(self, spec: dict[str, Any]) -> float:
    """The seconds that a round took. Raises PeerError."""
    assert self.process.stdin is not None and self.process.stdout is not None
    try:
      self.process.stdin.write(json.dumps({**spec, "variant": self.variant}) + "\n")
      self.process.stdin.flush()
      text = self.process.stdout.readline()
    except OSError:  # it has gone
      text = ""
    if not text:
      self.process.wait()
      self.errors.seek(0)
      raise PeerError(f"ended with exit code {self.process.returncode}: {_last_line(self.errors.read())}")
    answer = json.loads(text)
    if "error" in answer:
      raise PeerError(answer["error"])
    if answer["samples"] != spec["samples"]:
      raise PeerError(f"trained on {answer['samples']} examples, not on {spec['samples']}")
    return answer["seconds"]

  def close(self) -> None:
    """Ends the process."""
    assert self.process.stdin is not None and self.process.stdout is not None
    self.process.kill()  # it holds nothing worth keeping
    self.process.wait()
    for file in (self.process.stdin, self.process.stdout, self.errors):
      with contextlib.suppress(OSError):  # what was not read by a process that had gone
        file.close()


def start(name: str) -> Peer:
  """One of `PEERS`. Raises PeerError."""
  stem, _, variant = name.partition("/")
  return Peer(name, _HERE / f"{stem}.py", variant)


def _last_line(text: str) -> str:
  return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
