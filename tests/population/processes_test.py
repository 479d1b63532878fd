"""Availability processes: counts, binomial bounds, and answers that do not depend on who else is asked about."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from apfl_jax import population
from apfl_jax.types import Array, Availability, Process

N, ROUNDS = 200, 60
UNLIKELY = 1e-6  # seeds are fixed, so a sound process passes always
RANK = np.arange(N, dtype=np.float32) % 10 / 9  # the smallest of ten labels that a client holds
FACTS = population.Facts(
  rounds=ROUNDS,
  leave_at=0.5,
  off_rounds=4.0,
  day_rounds=20.0,
  regions=7,
  label_rank=RANK,
  trace=population.read_trace(population.SAMPLE),
)


def available(ids: Array | np.ndarray, **fields: Any) -> Availability:
  shape = jnp.shape(ids)
  nothing = Availability(
    present=jnp.ones(shape, bool),
    arrives=jnp.ones(shape, bool),
    delay=jnp.zeros(shape, jnp.int32),
    work=jnp.ones(shape),
    speed=jnp.ones(shape),
    gone=jnp.zeros(shape, bool),
    wait=jnp.zeros(shape, jnp.int32),
  )
  return nothing._replace(**fields)


def leaving() -> Process:
  """Every second round a client leaves for good, 0 in round 2, as told by the round and by the steps counted."""

  def look(state, round, ids, key):
    left = (state + round) // 4
    return available(ids, present=ids >= left, gone=ids < left)

  return Process(lambda key: jnp.int32(0), lambda state, round, key: state + 1, look)


@pytest.fixture(scope="module")
def history():
  """(name, rate, seed, **facts) -> Availability [ROUNDS, N], stepped as a run steps; one compilation a name."""

  def compiled(name):
    @jax.jit
    def seen(rate, seed, facts):
      process = population.make([name], N, rate[None], facts=facts)

      def one(state, round):
        state = population.step(process, state, round, seed)
        return state, population.look(process, state, round, jnp.arange(N), seed)

      return jax.lax.scan(one, population.start(process, seed), jnp.arange(ROUNDS))[1]

    return seen

  functions = {name: compiled(name) for name in population.PROCESSES}

  def seen(name, rate, seed=0, **facts):
    facts = jax.tree.map(jnp.asarray, FACTS._replace(**facts))
    got = jax.tree.map(np.asarray, functions[name](jnp.float32(rate), jnp.uint32(seed), facts))
    assert functions[name]._cache_size() == 1, "a rate, a seed or another setting recompiles"
    return got

  return seen


def test_none_is_everyone_always(history):
  got = history("none", 0.7)
  for name, want in available(np.zeros((ROUNDS, N)))._asdict().items():
    np.testing.assert_array_equal(getattr(got, name), want, name)


@pytest.mark.parametrize("rate", [0.0, 0.004, 0.25, 0.5, 0.9, 1.0])
def test_cold_loses_the_same_clients_in_all_rounds(history, rate):
  got = history("cold", rate)
  assert np.all(got.present == got.present[0])
  np.testing.assert_array_equal(got.gone, ~got.present)
  assert np.sum(got.gone[0]) == round(rate * N)
  assert np.all(got.arrives) and np.all(got.delay == 0) and np.all(got.work == 1)


@pytest.mark.parametrize("num_clients", [1, 2, 7, 10, 64, 1000])
def test_cold_loses_the_rounded_share(num_clients):
  @jax.jit
  @jax.vmap
  def lost(rate):
    process = population.cold(num_clients, rate)
    return jnp.sum(population.look(process, population.start(process, 3), 0, jnp.arange(num_clients), 3).gone)

  rates = [0.0, 0.1, 0.3, 0.5, 0.75, 0.8, 1.0]
  np.testing.assert_array_equal(lost(jnp.array(rates)), [round(rate * num_clients) for rate in rates])


def test_cold_loses_every_client_as_often(history):
  lost = np.sum([history("cold", 0.25, seed).gone[0] for seed in range(200)], axis=0)
  # A count's variance is 200 / 4 * 3 / 4, and their sum is fixed.
  assert stats.chi2.sf(np.sum((lost - 50.0) ** 2) / 37.5 * (N - 1) / N, N - 1) > UNLIKELY


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_bernoulli_loses_uploads_at_its_rate(history, rate):
  got = history("bernoulli", rate)
  assert np.all(got.present) and not np.any(got.gone)
  lost = int(np.sum(~got.arrives))
  assert stats.binomtest(lost, got.arrives.size, rate).pvalue > UNLIKELY


def test_bernoulli_rounds_and_clients_are_independent(history):
  lost = ~history("bernoulli", 0.3).arrives
  for axis, trials in ((0, ROUNDS), (1, N)):  # sums over rounds and over clients spread as binomials do
    counts = np.sum(lost, axis=axis)
    deviation = np.sum((counts - 0.3 * trials) ** 2) / (0.3 * 0.7 * trials)
    assert UNLIKELY < stats.chi2.sf(deviation, counts.size) < 1 - UNLIKELY
  for together in (lost[1:] & lost[:-1], lost[:, 1:] & lost[:, :-1]):  # neighbours
    assert stats.binomtest(int(np.sum(together)), together.size, 0.09).pvalue > UNLIKELY


def likely(count, trials, rate):
  return stats.binomtest(int(count), int(trials), rate).pvalue > UNLIKELY


@pytest.mark.parametrize(
  ("rate", "leave_at", "leave"), [(0.25, 0.5, 30), (0.6, 0.1, 6), (1.0, 0.9, 54), (0.3, 1.0, 60)]
)
def test_late_takes_part_until_it_leaves_for_good(history, rate, leave_at, leave):
  got = history("late", rate, leave_at=leave_at)
  assert np.all(got.present[:leave]) and np.all(got.present[leave:] == got.present[-1])
  np.testing.assert_array_equal(got.gone, ~got.present)
  assert np.sum(got.gone[-1]) == (round(rate * N) if leave < ROUNDS else 0)


def test_late_from_the_start_is_cold(history):
  cold, late = history("cold", 0.4), history("late", 0.4, leave_at=0.0)
  jax.tree.map(np.testing.assert_array_equal, cold, late)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_arrivals_come_at_an_even_pace_over_the_first_half_and_stay(history, rate):
  got = history("arrive", rate)
  assert np.all(got.present[1:] >= got.present[:-1]) and not np.any(got.gone)
  joining, half = round(rate * N), ROUNDS // 2
  t = np.arange(ROUNDS)
  assert np.sum(got.present[0]) == N - joining and np.all(got.present[half:])
  np.testing.assert_allclose(np.sum(got.present, axis=1), N - joining * (1 - np.minimum(t / half, 1)), atol=1)


def test_arrivals_are_in_no_order_of_ids(history):
  rounds = [np.argmax(history("arrive", 1.0, seed).present, axis=0) for seed in range(10)]
  half = ROUNDS // 2
  assert all(np.array_equal(np.unique(joined), np.arange(1, half + 1)) for joined in rounds)
  for client in range(N):  # ten draws of a uniform law
    assert abs(np.mean([joined[client] for joined in rounds]) - (half + 1) / 2) < 5 * half / np.sqrt(12 * 10)
  assert abs(stats.spearmanr(np.arange(N), rounds[0])[0]) < 5 / np.sqrt(N)


def test_a_run_of_one_round_has_everybody_arrived(history):
  assert np.all(history("arrive", 1.0, rounds=1).present)


@pytest.mark.parametrize(("rate", "length"), [(0.3, 4.0), (0.6, 8.0), (0.5, 2.0)])
def test_markov_is_the_stationary_chain_with_its_mean_absence(history, rate, length):
  seen = [history("markov", rate, seed, off_rounds=length) for seed in range(5)]
  assert not any(np.any(one.gone) for one in seen)
  away = np.stack([~one.present for one in seen])  # [5, ROUNDS, N]
  for t in (0, 1, ROUNDS // 2, ROUNDS - 1):
    assert likely(np.sum(away[:, t]), away[:, t].size, rate), t
  pairs = away[:, 0, 1:] & away[:, 0, :-1]
  assert likely(np.sum(pairs), pairs.size, rate**2), "clients are not independent"
  # Both rates of change, also of those who were away or there for longer: nothing but the last round counts.
  back, leave = 1 / length, rate / (length * (1 - rate))
  before, now, after = away[:, :-2], away[:, 1:-1], away[:, 2:]
  for condition in (now, now & before, now & ~before):
    assert likely(np.sum(condition & ~after), np.sum(condition), back)
  for condition in (~now, ~now & before, ~now & ~before):
    assert likely(np.sum(condition & after), np.sum(condition), leave)
  # Absences that begin in the first half last so long on average; hardly any goes on at the end.
  lengths = []
  for line in away.transpose(0, 2, 1).reshape(-1, ROUNDS):
    for t in range(ROUNDS // 2):
      if line[t + 1] and not line[t]:
        lengths.append(np.argmin(np.append(line[t + 1 :], False)))
  deviation = np.sqrt(length * (length - 1) / len(lengths))  # of the mean of geometric lengths
  assert len(lengths) > 1000 and abs(np.mean(lengths) - length) < 5 * deviation + 0.02 * length


def test_label_makes_presence_grow_with_the_smallest_label(history):
  present = np.concatenate([history("label", 0.8, seed).present for seed in range(3)])
  for rank in np.unique(RANK):
    some = present[:, rank == RANK]
    assert likely(np.sum(some), some.size, min(1.0, 1 - 0.8 * (1 - float(rank))))
  share = np.mean(present, axis=0)
  slope, _, correlation, _, _ = stats.linregress(RANK, share)
  assert abs(slope - 0.8) < 0.03 and correlation > 0.95
  # Given the labels, clients and rounds are independent.
  low = ~present[:, RANK == 0]
  for together in (low[1:] & low[:-1], low[:, 1:] & low[:, :-1]):
    assert likely(np.sum(together), together.size, 0.64)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.7])
def test_diurnal_is_a_sine_of_the_day_in_many_time_zones(history, rate):
  away = np.stack([~history("diurnal", rate, seed).present for seed in range(3)])
  assert likely(np.sum(away), away.size, rate)  # whole days
  for t in (0, 5, ROUNDS - 1):
    assert likely(np.sum(away[:, t]), away[:, t].size, rate)  # it is some hour everywhere
  swing, day = min(rate, 1 - rate), int(FACTS.day_rounds)
  for lag in (day // 4, day // 2, day):  # E[sin(x) sin(x + a)] = cos(a) / 2
    covariance = np.mean((away[:, lag:] - rate) * (away[:, :-lag] - rate))
    assert abs(covariance - swing**2 * np.cos(2 * np.pi * lag / day) / 2) < 0.01, lag
  assert abs(np.mean((away[..., 1:] - rate) * (away[..., :-1] - rate))) < 0.01, "neighbours share a zone"


@pytest.mark.parametrize(("rate", "regions"), [(0.3, 7), (0.5, 3), (0.8, 1)])
def test_regions_are_away_as_one(history, rate, regions):
  away = [~history("regional", rate, seed, regions=regions).present for seed in range(3)]
  events = []
  for one in away:
    patterns, sizes = np.unique(one, axis=1, return_counts=True)
    assert patterns.shape[1] == regions and np.max(sizes) - np.min(sizes) <= 1
    events.append(patterns)
  events = np.stack(events)
  assert likely(np.sum(events), events.size, rate)
  together = events[:, 1:] & events[:, :-1]  # the next round
  assert likely(np.sum(together), together.size, rate**2)
  if regions > 1:  # another region; `unique` has ordered them, so of all pairs
    both = [events[..., a] & events[..., b] for a in range(regions) for b in range(a)]
    assert abs(np.mean(both) - rate**2) < 0.1


@pytest.mark.parametrize("name", [name for name in population.PROCESSES if name != "trace"])
def test_the_ends_of_rates(history, name):
  got = history(name, 0.0)
  assert np.all(got.present) and np.all(got.arrives)
  if name in ("cold", "diurnal", "regional"):
    assert not np.any(history(name, 1.0).present)


@given(
  rate=st.floats(0, 1, width=32),
  seed=st.integers(0, 2**32 - 1),
  leave_at=st.floats(0, 1, width=32),
  off_rounds=st.floats(1, 50, width=32),
  day_rounds=st.floats(0.125, 1000, width=32),
  regions=st.integers(1, 2**31 - 1),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_masks_make_sense_at_any_setting(history, rate, seed, **facts):
  for name in population.PROCESSES:
    got = history(name, rate, seed, **facts)
    assert not np.any(got.gone & got.present), name
    assert np.all(got.gone[1:] >= got.gone[:-1]), f"{name}: who is gone comes back"
    assert np.all(got.delay == 0) and np.all(got.wait == 0) and np.all(got.work == 1), name
    assert name == "trace" or np.all(got.speed == 1), name


@pytest.mark.parametrize("name", [name for name in population.PROCESSES if name not in ("none", "trace")])
def test_seeds_differ(history, name):
  one, other = history(name, 0.5, 0), history(name, 0.5, 1)
  assert np.any(one.present != other.present) or np.any(one.arrives != other.arrives)


@pytest.mark.parametrize("law", ["uniform", "lognormal", "pareto"])
def test_speeds_have_mean_1_and_their_law(law):
  many, spread = 20_000, 0.6

  @jax.jit
  def seen(round, spread, seed):
    process = population.speeds(law, spread)
    return population.look(process, population.start(process, seed), round, jnp.arange(many), seed)

  got = seen(0, spread, 3)
  speed = np.asarray(got.speed)
  jax.tree.map(np.testing.assert_array_equal, got, seen(9, spread, 3))  # drawn once
  assert np.all(speed > 0) and np.any(speed != seen(0, spread, 4).speed)
  assert abs(np.mean(speed) - 1) < 5 * np.std(speed) / np.sqrt(many)
  laws = {
    "uniform": (speed, stats.uniform(1 - spread, 2 * spread)),
    "lognormal": (speed, stats.lognorm(spread, scale=np.exp(-(spread**2) / 2))),
    "pareto": (1 / speed, stats.pareto(1 / spread, scale=1 / (1 + spread))),
  }
  values, wanted = laws[law]
  assert stats.kstest(values, wanted.cdf).pvalue > UNLIKELY
  np.testing.assert_allclose(seen(0, 0.0, 3).speed, 1, rtol=1e-6)
  assert np.all(np.isfinite(np.asarray(seen(0, 4.0, 3).speed)))


def test_an_answer_does_not_depend_on_who_else_is_asked_about():
  names = list(population.PROCESSES)
  facts = jax.tree.map(jnp.asarray, FACTS)
  process = population.make(names, N, jnp.full(len(names), 0.1), population.speeds("lognormal", 0.5), facts=facts)
  state = population.start(process, 5)
  look = jax.jit(lambda ids: population.look(process, state, jnp.int32(40), ids, 5))
  everyone = look(jnp.arange(N))
  assert 0 < np.sum(everyone.present) < N and np.unique(everyone.speed).size == N
  shuffled = np.random.default_rng(0).permutation(N)
  for ids in (shuffled, shuffled[:6].reshape(2, 3)):
    got = look(jnp.asarray(ids))
    for name, whole in everyone._asdict().items():
      np.testing.assert_array_equal(getattr(got, name), np.asarray(whole)[ids], name)


def test_chain_composes():
  def constant(**fields):
    return Process(
      lambda key: (), lambda state, round, key: state, lambda state, round, ids, key: available(ids, **fields)
    )

  odd, low = jnp.arange(8) % 2 == 1, jnp.arange(8) < 4
  process = population.chain(
    constant(present=odd, arrives=low, delay=jnp.arange(8), work=jnp.full(8, 0.5), speed=jnp.full(8, 3.0), gone=~odd),
    constant(present=low, arrives=odd, delay=jnp.full(8, 2), work=jnp.full(8, 0.25), speed=jnp.full(8, 2.0), gone=~low),
    leaving(),
    population.waiting(3),
    constant(wait=jnp.arange(8)),
  )
  state = population.start(process, 0)
  for round in range(4):
    state = population.step(process, state, jnp.int32(round), 0)
  got = population.look(process, state, jnp.int32(3), jnp.arange(8), 0)
  i = np.arange(8)
  np.testing.assert_array_equal(got.present, (i % 2 == 1) & (i < 4) & (i >= 1))
  np.testing.assert_array_equal(got.arrives, (i < 4) & (i % 2 == 1))
  np.testing.assert_array_equal(got.delay, i + 2)
  np.testing.assert_array_equal(got.wait, i + 3)
  np.testing.assert_array_equal(got.work, np.full(8, 0.125))
  np.testing.assert_array_equal(got.speed, np.full(8, 6.0))
  np.testing.assert_array_equal(got.gone, (i % 2 == 0) | (i >= 4) | (i < 1))


def test_chained_processes_draw_apart():
  process = population.make(["cold", "cold"], N, jnp.full(2, 0.5))
  look = jax.jit(lambda: population.look(process, population.start(process, 0), 0, jnp.arange(N), 0))
  # Two independent halves leave a quarter on average (hypergeometric, standard deviation 3.5); equal ones a half.
  assert abs(int(jnp.sum(look().present)) - N // 4) < 18


def test_a_chain_of_two_is_both(history):
  """Of two chains of on and off, one after the other: there if both are, and each keeps its own law."""

  @jax.jit
  def there(seed):
    process = population.make(["markov", "regional"], N, jnp.array([0.3, 0.5]), facts=FACTS)
    return population.look(process, population.start(process, seed), 7, jnp.arange(N), seed).present

  present = np.stack([there(seed) for seed in range(100)])
  # Region by region: away together, else as the chain says.
  assert abs(np.mean(present) - 0.7 * 0.5) < 5 * np.sqrt(0.25 / (7 * 100))
  awake = np.mean(present, axis=1)
  assert np.std(awake) > 3 * np.sqrt(0.35 * 0.65 / N), "the shared cause shows"


def test_other_processes_change_no_draw():
  names, rates = ["cold", "bernoulli"], jnp.full(2, 0.5)
  seen = []
  for process in (population.make(names, N, rates), population.make(names, N, rates, population.waiting(7))):
    seen.append(population.look(process, population.start(process, 1), 2, jnp.arange(N), 1))
  np.testing.assert_array_equal(seen[1].wait, 7)
  jax.tree.map(np.testing.assert_array_equal, seen[1]._replace(wait=seen[0].wait), seen[0])


def test_departed_is_what_a_loop_over_rounds_sees():
  num_clients, seed = 12, 2
  process = population.chain(population.cold(num_clients, 0.25), leaving(), population.bernoulli(0.5))
  departed = jax.jit(lambda rounds: population.departed(process, seed, rounds, num_clients))

  @jax.jit
  def go_on(state, round):
    state = population.step(process, state, round, seed)
    return state, population.look(process, state, round, jnp.arange(num_clients), seed).present

  state, present = population.start(process, seed), []
  for round in range(12):
    state, now = go_on(state, round)
    present.append(np.asarray(now))
    # Nobody of this population is away for a while only: who is absent now does not come back.
    np.testing.assert_array_equal(departed(round + 1), ~present[-1])
  assert np.all(np.diff(np.stack(present).astype(int), axis=0) <= 0)
  assert 0 < np.sum(present[-1]) < np.sum(present[0]) == 9
