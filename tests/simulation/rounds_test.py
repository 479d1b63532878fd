"""The round step, seen by a method that records what it is given."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import simulation
from apfl_jax.types import (
  Algorithm,
  Array,
  Availability,
  Download,
  Federation,
  Prediction,
  Process,
  PyTree,
  Received,
  Span,
  Store,
  Upload,
)
from tests import tasks

N, VERSIONS = 6, 3
IDS = np.arange(N)
SIZES = np.array([11, 15, 12, 16, 13, 14])  # of the training spans, by id
ORDER = np.array([3, 0, 5, 1, 4, 2])  # ids in row order


class Server(NamedTuple):
  """Server of the recorder: how often it aggregated, what it then got."""

  version: Array
  received: PyTree


class Client(NamedTuple):
  """Client of the recorder: the version of its first download, visits so far."""

  first: Array
  visits: Array


def _recorder(settings: PyTree) -> Algorithm:
  """Client i sends i with weight i + 1, and all it was told; `poison` float32 [3] is added to what client 2 sends."""

  def init(key):
    row = Upload((jnp.zeros(()), jnp.zeros(2)), jnp.zeros(()), {k: jnp.int32(0) for k in _TOLD} | {"number": 0.0})
    kept = jax.tree.map(lambda x: jnp.zeros((N, *jnp.shape(x)), jnp.result_type(x)), row.kept)
    zero = jnp.zeros(N, jnp.int32)
    return Server(jnp.int32(0), Received(row.update, row.weight, kept, zero, zero > 0, zero))

  def local_update(download, client, data, visit, key):
    number = visit.id.astype(jnp.float32)
    poison = jnp.where(visit.id == 2, settings["poison"], 0.0)
    told = {
      "saw": download.shared,
      "own": download.own,
      "size": data.train.size,
      "round": visit.round,
      "times": visit.times,
      "staleness": visit.staleness,
      "wait": visit.wait,
      "visits": client.visits,
      "first": client.first,
    }
    update = number + poison[0], number * jnp.array([1.0, 10.0])
    upload = Upload(update, number + 1 + poison[1], told | {"number": number + poison[2]})
    return client._replace(visits=client.visits + 1), upload

  return Algorithm(
    init=init,
    download=lambda server: Download(shared=server.version, own=7 * jnp.arange(N)),
    local_update=local_update,
    aggregate=lambda server, received, key: Server(server.version + 1, received),
    predict=lambda model, images: Prediction(jnp.zeros((len(images), 2)), jnp.zeros((len(images), 1))),
    global_model=lambda server: None,
    init_client=lambda download, key: Client(first=download.shared, visits=jnp.int32(0)),
    personalize=lambda download, client, data, visit, key: (),
  )


_TOLD = ("saw", "own", "size", "round", "times", "staleness", "wait", "visits", "first")


def _as_said(settings: PyTree) -> Process:
  """Availability out of tables by id."""

  def look(state, round, ids, key):
    ones = jnp.ones(ids.shape)
    present, arrives, delay, wait = (settings[name][ids] for name in ("present", "arrives", "delay", "wait"))
    return Availability(present > 0, arrives > 0, delay, work=ones, speed=ones, gone=present == 0, wait=wait)

  return Process(init=lambda key: (), step=lambda state, round, key: state, look=look)


def _inputs(**settings: Any) -> simulation.Inputs:
  blank = Store(jnp.zeros((1, 2, 2, 1), jnp.uint8), jnp.zeros(1, jnp.int32), jnp.zeros(SIZES.sum(), jnp.int32))
  span = Span(jnp.zeros(N, jnp.int32), jnp.asarray(SIZES[ORDER], jnp.int32))
  federation = Federation(blank, jnp.asarray(ORDER, jnp.int32), span, span, span)
  said: dict[str, Any] = {"present": np.ones(N), "arrives": np.ones(N), "delay": np.zeros(N), "wait": IDS}
  said |= {"poison": np.zeros(3)} | settings
  traced = {name: jnp.asarray(value, jnp.float32 if name == "poison" else jnp.int32) for name, value in said.items()}
  return simulation.Inputs(jnp.uint32(3), federation, Span(jnp.int32(0), jnp.int32(1)), traced)


@functools.cache
def _simulator() -> simulation.Simulator:
  build = lambda settings: (_recorder(settings), _as_said(settings))
  return simulation.simulator(
    build, _inputs(), 2, population_size=N, cohort_size=N, chunk=2, versions=VERSIONS, how="sequential"
  )


def _rounds(rounds: int, **settings: Any) -> list:
  return list(tasks.each_round(_simulator(), _inputs(**settings), rounds))


def _by_id(received: Received, name: str) -> dict:
  """What each client whose upload arrived was told."""
  ids, arrived = received.ids[received.arrived], received.kept[name][received.arrived]
  return dict(zip(ids.tolist(), arrived.tolist(), strict=True))


def _check_sums(received: Received, arrived: set) -> None:
  """Whole numbers, so float sums are exact in any order."""
  assert set(received.ids[received.arrived].tolist()) == arrived
  number, vector = received.total
  assert number == sum((i + 1) * i for i in arrived)
  np.testing.assert_array_equal(vector, [number, 10 * number])
  assert received.weight == sum(i + 1 for i in arrived)
  for row in jax.tree.leaves(received.kept):
    assert not row[~received.arrived].any()


def _status(metrics: simulation.RoundMetrics) -> dict:
  """id -> status of the clients that took part."""
  there = metrics.status > 0
  return dict(zip(metrics.ids[there].tolist(), metrics.status[there].tolist(), strict=True))


def test_weighted_sums_and_what_clients_are_told():
  for now, (state, metrics) in enumerate(_rounds(3)):
    received = state.server.received
    _check_sums(received, set(range(N)))
    assert (metrics.present, metrics.arrived) == (N, N)
    assert _status(metrics) == dict.fromkeys(range(N), 2)
    expected: dict[str, Any] = {
      "number": IDS,
      "own": 7 * IDS,
      "size": SIZES,
      "saw": [now] * N,
      "round": [now] * N,
      "times": [now] * N,
      "visits": [now] * N,
      "staleness": [0] * N,
      "wait": IDS,
      "first": [0] * N,
    }
    for name, values in expected.items():
      assert _by_id(received, name) == dict(enumerate(values)), name
    assert (state.round, state.server.version) == (now + 1, now + 1)
    np.testing.assert_array_equal(state.times, now + 1)


def test_the_mean_is_the_total_by_the_weight():
  received = _rounds(1)[0][0].server.received
  expected = sum((i + 1) * i for i in range(N)) / sum(i + 1 for i in range(N))
  np.testing.assert_allclose(received.mean[0], expected, rtol=1e-6)
  np.testing.assert_allclose(received.mean[1], [expected, 10 * expected], rtol=1e-6)


def test_the_absent_do_nothing():
  there = {1, 2, 5}
  state, metrics = _rounds(2, present=[i in there for i in range(N)])[-1]
  _check_sums(state.server.received, there)
  assert (metrics.present, metrics.arrived) == (3, 3)
  assert _status(metrics) == dict.fromkeys(there, 2)
  came = np.isin(ORDER, list(there))
  np.testing.assert_array_equal(state.times, 2 * came)
  np.testing.assert_array_equal(state.clients.visits, 2 * came)


def test_a_lost_upload_moves_the_client_and_not_the_server():
  rounds = _rounds(2, arrives=np.zeros(N))
  for now, (state, metrics) in enumerate(rounds):
    assert (metrics.present, metrics.arrived) == (N, 0)
    assert _status(metrics) == dict.fromkeys(range(N), 1)
    assert state.server.version == 0 and not state.server.received.ids.any()
    np.testing.assert_array_equal(state.clients.visits, now + 1)
    np.testing.assert_array_equal(state.times, now + 1)

  state, metrics = _rounds(1, arrives=IDS != 4)[-1]
  _check_sums(state.server.received, set(range(N)) - {4})
  assert _status(metrics) == dict.fromkeys(range(N), 2) | {4: 1}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["update", "weight", "kept"])
def test_what_is_not_finite_does_not_arrive(where, value):
  poison = np.where(np.array(["update", "weight", "kept"]) == where, value, 0.0)
  state, metrics = _rounds(1, poison=poison)[-1]
  _check_sums(state.server.received, {0, 1, 3, 4, 5})
  assert _status(metrics) == dict.fromkeys(range(N), 2) | {2: 3}
  np.testing.assert_array_equal(state.clients.visits, 1)


def test_late_clients_see_old_versions():
  """Version v is the download of round v. A client may not be late by all the versions kept, or more."""
  delay = np.array([0, 1, 2, 3, 4, 0])
  for now, (state, metrics) in enumerate(_rounds(6, delay=delay)):
    real = {i: min(int(delay[i]), now) for i in range(N)}  # nothing was there to download before round 0
    arrived = {i for i in range(N) if real[i] < VERSIONS}
    received = state.server.received
    _check_sums(received, arrived)
    assert _by_id(received, "saw") == {i: now - real[i] for i in arrived}
    assert _by_id(received, "staleness") == {i: real[i] for i in arrived}
    assert _status(metrics) == {i: 1 + (i in arrived) for i in range(N)}
    kept = np.arange(max(0, now - VERSIONS + 1), now + 1)
    np.testing.assert_array_equal(state.history[kept % VERSIONS], kept)


def test_a_first_visit_starts_from_the_download_that_the_client_saw():
  inputs, late = _inputs(present=IDS != 3), _inputs(delay=2 * (IDS == 3))
  simulator = _simulator()
  state, _ = simulator.advance(simulator.init(inputs), inputs, jnp.int32(2))
  state, _ = simulator.advance(state, inputs, jnp.int32(2))
  state, _ = simulator.advance(state, late, jnp.int32(2))
  row = int(np.flatnonzero(ORDER == 3)[0])
  assert (int(state.clients.first[row]), int(state.clients.visits[row])) == (2, 2)  # in round 4, two rounds late
  assert _by_id(tasks.on_host(state.server.received), "first") == {i: 2 * (i == 3) for i in range(N)}


def test_the_state_passed_is_given_up():
  inputs, simulator = _inputs(), _simulator()
  before = simulator.init(inputs)
  leaves = jax.tree.leaves(before)
  after, _ = simulator.advance(before, inputs, jnp.int32(1))
  assert leaves and all(leaf.is_deleted() for leaf in leaves)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, inputs)))


@pytest.mark.parametrize("name", ["fedavg", "local"])
def test_rows_may_be_in_any_order(name):
  """Whoever has which id keeps it; only the rows change places."""
  simulator, inputs = tasks.simulator(name), tasks.with_settings(tasks.inputs(name), drop_rates=[0.2, 0.3])
  federation = inputs.federation
  parts = {part: jax.tree.map(lambda x: x[ORDER], getattr(federation, part)) for part in federation._fields[1:]}
  moved = inputs._replace(federation=federation._replace(**parts))
  here, there = tasks.run(simulator, inputs, 4), tasks.run(simulator, moved, 4)
  tasks.assert_same(there.server, here.server)
  tasks.assert_same((there.clients, there.times), jax.tree.map(lambda x: x[ORDER], (here.clients, here.times)))
  scores = tasks.personal(simulator, here, inputs)
  tasks.assert_same(tasks.personal(simulator, there, moved), jax.tree.map(lambda x: x[ORDER], scores))


def test_keys_are_not_used_twice():
  """By the engine, the process and a method; every method is looked at without the engine, in common_test."""

  def look(simulator, inputs):
    state = jax.eval_shape(simulator.init, inputs)
    rows = jnp.arange(tasks.NUM_CLIENTS)
    with jax.debug_key_reuse(True):
      # In functions made here, since what was traced before is not looked at again.
      jax.jit(lambda *args: simulator.init(*args)).trace(inputs)
      jax.jit(lambda *args: simulator.advance(*args)).trace(state, inputs, jnp.int32(2))
      jax.jit(lambda *args: simulator.score_personal(*args)).trace(state, inputs, rows, rows >= 0)

  def reusing(settings):
    algorithm, process = tasks.build("fedavg", tasks.NUM_CLIENTS, settings)

    def local_update(download, client, data, visit, key):
      client, upload = algorithm.local_update(download, client, data, visit, key)
      return client, upload._replace(weight=upload.weight + jax.random.uniform(key))

    return algorithm._replace(local_update=local_update), process

  look(tasks.simulator("scaffold"), tasks.inputs("scaffold"))
  inputs, sizes = tasks.inputs("fedavg"), {"population_size": tasks.NUM_CLIENTS, "cohort_size": tasks.COHORT_SIZE}
  with pytest.raises(jax.errors.KeyReuseError):
    look(simulation.simulator(reusing, inputs, tasks.NUM_CLASSES, **sizes, chunk=tasks.CHUNK, how="sequential"), inputs)


@pytest.mark.parametrize("how", ["sequential", "vmap"])
def test_a_client_does_not_depend_on_the_others(how):
  """Its own model after its first visit, in a full cohort and in one of few."""
  simulator, inputs = tasks.simulator("local", how=how), tasks.inputs("local")
  init = tasks.simulator("local").init
  few = tasks.with_settings(inputs, drop_rates=[0.5, 0.0])
  (one, _), (other, _) = (simulator.advance(init(i), i, jnp.int32(1)) for i in (inputs, few))
  both = np.flatnonzero((np.asarray(one.times) == 1) & (np.asarray(other.times) == 1))
  assert both.size and int(one.times.sum()) == 4 and int(other.times.sum()) == 3
  tolerance = 0.0 if how == "sequential" else 1e-6
  mine, same = jax.tree.map(lambda x: np.asarray(x)[both], (one.clients, other.clients))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), mine, same)
  assert not np.array_equal(mine.head["kernel"], np.broadcast_to(one.server.head["kernel"], mine.head["kernel"].shape))
