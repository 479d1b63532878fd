"""Availability processes: counts, binomial bounds, and answers that do not depend on who else is asked about."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from apfl_jax import population
from apfl_jax.types import Array, Availability, Process

N, ROUNDS = 200, 60
UNLIKELY = 1e-6  # seeds are fixed, so a sound process passes always


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
  """(name, rate, seed) -> Availability [ROUNDS, N], stepped as a run steps; one compilation a name."""

  def compiled(name):
    @jax.jit
    def seen(rate, seed):
      process = population.make([name], N, rate[None])

      def one(state, round):
        state = population.step(process, state, round, seed)
        return state, population.look(process, state, round, jnp.arange(N), seed)

      return jax.lax.scan(one, population.start(process, seed), jnp.arange(ROUNDS))[1]

    return seen

  functions = {name: compiled(name) for name in population.PROCESSES}

  def seen(name, rate, seed=0):
    got = jax.tree.map(np.asarray, functions[name](jnp.float32(rate), jnp.uint32(seed)))
    assert functions[name]._cache_size() == 1, "a rate or a seed recompiles"
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


def test_seeds_differ(history):
  assert np.any(history("cold", 0.5, 0).present != history("cold", 0.5, 1).present)
  assert np.any(history("bernoulli", 0.5, 0).arrives != history("bernoulli", 0.5, 1).arrives)


def test_an_answer_does_not_depend_on_who_else_is_asked_about():
  process = population.make(["cold", "bernoulli"], N, jnp.full(2, 0.5))
  state = population.start(process, 5)
  look = jax.jit(lambda ids: population.look(process, state, jnp.int32(4), ids, 5))
  everyone = look(jnp.arange(N))
  shuffled = np.random.default_rng(0).permutation(N)
  for ids in (shuffled, shuffled[:3], shuffled[:6].reshape(2, 3), np.int32(17)):
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
