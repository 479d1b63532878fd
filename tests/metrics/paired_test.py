"""Paired comparisons against SciPy, and where the answer is known in closed form."""

import numpy as np
import pytest
from scipy import stats

from apfl_jax import metrics
from apfl_jax.errors import InputError


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_agrees_with_scipy(count):
  rng = np.random.default_rng(count)
  a, b = rng.normal(0.4, 1, count), rng.normal(0, 1, count)
  got = metrics.paired(a, b)
  mean = lambda x, axis: np.mean(x, axis=axis)
  test = stats.permutation_test((a - b,), mean, permutation_type="samples", alternative="greater", n_resamples=np.inf)
  assert got.p_value == pytest.approx(test.pvalue)
  assert (got.mean, got.std) == pytest.approx((np.mean(a - b), stats.tstd(a - b)))
  interval = stats.bootstrap(
    (a - b,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
  ).confidence_interval
  assert (got.low, got.high) == pytest.approx(tuple(interval), abs=0.05 * got.std)


@pytest.mark.parametrize("count", [1, 3, 10, 14])
def test_always_ahead_is_as_sure_as_the_number_of_pairs_allows(count):
  ahead = np.linspace(1, 2, count)
  assert metrics.paired(ahead, np.zeros(count)).p_value == 2.0**-count
  assert metrics.paired(np.zeros(count), ahead).p_value == 1


def test_many_pairs_are_drawn_and_agree_with_the_normal_law():
  differences = np.random.default_rng(0).normal(0.2, 1, 60)
  got = metrics.paired(differences, np.zeros(60))
  z = differences.sum() / np.sqrt((differences**2).sum())
  assert got.p_value == pytest.approx(stats.norm.sf(z), abs=0.02)
  assert metrics.paired(np.ones(60), np.zeros(60)).p_value == 1 / 10_001  # never 0


def test_no_difference_is_no_evidence():
  got = metrics.paired([0.1 + 0.2, 0.5], [0.1 + 0.2, 0.5])
  assert got[1:] == (0, 0, 0, 0, 1)


def test_pairs_with_a_gap_are_left_out():
  got, want = metrics.paired([1, np.nan, 3, 4], [0, 5, 1, np.nan]), metrics.paired([1, 3], [0, 1])
  np.testing.assert_array_equal(got.differences, want.differences)
  assert got[1:] == want[1:]
  assert metrics.paired([np.nan], [1])[1:] == (None,) * 5
  assert metrics.paired([3], [1])[1:] == (2, None, None, None, 0.5)


def test_lists_of_two_lengths_are_refused():
  with pytest.raises(InputError, match="of one length"):
    metrics.paired([1, 2], [1])
