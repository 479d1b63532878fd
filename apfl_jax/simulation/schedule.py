"""The virtual clock: who starts and ends when, on which version of the server, before anything is trained.

A visit takes download + steps * work * seconds a step / speed + upload virtual seconds, where work is the share of its
steps that it does, times a log-normal factor of mean 1.
  synchronous   a round starts ceil(K (1 + o)) clients; it ends when K uploads have arrived, when nobody is left to wait
                for, or at the deadline. Who is later is cut off: it keeps nothing and is not computed.
  asynchronous  `concurrency` clients are at work; when one ends, its upload is aggregated by itself, and the next
                client starts on what the server is then. What happens at one moment ends first and starts then.

The availability processes are in round floor(time / round_seconds). Each such round has its keyed order of clients;
the next to start is the first along it that is present and not at work, and who ends joins at the order's end. A client
that is away at its start is not drawn; one that is away at its end, or whose upload the process loses, has worked and
is not heard of [O]. Unless told otherwise a round of theirs is a T-th of what the run would take if all were always
there, so that what they do by shares of the run's rounds happens at those shares of the run [O].

A schedule is a pure function of the seed, the process, speeds, sizes and costs: neither devices nor batches nor what is
learnt change it.
"""

import heapq
import zipfile
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax import population, random
from apfl_jax.errors import InputError
from apfl_jax.simulation.cohort import along
from apfl_jax.types import Array, Availability, Process, PyTree

CLOCKS = ("rounds", "synchronous", "asynchronous")
_BLOCK = 4096  # visits whose durations are drawn in a call
_PATIENCE = 10_000  # rounds of the process in a row in which nobody is there
_USUAL = 20_000  # visits, of which the length of a round is taken
_ROUNDING = 1e-9  # of a round: sums of durations that should be whole may fall short of it


class Settings(NamedTuple):
  """Of a clock.

  Attributes:
    clock: 'synchronous' or 'asynchronous'.
    rounds: T; a run is T * K visits, or T synchronous rounds.
    cohort_size: K.
    concurrency: clients at work at a time, on the asynchronous clock.
    over_selection: o, share of clients that a synchronous round starts beyond K.
    deadline: virtual seconds after which a synchronous round ends; 0 for none.
    jitter: standard deviation of the logarithm of a visit's factor.
    round_seconds: length of a round of the availability processes; 0 for a T-th of the run if all were always there.
    max_staleness: versions that an upload may be behind; older ones do not arrive. 0 for any.
  """

  clock: str
  rounds: int
  cohort_size: int
  concurrency: int
  over_selection: float = 0.0
  deadline: float = 0.0
  jitter: float = 0.0
  round_seconds: float = 0.0
  max_staleness: int = 0

  @property
  def places(self) -> int:
    """Clients at work at a time, at most."""
    if self.clock == "asynchronous":
      return self.concurrency
    # Rounded first, for 100 * 1.1 is more than 110.
    return int(np.ceil(round(self.cohort_size * (1 + self.over_selection), 6)))


class Schedule(NamedTuple):
  """Visits [V] in the order in which they started. Version v is the server after v groups from which uploads arrived.

  Attributes:
    clock: 'synchronous' or 'asynchronous'.
    cohort_size: K.
    places: clients at work at a time, at most.
    num_clients: N.
    width: clients that are computed together on the asynchronous clock, at most; 0 for what fits, see `batches.plan`.
    round_seconds: length of a round of the availability processes.
    gone: bool [N] by id, away for good when the run ends.
    presence: uint8 [W, ceil(N / 8)], packed bits by id: who is there in each round of the processes; [0, 0]
      unless asked for.
    seconds: float64 [T], when each round of K visits is over.
    client: int32 [V].
    start: float64 [V], virtual seconds.
    end: float64 [V]; of one that is cut off, when that happens.
    group: int32 [V], which uploads it is aggregated with, counted from 0; -1 for a visit that is cut off or that has
      not ended when the run does.
    read: int32 [V], the version that it downloaded.
    staleness: int32 [V], versions between its download and its group.
    arrives: bool [V].
    round: int32 [V], in which it is due.
    number: int32 [V], what its keys are made of: its round, or where its client had that already the next number.
    work: float32 [V], the share of its steps that it does.
    wait: int32 [V], idle steps.
  """

  clock: str
  cohort_size: int
  places: int
  num_clients: int
  width: int
  round_seconds: float
  gone: np.ndarray
  presence: np.ndarray
  seconds: np.ndarray
  client: np.ndarray
  start: np.ndarray
  end: np.ndarray
  group: np.ndarray
  read: np.ndarray
  staleness: np.ndarray
  arrives: np.ndarray
  round: np.ndarray
  number: np.ndarray
  work: np.ndarray
  wait: np.ndarray

  @property
  def idle_share(self) -> float:
    """Share of the places' time in which nobody was at work, up to the end of the last round."""
    busy = np.minimum(self.end, self.seconds[-1]) - np.minimum(self.start, self.seconds[-1])
    return max(0.0, float(1 - busy.sum() / (self.places * self.seconds[-1])))

  @property
  def starts(self) -> np.ndarray:
    """int64 [N] by id: visits begun before the run ends, those cut off and those not over then included."""
    return np.bincount(self.client[self.start < self.seconds[-1]], minlength=self.num_clients)

  def visits(self, arrived: int | None = None) -> dict[str, int]:
    """Visits begun before the run ends, by what became of them.

    'arrived'; 'lost', whose client was away at its end or whose upload was lost, too stale or not finite; 'cut off' by
    the end of a synchronous round; 'not over' when the run is.

    Args:
      arrived: how many did; None for those that the schedule lets arrive.
    """
    begun = self.start < self.seconds[-1]
    ended = int(np.count_nonzero(begun & (self.group >= 0)))
    if arrived is None:
      arrived = int(np.count_nonzero(begun & (self.group >= 0) & self.arrives))
    rest = "cut off" if self.clock == "synchronous" else "not over"
    return {"arrived": arrived, "lost": ended - arrived, rest: int(np.count_nonzero(begun)) - ended}

  def staleness_histogram(self, bins: int = 40) -> dict[str, list[int]]:
    """How stale what arrived was: counts [b], and edges [b + 1], of which a bin holds the lower one."""
    values = self.staleness[self.arrives & (self.group >= 0)]
    width = max(1, -(-(int(values.max(initial=0)) + 1) // bins))
    edges = np.arange(0, int(values.max(initial=0)) + width + 1, width)
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}

  def traffic(self, down: int, up: int) -> np.ndarray:
    """float64 [T]: bytes that were moved by the end of each round, from those of a download and of an upload."""
    started = np.searchsorted(np.sort(self.start), self.seconds, side="left")
    ended = np.searchsorted(np.sort(self.end[self.group >= 0]), self.seconds, side="right")
    return started * float(down) + ended * float(up)

  def classes_present(self, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What those hold together that are there.

    Args:
      held: bool [N, C] by id, who has which classes.

    Returns:
      (bool [V, C], when a visit starts; bool [T, C], just before a round is over)

    Raises:
      InputError: the schedule does not tell who is there.
    """
    if not len(self.presence):
      raise InputError(
        "schedule: got one that does not tell who is there, accepted is one of a run with --softmax_mask=present"
      )
    there = (np.unpackbits(bits, count=self.num_clients).astype(bool) for bits in self.presence)
    classes = np.stack([held[here].any(axis=0) for here in there])
    return classes[_round_at(self.start, self.round_seconds)], classes[_round_before(self.seconds, self.round_seconds)]


def make(
  process: Callable[[PyTree], Process],
  traced: PyTree,
  seed: Array | int,
  settings: Settings,
  compute: np.ndarray,
  *,
  download: float = 0.0,
  upload: float = 0.0,
  presence: bool = False,
) -> Schedule:
  """Plays the clock to the end of a run.

  Args:
    process: (traced) -> the population, called inside a trace.
    traced: whatever it reads.
    seed: the run's.
    settings: of the clock.
    compute: float64 [N] by id, seconds that a client's steps take at speed 1.
    download: seconds.
    upload: seconds.
    presence: whether to tell who is there, for which everybody is looked at in each round of the processes.

  Raises:
    InputError: nobody comes any more, or clients download late.
  """
  if settings.clock not in CLOCKS[1:]:
    raise InputError(f"clock: got {settings.clock!r}, accepted are {', '.join(CLOCKS[1:])}")
  if not settings.round_seconds:
    ideal = undisturbed(process, traced, seed, settings, compute, download=download, upload=upload)
    settings = settings._replace(round_seconds=float(ideal.seconds[-1] / len(ideal.seconds)) or 1.0)
  there = _Presence(process, traced, seed, len(compute), settings.round_seconds)
  made = _play(there, seed, settings, compute, download, upload)
  return made._replace(presence=there.table(made.seconds[-1])) if presence else made


def undisturbed(
  process: Callable[[PyTree], Process],
  traced: PyTree,
  seed: Array | int,
  settings: Settings,
  compute: np.ndarray,
  *,
  download: float = 0.0,
  upload: float = 0.0,
) -> Schedule:
  """The same clock, or the beginning of it, if all were there all the time; arguments as of `make`."""
  rounds = min(settings.rounds, -(-_USUAL // settings.cohort_size))
  presence = _Presence(process, traced, seed, len(compute), np.inf, always=True)
  return _play(presence, seed, settings._replace(rounds=rounds), compute, download, upload)


def _play(
  presence: "_Presence", seed: Array | int, settings: Settings, compute: np.ndarray, download: float, upload: float
) -> Schedule:
  """Plays the clock for those that are there; arguments as of `make`."""
  most = settings.places + settings.rounds * max(settings.places, settings.cohort_size)
  factor = _factors(seed, most, settings.jitter)
  seconds = lambda visit, id, there: (download + compute[id] * there.work / there.speed + upload) * factor[visit]
  play = _asynchronous if settings.clock == "asynchronous" else _synchronous
  columns = play(_Line(presence, settings), settings, lambda visit, id, there: float(seconds(visit, id, there)))
  return Schedule(
    clock=settings.clock,
    cohort_size=settings.cohort_size,
    places=settings.places,
    num_clients=len(compute),
    width=0,
    round_seconds=presence.length,
    gone=presence.gone(columns["seconds"][-1]),
    presence=np.zeros((0, 0), np.uint8),
    **columns,
  )


def _round_at(times: np.ndarray, length: float) -> np.ndarray:
  """int64: the rounds of the process, of a length in seconds, at some times."""
  return (np.asarray(times) / length + _ROUNDING).astype(np.int64)


def _round_before(times: np.ndarray, length: float) -> np.ndarray:
  """The same just before them."""
  return np.maximum(0, np.ceil(np.asarray(times) / length - _ROUNDING).astype(np.int64) - 1)


def _factors(seed: Array | int, count: int, jitter: float) -> np.ndarray:
  """float64 [count] or more: exp(s z - s^2 / 2) of each visit by its number."""
  drawn = [_normals(jnp.uint32(seed), np.int32(first)) for first in range(0, count, _BLOCK)]
  return np.exp(jitter * np.concatenate(drawn).astype(np.float64) - jitter**2 / 2)


@jax.jit
def _normals(seed: Array, first: Array) -> Array:
  key = random.key(seed, random.Purpose.DURATION)
  return jax.vmap(lambda visit: jax.random.normal(jax.random.fold_in(key, visit)))(first + jnp.arange(_BLOCK))


# --- who is there -----------------------------------------------------------------------------------------------------


class _There(NamedTuple):
  """Of one client."""

  present: bool
  speed: float
  work: float
  wait: int


@partial(jax.jit, static_argnums=0)
def _start(process: Callable[[PyTree], Process], traced: PyTree, seed: Array) -> PyTree:
  return population.start(process(traced), seed)


@partial(jax.jit, static_argnums=0)
def _step(process: Any, traced: PyTree, seed: Array, state: PyTree, begin: Array, end: Array) -> PyTree:
  return jax.lax.fori_loop(begin, end, lambda t, s: population.step(process(traced), s, t, seed), state)


@partial(jax.jit, static_argnums=0)
def _ahead(
  process: Any, traced: PyTree, seed: Array, state: PyTree, round: Array, num_clients: Array, positions: Array
) -> tuple[Array, Availability]:
  return along(process(traced), state, round, seed, num_clients, positions)


@partial(jax.jit, static_argnums=0)
def _look(process: Any, traced: PyTree, seed: Array, state: PyTree, round: Array, ids: Array) -> Availability:
  return population.look(process(traced), state, round, ids, seed)


class _Presence:
  """The population process, looked at for many clients a call; with `always`, as if all were there all the time."""

  def __init__(
    self,
    process: Callable[[PyTree], Process],
    traced: PyTree,
    seed: Any,
    num_clients: int,
    length: float,
    always: bool = False,
  ):
    self.num_clients, self.length, self.always = num_clients, length, always
    self._of = process, traced, jnp.uint32(seed)
    self._start = self._now = -1, _start(*self._of)

  def round(self, time: float) -> int:
    """The process's round at a time."""
    return int(time / self.length + _ROUNDING)

  def _stepped(self, known: tuple[int, PyTree], round: int) -> tuple[int, PyTree]:
    """A round and its state, from one before it or the same."""
    return round, _step(*self._of, known[1], np.int32(known[0] + 1), np.int32(round + 1))

  def enter(self, round: int) -> None:
    """Goes on to a round; none before it may be entered any more."""
    self._now = self._stepped(self._now, round)

  def order(self, position: int, count: int) -> deque[tuple[int, _There]]:
    """The next clients along the order of the round that was entered."""
    positions = position + np.arange(count)
    round, state = self._now
    given = state, np.int32(round), np.int32(self.num_clients), positions.astype(np.int32)
    ids, there = jax.tree.map(np.asarray, _ahead(*self._of, *given))
    inside = positions < self.num_clients
    if there.delay[inside].any():
      raise InputError(
        "clock: got clients that download rounds ago (delay), accepted are those that do so at their start"
      )
    fields = (there.present[inside] | self.always, there.speed[inside], there.work[inside], there.wait[inside])
    return deque(zip(ids[inside].tolist(), map(_There, *(x.tolist() for x in fields)), strict=True))

  def arrives(self, ids: np.ndarray, times: np.ndarray) -> np.ndarray:
    """bool [V]: whether uploads of these clients arrive at these times."""
    if self.always:
      return np.ones(len(ids), bool)
    rounds = _round_at(times, self.length)
    order = np.argsort(rounds, kind="stable")
    found = np.zeros(len(order), bool)
    at = self._now if len(order) and self._now[0] <= rounds[order[0]] else self._start
    for part in np.split(order, np.flatnonzero(np.diff(rounds[order])) + 1):
      if len(part):
        at = self._stepped(at, int(rounds[part[0]]))
        padded = np.resize(ids[part], 1 << max(3, (len(part) - 1).bit_length()))  # few shapes, for each is compiled
        there = _look(*self._of, at[1], np.int32(at[0]), padded.astype(np.int32))
        found[part] = np.asarray(there.present & there.arrives)[: len(part)]
    return found

  def gone(self, time: float) -> np.ndarray:
    """bool [N] by id: away for good just before a time."""
    at = self._stepped(self._start, int(_round_before(np.array(time), self.length)))
    return np.asarray(self._everybody(at).gone)

  def table(self, time: float) -> np.ndarray:
    """uint8 [W, ceil(N / 8)], packed bits by id: who is there in each round up to a time."""
    at, rows = self._start, []
    for round in range(self.round(time) + 1):
      at = self._stepped(at, round)
      rows.append(np.packbits(np.asarray(self._everybody(at).present)))
    return np.stack(rows)

  def _everybody(self, at: tuple[int, PyTree]) -> Availability:
    round, state = at
    return _look(*self._of, state, np.int32(round), np.arange(self.num_clients, dtype=np.int32))


class _Line:
  """Who is the next to start."""

  def __init__(self, presence: _Presence, settings: Settings):
    self.presence = presence
    self.at_work: set[int] = set()
    self._block = min(presence.num_clients, 2 * max(settings.places, 32))
    self._round, self._idle = -1, 0

  def enter(self, time: float) -> None:
    """A new round of the process begins the line anew."""
    round = self.presence.round(time)
    if round != self._round:
      self._round, self._position = round, 0
      self._ahead: deque[tuple[int, _There]] = deque()
      self._again: deque[int] = deque()
      self._passed: dict[int, _There] = {}
      self.presence.enter(round)

  def next(self) -> tuple[int, _There] | None:
    """A client that is there and not at work, who is at work from now on; None where there is none."""
    while True:
      if not self._ahead and self._position < self.presence.num_clients:
        self._ahead = self.presence.order(self._position, self._block)
        self._position += self._block
      if self._ahead:
        id, there = self._ahead.popleft()
        self._passed[id] = there
        if not there.present or id in self.at_work:
          continue
      elif self._again:
        id = self._again.popleft()
        there = self._passed[id]
      else:
        return None
      self.at_work.add(id)
      self._idle = 0
      return id, there

  def back(self, id: int) -> None:
    """A client has ended: it joins at the end, unless its turn in this round is still to come."""
    self.at_work.remove(id)
    if id in self._passed and self._passed[id].present:
      self._again.append(id)

  def wait(self) -> float:
    """When the process's next round begins.

    Raises:
      InputError: that was asked again and again, and nobody came.
    """
    self._idle = 0 if self.at_work else self._idle + 1
    if self._idle > _PATIENCE:
      raise InputError(
        f"clock: got a population of which nobody is there for {_PATIENCE} rounds of its process from virtual second"
        f" {(self._round - _PATIENCE) * self.presence.length:.6g} on; accepted is one that comes back"
      )
    return (self._round + 1) * self.presence.length


# --- the two clocks ---------------------------------------------------------------------------------------------------

_Seconds = Callable[[int, int, _There], float]


def _asynchronous(line: _Line, settings: Settings, seconds: _Seconds) -> dict[str, np.ndarray]:
  """The columns of a schedule, [V] and `seconds` [T]: an upload is a group, until T K of them have ended."""
  total, size = settings.rounds * settings.cohort_size, settings.cohort_size
  rows: list[tuple] = []  # client, start, end, ended before it started, work, wait
  working: list[tuple[float, int]] = []  # (end, visit), a heap
  ended: list[int] = []  # visits in the order in which they end
  now, free = 0.0, settings.concurrency
  line.enter(now)
  while len(ended) < total:
    while free and (found := line.next()):
      id, there = found
      visit = len(rows)
      end = now + seconds(visit, id, there)
      rows.append((id, now, end, len(ended), there.work, there.wait))
      heapq.heappush(working, (end, visit))
      free -= 1
    change = line.wait() if free else np.inf
    if not working or change < working[0][0]:
      now = change
      line.enter(now)
      continue
    now = working[0][0]
    line.enter(now)
    while working and working[0][0] == now and len(ended) < total:
      visit = heapq.heappop(working)[1]
      ended.append(visit)
      line.back(rows[visit][0])
      free += 1

  client, start, ends, before, work, wait = (np.array(column) for column in zip(*rows, strict=True))
  order = np.array(ended)
  arrives = np.zeros(len(rows), bool)
  arrives[order] = line.presence.arrives(client[order], ends[order])
  group, staleness, number = (np.full(len(rows), start) for start in (-1, 0, 0))
  version = np.zeros(total + 1, int)  # after so many visits have ended
  last: dict[int, int] = {}
  for place, visit in enumerate(ended):
    stale = int(version[place] - version[before[visit]])
    if settings.max_staleness and stale > settings.max_staleness:
      arrives[visit] = False
    version[place + 1] = version[place] + arrives[visit]
    group[visit], staleness[visit] = place, stale
    id = rows[visit][0]
    number[visit] = last[id] = max(place // size, last.get(id, -1) + 1)
  return _columns(
    seconds=ends[order][size - 1 :: size],
    client=client,
    start=start,
    end=ends,
    group=group,
    read=version[before],
    staleness=staleness,
    arrives=arrives,
    round=np.maximum(group, 0) // size,
    number=number,
    work=work,
    wait=wait,
  )


def _synchronous(line: _Line, settings: Settings, seconds: _Seconds) -> dict[str, np.ndarray]:
  """The columns of a schedule, [V] and `seconds` [T]: a round is a group, of those who end before it does."""
  rows: list[tuple] = []  # client, start, end, group, version, arrives, round, work, wait
  closes: list[float] = []
  now, version = 0.0, 0
  for round in range(settings.rounds):
    line.enter(now)
    while (first := line.next()) is None:
      now = line.wait()
      line.enter(now)
    drawn = [first]
    while len(drawn) < settings.places and (found := line.next()):
      drawn.append(found)
    end = np.array([now + seconds(len(rows) + i, id, there) for i, (id, there) in enumerate(drawn)])
    ids = np.array([id for id, _ in drawn])
    arrives = line.presence.arrives(ids, end)
    by = np.argsort(end, kind="stable")
    enough = np.searchsorted(np.cumsum(arrives[by]), settings.cohort_size)  # its place, or after the last
    last = min(int(enough), len(by) - 1)
    close = end[by[last]]
    counted = np.zeros(len(by), bool)
    counted[by[: last + 1]] = True
    if settings.deadline and now + settings.deadline < close:
      close = now + settings.deadline
      counted &= end <= close
    for i, (id, there) in enumerate(drawn):
      group, heard = (round, bool(arrives[i])) if counted[i] else (-1, False)
      rows.append((id, now, min(end[i], close), group, version, heard, round, there.work, there.wait))
    version += bool((arrives & counted).any())
    now = float(close)
    closes.append(now)
    line.enter(now)
    for i in by:
      line.back(int(ids[i]))
  names = ("client", "start", "end", "group", "read", "arrives", "round", "work", "wait")
  columns = dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))
  return _columns(seconds=np.array(closes), staleness=np.zeros(len(rows)), number=columns["round"], **columns)


def _columns(**columns: np.ndarray) -> dict[str, np.ndarray]:
  """Columns of any dtypes -> the same in those of a schedule."""
  kinds = {"seconds": np.float64, "start": np.float64, "end": np.float64, "arrives": bool, "work": np.float32}
  return {name: np.asarray(x).astype(kinds.get(name, np.int32)) for name, x in columns.items()}


# --- files ------------------------------------------------------------------------------------------------------------


def save(schedule: Schedule, file: Any) -> None:
  """Writes an archive of arrays into an open file or to a path; the same schedule is the same bytes but for dates."""
  np.savez_compressed(file, **schedule._asdict())


def load(path: Path, clock: str, num_clients: int, cohort_size: int, rounds: int) -> Schedule:
  """A schedule that was saved, for a run of this clock, N, K and T.

  Raises:
    InputError: it cannot be read, or is one of another run.
  """
  try:
    with np.load(path) as file:
      columns = dict(file)
    names = ("clock", "cohort_size", "places", "num_clients", "width", "round_seconds")
    plain = {name: columns.pop(name).item() for name in names}
    schedule = Schedule(**plain, **columns)
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    if isinstance(error, (KeyError, TypeError)):
      reason = "it has other arrays"
    elif isinstance(error, OSError) and error.strerror:
      reason = error.strerror
    else:
      reason = "it is no .npz file"
    raise InputError(
      f"schedule: {path} is no saved schedule ({reason}), accepted is the schedule.npz of a run"
    ) from error
  here = {"clock": clock, "num_clients": num_clients, "cohort_size": cohort_size, "rounds": rounds}
  there = {**plain, "rounds": len(schedule.seconds)}
  for name, value in here.items():
    if there[name] != value:
      raise InputError(f"schedule: {path} is of a run with {name}={there[name]}, accepted is one with {value}")
  return schedule
