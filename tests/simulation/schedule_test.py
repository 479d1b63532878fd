"""Schedules: nobody at work twice, versions in causal order, slots kept while they are needed, files that replay."""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apfl_jax import population, random
from apfl_jax.errors import InputError
from apfl_jax.simulation import batches, schedule
from apfl_jax.simulation.batches import Plan
from apfl_jax.simulation.schedule import Schedule, Settings
from apfl_jax.types import Process, PyTree

N = 9
COMPUTE = np.arange(3.0, 3.0 + N)


def _coming_and_going(traced: PyTree) -> Process:
  others = (population.speeds("lognormal", traced["spread"]),)
  return population.make(("markov", "bernoulli"), N, traced["rates"], *others, facts=population.Facts(off_rounds=2.0))


def _play(
  seed: int = 0,
  rates: Any = (0.0, 0.0),
  spread: float = 0.0,
  compute: Any = COMPUTE,
  presence: bool = False,
  **values: Any,
) -> Schedule:
  traced = {"rates": np.float32(rates), "spread": np.float32(spread)}
  values = {"clock": "asynchronous", "rounds": 5, "cohort_size": 3, "concurrency": 3, "round_seconds": 4.0} | values
  settings = Settings(**values)
  return schedule.make(_coming_and_going, traced, seed, settings, np.asarray(compute, float), presence=presence)


@jax.jit
def _look(traced: PyTree, seed: Any, round: Any, ids: Any) -> Any:
  process = _coming_and_going(traced)
  return population.look(process, population.start(process, seed), round, ids, seed)


@jax.jit
def _order(seed: Any, round: Any) -> Any:
  bits = random.permutation_key(random.key(seed, random.Purpose.COHORT, round))
  return random.permute(bits, jnp.arange(N), N)


def _causal(made: Schedule) -> None:
  """What anybody could see who watched the clients and the server."""
  ends = made.seconds[-1]
  for id in range(N):
    mine = np.flatnonzero(made.client == id)
    assert (made.start[mine][1:] >= made.end[mine][:-1]).all()  # not twice at work
    numbers = made.number[mine][made.group[mine] >= 0]
    assert (np.diff(numbers) > 0).all()  # so that its keys differ
  moments = np.concatenate([made.start, made.end])
  change = np.repeat([1, -1], len(made.start))
  order = np.lexsort((change, moments))  # who ends at a moment makes room for who starts then
  assert np.cumsum(change[order]).max() <= made.places
  assert 0 <= made.idle_share < 1

  counted = np.flatnonzero(made.group >= 0)
  assert (made.end[counted] <= ends).all() and not made.arrives[made.group < 0].any()
  heard = counted[made.arrives[counted]]
  groups = np.unique(made.group[heard])  # each makes a version, when its last upload is there
  done = np.array([made.seconds[g] if made.clock == "synchronous" else made.end[made.group == g][0] for g in groups])
  before = np.searchsorted(groups, made.group[counted])
  np.testing.assert_array_equal(made.staleness[counted], before - made.read[counted])
  # Read is all that was there; of what happens at the start's own moment, only what had ended before.
  assert (made.read <= np.searchsorted(done, made.start, side="right")).all()
  assert (made.read >= np.searchsorted(done, made.start, side="left")).all()


def _kept(plan: Plan) -> None:
  """Plays the batches with a history of labels: what is read is what was downloaded."""
  made, layout, all = plan.schedule, plan.layout, plan.all
  rows = [np.flatnonzero(ok) for ok in all.cohort.ok]
  assert sum(map(len, rows)) == np.count_nonzero(made.group >= 0)
  assert plan.sizes.max() <= layout.width and len(plan.offsets) == len(made.seconds) + 1
  shared, own = np.full(layout.versions + 1, -1), [None] * layout.seats
  shared[0] = version = started = 0
  visits = iter(np.argsort(np.where(made.group < 0, len(made.group), made.group), kind="stable"))

  def sit(until: int) -> None:
    nonlocal started
    for i in range(started, until):
      own[all.seats[i]] = (all.starts[i], version)
    started = max(started, until)

  sit(int(all.before))
  for number, inside in enumerate(rows):
    ids = all.cohort.ids[number, inside]
    assert len(set(ids.tolist())) == len(ids)
    told = [next(visits) for _ in inside]
    for row, visit in zip(inside, told, strict=True):
      assert all.cohort.ids[number, row] == made.client[visit]
      assert shared[all.cohort.slot[number, row]] == made.read[visit]
      assert own[all.cohort.own[number, row]] == (made.client[visit], made.read[visit])
    for row, visit in zip(inside, told, strict=True):
      assert all.first[number] + row == made.group[visit]
      if made.arrives[visit]:
        version += 1
        shared[all.written[number, row]] = version
      sit(int(all.upto[number, row]))
  np.testing.assert_array_equal(np.diff(plan.offsets) > 0, True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
  seed=st.integers(0, 10**6),
  rates=st.tuples(st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.3, 1.0])),
  spread=st.sampled_from([0.0, 1.0]),
  equal=st.booleans(),
  cohort=st.integers(1, 5),
  concurrency=st.integers(1, N),
  rounds=st.integers(1, 7),
  jitter=st.sampled_from([0.0, 0.8]),
  length=st.sampled_from([0.7, 3.0, 40.0]),
  stale=st.integers(0, 4),
  width=st.integers(0, 4),
)
def test_asynchronous_schedules(seed, rates, spread, equal, cohort, concurrency, rounds, jitter, length, stale, width):
  made = _play(
    seed,
    rates,
    spread,
    np.full(N, 3.0) if equal else COMPUTE,
    rounds=rounds,
    cohort_size=cohort,
    concurrency=concurrency,
    jitter=jitter,
    round_seconds=length,
    max_staleness=stale,
  )
  _causal(made)
  assert np.count_nonzero(made.group >= 0) == rounds * cohort
  np.testing.assert_array_equal(made.round, np.maximum(made.group, 0) // cohort)  # however often a client came
  assert (np.diff(made.end[np.argsort(made.group)][np.count_nonzero(made.group < 0) :]) >= 0).all()
  if stale:
    assert made.staleness[made.arrives].max(initial=0) <= stale
  plan = batches.plan(made, width)
  _kept(plan)
  assert plan.layout.versions == concurrency <= plan.layout.seats


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
  seed=st.integers(0, 10**6),
  rates=st.tuples(st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.3, 1.0])),
  spread=st.sampled_from([0.0, 1.0]),
  cohort=st.integers(1, 5),
  over=st.sampled_from([0.0, 0.3, 0.8]),
  deadline=st.sampled_from([0.0, 5.0, 9.0]),
  rounds=st.integers(1, 7),
  length=st.sampled_from([0.7, 3.0, 40.0]),
)
def test_synchronous_schedules(seed, rates, spread, cohort, over, deadline, rounds, length):
  values = {"over_selection": over, "deadline": deadline, "rounds": rounds, "cohort_size": cohort}
  made = _play(seed, rates, spread, clock="synchronous", round_seconds=length, **values)
  _causal(made)
  starts = np.unique(made.start)
  assert len(starts) == rounds and (starts[1:] >= made.seconds[:-1]).all()
  for number, (start, close) in enumerate(zip(starts, made.seconds, strict=True)):
    there = made.start == start
    assert there.sum() <= made.places and (made.end[there] <= close).all()
    counted = made.group == number
    assert (counted & ~there).sum() == 0 and made.arrives[counted].sum() <= cohort
    if deadline:
      assert close <= start + deadline + 1e-9
    if close < start + deadline or not deadline:  # it ended by itself: with enough uploads, or with the last of them
      assert made.arrives[counted].sum() == cohort or counted.sum() == there.sum()
  plan = batches.plan(made)
  ids, ok = plan.cohorts(0, rounds)
  assert Counter(ids[ok].tolist()) == Counter(made.client[made.group >= 0].tolist())
  assert not plan.layout.alone and plan.layout.width == made.places


@pytest.mark.parametrize(
  "values",
  [
    {"clock": "synchronous", "over_selection": 0.8, "deadline": 9.0},
    {"clock": "asynchronous", "concurrency": 5, "max_staleness": 3},
  ],
  ids=lambda values: values["clock"],
)
def test_every_visit_that_begins_arrives_is_lost_or_is_not_waited_for(values):
  made = _play(4, (0.3, 0.2), 1.0, rounds=12, cohort_size=4, **values)
  found = made.visits()
  assert sum(found.values()) == made.starts.sum() and min(found.values()) > 0, found
  assert found["arrived"] == sum(made.staleness_histogram()["counts"])
  unheard = [bool(g < 0 and s < made.seconds[-1]) for g, s in zip(made.group, made.start, strict=True)]
  assert made.visits(0) == found | {"arrived": 0, "lost": found["arrived"] + found["lost"]}
  assert found["cut off" if values["clock"] == "synchronous" else "not over"] == sum(unheard)


def test_durations_are_download_steps_and_upload():
  traced = {"rates": np.zeros(2, np.float32), "spread": np.float32(0.9)}
  values = Settings("asynchronous", rounds=4, cohort_size=3, concurrency=3, round_seconds=4.0)
  made = schedule.make(_coming_and_going, traced, 5, values, COMPUTE, download=0.25, upload=1.5)
  speed = np.asarray(_look(traced, 5, 0, np.arange(N)).speed, float)
  np.testing.assert_allclose(made.end - made.start, 0.25 + (COMPUTE / speed)[made.client] + 1.5, rtol=1e-6)


def test_jitter_is_a_factor_of_mean_one_that_goes_with_the_visit():
  values = {"rounds": 400, "cohort_size": 9, "concurrency": 9, "compute": np.ones(N)}
  calm, shaken = _play(3, **values), _play(3, jitter=0.5, **values)
  factor = shaken.end - shaken.start
  assert np.ptp(calm.end - calm.start) < 1e-9
  np.testing.assert_allclose([factor.mean(), np.log(factor).std()], [1.0, 0.5], atol=0.03)
  again = _play(3, jitter=0.5, rounds=10, cohort_size=9, concurrency=9, compute=2 * np.ones(N))
  some = min(len(again.client), 90)
  np.testing.assert_allclose((again.end - again.start)[:some], 2 * factor[:some], rtol=1e-9)


def test_equal_durations_draw_the_cohorts_of_rounds():
  """Four clients at work, all for one round of the process: each time the first along that round's permutation."""
  for clock in ("asynchronous", "synchronous"):
    made = _play(
      2,
      clock=clock,
      compute=np.full(N, 0.7),
      rounds=6,
      cohort_size=4,
      concurrency=4,
      round_seconds=0.7,
      max_staleness=0,
    )
    counted = made.group >= 0
    drawn = made.client[counted].reshape(6, 4)
    for number in range(6):
      np.testing.assert_array_equal(drawn[number], _order(2, number)[:4])
    np.testing.assert_array_equal(made.round[counted], np.repeat(np.arange(6), 4))
    np.testing.assert_allclose(made.seconds, 0.7 * np.arange(1, 7))
    assert abs(made.idle_share) < 1e-9
    sizes = batches.plan(made).sizes
    np.testing.assert_array_equal(sizes, 4)


@pytest.mark.parametrize(
  "values",
  [
    {"concurrency": 9},
    {"cohort_size": 4, "concurrency": 1},
    {"clock": "synchronous", "over_selection": 0.6},
    {"clock": "synchronous", "deadline": 4.0},
  ],
)
def test_by_itself_a_run_is_as_many_rounds_of_the_process_as_of_its_own(values):
  """So that who leaves in the midst of the rounds leaves in the midst of the run."""
  settings = Settings(
    **{"clock": "asynchronous", "rounds": 20, "cohort_size": 3, "concurrency": 3, "jitter": 0.5} | values
  )
  for leave, left in ((0.9, 4), (1.1, 0)):
    made = schedule.make(_leaving, np.float32(leave), 2, settings, COMPUTE)
    assert np.count_nonzero(made.gone) == left
  half = schedule.make(_leaving, np.float32(0.5), 2, settings, COMPUTE)
  last = max(half.start[half.gone[half.client]])
  assert 0.35 < last / half.seconds[-1] < 0.65


def _leaving(leave: PyTree) -> Process:
  facts = population.Facts(rounds=20, leave_at=leave)
  return population.make(("late",), N, jnp.float32([0.5]), population.speeds("pareto", 0.5), facts=facts)


def test_a_process_in_which_clients_download_late_is_refused():
  everyone = population.everyone()
  late = lambda traced: everyone._replace(look=lambda *told: everyone.look(*told)._replace(delay=told[2] % 2))
  with pytest.raises(InputError, match="clock: got clients that download rounds ago"):
    schedule.make(late, np.float32(0), 0, Settings("synchronous", 2, 4, 0), COMPUTE)


def test_idle_places_wait_for_the_process_and_nobody_is_drawn_who_is_away():
  made = _play(1, rates=(0.4, 0.0), rounds=20, cohort_size=9, concurrency=9, presence=True)
  assert 0.1 < made.idle_share < 0.9
  traced = {"rates": np.float32((0.4, 0.0)), "spread": np.float32(0)}
  look = lambda time, id: _look(traced, 1, int(time / 4.0 + 1e-9), np.arange(N)).present[id]
  at_start = [look(t, i) for t, i in zip(made.start, made.client, strict=True)]
  at_end = [look(t, i) for t, i in zip(made.end, made.client, strict=True)]
  assert all(at_start)
  np.testing.assert_array_equal(made.arrives[made.group >= 0], np.array(at_end)[made.group >= 0])
  everyone = np.arange(N)
  at_starts, at_closes = made.classes_present(np.eye(N, dtype=bool))  # each a class of its own
  np.testing.assert_array_equal(at_starts, [look(t, everyone) for t in made.start])
  np.testing.assert_array_equal(at_closes, [look(t - 1e-6, everyone) for t in made.seconds])
  held = np.arange(2 * N).reshape(N, 2) % 5 == 0
  np.testing.assert_array_equal(made.classes_present(held)[0], at_starts @ held)


def test_a_population_that_never_comes_is_refused(monkeypatch):
  monkeypatch.setattr(schedule, "_PATIENCE", 20)
  for clock in ("asynchronous", "synchronous"):
    with pytest.raises(InputError, match="clock: got a population of which nobody is there for 20 rounds"):
      schedule.make(_nobody, np.float32(0), 0, Settings(clock, rounds=2, cohort_size=2, concurrency=2), np.ones(N))


def _nobody(traced: PyTree) -> Process:
  return population.cold(N, 1.0)


def test_the_histogram_and_the_traffic_count_what_happened():
  made = _play(4, rates=(0.0, 0.3), jitter=0.5, rounds=30, cohort_size=4, concurrency=7)
  told = made.staleness_histogram(bins=5)
  late = made.staleness[made.arrives & (made.group >= 0)]
  for low, high, count in zip(told["edges"], told["edges"][1:], told["counts"], strict=False):
    assert count == np.sum((late >= low) & (late < high))
  assert sum(told["counts"]) == len(late) and len(told["counts"]) <= 5
  down, up = 10, 3
  expected = [
    sum(down * (s < t) + up * (e <= t and g >= 0) for s, e, g in zip(made.start, made.end, made.group, strict=True))
    for t in made.seconds
  ]
  np.testing.assert_allclose(made.traffic(down, up), expected)
  assert made.starts.sum() * down + np.count_nonzero(made.group >= 0) * up == expected[-1]
  cut = _play(4, clock="synchronous", over_selection=0.8, rounds=5, cohort_size=4)
  np.testing.assert_array_equal(cut.starts, np.bincount(cut.client, minlength=N))
  assert cut.starts.sum() == 5 * 8 and np.count_nonzero(cut.group >= 0) == 5 * 4


@functools.cache
def _saved() -> Schedule:
  values = {"rounds": 9, "cohort_size": 4, "concurrency": 6, "presence": True}
  return _play(8, rates=(0.2, 0.2), spread=0.5, jitter=0.5, **values)


def test_a_saved_schedule_is_the_same_and_makes_the_same_batches(tmp_path):
  schedule.save(_saved(), tmp_path / "schedule.npz")
  read = schedule.load(tmp_path / "schedule.npz", "asynchronous", N, 4, 9)
  for mine, theirs in zip(_saved(), read, strict=True):
    np.testing.assert_array_equal(theirs, mine)
    assert np.asarray(theirs).dtype == np.asarray(mine).dtype
  one, other = (batches.plan(made, held=np.eye(N, dtype=bool)) for made in (_saved(), read))
  assert one.layout == other.layout
  jax.tree.map(np.testing.assert_array_equal, one.all, other.all)


@pytest.mark.parametrize("wrong", [{"clock": "synchronous"}, {"num_clients": 7}, {"cohort_size": 5}, {"rounds": 8}])
def test_a_schedule_of_another_run_is_refused(tmp_path, wrong):
  schedule.save(_saved(), tmp_path / "schedule.npz")
  values: Any = {"clock": "asynchronous", "num_clients": N, "cohort_size": 4, "rounds": 9} | wrong
  with pytest.raises(InputError, match=f"of a run with {next(iter(wrong))}=.*, accepted is one with"):
    schedule.load(tmp_path / "schedule.npz", **values)


def test_what_is_no_schedule_is_refused(tmp_path):
  (tmp_path / "text").write_text("no archive")
  np.savez(tmp_path / "other.npz", x=np.ones(2))
  told = {"text": "it is no .npz file", "other.npz": "it has other arrays", "nowhere": "No such file or directory"}
  for name, reason in told.items():
    with pytest.raises(InputError, match=rf"{name} is no saved schedule \({reason}\)"):
      schedule.load(tmp_path / name, "asynchronous", N, 4, 9)


def test_many_events_take_seconds():
  """A hundred thousand in one or two; the bound leaves room for a busy machine."""
  import time

  start = time.perf_counter()
  clients, traced = 2000, np.float32(0.5)
  made = schedule.make(
    _many, traced, 0, Settings("asynchronous", 20, 1000, 500, jitter=0.5, round_seconds=1.0), np.ones(clients)
  )
  plan = batches.plan(made)
  assert plan.sizes.sum() == 20_000 and plan.sizes.mean() > 5
  assert time.perf_counter() - start < 20


def _many(traced: PyTree) -> Process:
  return population.speeds("lognormal", traced)
