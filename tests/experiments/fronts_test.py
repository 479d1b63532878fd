"""Fronts on points made up by hand."""

import math

import numpy as np
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
  every = [*SOME, *rival]
  at = lambda level: fronts.lead(SOME, rival, every, point(level, 0.0))
  assert at(0.85).mean == pytest.approx(0.2) and len(at(0.85).differences) == 2  # of the rival's two seeds
  assert at(0.4).mean == pytest.approx(-0.2) and len(at(0.4).differences) == 3
  nowhere = fronts.lead(SOME, rival, every)  # at .94, where the rival is not
  assert nowhere.differences.tolist() == [1, 1, 1] and nowhere.low == 1
  assert fronts.lead(rival, SOME, every).high == -1
  assert fronts.lead(SOME, [], SOME).mean is None


def test_leads_are_those_at_the_rivals_whole_front():
  means = lambda rival: [pair.mean for pair in fronts.leads(SOME, rival, [*SOME, *rival])]
  assert means([point(0.94, 0.3), point(0.78, 0.69), point(0.6, 0.68)]) == pytest.approx([0.01, 0.1])
  assert means([point(0.949, 0.1)]) == pytest.approx([0.3])  # above the top counts as the top
  assert means([point(0.99, 0.1)]) == [-1] and means([]) == []
  assert [pair.mean for pair in fronts.leads([], SOME, SOME)] == [None] * 3


def test_of_equal_methods_the_one_with_more_variants_is_not_ahead():
  rng = np.random.default_rng(0)
  found = []
  for _ in range(60):
    one, many = (
      [fronts.Point("", "", dict.fromkeys(range(5), 0.9), dict(enumerate(rng.normal(0.5, 0.1, 5)))) for _ in range(n)]
      for n in (1, 20)
    )
    best = max(fronts.mean(p.pooled) for p in many) - fronts.mean(one[0].pooled)
    found.append((fronts.lead(many, one, [*one, *many]).mean, best))
  honest, best = np.mean(found, axis=0)
  assert abs(honest) < 0.02 < 0.06 < best


def test_a_seed_has_no_part_in_the_choice_of_its_own_level():
  """Without seed 0 the second method is nowhere near; seed 0 alone would set a level that the first does not reach."""
  flat = lambda value: dict.fromkeys(range(3), value)
  points = [fronts.Point("a", "", flat(0.9), flat(0.7)), fronts.Point("b", "", {0: 0.99, 1: 0.86, 2: 0.86}, flat(0.5))]
  got = fronts.lead(points[:1], points[1:], points)
  assert got.differences.tolist() == [1, -1, -1]


def test_points_without_numbers_are_left_out():
  empty = fronts.Point("m", "", {}, {})
  found = fronts.by_method([SOME[0], empty, point(0.1, 0.2, method="other")])
  assert list(found) == ["m", "other"] and found["m"] == [SOME[0]]
  assert math.isnan(fronts.mean({}))
