"""The virtual clock against a plain heap of events in NumPy: one client at a time, its own arithmetic, float64."""

import functools
import heapq
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import metrics, population, simulation
from apfl_jax.algorithms import METHODS as REGISTRY
from apfl_jax.algorithms import fedasync, fedavg, fedbuff, mifa, persafl
from apfl_jax.errors import InputError
from apfl_jax.simulation import batches, schedule
from apfl_jax.types import (
  Algorithm,
  Download,
  Federation,
  LocalSGD,
  Model,
  Params,
  Prediction,
  PyTree,
  Span,
  State,
  Store,
  Task,
  Upload,
)
from tests import tasks

N, CLASSES, FEATURES = 12, 3, 4
SIZES = np.array([5, 3, 8, 6, 4, 7, 8, 3, 5, 6, 7, 4])
STARTS = np.cumsum([0, *SIZES[:-1]])
RATE, STEPS = 0.3, 3
_rng = np.random.default_rng(1)
LABELS = _rng.integers(0, CLASSES, SIZES.sum())
IMAGES = np.clip(_rng.normal(90, 60, (len(LABELS), 2, 2, 1)) + 40 * LABELS[:, None, None, None], 0, 255).astype(
  np.uint8
)
FIRST = _rng.normal(size=(FEATURES, CLASSES)) / 2
X, Y = IMAGES.reshape(len(LABELS), -1) / 255, np.eye(CLASSES)[LABELS]

LOGISTIC = Model(
  init=lambda key: Params((), jnp.asarray(FIRST, jnp.float32)),
  base=lambda base, images: ((x := images.reshape(len(images), -1)), (x,)),
  head=lambda head, features: features @ head,
)
# All of a client's examples make a batch, so that the order of examples does not matter.
SGD = LocalSGD(jnp.float32(RATE), int(SIZES.max()), 1, STEPS, 2, "uniform", "none")
TASK = Task(N, CLASSES, (2, 2, 1), jnp.eye(CLASSES), LOGISTIC, SGD, jnp.int32(10))
INPUTS = simulation.Inputs(
  seed=jnp.uint32(4),
  federation=Federation(
    Store(jnp.asarray(IMAGES), jnp.asarray(LABELS, jnp.int32), jnp.arange(len(LABELS), dtype=jnp.int32)),
    jnp.arange(N, dtype=jnp.int32),
    *[Span(jnp.asarray(STARTS, jnp.int32), jnp.asarray(SIZES, jnp.int32))] * 3,
  ),
  pooled=Span(jnp.int32(0), jnp.int32(1)),
  settings={"rates": jnp.zeros(1), "spread": jnp.float32(0.8)},
)


def _process(settings: PyTree) -> Any:
  return population.make(("bernoulli",), N, settings["rates"], population.speeds("pareto", settings["spread"]))


def _play(inputs: Any = INPUTS, process: Any = _process, presence: bool = False, **values: Any) -> schedule.Schedule:
  """500 events of heavy-tailed speeds, shaken besides."""
  compute = STEPS * np.ones(N)
  known = {"clock": "asynchronous", "rounds": 50, "cohort_size": 10, "concurrency": 8, "jitter": 0.6}
  settings = schedule.Settings(**(known | {"round_seconds": 3.0} | values))
  times = {"download": 0.1, "upload": 0.2}
  return schedule.make(process, inputs.settings, inputs.seed, settings, compute, **times, presence=presence)


def _run(
  algorithm: Algorithm,
  plan: batches.Plan | None,
  inputs: Any = INPUTS,
  rounds: int = 0,
  process: Any = _process,
  **values: Any,
) -> tuple[simulation.RoundMetrics, simulation.Chunks]:
  """All rounds of a plan; without one as many rounds of the ordinary kind."""
  options: dict[str, Any] = {"population_size": N, "cohort_size": 4, "chunk": max(rounds, 1), "how": "sequential"}
  if plan:
    rounds = len(plan.schedule.seconds)
    options |= {"layout": plan.layout, "cohort_size": plan.per_round, "chunk": rounds}
  made = simulation.simulator(lambda settings: (algorithm, process(settings)), inputs, CLASSES, **(options | values))
  staging = simulation.Staging(made, jax.tree.map(np.asarray, inputs))
  chunks = simulation.Chunks(made, staging, *staging.begin(), plan=plan)
  return chunks.run(rounds, 0), chunks


@functools.cache
def _equal_rounds() -> tuple[Algorithm, simulation.RoundMetrics, State]:
  """FedAvg's rounds of the ordinary kind, of clients of the same speed: what several clocks have to give."""
  algorithm = fedavg(TASK)
  happened, chunks = _run(algorithm, None, SAME_SPEED, rounds=7)
  return algorithm, happened, chunks.state


def _head(algorithm: Algorithm, state: State) -> np.ndarray:
  shared: Any = algorithm.download(state.server).shared
  return np.asarray(getattr(shared, "params", shared).head, np.float64)


# --- the oracle -------------------------------------------------------------------------------------------------------


def gradient(id: int, w: np.ndarray, answers: np.ndarray = Y, kept: Any = True) -> np.ndarray:
  rows = slice(STARTS[id], STARTS[id] + SIZES[id])
  chance = np.exp(X[rows] @ w) * kept
  chance /= chance.sum(1, keepdims=True)
  return X[rows].T @ (chance - answers[rows]) / SIZES[id]


def descended(id: int, w: np.ndarray, slope: Callable[[int, np.ndarray], np.ndarray] = gradient) -> np.ndarray:
  for _ in range(STEPS):
    w = w - RATE * slope(id, w)
  return w


def played(made: schedule.Schedule, server: Any) -> np.ndarray:
  """Of the schedule it takes who comes and how long each visit takes; when that is and what is read follows."""
  took = made.end - made.start
  due = np.count_nonzero(made.group >= 0)
  working: list[tuple[float, int]] = []
  downloads: dict[int, Any] = {}
  now, begun, done = 0.0, 0, 0
  while done < due:
    while begun - done < made.places and begun < len(took):
      assert made.start[begun] == now
      downloads[begun] = server.download(now)
      heapq.heappush(working, (now + took[begun], begun))
      begun += 1
    now, visit = heapq.heappop(working)
    if made.arrives[visit]:
      server.receive(int(made.client[visit]), downloads.pop(visit))
    done += 1
  return server.w


class Async:
  """FedAsync: w <- w + a (1 + tau)^-p (w_i - w)."""

  def __init__(self, alpha: float, power: float, rho: float):
    self.w, self.version, self.told = FIRST, 0, (alpha, power, rho)

  def download(self, now: float) -> Any:
    return self.w, self.version

  def receive(self, id: int, read: Any) -> None:
    (start, version), (alpha, power, rho) = read, self.told
    mine = descended(id, start, lambda id, w: gradient(id, w) + rho * (w - start))
    share = alpha * (1 + self.version - version) ** -power
    self.w, self.version = (1 - share) * self.w + share * mine, self.version + 1


class Buffered(Async):
  """FedBuff: a step of the mean of K discounted updates; tau counts such steps."""

  def __init__(self, size: int, power: float, rate: float):
    self.w, self.version, self.told, self.buffer = FIRST, 0, (size, power, rate), []

  def receive(self, id: int, read: Any) -> None:
    (start, version), (size, power, rate) = read, self.told
    self.buffer.append((1 + self.version - version) ** -power * (descended(id, start) - start))
    if len(self.buffer) == size:
      self.w, self.version, self.buffer = self.w + rate * sum(self.buffer) / size, self.version + 1, []


class Personal(Async):
  """PersA-FL, option B: SGD on the loss after a gradient step, all of the chain rule."""

  def __init__(self, alpha: float, power: float, rate: float):
    self.w, self.version, self.told = FIRST, 0, (alpha, power, rate)

  def receive(self, id: int, read: Any) -> None:
    (start, version), (alpha, power, rate) = read, self.told

    def slope(id, w):
      outer = gradient(id, w - alpha * RATE * gradient(id, w))
      bent = (gradient(id, w + 1e-5 * outer) - gradient(id, w - 1e-5 * outer)) / 2e-5
      return outer - alpha * RATE * bent

    scale = rate * (1 + self.version - version) ** -power
    self.w, self.version = self.w + scale * (descended(id, start, slope) - start), self.version + 1


METHODS = {
  "fedasync": (
    lambda: fedasync(TASK, alpha=0.5, exponent=0.7, rho=0.1, max_staleness=1000),
    lambda: Async(0.5, 0.7, 0.1),
  ),
  "fedbuff": (
    lambda: fedbuff(TASK, buffer_size=3, staleness_exponent=0.8, server_learning_rate=0.7),
    lambda: Buffered(3, 0.8, 0.7),
  ),
  "persafl": (
    lambda: persafl(TASK, option="b", alpha=0.6, first_order=False, staleness_power=0.9, server_learning_rate=0.4),
    lambda: Personal(0.6, 0.9, 0.4),
  ),
}


# Slow to compile: client_map_test.py has chunks of clients, and persafl_test.py the method.
_SLOW = (("persafl", "sequential"), ("fedbuff", "vmap:4"))
_CASES = [*((name, "sequential") for name in METHODS), ("fedbuff", "vmap:4")]
_CASES = [pytest.param(*case, marks=[pytest.mark.slow] * (case in _SLOW)) for case in _CASES]


@functools.cache
def _batched(name: str, how: str) -> np.ndarray:
  """The head after all events, several computed together."""
  algorithm = METHODS[name][0]()
  return _head(algorithm, _run(algorithm, batches.plan(_play()), how=how)[1].state)


@pytest.mark.parametrize(("name", "how"), _CASES)
def test_batches_are_a_heap_of_events(name, how):
  made, server = _play(), METHODS[name][1]()
  plan = batches.plan(made)
  assert plan.sizes.sum() == 500 and plan.sizes.max() > 2 and plan.sizes.mean() > 1.5
  assert np.ptp(made.staleness[made.arrives]) > 5
  expected = played(made, server)
  assert np.abs(expected - FIRST).max() > 0.1
  np.testing.assert_allclose(_batched(name, how), expected, rtol=0, atol=1e-5)


def test_lost_uploads_make_no_version():
  inputs = INPUTS._replace(settings=INPUTS.settings | {"rates": jnp.array([0.4])})
  made = _play(inputs)
  lost = ~made.arrives[made.group >= 0]
  assert 100 < lost.sum() < 300
  algorithm, server = (make() for make in METHODS["fedasync"])
  happened, chunks = _run(algorithm, batches.plan(made), inputs)
  np.testing.assert_allclose(_head(algorithm, chunks.state), played(made, server), rtol=0, atol=1e-5)
  np.testing.assert_array_equal(happened.present, 10)
  assert happened.arrived.sum() == 500 - lost.sum()
  np.testing.assert_array_equal(chunks.state.times, np.bincount(made.client[made.group >= 0], minlength=N))


def test_batches_of_one_give_the_same():
  algorithm, plan = METHODS["fedbuff"][0](), batches.plan(_play(), 1)
  assert plan.sizes.max() == 1
  one_by_one = _head(algorithm, _run(algorithm, plan)[1].state)
  np.testing.assert_allclose(one_by_one, _batched("fedbuff", "sequential"), rtol=0, atol=1e-6)


EQUAL = {"jitter": 0.0, "cohort_size": 4, "concurrency": 4, "rounds": 7, "round_seconds": STEPS + 0.1 + 0.2}
SAME_SPEED = INPUTS._replace(settings=INPUTS.settings | {"spread": jnp.float32(0)})


def test_equal_durations_and_a_buffer_of_the_cohort_are_synchronous_fedavg():
  buffered = fedbuff(TASK, buffer_size=4)
  plan = batches.plan(_play(SAME_SPEED, **EQUAL))
  np.testing.assert_array_equal(plan.sizes, 4)
  _, chunks = _run(buffered, plan, SAME_SPEED)
  plain, _, state = _equal_rounds()
  expected = _head(plain, state)
  assert np.abs(expected - FIRST).max() > 0.1
  np.testing.assert_allclose(_head(buffered, chunks.state), expected, rtol=0, atol=1e-6)


def test_synchronous_rounds_without_a_deadline_are_rounds_to_the_bit():
  algorithm, expected, state = _equal_rounds()
  plan = batches.plan(_play(SAME_SPEED, **(EQUAL | {"clock": "synchronous"})))
  happened, chunks = _run(algorithm, plan, SAME_SPEED)
  tasks.assert_same((chunks.state.server, chunks.state.times), (state.server, state.times))
  tasks.assert_same((happened.ids, happened.status), (expected.ids, expected.status))


def test_a_synchronous_round_is_the_mean_of_those_that_it_waited_for():
  made = _play(clock="synchronous", cohort_size=5, over_selection=0.6, deadline=4.5, rounds=12)
  cut = np.bincount(made.start.searchsorted(made.start)[made.group < 0]).max()
  assert cut >= 3 and (np.bincount(made.group[made.group >= 0], minlength=12) < 5).any()
  w = FIRST
  for number in range(12):
    ids = made.client[(made.group == number) & made.arrives]
    if len(ids):
      w = w + np.mean([descended(id, w) - w for id in ids], axis=0)
  algorithm = fedavg(TASK)
  _, chunks = _run(algorithm, batches.plan(made))
  np.testing.assert_allclose(_head(algorithm, chunks.state), w, rtol=0, atol=1e-5)


def _told() -> Algorithm:
  """A method that checks what its clients were given; the rows of `own` change with every upload."""

  def local_update(download, client, data, visit, key):
    told = {"own": download.own, "shared": download.shared, "visit": visit, "client": client}
    return client + 1, Upload(update=(), weight=jnp.float32(1.0), kept=told)

  def aggregate(server, received, key):
    kept = jax.tree.map(lambda x: x[0], received.kept)
    right = (kept["own"] == 100 * kept["shared"] + received.ids[0]) & (kept["visit"].id == received.ids[0])
    right &= (kept["client"] == kept["visit"].times) & (received.staleness[0] == server["version"] - kept["shared"])
    right &= kept["visit"].staleness == received.staleness[0]
    return {"version": server["version"] + 1, "right": server["right"] & right}

  return fedavg(TASK)._replace(
    init=lambda key: {"version": jnp.int32(0), "right": jnp.bool_(True)},
    download=lambda server: Download(server["version"], 100 * server["version"] + jnp.arange(N)),
    local_update=local_update,
    aggregate=aggregate,
    global_model=lambda server: None,
    init_client=lambda download, key: jnp.int32(0),
    personalize=lambda download, client, data, visit, key: LOGISTIC.init(key),
  )


@pytest.mark.parametrize("concurrency", [1, 5, 12])
def test_clients_get_what_was_there_when_they_downloaded(concurrency):
  """Shared version and own row alike, whatever is computed together; their state is what their last visit left."""
  inputs = INPUTS._replace(settings=INPUTS.settings | {"rates": jnp.array([0.2])})
  made = _play(inputs, concurrency=concurrency, rounds=20)
  _, chunks = _run(_told(), batches.plan(made), inputs)
  assert bool(chunks.state.server["right"])
  assert int(chunks.state.server["version"]) == np.count_nonzero(made.arrives & (made.group >= 0))


@pytest.mark.slow  # to compile; rows of rounds are staged by default
def test_rows_may_be_staged(tmp_path):
  """Client rows on disk and examples in host memory: the same bits, after a checkpoint too."""
  task = TASK._replace(sgd=SGD._replace(batch_size=3))
  plan = batches.plan(_play(rounds=6, cohort_size=3, concurrency=3))
  made = simulation.simulator(
    lambda settings: (mifa(task), _process(settings)),
    INPUTS,
    CLASSES,
    population_size=N,
    cohort_size=plan.per_round,
    chunk=2,
    layout=plan.layout,
    how="sequential",
  )
  inputs = jax.tree.map(np.asarray, INPUTS)
  ends = []
  for name, places in (("one", {}), ("other", {"client_state": "disk", "data_on": "host"}), ("other", {})):
    if len(ends) == 2:  # goes on from the middle, in another place
      shutil.rmtree(tmp_path / "other" / "checkpoints" / "6")
    result = simulation.run(
      made,
      inputs,
      rounds=6,
      gone=np.zeros(N, bool),
      eval_every=2,
      directory=tmp_path / name,
      checkpoint_every=4,
      clock=plan,
      traffic=(3, 4),
      progress=False,
      **places,
    )
    ends.append((result.state.server, result.state.times, result.personal_scores.own))
    assert [line["virtual_seconds"] for line in result.record.metrics] == plan.schedule.seconds[1::2].tolist()
    assert result.record.metrics[-1]["bytes"] == plan.schedule.traffic(3, 4)[-1]
  for other in ends[1:]:
    tasks.assert_same(other, ends[0])


# --- the mask of those present ----------------------------------------------------------------------------------------

KIND = np.arange(N) % CLASSES  # client i holds this class alone
HELD = np.eye(CLASSES, dtype=bool)[KIND]
KINDS = np.repeat(KIND, SIZES)
MASKED = INPUTS._replace(
  federation=INPUTS.federation._replace(
    store=INPUTS.federation.store._replace(labels=jnp.asarray(KINDS, jnp.int32)),
  )
)


def _turns(settings: PyTree, heard: Any = lambda round, ids: True) -> Any:
  """In each round those of one class are away, of the next class in the next."""
  speeds = population.speeds("pareto", settings["spread"])

  def look(state, round, ids, key):
    found = speeds.look(state, round, ids, key)
    return found._replace(present=(ids + round) % CLASSES != 0, arrives=found.arrives & heard(round, ids))

  return speeds._replace(look=look)


def _there(time: float, length: float) -> np.ndarray:
  """bool [C]: the classes of those who are there."""
  return (np.arange(CLASSES) + int(time / length + 1e-9)) % CLASSES != 0


class Masked(Async):
  """FedAsync; a client's softmax spans its own class and those of who was there when it downloaded.

  With a `mask`, bool [C], it spans its own class and those of the mask instead, always.
  """

  def __init__(self, alpha: float, power: float, rho: float, mask: np.ndarray | None = None):
    super().__init__(alpha, power, rho)
    self.mask = mask

  def download(self, now: float) -> Any:
    return self.w, self.version, _there(now, 3.0) if self.mask is None else self.mask

  def receive(self, id: int, read: Any) -> None:
    start, version, there = read
    alpha, power, _ = self.told
    mine = descended(id, start, lambda id, w: gradient(id, w, np.eye(CLASSES)[KINDS], there | HELD[id]))
    share = alpha * (1 + self.version - version) ** -power
    self.w, self.version = (1 - share) * self.w + share * mine, self.version + 1


def _masked(softmax_mask: str) -> tuple[Any, np.ndarray]:
  """What was played, and FedAsync's head after it."""
  algorithm = fedasync(TASK, alpha=0.5, exponent=0.7, rho=0.0, max_staleness=1000)
  made = _play(MASKED, _turns, presence=True)
  plan = batches.plan(made, held=HELD)
  assert plan.sizes.mean() > 1.2 and len(set(np.floor(made.start / 3.0))) > 20
  state = _run(algorithm, plan, MASKED, process=_turns, softmax_mask=softmax_mask)[1].state
  return made, _head(algorithm, state)


def test_masked_batches_are_a_heap_of_events():
  made, found = _masked("present")
  np.testing.assert_allclose(found, played(made, Masked(0.5, 0.7, 0.0)), rtol=0, atol=1e-5)
  others = [played(made, Masked(0.5, 0.7, 0.0, np.full(CLASSES, mask))) for mask in (False, True)]
  assert min(np.abs(found - other).max() for other in others) > 0.1


@pytest.mark.slow  # to compile; options_test.py has it in rounds
def test_own_classes_alone_are_a_mask_on_the_clock_too():
  made, found = _masked("own")
  expected = played(made, Masked(0.5, 0.7, 0.0, np.zeros(CLASSES, bool)))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


CLOCKS = [pytest.param("synchronous", marks=pytest.mark.slow), "asynchronous"]  # slow to compile


@pytest.mark.slow  # to compile; masked batches are a heap of events, and equal durations rounds without a mask, above
@pytest.mark.parametrize("clock", CLOCKS)
def test_equal_durations_are_rounds_with_the_mask_too(clock):
  """The cohort is all who are there, of whom half leave before they are heard; so the rounds are told that, too."""
  inputs = MASKED._replace(settings=SAME_SPEED.settings)
  values = EQUAL | {"cohort_size": 8, "concurrency": 8, "clock": clock}
  plan = batches.plan(_play(inputs, _turns, presence=True, **values), held=HELD)
  np.testing.assert_array_equal(plan.sizes, 8)
  plain = fedavg(TASK)
  timed = fedbuff(TASK, buffer_size=4) if clock == "asynchronous" else plain
  happened, chunks = _run(timed, plan, inputs, process=_turns, softmax_mask="present")
  np.testing.assert_array_equal(happened.arrived, 4)
  leaving = lambda settings: _turns(settings, lambda round, ids: (ids + round + 1) % CLASSES != 0)
  options = {"rounds": 7, "process": leaving, "cohort_size": 8}
  came, rounds = _run(plain, None, inputs, softmax_mask="present", **options)
  expected, unmasked = _head(plain, rounds.state), FIRST
  slope = functools.partial(gradient, answers=np.eye(CLASSES)[KINDS])
  for ids, status in zip(came.ids, came.status, strict=True):
    unmasked = np.mean([descended(id, unmasked, slope) for id in ids[status == 2]], axis=0)
  assert np.abs(expected - unmasked).max() > 0.01 and np.abs(expected - FIRST).max() > 0.1
  np.testing.assert_allclose(_head(timed, chunks.state), expected, rtol=0, atol=1e-6)
  if clock == "synchronous":
    tasks.assert_same((chunks.state.server, chunks.state.times), (rounds.state.server, rounds.state.times))


@pytest.mark.parametrize("clock", CLOCKS)
def test_personal_models_get_the_classes_of_who_is_there_when_they_are_made(clock):
  kept = lambda data: (data.logit_offset > -jnp.inf).astype(jnp.float32)
  algorithm = fedavg(TASK)._replace(
    personalize=lambda download, client, data, visit, key: kept(data),
    predict=lambda model, images: Prediction(jnp.zeros((len(images), CLASSES)), jnp.zeros((len(images), 1))),
    global_model=lambda server: None,
    describe=lambda model: {"kept": model},
  )
  seen = set()
  for rounds in (5, 6):
    plan = batches.plan(_play(MASKED, _turns, presence=True, clock=clock, rounds=rounds, cohort_size=4), held=HELD)
    simulator = simulation.simulator(
      lambda settings: (algorithm, _turns(settings)),
      MASKED,
      CLASSES,
      population_size=N,
      cohort_size=plan.per_round,
      layout=plan.layout,
      softmax_mask="present",
      how="sequential",
    )
    inputs = jax.tree.map(np.asarray, MASKED)
    result = simulation.run(
      simulator, inputs, rounds=rounds, gone=np.zeros(N, bool), eval_every=0, clock=plan, progress=False
    )
    there = _there(plan.schedule.seconds[-1] - 1e-6, 3.0)
    described: Any = result.personal_scores.described
    np.testing.assert_array_equal(described["kept"] > 0, there | HELD)
    seen.add(tuple(there))
  assert len(seen) > 1


def test_the_mask_needs_to_be_told_who_is_there():
  made = _play(rounds=2)
  with pytest.raises(InputError, match="softmax_mask: got 'present' with batches that lack classes"):
    _run(fedavg(TASK), batches.plan(made), softmax_mask="present")
  with pytest.raises(InputError, match="schedule: got one that does not tell who is there"):
    batches.plan(made, held=HELD)


COHORT = 4


def _on_the_clock(name: str, rounds: int) -> tuple[simulation.Chunks, simulation.Simulator]:
  """A method of the registry on the `fast` task, each upload aggregated by itself."""
  inputs = tasks.inputs(name)
  build = lambda settings: tasks.build(name, tasks.NUM_CLIENTS, settings, aggregations=COHORT)
  settings = schedule.Settings("asynchronous", rounds, COHORT, concurrency=3, jitter=0.5, round_seconds=1.0)
  compute = np.ones(tasks.NUM_CLIENTS)
  made = schedule.make(lambda traced: build(traced)[1], inputs.settings, inputs.seed, settings, compute)
  plan = batches.plan(made)
  simulator = simulation.simulator(
    build,
    inputs,
    tasks.NUM_CLASSES,
    population_size=tasks.NUM_CLIENTS,
    cohort_size=plan.per_round,
    chunk=rounds,
    layout=plan.layout,
    how="sequential",
  )
  staging = simulation.Staging(simulator, jax.tree.map(np.asarray, inputs))
  chunks = simulation.Chunks(simulator, staging, *staging.begin(), plan=plan)
  chunks.run(rounds, 0)
  return chunks, simulator


@pytest.mark.slow  # to compile; clients get their own rows above
def test_a_method_with_rows_of_its_own_learns_on_the_clock():
  chunks, simulator = _on_the_clock("pafedfv", 10)
  scores = tasks.personal(simulator, chunks.state, chunks.inputs)
  assert metrics.accuracy(scores.own).min() > 0.9


@pytest.mark.slow  # to compile
@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_learns_on_the_clock(name):
  chunks, simulator = _on_the_clock(name, 20)
  scores = tasks.personal(simulator, chunks.state, chunks.inputs)
  tasks.assert_finite((chunks.state.server, scores))
  assert metrics.accuracy(scores.own).mean() > 0.8


@pytest.mark.slow  # to compile; cost_test.py counts its trainings from the same branches
def test_the_generator_of_ap_fl_trains_once_a_round_of_uploads():
  """And as long as in rounds: after a tenth of ten rounds, two steps each."""
  chunks, _ = _on_the_clock("ap_fl", 4)
  server: Any = chunks.state.server
  assert int(server.rounds) == 4 * COHORT
  counts = {int(x) for x in jax.tree.leaves(server.source.optimizer) if x.ndim == 0}
  assert counts == {(4 - 1) * 2}
  tasks.assert_finite(server)
