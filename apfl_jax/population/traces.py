"""Availability and speed from a file: who was there when, as seen on devices or made up elsewhere.

The file is a table with an interval a row, in any order, as CSV with a header or as Parquet (a name that ends with
.parquet; needs `pip install 'apfl_jax[parquet]'`):

  client,start,end,speed
  0,0,6.5,1.2
  0,12,20,1.2
  1,3,9,0.7

  client: 0, 1, 2 and so on, none left out.
  start, end: 0 <= start <= end, in any unit of time; the client is there from `start` on and no more at `end`. The
    intervals of a client do not overlap; one that ends where it starts says only that there is this client.
  speed: may be left out; above 0, in any unit (its mean over the file's clients counts as 1), one a client.

Round t begins at t times the length of a round, and a client is there in it if it is at that moment. After the last
`end` of all, rounded up to whole rounds, the file begins anew, so nobody leaves for good. Of R clients in the file, the
run's client i does as number i modulo R.

`sample.csv` is synthetic, see `sample.py`. FedScale's traces of phones become such a file by
`experiments/convert_trace.py`.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from apfl_jax.errors import InputError
from apfl_jax.population.processes import available, keep
from apfl_jax.types import Array, Process

SAMPLE = Path(__file__).with_name("sample.csv")
_NEEDED, _OPTIONAL = ("client", "start", "end"), ("speed",)
_NEVER = np.iinfo(np.int32).max


class Trace(NamedTuple):
  """What a file says of R clients, in rounds.

  Attributes:
    edges: int32 [R, 2 I], ascending: the first round in which a client is there, the first in which it is not, and so
      on; what is left is a round that never comes.
    period: int32 [], rounds after which all begins anew.
    speed: float32 [R], mean 1 over the clients of the file.
  """

  edges: Array
  period: Array
  speed: Array


class _Interval(NamedTuple):
  client: int
  start: float
  end: float
  row: int
  speed: float


def trace(table: Trace) -> Process:
  """Everyone is there when the trace says so, with its speed; the rate of the process means nothing."""

  def look(state, round, ids, key):
    del state, key
    clients, now = ids % table.speed.shape[0], round % table.period
    # An odd number of edges behind us: we are inside an interval.
    passed = jnp.vectorize(lambda client: jnp.searchsorted(table.edges[client], now, side="right"))(clients)
    return available(ids)._replace(present=passed % 2 == 1, speed=table.speed[clients])

  return Process(init=lambda key: (), step=keep, look=look)


def read_trace(path: str | Path, round_length: float = 1.0, num_clients: int | None = None) -> Trace:
  """Reads and checks a whole file; NumPy arrays.

  Args:
    path: of the file.
    round_length: length of a round in the file's unit of time, above 0.
    num_clients: of the run; rows of clients beyond are left out.

  Raises:
    InputError: with the row of the table, the header being row 1, of Parquet too.
  """
  intervals = sorted(_intervals(path))
  if not intervals:
    raise InputError(f"trace: {path} has no row under its header, accepted is an interval or more")
  speeds = _speeds(path, intervals)
  for before, after in zip(intervals, intervals[1:], strict=False):
    if before.client == after.client and after.start < before.end:
      first, second = sorted((before, after), key=lambda interval: interval.row)
      raise InputError(
        f"trace: {path}, row {second.row}: client {second.client} is there from {second.start:g} to {second.end:g},"
        f" which overlaps row {first.row}, from {first.start:g} to {first.end:g}; accepted are intervals apart"
      )

  client = np.array([interval.client for interval in intervals])
  times = np.array([(interval.start, interval.end) for interval in intervals])
  rounds = np.ceil(times / round_length)  # a round that begins at an edge is behind it
  if rounds.max() >= _NEVER:
    raise InputError(f"trace: {path} lasts {rounds.max():.3g} rounds, accepted are less than {_NEVER}")
  if not np.any(rounds[:, 0] < rounds[:, 1]):
    raise InputError(
      f"trace: {path} has nobody there when a round of length {round_length:g} begins, accepted is an interval or more"
      " around such a time"
    )
  kept = client < (num_clients or len(speeds))
  counts = np.bincount(client[kept])
  place = np.arange(np.sum(kept)) - np.repeat(np.cumsum(counts) - counts, counts)
  edges = np.full((len(counts), counts.max(), 2), _NEVER, np.int32)
  edges[client[kept], place] = rounds[kept]
  array: Any = np.asarray
  return Trace(
    edges=array(edges.reshape(len(counts), -1)),
    period=array(rounds.max(), np.int32),
    speed=array((speeds / speeds.mean())[: len(counts)], np.float32),
  )


def _intervals(path: str | Path) -> Iterator[_Interval]:
  """The rows of a file, each checked by itself."""
  rows_of = _parquet_rows if Path(path).suffix.lower() == ".parquet" else _csv_rows
  try:
    with open(path, "rb") as file:
      rows = rows_of(path, file)
      _, names = next(rows)
      header = [str(name).strip() for name in names]
      missing = [name for name in _NEEDED if name not in header]
      if missing:
        raise InputError(
          f"trace: {path}, row 1: no column {missing[0]}, accepted is a header with {', '.join(_NEEDED)} and, if"
          f" wanted, {_OPTIONAL[0]}"
        )
      for name in header:
        if name not in (*_NEEDED, *_OPTIONAL) or header.count(name) > 1:
          raise InputError(
            f"trace: {path}, row 1: column {name!r}, accepted are {', '.join((*_NEEDED, *_OPTIONAL))}, each once"
          )
      for row, cells in rows:
        where = f"trace: {path}, row {row}"
        if len(cells) != len(header):
          raise InputError(f"{where}: {len(cells)} fields, accepted are {len(header)} as in the header")
        yield _interval(where, row, dict(zip(header, cells, strict=True)))
  except OSError as error:
    raise InputError(f"trace: {path} cannot be read ({error.strerror}), accepted is a CSV or Parquet file") from error


def _csv_rows(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, Sequence[str]]]:
  """(row, its cells), first the names of the columns; blank lines are left out."""
  try:
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
      reader = csv.reader(text, strict=True)
      yield 1, next(reader, [])
      for cells in reader:
        if any(cell.strip() for cell in cells):
          yield reader.line_num, cells
  except (csv.Error, UnicodeDecodeError) as error:
    raise InputError(f"trace: {path} is no CSV text ({error}), accepted is a CSV file in UTF-8") from error


def arrow(what: str) -> tuple[Any, Any]:
  """The modules pyarrow and pyarrow.parquet. Raises InputError, which begins with `what`, where they are missing."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise InputError(f"{what} needs the package pyarrow; install it with: pip install 'apfl_jax[parquet]'") from error
  return pyarrow, parquet


def _parquet_rows(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, Sequence[Any]]]:
  """(row, its cells), first the names of the columns; rows are numbered as if these were a line of their own."""
  pyarrow, parquet = arrow(f"trace: {path}")
  try:
    table = parquet.ParquetFile(file)
    yield 1, table.schema_arrow.names
    row = 1
    for batch in table.iter_batches(use_threads=False):
      for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        row += 1
        yield row, cells
  except (pyarrow.ArrowException, OSError) as error:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(f"trace: {path} is no Parquet file ({said}), accepted is a whole one") from error


def _interval(where: str, row: int, cells: dict[str, Any]) -> _Interval:
  def number(name: str) -> float:
    try:
      value = float(cells[name])
    except (TypeError, ValueError, OverflowError):
      value = math.nan
    if not math.isfinite(value):
      raise InputError(f"{where}: {name} is {cells[name]!r}, accepted is a finite number")
    return value

  client, start, end = map(number, _NEEDED)
  if client < 0 or client != int(client):
    raise InputError(f"{where}: client is {cells['client']!r}, accepted is a whole number from 0")
  if start < 0:
    raise InputError(f"{where}: start is {start:g}, accepted is 0 or more")
  if end < start:
    raise InputError(f"{where}: end is {end:g}, before start, accepted is {start:g} or more")
  speed = number("speed") if "speed" in cells else 1.0
  if not speed > 0:
    raise InputError(f"{where}: speed is {speed:g}, accepted is a number above 0")
  return _Interval(int(client), start, end, row, speed)


def _speeds(path: str | Path, intervals: list[_Interval]) -> np.ndarray:
  """float64 [R], a speed a client, none left out and none with two; the intervals are sorted."""
  speeds: list[float] = []
  row = 0  # where the last client's speed was said first
  for interval in intervals:
    client, where = interval.client, f"trace: {path}, row {interval.row}"
    if client > len(speeds):
      raise InputError(
        f"{where}: unknown client {client}, there is no client {len(speeds)}; accepted are clients 0, 1, 2 and so on,"
        " none left out"
      )
    if client == len(speeds):
      speeds.append(interval.speed)
      row = interval.row
    elif interval.speed != speeds[-1]:
      raise InputError(
        f"{where}: speed of client {client} is {interval.speed:g}, but {speeds[-1]:g} in row {row}; accepted is one a"
        " client"
      )
  return np.array(speeds)
