"""Cohorts against looking at the whole population along the whole permutation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from apfl_jax import population, random
from apfl_jax.simulation.cohort import draw_cohort
from apfl_jax.types import Array, Process

N, ROUNDS = 50, 40


def flickering(rate: Array | float) -> Process:
  """Each client is absent with probability `rate`, independently in every round."""
  everyone = population.everyone()

  def look(state, round, ids, key):
    chance = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(ids)
    return everyone.look(state, round, ids, key)._replace(present=chance >= rate)

  return everyone._replace(look=look)


PRESENCE = {"cold": lambda size, rate: population.cold(size, rate), "flickering": lambda size, rate: flickering(rate)}


@pytest.fixture(scope="module")
def drawn():
  """(name, N, K, rate, seed) -> (ids [ROUNDS, K], ok [ROUNDS, K]) and all that decides them, (order, present)."""

  @functools.cache
  def compiled(name, size, count):
    @jax.jit
    def rounds(rate, seed):
      process = PRESENCE[name](size, rate)
      state = population.start(process, seed)

      def one(round):
        bits = random.permutation_key(random.key(seed, random.Purpose.COHORT, round))
        order = random.permute(bits, jnp.arange(size), size)
        present = population.look(process, state, round, jnp.arange(size), seed).present
        return draw_cohort(process, state, round, seed, size, count), order, present

      return jax.lax.map(one, jnp.arange(ROUNDS))

    return rounds

  def draw(name, size, count, rate, seed=0):
    return jax.tree.map(np.asarray, compiled(name, size, count)(jnp.float32(rate), jnp.uint32(seed)))

  return draw


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("name", "size", "count"), [("cold", N, 8), ("flickering", N, 8), ("flickering", 12, 12)])
def test_the_cohort_is_the_first_present_ones_along_the_permutation(drawn, name, size, count, rate):
  (ids, ok), orders, presences = drawn(name, size, count, rate)
  assert ids.shape == ok.shape == (ROUNDS, count)
  short = 0
  for got, valid, order, present in zip(ids, ok, orders, presences, strict=True):
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    want = [client for client in order if present[client]][:count]
    np.testing.assert_array_equal(valid, np.arange(count) < len(want))
    np.testing.assert_array_equal(got[valid], want)
    assert np.all((got >= 0) & (got < size))  # the rest are still row numbers
    short += len(want) < count
  # The cases are what they are meant to be: all, some or none of the rounds have enough clients.
  enough = {0.0: ROUNDS, 0.5: None if size == count else ROUNDS, 1.0: 0}.get(rate)
  assert enough is None or ROUNDS - short == enough
  if rate == 0.9:
    assert short > 0


def test_cohorts_differ_by_round_and_by_seed(drawn):
  first, second = (drawn("cold", N, 8, 0.0, seed)[0][0] for seed in (0, 1))
  assert len({tuple(row) for row in first.tolist()}) == ROUNDS
  assert np.all(np.any(first != second, axis=-1))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_every_client_is_picked_as_often(drawn, rate):
  cohorts = [drawn("flickering", N, 8, rate, seed)[0] for seed in range(50)]
  times = np.bincount(np.concatenate([ids[ok] for ids, ok in cohorts]), minlength=N)
  rounds, share = 50 * ROUNDS, 8 / N
  assert np.sum(times) == rounds * 8
  # A count's variance is that of `rounds` draws of chance `share`, and their sum is fixed.
  deviation = np.sum((times - rounds * share) ** 2) / (rounds * share * (1 - share)) * (N - 1) / N
  assert stats.chi2.sf(deviation, N - 1) > 1e-6
