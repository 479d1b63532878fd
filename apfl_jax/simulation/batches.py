"""What of a schedule is computed together: batches of visits, exact for a server that takes one upload at a time.

A batch is groups one after another whose versions of the server all exist when it begins, no client twice. Its clients
are computed at once; then their uploads are aggregated one after another, and what each makes of the server goes to a
slot of the history, if somebody will read it. A slot is free when its last reader is computed. A synchronous round is
one batch, aggregated as a whole.
"""

import heapq
from typing import Any, NamedTuple

import jax
import numpy as np

from apfl_jax.simulation.schedule import Schedule


class Layout(NamedTuple):
  """What a compiled program is made for.

  Attributes:
    alone: whether each upload is aggregated by itself, or a batch as a whole.
    width: P, clients a batch, at most.
    batches: D, batches a call, at most.
    versions: H, slots for versions of `Download.shared`; one more is where versions go that nobody reads.
    seats: S, slots for rows of `Download.own`, one for each client at work.
    classes: C where visits have the classes present at their start, else 0.
  """

  alone: bool
  width: int
  batches: int
  versions: int
  seats: int
  classes: int = 0

  @property
  def starts(self) -> int:
    """Clients that start in a call, at most: as many as end, and those at work after it."""
    return self.width * self.batches + self.seats


class Cohort(NamedTuple):
  """Who is computed together, [K] each; in batches [D, P].

  Attributes:
    ids: int32.
    ok: bool; the others are nobody.
    round: int32, see `Visit`.
    number: int32, what keys are made of: another at each visit of a client.
    staleness: int32.
    work: float32.
    wait: int32.
    arrives: bool.
    slot: int32, where in the history the version is that it downloaded.
    own: int32, which row of `Download.own` it got: its id, or the seat in which its row was kept.
    present: bool [K, C], classes of the clients that were there when it started; None where nobody asks.
  """

  ids: Any
  ok: Any
  round: Any
  number: Any
  staleness: Any
  work: Any
  wait: Any
  arrives: Any
  slot: Any
  own: Any
  present: Any


class Batches(NamedTuple):
  """What a call computes: D batches of P rows, each row's upload in the order in which it is aggregated.

  Attributes:
    count: int32 [], how many of the batches there are.
    cohort: Cohort [D, P].
    ends: bool [D], whether a round is over after the batch.
    first: int32 [D], the group of the batch's first row.
    written: int32 [D, P], the slot of the version that comes of the row's group; H where nobody will read it.
    upto: int32 [D, P], how many of `starts` begin on a version not later than that.
    before: int32 [], how many begin before the first row.
    starts: int32 [D P + S], ids of the clients that begin, by the version that they read.
    seats: int32 [D P + S], theirs.
  """

  count: Any
  cohort: Cohort
  ends: Any
  first: Any
  written: Any
  upto: Any
  before: Any
  starts: Any
  seats: Any


def blank_batches(layout: Layout) -> Batches:
  """Batches of nobody, in the shapes of a call."""
  table = lambda kind, *axes: np.zeros((layout.batches, layout.width, *axes), kind)
  whole, zero = table(np.int32), np.int32(0)
  cohort = Cohort(
    ids=whole,
    ok=table(bool),
    round=whole,
    number=whole,
    staleness=whole,
    work=table(np.float32),
    wait=whole,
    arrives=table(bool),
    slot=whole,
    own=whole,
    present=table(bool, layout.classes) if layout.classes else None,
  )
  starts = np.zeros(layout.starts, np.int32)
  return Batches(zero, cohort, table(bool)[:, 0], whole[:, 0], whole, whole, zero, starts, starts)


class Plan(NamedTuple):
  """A schedule as batches, in host memory.

  Attributes:
    schedule: what it is a plan of.
    layout: of the program that executes it.
    all: Batches, of the whole run: [B, P], `starts` [V]; B is the number of batches.
    offsets: int64 [T + 1], the batches of round t are those from offsets[t] to offsets[t + 1].
    per_round: most visits that a round computes.
    present: bool [T, C], classes of the clients that are there just before each round is over; None where nobody asks.
  """

  schedule: Schedule
  layout: Layout
  all: Batches
  offsets: np.ndarray
  per_round: int
  present: np.ndarray | None

  @property
  def sizes(self) -> np.ndarray:
    """int64 [B], rows of each batch."""
    return self.all.cohort.ok.sum(axis=1)

  def cohorts(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, ok) of the clients computed in rounds `begin` to `end`, [batches, P]."""
    some = slice(self.offsets[begin], self.offsets[end])
    return self.all.cohort.ids[some], self.all.cohort.ok[some]

  def calls(self, begin: int, end: int) -> list[Batches]:
    """The batches of rounds `begin` to `end`, padded, in calls of D."""
    size = self.layout.batches
    return [
      self._call(at, min(at + size, self.offsets[end])) for at in range(self.offsets[begin], self.offsets[end], size)
    ]

  def _call(self, begin: int, end: int) -> Batches:
    whole, layout = self.all, self.layout
    done = int(whole.upto[begin - 1, -1]) if begin else 0
    pad = lambda x: np.concatenate([x[begin:end], np.zeros((layout.batches - (end - begin), *x.shape[1:]), x.dtype)])
    some = lambda x: np.pad(x[done : done + layout.starts], (0, max(0, layout.starts - len(x[done:]))))
    return Batches(
      count=np.int32(end - begin),
      cohort=jax.tree.map(pad, whole.cohort),
      ends=pad(whole.ends),
      first=pad(whole.first),
      written=pad(whole.written),
      upto=np.maximum(pad(whole.upto) - done, 0).astype(np.int32),
      before=np.int32(0 if begin else whole.before),
      starts=some(whole.starts),
      seats=some(whole.seats),
    )


def plan(schedule: Schedule, width: int = 0, held: np.ndarray | None = None) -> Plan:
  """Divides a schedule into batches: groups one after another whose versions all exist when the batch begins, no client
  twice. A batch ends with its round, for what is evaluated is the server between rounds.

  Args:
    schedule: who ends when.
    width: clients a batch, at most; 0 for the schedule's, or `fitting` where it has none. A synchronous round is one
      batch, whatever it is.
    held: bool [N, C] by id, who has which classes; only the softmax mask `present` needs it.

  Raises:
    InputError: the schedule does not tell who is there, and `held` asks for it.

  Shapes are those of all schedules of such a clock and width, so that another seed compiles nothing; but where uploads
  are lost on the asynchronous clock, more seats may be needed.
  """
  alone = schedule.clock == "asynchronous"
  order = _order(schedule)
  if alone:
    width = width or schedule.width or fitting(schedule)
    begins = _begins(schedule, order, width)
  else:
    begins = np.searchsorted(schedule.group[order], np.arange(len(schedule.seconds)))
    width = schedule.places
  count = len(begins)
  sizes = np.diff([*begins, len(order)])
  batch, place = np.repeat(np.arange(count), sizes), np.arange(len(order)) - np.repeat(begins, sizes)

  # Versions: the groups from which something arrives make one, in order.
  arrives = schedule.arrives[order]
  version = np.cumsum(arrives) if alone else np.zeros(len(order), int)
  read = schedule.read[order]
  nothing = np.zeros(len(order), int)
  slot, seat, needed = _places(read, batch, version, arrives) if alone else (nothing, nothing, 1)
  versions = seats = 1
  if alone:
    # At most as many versions are read as clients are at work. A lost upload makes none, so that who starts then has
    # a seat from the last one on, while others have theirs.
    versions = seats = schedule.places
    while seats < needed or seats == versions and not arrives.all():
      seats *= 2
  by_read = np.argsort(read, kind="stable") if alone else nothing[:0]
  upto = np.searchsorted(read[by_read], version, side="right")
  before = np.searchsorted(read[by_read], 0, side="right")

  def table(values: np.ndarray) -> np.ndarray:
    kind = values.dtype if values.dtype in (bool, np.float32) else np.int32
    padded = np.zeros((count, width, *values.shape[1:]), kind)
    padded[batch, place] = values
    return padded

  present, classes = (None, 0) if held is None else (schedule.classes_present(held), held.shape[1])
  column = lambda name: table(getattr(schedule, name)[order])
  cohort = Cohort(
    ids=column("client"),
    ok=table(np.ones(len(order), bool)),
    round=column("round"),
    number=column("number"),
    staleness=column("staleness"),
    work=column("work"),
    wait=column("wait"),
    arrives=column("arrives"),
    slot=table(slot[read] if alone else nothing),
    own=table(seat if alone else schedule.client[order]),
    present=present and table(present[0][order]),
  )
  made = np.where(arrives & (slot[version] >= 0), slot[version], versions) if alone else nothing
  whole = Batches(
    count=np.int32(count),
    cohort=cohort,
    ends=np.ones(count, bool) if not alone else np.append(begins[1:], len(order)) % schedule.cohort_size == 0,
    first=begins.astype(np.int32) if alone else np.arange(count, dtype=np.int32),
    written=table(made),
    upto=np.maximum.accumulate(table(upto).ravel()).reshape(count, width),
    before=np.int32(before),
    starts=schedule.client[order][by_read].astype(np.int32),
    seats=seat[by_read].astype(np.int32),
  )
  offsets = np.concatenate([[0], np.flatnonzero(whole.ends) + 1])
  per_round = schedule.cohort_size if alone else width
  dispatch = int(np.clip(4096 // width, 1, 256))
  layout = Layout(alone, width, dispatch, versions, seats, classes)
  return Plan(schedule, layout, whole, offsets, per_round, present and present[1])


def fitting(schedule: Schedule) -> int:
  """A width for batches: the power of two next to the mean of what they could be, at most K."""
  order = _order(schedule)
  return min(
    schedule.cohort_size, 2 ** round(np.log2(len(order) / len(_begins(schedule, order, schedule.cohort_size))))
  )


def _order(schedule: Schedule) -> np.ndarray:
  """int64 [E]: the visits that are aggregated, as they are."""
  counted = np.flatnonzero(schedule.group >= 0)
  return counted[np.argsort(schedule.group[counted], kind="stable")]


def _begins(schedule: Schedule, order: np.ndarray, width: int) -> np.ndarray:
  """int64 [B]: where in the order each batch begins."""
  begins, inside = [0], set[int]()
  read, client = schedule.read[order].tolist(), schedule.client[order].tolist()
  version = np.concatenate([[0], np.cumsum(schedule.arrives[order])]).tolist()
  here = 0
  for place, (of, id) in enumerate(zip(read, client, strict=True)):
    full = place - begins[-1] == width or place % schedule.cohort_size == 0
    if place and (full or of > here or id in inside):
      begins.append(place)
      inside = set()
      here = version[place]
    inside.add(id)
  return np.array(begins)


def _places(
  read: np.ndarray, batch: np.ndarray, version: np.ndarray, makes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
  """Slots of versions and seats of clients: taken when a version is made, free when its last reader is computed.

  Args:
    read: int [E], the version of each visit, in the order of aggregation.
    batch: int [E].
    version: int [E], after the visit.
    makes: bool [E], whether it made that version.

  Returns:
    (slot int [versions], -1 where nobody reads it; seat int [E]; how many seats)
  """
  highest = int(version.max(initial=0))
  last = np.full(highest + 1, -1)
  np.maximum.at(last, read, batch)
  by_read = np.argsort(read, kind="stable")
  bounds = np.searchsorted(read[by_read], np.arange(highest + 2))
  slot, seat = np.full(highest + 1, -1), np.zeros(len(read), int)
  slots, seats = _Pool(), _Pool()

  def begin(number: int) -> None:
    if last[number] >= 0:
      slot[number] = slots.take()
      for visit in by_read[bounds[number] : bounds[number + 1]]:
        seat[visit] = seats.take()

  begin(0)
  at, closing = 0, np.argsort(last, kind="stable").tolist()
  closed = int(np.sum(last < 0))
  while at < len(read):
    until = int(np.searchsorted(batch, batch[at], side="right"))
    while closed <= highest and last[closing[closed]] == batch[at]:
      slots.free(slot[closing[closed]])
      closed += 1
    for visit in range(at, until):
      seats.free(seat[visit])
    for visit in range(at, until):
      if makes[visit]:
        begin(int(version[visit]))
    at = until
  return slot, seat, max(1, seats.size)


class _Pool:
  """Numbers from 0 on, the smallest free one first."""

  def __init__(self) -> None:
    self.size = 0
    self._free: list[int] = []

  def take(self) -> int:
    """One that is free; a new one where none is."""
    if self._free:
      return heapq.heappop(self._free)
    self.size += 1
    return self.size - 1

  def free(self, number: int) -> None:
    """It may be taken again."""
    heapq.heappush(self._free, int(number))
