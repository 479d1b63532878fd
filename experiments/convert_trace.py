"""Makes a trace of FedScale's device files: `python -m experiments.convert_trace --availability=client_behave_trace
--capacity=client_device_capacity --output=trace.csv`, for runs with `--dropout=trace --trace=trace.csv
--trace_round=3600`, where a round is an hour (on a virtual clock with `--round_seconds=3600` too).

FedScale (Lai et al. 2022, arXiv 2105.11367) keeps two pickles [C: benchmark/dataset/data/device_info/README.md,
fedscale/cloud/internal/client_metadata.py, cloud/client_manager.py, cloud/aggregation/aggregator.py; of the data itself
only the few entries that its documentation and others print]. JSON of the same shape is read too.
  availability  {device: {"active": [12788, ...], "inactive": [65881, ...], "finish_time": 518400, ...}}
                The device is there from active[i] to inactive[i], in seconds, and all over again after finish_time,
                which is whole days in those entries, but not the same for all. What else is there is not read: `model`,
                and `duration`, the sum of those spans.
  capacity      {device: {"computation": 153.0, "communication": 2209.6}}
                Milliseconds to infer one example; kbit/s both ways, of 1,024 bits as FedScale counts a model's size.

What a trace has of it (apfl_jax/population/traces.py):
  client      the devices in the file's order, 0, 1, 2 and so on.
  start, end  in seconds. The trace lasts as long as the longest `finish_time`; devices of a shorter one begin anew
              within it, and all do after it [O]. At `inactive` a device is away, where FedScale counts it in. Its
              look-up moves on by at most one interval a question and may miss some; here the lists hold as they are.
  speed       1000 / computation, examples a second. FedScale takes training as 3 times as slow, so that an SGD step of
              B examples at speed 1 takes `--step_seconds` = 3 B / (what is printed as 1).
Communication has no column, for a run has one `--bandwidth`: the one printed takes the devices' mean time a byte.

The two files list different devices. They are paired by name if the capacity file has a device of every name, else by
place, the capacity file beginning anew when it ends [O] (FedScale: by the place in one and the number in the other).

A pickle can run any code when it is read. These are read as dicts, lists, texts and numbers, NumPy's among them (the
public capacity file has, to the byte, the size of 500,000 pairs of float64), and refused if they name anything else.
"""

import csv
import json
import math
import pickle
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from apfl_jax.errors import InputError
from apfl_jax.files import replacing
from apfl_jax.population.traces import arrow
from experiments import config

_COLUMNS = ("client", "start", "end", "speed")
_LARGEST = 2**53  # numbers below are exact
_REPEATS = 10_000  # of a device's intervals within the trace


class Listed(NamedTuple):
  """A file of devices: the flag that named it, and what it says of each, by name in the file's order."""

  what: str
  path: Path
  entries: dict[str, Any]

  def where(self, name: str) -> str:
    """How an error begins."""
    return f"{self.what}: {self.path}, device {name!r}"


class Device(NamedTuple):
  """A phone: how an error about it begins, its intervals, after how long they begin anew, and its capacity."""

  where: str
  intervals: list[tuple[float, float]]  # seconds
  period: float  # seconds
  rate: float | None  # examples a second
  bandwidth: float | None  # bytes a second


class _Dtype:
  """Stands in for numpy.dtype, which must not be handed what a stranger wrote."""

  def __init__(self, code: Any, *_: Any):
    self.code, self.order = code, "="

  def __setstate__(self, state: Any) -> None:
    self.order = state[1]


class _Plain(pickle.Unpickler):
  """Makes dicts, lists, texts and numbers, and calls nothing that a file names."""

  def find_class(self, module: str, name: str) -> Any:
    """What stands in for the two names in a pickled number of NumPy's; `load` can call nothing else."""
    if (module, name) == ("numpy", "dtype"):
      return _Dtype
    if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
      return self._scalar
    raise pickle.UnpicklingError(f"it names {module!r}, {name!r}")

  def _scalar(self, dtype: _Dtype, raw: bytes) -> float:
    if dtype.order not in ("<", ">", "|", "=") or dtype.code not in ("f4", "f8", "i4", "i8"):
      raise pickle.UnpicklingError("it has numbers of an odd kind")
    (number,) = np.frombuffer(raw, f"{dtype.order}{dtype.code}").tolist()
    return number


def load(what: str, path: Path) -> Listed:
  """Reads a pickle or a JSON file.

  Args:
    what: the flag, for errors.
    path: of the file.

  Raises:
    InputError: it cannot be read, is no dict by name, or would run code.
  """
  accepted = "accepted is a pickle or JSON of dicts, lists, texts and numbers"
  try:
    with open(path, "rb") as file:
      is_json = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))  # no pickle begins so
      file.seek(0)
      entries = json.load(file, object_pairs_hook=_once) if is_json else _Plain(file).load()
  except OSError as error:
    raise InputError(f"{what}: {path} cannot be read ({error.strerror}), {accepted}") from error
  except Exception as error:  # a damaged pickle raises nearly anything
    said = (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(f"{what}: {path} is refused ({said}), {accepted}") from error
  if not isinstance(entries, dict) or not entries:
    raise InputError(f"{what}: {path} is no dict with a device or more, {accepted}")
  named: dict[str, Any] = {}
  for name, entry in entries.items():
    if not isinstance(name, str) and not (isinstance(name, int) and abs(name) < _LARGEST) or str(name) in named:
      raise InputError(f"{what}: {path}, entry {len(named) + 1}: accepted are texts and numbers as names, each once")
    named[str(name)] = entry
  return Listed(what, path, named)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("a name is there twice")
  return found


def by_name(availability: Listed, capacity: Listed) -> bool:
  """Whether the two files are of the same devices."""
  return availability.entries.keys() <= capacity.entries.keys()


def devices(availability: Listed, capacity: Listed | None = None, drop_broken: bool = False) -> list[Device]:
  """The devices of the first file in its order, each with its capacity.

  Raises:
    InputError: at the first broken device unless these are left out, or if none is left.
  """
  names = list(availability.entries)
  others = names
  if capacity and not by_name(availability, capacity):
    places = list(capacity.entries)
    others = [places[i % len(places)] for i in range(len(names))]
  found = []
  for name, other in zip(names, others, strict=True):
    where = availability.where(name)
    try:
      intervals, period = _availability(where, availability.entries[name])
      rate, bandwidth = _capacity(capacity.where(other), capacity.entries[other]) if capacity else (None, None)
      found.append(Device(where, intervals, period, rate, bandwidth))
    except InputError:
      if not drop_broken:
        raise
  if not found:
    raise InputError(f"availability: {availability.path} has broken devices alone, accepted is one or more that is not")
  return found


def _availability(where: str, entry: Any) -> tuple[list[tuple[float, float]], float]:
  """A device's intervals, ascending and apart, and its period, in seconds."""
  active, inactive, period = (_field(where, entry, name) for name in ("active", "inactive", "finish_time"))
  if not isinstance(active, list) or not isinstance(inactive, list) or len(active) != len(inactive):
    raise InputError(f"{where}: active and inactive do not match, accepted are lists of one length")
  period = _positive(where, "finish_time", period)
  intervals: list[tuple[float, float]] = []
  before = 0.0
  for place, (start, end) in enumerate(zip(active, inactive, strict=True), 1):
    at = f"{where}, interval {place}"
    start, end = _number(at, "active", start), _number(at, "inactive", end)
    if start < before:
      raise InputError(f"{at}: active is {start:g}, accepted is {before:g} or more")
    if not start <= end <= period:
      raise InputError(f"{at}: inactive is {end:g}, accepted is from {start:g}, active, to {period:g}, finish_time")
    intervals.append((start, end))
    before = end
  return intervals, period


def _capacity(where: str, entry: Any) -> tuple[float, float]:
  """Examples a second, bytes a second."""
  milliseconds, kbits = (
    _positive(where, name, _field(where, entry, name)) for name in ("computation", "communication")
  )
  return 1000 / milliseconds, kbits * 1024 / 8


def _field(where: str, entry: Any, name: str) -> Any:
  if not isinstance(entry, dict) or name not in entry:
    raise InputError(f"{where}: no {name}, accepted is a dict with it")
  return entry[name]


def _number(where: str, name: str, value: Any) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
    said = f"{value}" if isinstance(value, float) else f"of type {type(value).__name__}"
    raise InputError(f"{where}: {name} is {said}, accepted is a finite number below {_LARGEST}")
  return value


def _positive(where: str, name: str, value: Any) -> float:
  if not _number(where, name, value) > 0:
    raise InputError(f"{where}: {name} is {value:g}, accepted is a number above 0")
  return value


def rows(phones: Sequence[Device]) -> list[tuple[Any, ...]]:
  """The rows of a trace that lasts as long as the longest period; (client, start, end) and the speed if it is known."""
  span = max(phone.period for phone in phones)
  result: list[tuple[Any, ...]] = []
  for client, phone in enumerate(phones):
    times = math.ceil(span / phone.period)
    if times > _REPEATS:
      raise InputError(f"{phone.where}: finish_time is {phone.period:g}, accepted is {span / _REPEATS:g} or more")
    spans = [(a + k * phone.period, min(b + k * phone.period, span)) for k in range(times) for a, b in phone.intervals]
    spans = [(start, end) for start, end in spans if start < end]
    # Empty intervals say who there is, and when all begins anew.
    spans = (spans or [(0, 0)]) + ([(span, span)] if client == 0 else [])
    speed = () if phone.rate is None else (phone.rate,)
    result += [(client, start, end, *speed) for start, end in spans]
  return result


def write(path: Path, table: Sequence[tuple[Any, ...]]) -> None:
  """Writes rows as CSV or, if the path ends so, as Parquet."""
  names = _COLUMNS[: len(table[0])]
  with replacing(path) as temporary:
    if path.suffix.lower() == ".parquet":
      pyarrow, parquet = arrow("output: Parquet")
      client, *others = zip(*table, strict=True)
      columns = [np.array(client), *(np.array(column, float) for column in others)]
      parquet.write_table(pyarrow.table(dict(zip(names, columns, strict=True))), temporary)
    else:
      with open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(table)


def summary(phones: Sequence[Device], table: Sequence[tuple[Any, ...]]) -> str:
  """One line: how many devices, how long, how much of the time they are there, how fast they are."""
  span = max(phone.period for phone in phones)
  there = sum(end - start for _, start, end, *_ in table) / span / len(phones)
  line = f"{len(phones)} devices, {span:g} seconds, there {there:.1%} of the time"
  rates = [phone.rate for phone in phones if phone.rate is not None]
  if rates:
    mean = statistics.fmean(rates)
    low, middle, high = np.quantile(rates, (0.1, 0.5, 0.9)) / mean
    bandwidth = statistics.harmonic_mean([phone.bandwidth for phone in phones if phone.bandwidth is not None])
    line += (
      f"; speed {low:.3g}, {middle:.3g}, {high:.3g} (10th, 50th, 90th percentile; 1 is {mean:.4g} examples a second),"
      f" bandwidth {bandwidth:.4g} bytes a second"
    )
  return line


def main(arguments: Sequence[str]) -> None:
  """Writes the trace and prints a line about it."""
  del arguments
  said = flags.FLAGS
  if not said.availability:
    raise InputError("availability: got none, accepted is a file of devices")
  output = Path(said.output).expanduser()
  if output.suffix.lower() not in (".csv", ".parquet"):
    raise InputError(f"output: got {said.output!r}, accepted is the name of a file that ends with .csv or .parquet")
  availability = load("availability", Path(said.availability).expanduser())
  capacity = load("capacity", Path(said.capacity).expanduser()) if said.capacity else None
  phones = devices(availability, capacity, said.drop_broken)
  notes = []
  if capacity:
    notes.append(f"paired by {'name' if by_name(availability, capacity) else 'place'}")
  if len(phones) < len(availability.entries):
    notes.append(f"broken and left out: {len(availability.entries) - len(phones)}")
  if said.num_devices > len(phones):
    raise InputError(f"num_devices: got {said.num_devices}, accepted is at most {len(phones)}, which the file has")
  if said.num_devices:
    chosen = np.random.default_rng(said.seed).choice(len(phones), said.num_devices, replace=False)
    phones = [phones[i] for i in sorted(chosen)]
  table = rows(phones)
  output.parent.mkdir(parents=True, exist_ok=True)
  write(output, table)
  print("; ".join([f"{output}: {summary(phones, table)}", *notes]))


if __name__ == "__main__":
  # Here and not at import: other binaries have flags of these names too.
  flags.DEFINE_string("availability", "", "pickle or JSON of when devices are there, as FedScale's client_behave_trace")
  flags.DEFINE_string("capacity", "", "pickle or JSON of how fast they are, as client_device_capacity; empty for none")
  flags.DEFINE_string("output", "trace.csv", "file of the trace, .csv or .parquet")
  flags.DEFINE_integer("num_devices", 0, "drawn at random; 0 for all", lower_bound=0)
  flags.DEFINE_integer("seed", 0, "of the draw", lower_bound=0)
  flags.DEFINE_bool("drop_broken", False, "leave broken devices out instead of stopping at the first")
  config.main(main)
