"""Where rows live: on the devices all the time, or in host memory or on disk and on the devices when they are needed.

A chunk of rounds runs on the union of its cohorts as a small federation. If all rows are on the devices that union is
everybody and nothing ever moves; otherwise the rows of one chunk are written back and those of the next brought in.
Of several hosts, each holds the rows of every P-th client and adds them to what all devices get.
"""

import mmap
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apfl_jax.errors import InputError
from apfl_jax.simulation.client_map import AXIS
from apfl_jax.simulation.rounds import Inputs, Simulator
from apfl_jax.types import Federation, PyTree, Span, State, Store

PLACES = ("device", "host", "disk")
_BLOCK = 4096  # rows written at a time
_PAGE = 4096  # bytes that the system gives out at a time
_PARTS = ("train", "validation", "test")


class Snapshot(NamedTuple):
  """The client rows that exist, for checkpoints; rows of clients never visited do not.

  Attributes:
    rows: int32 [V], row numbers in the federation.
    times: int32 [V].
    clients: pytree [V, ...].
  """

  rows: np.ndarray
  times: np.ndarray
  clients: PyTree


class _Rows(NamedTuple):
  """Some rows and what they hold, padded; on the devices.

  Attributes:
    rows: int64 [u], row numbers in the federation, ascending.
    times: int32 [U], U >= u.
    clients: pytree [U, ...].
  """

  rows: np.ndarray
  times: Any
  clients: PyTree


class _Incoming(NamedTuple):
  """Rows on their way, as they were before the rounds in progress."""

  held: _Rows
  inputs: Inputs


class Staging:
  """The rows of a run. At any time some are current, that is on the devices, in `State.clients` and in the inputs."""

  def __init__(
    self,
    simulator: Simulator,
    inputs: Inputs,
    *,
    data_on: str = "device",
    client_state: str = "device",
    directory: Path | None = None,
  ):
    """Makes no row current yet; see `begin`.

    Args:
      simulator: the compiled functions.
      inputs: with the whole federation; NumPy arrays, of which `disk` expects memory-mapped images.
      data_on: where examples live: 'device', 'host' or 'disk'.
      client_state: where the methods' client rows live.
      directory: the folder of the nameless files of client rows; only `disk` needs it.

    Raises:
      InputError: an unknown place, or `disk` without a directory.
    """
    for name, place in (("data_on", data_on), ("client_state", client_state)):
      if place not in PLACES:
        raise InputError(f"{name}: got {place!r}, accepted are {', '.join(PLACES)}")
    if client_state == "disk" and directory is None:
      raise InputError("client_state: got 'disk' without a run directory to keep the files in")
    self.simulator = simulator
    whole = jax.tree.map(np.asarray, inputs)
    if data_on == "host":
      store = whole.federation.store
      if isinstance(_owner(store.images), mmap.mmap):
        store = store._replace(images=np.array(store.images))
        whole = whole._replace(federation=whole.federation._replace(store=store))
    self._federation: Federation = whole.federation
    self._pooled: Span = whole.pooled
    self.data_on, self.cohort_size, self.mesh = data_on, simulator.cohort_size, simulator.mesh
    population = len(self._federation.id)
    union = min(population, simulator.chunk * simulator.cohort_size)
    moving = (data_on, client_state) != ("device", "device")
    self.size = union if moving else population
    self.resident = self.size == population
    # Rows by id, for a schedule tells ids.
    self._row_of = np.zeros(simulator.population_size, np.int64)
    self._row_of[self._federation.id] = np.arange(population)
    self._mine = np.arange(population) % jax.process_count() == jax.process_index()

    plain = whole._replace(federation=(), pooled=())
    self._rest: Any = simulator.place(plain)
    self._store: Store | None = None
    self.times = np.zeros(population, np.int32)
    self._directory = directory if client_state == "disk" else None
    self._clients: PyTree = ()
    self._current = np.zeros(0, np.int64)
    self._leaving: _Rows | None = None  # off the devices soon, and not in the tables yet
    self._flushed: Any = None
    self._capacities: dict[int, int] = {}
    self._shapes: tuple[State, Inputs] | None = None  # tracing `init` takes a while

  # --- what a run asks for --------------------------------------------------------------------------------------------

  def begin(self, snapshot: Snapshot | None = None) -> tuple[State, Inputs]:
    """The state before round 0 and its inputs, with the first rows current; or with a checkpoint's client rows."""
    first = np.arange(self.size)
    if self.data_on == "device":
      self._store = self.simulator.place(self._federation.store)
    if not self.resident:
      # A file or a page that is never written takes no room: rows do not exist before their client's first visit.
      leaves, form = jax.tree.flatten(self.shapes()[0].clients)
      tables = [_Table(len(self.times), leaf, self._directory) for leaf in leaves]
      self._clients = jax.tree.unflatten(form, tables)
    inputs = self._inputs(first, self.size, pooled=self.resident)
    state = self.simulator.init(inputs)
    self._current = first
    if snapshot is not None:
      self.times[snapshot.rows] = snapshot.times
      if self.resident:
        clients = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), jax.eval_shape(lambda: state.clients))
        jax.tree.map(lambda all, some: all.__setitem__(snapshot.rows, some), clients, snapshot.clients)
        state = state._replace(clients=self.simulator.place(clients), times=self.simulator.place(self.times))
      else:
        self._scatter(snapshot.rows, snapshot.clients)
        self._current = np.zeros(0, np.int64)  # what is there now means nothing
    return state, inputs

  def coming(self, ids: np.ndarray, ok: np.ndarray) -> "_Incoming | np.ndarray | None":
    """What `swap` needs to make the rows of the next cohorts current; None if they all are.

    Called while the current rows are being computed on: the tables get what left before, and give what comes next.

    Args:
      ids: int32 [...], of the cohorts.
      ok: bool, same shape.
    """
    self._settle()
    rows = np.unique(self._row_of[ids[ok]])
    if self.resident or np.isin(rows, self._current, assume_unique=True).all():
      return None
    # Hosts exchange rows, which must not get between the collectives of the rounds in progress.
    return rows if jax.process_count() > 1 else self._gather(rows, self.size, pooled=False)

  def swap(self, state: State, inputs: Inputs, incoming: "_Incoming | np.ndarray | None") -> tuple[State, Inputs]:
    """Makes the incoming rows current; those that were are written back with the next call of any other method."""
    if incoming is None:
      return state, inputs
    if isinstance(incoming, np.ndarray):
      self.flush(state)
      incoming = self._gather(incoming, self.size, pooled=False)
    self._settle()
    held, inputs = incoming
    # Of rows that stay, the tables do not have the newest.
    _, there, here = np.intersect1d(held.rows, self._current, assume_unique=True, return_indices=True)
    moves = [np.pad(x, (0, self.size - len(x))).astype(np.int32) for x in (there, here)]
    given = self.simulator.place((*moves, np.int32(len(there))))
    times, clients = _moved(self.mesh)((held.times, held.clients), (state.times, state.clients), *given)
    self._leaving = _Rows(self._current, state.times, state.clients)
    self._current = held.rows
    return state._replace(times=times, clients=clients), inputs

  def bring(self, state: State, inputs: Inputs, rows: np.ndarray, size: int) -> tuple[State, Inputs, np.ndarray]:
    """A state and inputs in which these rows can be scored, and where they are there, int32 [len(rows)].

    The state given stays as it is, and stays current.
    """
    if self.resident:
      return state, inputs, rows
    self.flush(state)
    held, inputs = self._gather(rows, size, pooled=True)
    return state._replace(times=held.times, clients=held.clients), inputs, np.arange(len(rows), dtype=np.int32)

  def pooled(self, state: State, inputs: Inputs) -> Inputs:
    """Inputs in which the pooled test examples are."""
    return self.bring(state, inputs, np.arange(1), 1)[1]

  def flush(self, state: State) -> None:
    """Writes the current rows into the tables, so that `times` and `snapshot` tell the truth."""
    self._settle()
    if self._flushed is not state.times:
      self._flushed = state.times
      self._write(_Rows(self._current, state.times, state.clients))

  def snapshot(self, state: State) -> Snapshot:
    """All client rows that exist."""
    self.flush(state)
    rows = np.flatnonzero(self.times).astype(np.int32)
    if self.resident:
      clients = jax.tree.map(lambda x: np.asarray(x)[rows], state.clients)
    else:
      clients = self._read(rows, len(rows))
      if jax.process_count() > 1:
        clients = jax.tree.map(np.asarray, self._sum_over_hosts(clients))
    return Snapshot(rows, self.times[rows], clients)

  def shapes(self) -> tuple[State, Inputs]:
    """Shapes of what the compiled chunk gets; nothing is computed or moved."""
    if self._shapes is None:
      self._shapes = self._shaped()
    return self._shapes

  def _shaped(self) -> tuple[State, Inputs]:
    store: Any = self._federation.store
    if self.data_on != "device":
      length = self._capacity(self.size) + (int(self._pooled.size) if self.resident else 0)
      store = jax.tree.map(lambda x: np.broadcast_to(x[:1], (length, *x.shape[1:])), store)
    rows = lambda tree: jax.tree.map(lambda x: np.broadcast_to(x[:1], (self.size, *x.shape[1:])), tree)
    whole: Any = self._federation
    federation = rows(whole._replace(store=()))._replace(store=store)
    inputs = jax.tree.map(_shape, self._rest._replace(federation=federation, pooled=self._pooled))
    return jax.eval_shape(self.simulator.init, inputs), inputs

  def table_bytes(self, visited: int) -> int:
    """Bytes of host memory that the tables of client rows take when so many clients were visited; none on disk."""
    if self.resident or self._directory:
      return 0
    rows = [int(np.prod(x.shape[1:])) * x.dtype.itemsize for x in jax.tree.leaves(self.shapes()[0].clients)]
    return min(visited * sum(max(_PAGE, row) for row in rows), len(self.times) * sum(rows))

  # --- moving ---------------------------------------------------------------------------------------------------------

  def _gather(self, rows: np.ndarray, size: int, *, pooled: bool) -> _Incoming:
    """Rows out of the tables, and the inputs that go with them."""
    times = np.pad(self.times[rows], (0, size - len(rows)))
    held = _Rows(rows, self.simulator.place(times), self._sum_over_hosts(self._read(rows, size)))
    return _Incoming(held, self._inputs(rows, size, pooled=pooled))

  def _read(self, rows: np.ndarray, size: int) -> PyTree:
    """Client rows out of the tables, [size, ...]; zeros where another host holds them."""
    clients = jax.tree.map(lambda table: table.read(rows, size), self._clients)
    if jax.process_count() == 1:
      return clients
    mine = np.pad(self._mine[rows], (0, size - len(rows)))
    return jax.tree.map(lambda x: np.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, np.zeros_like(x)), clients)

  def _settle(self) -> None:
    """Writes what left the devices into the tables."""
    if self._leaving is not None:
      self._write(self._leaving)
      self._leaving = None

  def _write(self, held: _Rows) -> None:
    count = len(held.rows)
    self.times[held.rows] = np.asarray(held.times)[:count]
    if not self.resident:
      self._scatter(held.rows, jax.tree.map(lambda x: np.asarray(x)[:count], held.clients))

  def _scatter(self, rows: np.ndarray, clients: PyTree) -> None:
    """Client rows into the tables of this host, of several hosts only those that it holds."""
    for start in range(0, len(rows), _BLOCK):
      part = slice(start, start + _BLOCK)
      some, block = rows[part], jax.tree.map(lambda x, part=part: x[part], clients)
      if jax.process_count() > 1:
        mine = self._mine[some]
        some, block = some[mine], jax.tree.map(lambda x, mine=mine: x[mine], block)
      jax.tree.map(lambda table, x, some=some: table.write(some, x), self._clients, block)

  def _inputs(self, rows: np.ndarray, size: int, *, pooled: bool) -> Inputs:
    """The inputs with a federation of these rows alone, padded to `size` rows of nobody."""
    whole: Any = self._federation
    blank = np.full(size - len(rows), self.simulator.population_size, np.int32)  # no client's id
    ids = np.concatenate([whole.id[rows], blank])
    pad = lambda x: np.concatenate([x[rows], np.zeros_like(blank)])
    spans = {part: jax.tree.map(pad, getattr(whole, part)) for part in _PARTS}
    place = self.simulator.place
    if self._store is not None:
      federation = Federation(self._store, *place((ids, *spans.values())))
      return self._rest._replace(federation=federation, pooled=place(self._pooled))

    sizes = np.stack([spans[part].size for part in _PARTS], axis=1).astype(np.int64)  # [size, parts]
    starts = np.stack([spans[part].start for part in _PARTS], axis=1)
    ends = np.cumsum(sizes).reshape(sizes.shape)
    where = np.repeat(starts.ravel() - (ends - sizes).ravel(), sizes.ravel()) + np.arange(ends.ravel()[-1])
    examples = whole.store.index[where]
    length = self._capacity(size)
    extra = int(self._pooled.size) if pooled else 0
    mine = np.repeat(self._mine[np.concatenate([rows, blank * 0])], sizes.sum(axis=1))
    tail = whole.store.index[int(self._pooled.start) : int(self._pooled.start) + extra]
    chosen = np.concatenate([examples, tail])
    at = np.concatenate([np.arange(len(examples)), length + np.arange(extra)])
    # Pooled examples come from the first host alone.
    from_here = np.concatenate([mine, np.full(extra, jax.process_index() == 0)])
    images = np.zeros((length + extra, *whole.store.images.shape[1:]), np.uint8)
    labels = np.zeros(length + extra, np.int32)
    images[at[from_here]] = whole.store.images[chosen[from_here]]
    labels[at[from_here]] = whole.store.labels[chosen[from_here]]
    images, labels = self._sum_over_hosts((images, labels))
    store = Store(images, labels, place(np.arange(length + extra, dtype=np.int32)))
    new = [
      Span(*place(((ends - sizes)[:, i].astype(np.int32), sizes[:, i].astype(np.int32)))) for i in range(len(_PARTS))
    ]
    federation = Federation(store, place(ids), *new)
    return self._rest._replace(federation=federation, pooled=Span(*place((np.int32(length), np.int32(extra)))))

  def _capacity(self, size: int) -> int:
    """Index entries that any `size` clients need at most; rounded up, so that another seed has the same."""
    if size not in self._capacities:
      self._capacities[size] = self._largest(size)
    return self._capacities[size]

  def _largest(self, size: int) -> int:
    each = sum(getattr(self._federation, part).size.astype(np.int64) for part in _PARTS)
    most = int(np.sort(each)[::-1][:size].sum())
    step = 1 << max(0, most.bit_length() - 4)
    return max(1, -(-most // step) * step)

  def _sum_over_hosts(self, tree: PyTree) -> PyTree:
    """NumPy arrays, of which each host has filled its part, on all devices."""
    if jax.process_count() == 1:
      return self.simulator.place(tree)
    mesh = self.simulator.mesh
    assert mesh is not None
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    local = len(mesh.local_devices)

    def spread(x: np.ndarray) -> jax.Array:
      padded = np.concatenate([x[None], np.zeros((local - 1, *x.shape), x.dtype)])
      return jax.make_array_from_process_local_data(split, padded)

    return _added(mesh)(jax.tree.map(spread, tree))


@cache
def _moved(mesh: Mesh | None) -> Callable[..., PyTree]:
  """(new, old, to int32 [U], from int32 [U], count) -> new with `count` rows of old in it; new is donated."""

  def move(new: PyTree, old: PyTree, to: jax.Array, source: jax.Array, count: jax.Array) -> PyTree:
    one = lambda i, tree: jax.tree.map(lambda a, b: a.at[to[i]].set(b[source[i]]), tree, old)
    return jax.lax.fori_loop(0, count, one, new)

  whole = NamedSharding(mesh, PartitionSpec()) if mesh else None
  return jax.jit(move, donate_argnums=0, out_shardings=whole)


@cache
def _added(mesh: Mesh) -> Callable[[PyTree], PyTree]:
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.jit(lambda tree: jax.tree.map(lambda x: x.sum(axis=0, dtype=x.dtype), tree), out_shardings=whole)


def _owner(x: Any) -> Any:
  """What holds an array's memory."""
  while isinstance(x, np.ndarray) and x.base is not None:
    x = x.base
  return x


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


class _Table:
  """Rows of one leaf of the clients' state, zeros until they are written: in memory, or in a file of this host.

  The file has no name, so that it goes with the process, however that ends. It is read and written row by row, not
  mapped: mapped pages would count as memory and are slow to come by.
  """

  def __init__(self, population: int, like: jax.ShapeDtypeStruct, directory: Path | None):
    """Args: N, the leaf [*, ...], and the folder of the file, if any."""
    shape, self._dtype = (population, *like.shape[1:]), np.dtype(like.dtype)
    self._row = shape[1:]
    self._bytes = int(np.prod(self._row)) * self._dtype.itemsize
    self._memory = self._file = None
    if directory is not None:
      directory.mkdir(parents=True, exist_ok=True)
      self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # open as long as the table
      self._file.truncate(population * self._bytes)
    else:
      pages = mmap.mmap(-1, max(1, population * self._bytes))
      if hasattr(mmap, "MADV_NOHUGEPAGE"):  # or a row's first write would take 2 MiB
        pages.madvise(mmap.MADV_NOHUGEPAGE)
      self._memory = np.frombuffer(pages, self._dtype, int(np.prod(shape))).reshape(shape)

  def read(self, rows: np.ndarray, size: int) -> np.ndarray:
    """[size, ...]: these rows, then zeros."""
    out = np.zeros((size, *self._row), self._dtype)
    if self._memory is not None:
      np.take(self._memory, rows, axis=0, out=out[: len(rows)], mode="clip")  # which needs no buffer
    elif self._file is not None and self._bytes:
      into = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
      for place, row in enumerate(rows.tolist()):
        os.preadv(self._file.fileno(), [into[place * self._bytes : (place + 1) * self._bytes]], row * self._bytes)
    return out

  def write(self, rows: np.ndarray, values: np.ndarray) -> None:
    """Rows [n] become values [n, ...]."""
    if self._memory is not None:
      self._memory[rows] = values
    elif self._file is not None and self._bytes:
      data = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
      for place, row in enumerate(rows.tolist()):
        os.pwrite(self._file.fileno(), data[place * self._bytes : (place + 1) * self._bytes], row * self._bytes)
