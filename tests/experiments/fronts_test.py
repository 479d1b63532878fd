"""Fronts on points made up by hand."""

import math

import pytest

from experiments import fronts


def point(own, pooled, method="m", variant="", seeds=(0, 1, 2)):
  """A variant whose means are these; seeds differ by a point to either side."""
  shift = {seed: (seed - 1) / 100 for seed in seeds}
  by_seed = lambda value: {seed: value + shift[seed] for seed in seeds}
  return fronts.Point(method, variant, by_seed(own), by_seed(pooled))


SOME = [point(0.9, 0.5), point(0.8, 0.7), point(0.8, 0.6), point(0.95, 0.4), point(0.7, 0.7)]


def test_a_front_has_what_nothing_beats_in_both():
  assert fronts.front(SOME) == [SOME[1], SOME[0], SOME[3]]
  assert fronts.front([]) == []


def test_the_best_at_a_level_is_the_best_of_those_that_reach_it():
  assert fronts.at_level(SOME, 0.85) is SOME[0]
  assert fronts.at_level(SOME, 0.7) is SOME[1]
  assert fronts.at_level(SOME, 0.8) is SOME[1]  # to the digit
  assert fronts.at_level(SOME, 0.96) is None
  assert fronts.top_level(SOME) == pytest.approx(0.94)


def test_a_lead_is_seed_by_seed_at_the_same_level():
  rival = [point(0.9, 0.3, seeds=(0, 1)), point(0.5, 0.9)]
  got = fronts.lead(SOME, rival, 0.85)
  assert got.mean == pytest.approx(0.2) and len(got.differences) == 2
  assert fronts.lead(SOME, rival, 0.4).mean == pytest.approx(-0.2)
  assert fronts.lead(SOME, rival, 0.93) is None  # the rival is not there


def test_the_least_lead_is_that_over_the_rivals_whole_front():
  rival = [point(0.94, 0.3), point(0.78, 0.69), point(0.6, 0.68)]
  assert fronts.least_lead(SOME, rival, 0.94).mean == pytest.approx(0.01)
  beyond = [point(0.99, 0.1)]
  assert fronts.least_lead(SOME, beyond, 0.98) is None
  assert fronts.least_lead(SOME, beyond, 0.94).mean == pytest.approx(0.3)  # above the top counts as the top
  assert fronts.least_lead([], rival, 0.9) is None and fronts.least_lead(SOME, [], 0.9) is None


def test_points_without_numbers_are_left_out():
  empty = fronts.Point("m", "", {}, {})
  found = fronts.by_method([SOME[0], empty, point(0.1, 0.2, method="other")])
  assert list(found) == ["m", "other"] and found["m"] == [SOME[0]]
  assert math.isnan(fronts.mean({}))
