"""Reads a run directory, as `experiments/train.py` leaves it."""

import csv
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from apfl_jax.errors import InputError

_NEEDED = ("algorithm", "dataset", "num_clients", "rounds", "seed")


class Clients(NamedTuple):
  """The columns of `clients.csv` that are drawn or judged, [N] each, in the order of the file.

  Attributes:
    id: int.
    dropped: bool, never took part or left for good.
    monopolist: bool, holds a class that only dropped clients hold.
    personal_accuracy: float, of its personal model on its own test examples; nan where not known.
    global_accuracy: float, of the global model on the same examples; nan where not known.
    reweighted_accuracy: float, of its personal model on pooled examples, at its mix of classes; likewise.
    lambda_base: float, the coefficient of its local model's base where a method mixes two models; nan where not known.
    lambda_head: float, of its head; likewise.
    barrier: float, its loss half-way between the two, less the mean of theirs; likewise.
    guard: float, 3 if it mixes neither, but answers with the model that both came from; likewise.
  """

  id: np.ndarray
  dropped: np.ndarray
  monopolist: np.ndarray
  personal_accuracy: np.ndarray
  global_accuracy: np.ndarray
  reweighted_accuracy: np.ndarray
  lambda_base: np.ndarray
  lambda_head: np.ndarray
  barrier: np.ndarray
  guard: np.ndarray


class Run(NamedTuple):
  """A run directory, read. Only `summary.json` must be there; what is missing is empty.

  Attributes:
    path: the directory.
    summary: `summary.json`.
    class_names: one for each class.
    flags: the lines of `flags.txt`.
    metrics: the lines of `metrics.jsonl`, a dict each.
    timings: the lines of `timings.jsonl`, a dict each.
    clients: `clients.csv`.
    arrays: `arrays.npz`.
  """

  path: pathlib.Path
  summary: dict[str, Any]
  class_names: list[str]
  flags: list[str]
  metrics: list[dict[str, Any]]
  timings: list[dict[str, Any]]
  clients: Clients
  arrays: dict[str, np.ndarray]


def read(workdir: pathlib.Path) -> Run:
  """Reads the directory of a run.

  Raises:
    InputError: there is no such run, or one of its files cannot be read.
  """
  path = workdir / "summary.json"
  if not path.is_file():
    raise InputError(f"{workdir}: not the directory of a run (no summary.json); give the --workdir of a finished run")
  summary = _parse(path.read_text(), path, 1)
  if missing := [key for key in _NEEDED if key not in summary]:
    raise InputError(f"{path}: no {', '.join(missing)}; a run's summary has {', '.join(_NEEDED)}")
  arrays = _arrays(workdir / "arrays.npz")
  names = summary.get("class_names") or range(arrays["histogram"].shape[1] if "histogram" in arrays else 0)
  return Run(
    path=workdir,
    summary=summary,
    class_names=[str(name) for name in names],
    flags=_lines(workdir / "flags.txt"),
    metrics=_records(workdir / "metrics.jsonl"),
    timings=_records(workdir / "timings.jsonl"),
    clients=_clients(workdir / "clients.csv", set(summary.get("monopolistic_classes") or ())),
    arrays=arrays,
  )


def _lines(path: pathlib.Path) -> list[str]:
  return path.read_text().splitlines() if path.is_file() else []


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
  return [_parse(line, path, number) for number, line in enumerate(_lines(path), 1) if line.strip()]


def _parse(text: str, path: pathlib.Path, line: int) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except json.JSONDecodeError as error:
    raise InputError(f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from error
  if not isinstance(value, dict):
    raise InputError(f"{path}, line {line}: a JSON object is wanted, not {text.strip()[:40]!r}")
  return value


def _clients(path: pathlib.Path, monopolistic: set[int]) -> Clients:
  rows: list[dict[str, str]] = []
  if path.is_file():
    with path.open(newline="") as file:
      rows = list(csv.DictReader(file))
  of_some = lambda name: np.array([float(row.get(name) or "nan") for row in rows], float)
  try:
    return Clients(
      id=np.array([int(row["client"]) for row in rows], int),
      dropped=np.array([bool(int(row["dropped"])) for row in rows], bool),
      monopolist=np.array([not monopolistic.isdisjoint(map(int, row["classes"].split())) for row in rows], bool),
      personal_accuracy=np.array([float(row["personal_accuracy"] or "nan") for row in rows], float),
      global_accuracy=np.array([float(row["global_accuracy"] or "nan") for row in rows], float),
      reweighted_accuracy=np.array([float(row["reweighted_accuracy"] or "nan") for row in rows], float),
      lambda_base=of_some("lambda_base"),
      lambda_head=of_some("lambda_head"),
      barrier=of_some("barrier"),
      guard=of_some("guard"),
    )
  except KeyError as error:
    raise InputError(f"{path}: no column {error}; there are {', '.join(rows[0])}") from error
  except (ValueError, AttributeError, TypeError) as error:
    raise InputError(f"{path}: a field cannot be read ({error})") from error


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  if not path.is_file():
    return {}
  try:
    with np.load(path) as file:
      return dict(file)
  except (ValueError, OSError, EOFError) as error:
    raise InputError(f"{path}: not an archive of arrays ({error})") from error
