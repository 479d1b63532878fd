"""Keys and keyed permutations: bijections counted one by one, uniformity by chi-square with fixed keys."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from apfl_jax import random
from apfl_jax.random import Purpose

LARGEST = 70
UNLIKELY = 1e-6  # the keys are fixed, so a sound generator passes always


@pytest.fixture(scope="module")
def orders():
  """(keys [R], sizes [R]) -> int32 [R, 76]: the elements at positions -3 to 72."""

  def order(key, size):
    return random.permute(random.permutation_key(key), jnp.arange(-3, LARGEST + 3), size)

  return jax.jit(jax.vmap(order))


def test_permute_is_a_bijection_of_every_size_and_clamps_positions(orders):
  sizes = np.repeat(np.arange(1, LARGEST + 1), 5)
  got = np.asarray(orders(jax.random.split(jax.random.key(0), len(sizes)), sizes))
  for size, row in zip(sizes, got, strict=True):
    inside = row[3 : 3 + size]
    np.testing.assert_array_equal(np.sort(inside), np.arange(size))
    np.testing.assert_array_equal(row[:3], inside[0])
    np.testing.assert_array_equal(row[3 + size :], inside[-1])


def test_permute_compiles_once_for_all_large_sizes():
  traces = 0

  @jax.jit
  def order(key, size):
    nonlocal traces
    traces += 1
    return random.permute(random.permutation_key(key), jnp.arange(131073), size)

  for size in (1000, 65536, 65537, 131073):
    got = np.asarray(order(jax.random.key(size), size))[:size]
    np.testing.assert_array_equal(np.bincount(got, minlength=size), np.ones(size))
  assert traces == 1


def test_permute_reaches_the_largest_sizes():
  bits = random.permutation_key(jax.random.key(1))
  permute = jax.jit(random.permute)
  for size in (2**29 + 1, 2**30 - 1, 2**30):
    positions = np.r_[0:500, size - 500 : size]
    got = np.asarray(permute(bits, positions, size))
    assert len(set(got.tolist())) == len(positions)
    assert got.min() >= 0 and got.max() < size
    assert stats.kstest(got / size, "uniform").pvalue > UNLIKELY


@pytest.fixture(scope="module")
def small_orders():
  """(keys [R], size) -> int32 [R, 8], for chi-squares over many keys."""
  order = lambda key, size: random.permute(random.permutation_key(key), jnp.arange(8), size)
  mapped = jax.jit(jax.vmap(order, in_axes=(0, None)))
  keys = jax.random.split(jax.random.key(2), 20000)
  return functools.cache(lambda size: np.asarray(mapped(keys, size))[:, :size])


@pytest.mark.parametrize("size", range(2, 9))
def test_every_element_is_as_often_first(small_orders, size):
  counts = np.bincount(small_orders(size)[:, 0], minlength=size)
  assert stats.chisquare(counts).pvalue > UNLIKELY, counts


@pytest.mark.parametrize("size", range(3, 9))
def test_every_pair_of_elements_is_as_often_at_a_pair_of_positions(small_orders, size):
  order = small_orders(size)
  different = ~np.eye(size, dtype=bool)
  for a, b in itertools.combinations(range(size), 2):
    counts = np.bincount(order[:, a] * size + order[:, b], minlength=size**2).reshape(size, size)
    assert stats.chisquare(counts[different]).pvalue > UNLIKELY, (a, b, counts)


def test_keys_give_different_orders(orders):
  got = np.asarray(orders(jax.random.split(jax.random.key(3), 200), np.full(200, LARGEST)))
  assert len({tuple(row) for row in got.tolist()}) == 200
  # Two independent orders agree at one position on average, with variance one.
  assert abs(np.mean(got[1:, 3:-3] == got[:-1, 3:-3]) * LARGEST - 1) < 5 / np.sqrt(199)


def test_keys_differ_by_seed_purpose_and_data():
  keys = [random.key(seed, purpose) for seed in range(3) for purpose in Purpose]
  keys += [
    random.key(seed, Purpose.CLIENT, *data) for seed in range(3) for data in [(0,), (1,), (0, 0), (0, 1), (1, 0)]
  ]
  words = {tuple(jax.random.key_data(k).tolist()) for k in keys}
  assert len(words) == len(keys)


@pytest.mark.parametrize("number", [0, 2**31, 2**32 - 1])
def test_data_is_folded_in_one_by_one(number):
  key = jax.random.key(7)
  for value in (Purpose.LOCAL_UPDATE, 5, number):
    key = jax.random.fold_in(key, value)
  assert random.key(7, Purpose.LOCAL_UPDATE, 5, number) == key


def test_what_is_no_number_of_32_bits_is_refused():
  for number in (-1, 2**32):
    with pytest.raises(OverflowError):
      random.key(7, Purpose.LOCAL_UPDATE, number)


def test_traced_and_concrete_keys_are_equal():
  traced = jax.jit(lambda *x: random.key(x[0], Purpose.COHORT, *x[1:]))(jnp.uint32(7), jnp.int32(5), jnp.int32(3))
  assert traced == random.key(7, Purpose.COHORT, 5, 3)


@pytest.fixture(scope="module")
def categorical():
  return jax.jit(lambda key, weights: random.categorical(key, weights, (100, 500)))


@pytest.mark.parametrize(
  "weights", [[0, 1, 0, 2.5, 0.5, 0], [3, 1, 0, 0, 0, 2], [0, 0, 0, 0, 0, 1e-6], [1e6, 0, 1e6, 0, 0, 0]]
)
def test_categorical_draws_in_proportion_and_never_a_zero(categorical, weights):
  drawn = np.asarray(categorical(jax.random.key(4), jnp.asarray(weights, jnp.float32)))
  assert drawn.shape == (100, 500) and drawn.dtype == np.int32
  share = np.asarray(weights) / np.sum(weights)
  counts = np.bincount(drawn.ravel(), minlength=6)
  assert np.all(counts[share == 0] == 0)
  if np.sum(share > 0) > 1:
    assert stats.chisquare(counts[share > 0], drawn.size * share[share > 0]).pvalue > UNLIKELY


def test_categorical_never_draws_a_zero_at_the_ends_of_the_unit_interval(monkeypatch):
  ends = jnp.array([0.0, 1.0])  # the second by rounding: the largest draw below 1 times a large total
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape: ends.reshape(shape))
  drawn = random.categorical(jax.random.key(0), jnp.array([0.0, 2.0, 0.0, 3.0, 0.0]), (2,))
  np.testing.assert_array_equal(drawn, [1, 3])
