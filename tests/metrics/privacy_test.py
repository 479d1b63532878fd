"""Attacks against closed forms: what nobody can tell apart, what everybody can, and all pairs counted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from apfl_jax.metrics import privacy, samples

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=25)


@given(SCORES, SCORES)
@settings(max_examples=60, deadline=None)
def test_auc_counts_pairs(members, others):
  pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
  assert privacy.auc(members, others) == pytest.approx(np.mean(pairs))
  assert privacy.auc(others, members) == pytest.approx(1 - np.mean(pairs))


def test_auc_of_two_gaussians_is_its_closed_form():
  rng = np.random.default_rng(0)
  a, b = rng.normal(1.0, 1.0, 20_000), rng.normal(0.0, 1.0, 20_000)
  assert privacy.auc(a, b) == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=0.01)
  assert privacy.auc(a, []) is None and privacy.auc([], b) is None


def test_matched_lists_have_the_same_classes_and_no_example_twice():
  rng = np.random.default_rng(0)
  labels, other_labels = np.repeat([0, 1, 2, -1], [50, 5, 9, 9]), np.repeat([0, 1, 3, -1], [20, 30, 9, 9])
  for most, sizes in ((100, [20, 5]), (20, [10, 5])):
    first, second = privacy.matched(labels, other_labels, rng, most=most)
    np.testing.assert_array_equal(labels[first], other_labels[second])
    np.testing.assert_array_equal(np.bincount(labels[first], minlength=2), sizes)
    assert len(set(first)) == len(first) and len(set(second)) == len(second)
  nothing, _ = privacy.matched([0, 0], [1], rng)
  assert len(nothing) == 0


@pytest.mark.parametrize(("copies", "expected"), [(True, 1.0), (False, 0.5)])
def test_samples_that_copy_are_told_from_samples_that_do_not(copies, expected):
  """The generator hands out what it was trained with, or draws anew from where that came from."""
  rng = np.random.default_rng(0)
  members, others = rng.normal(size=(2, 400, 5))
  made = members if copies else rng.normal(size=members.shape)
  to_members, to_others = (samples.nearest(made, real).distance for real in (members, others))
  assert privacy.closer(to_members, to_others) == pytest.approx(expected, abs=0.08)
  score = lambda real: -samples.nearest(real, made).distance
  assert privacy.auc(score(members), score(others)) == pytest.approx(expected, abs=0.08)


def test_closer_shares_ties():
  assert privacy.closer([1.0, 2.0, 3.0, 0.0], [1.0, 1.0, 4.0, 0.0]) == pytest.approx((0.5 + 0 + 1 + 0.5) / 4)
  assert privacy.closer([], []) is None
