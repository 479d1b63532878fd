"""Fronts of own against pooled accuracy: what a method can reach when its settings are tuned, beside what others can.

A personal model that only has to know its client's classes is easy to get (method 8.3): at equal accuracy on its own
mix of classes the question is how much it knows of all. One setting of a baseline is no baseline, so a method is the
whole set of its variants: a variant counts at a level of own accuracy if its mean over seeds reaches it, and the best
of those is compared, on each seed by the choice that all other seeds make.
"""

import math
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from apfl_jax import metrics
from apfl_jax.metrics import Paired

SLACK = 0.01  # own accuracies that differ by a point are taken as equal


class Point(NamedTuple):
  """A variant of a method, by seed.

  Attributes:
    method: whose front it is on.
    variant: its settings, in words.
    own: accuracy of the personal models on their clients' mix of classes, in [0, 1].
    pooled: accuracy on all classes alike.
    tested: own accuracy by the clients' own test examples, which are few; for tables.
  """

  method: str
  variant: str
  own: Mapping[int, float]
  pooled: Mapping[int, float]
  tested: Mapping[int, float] = types.MappingProxyType({})


def mean(values: Mapping[int, float], but: int | None = None) -> float:
  """Over seeds, but for one of them; nan without any."""
  kept = [value for seed, value in values.items() if seed != but]
  return sum(kept) / len(kept) if kept else math.nan


def by_method(points: Iterable[Point]) -> dict[str, list[Point]]:
  """The points of each method, in the order in which methods first come; those without numbers are left out."""
  found: dict[str, list[Point]] = {}
  for point in points:
    if not math.isnan(mean(point.own) + mean(point.pooled)):
      found.setdefault(point.method, []).append(point)
  return found


def front(points: Sequence[Point]) -> list[Point]:
  """The points that no other one beats in both means, by rising own accuracy."""
  place = lambda p: (mean(p.own), mean(p.pooled))
  kept: list[Point] = []
  for point in sorted(points, key=place, reverse=True):
    if not kept or mean(point.pooled) > mean(kept[-1].pooled):
      kept.append(point)
  return kept[::-1]


def at_level(points: Sequence[Point], level: float, but: int | None = None) -> Point | None:
  """The point with the best pooled accuracy among those whose own accuracy reaches the level; None without any."""
  reached = [point for point in points if mean(point.own, but) >= level - 1e-9]
  return max(reached, key=lambda point: mean(point.pooled, but), default=None)


def top_level(points: Iterable[Point], but: int | None = None) -> float:
  """The best own accuracy of all, less a point: the level at which methods are told apart by what else they know."""
  return max((m for point in points if not math.isnan(m := mean(point.own, but))), default=math.nan) - SLACK


def lead(first: Sequence[Point], second: Sequence[Point], every: Sequence[Point], at: Point | None = None) -> Paired:
  """Pooled accuracy of the first method less the second's, each by its best variant at a level of own accuracy.

  What is compared on a seed, the level and both variants, is chosen by the means over all other seeds. Chosen by that
  seed too, a method with more variants would be ahead by chance; drawing the choice anew in each draw of the bootstrap
  makes that worse, for the best of many is higher still on seeds that are there twice [O].

  Args:
    first: the points of a method.
    second: those of another.
    every: the points of all methods; the level is never above their top, see `top_level`.
    at: the point whose own accuracy is the level; None for the top.

  Returns:
    A difference for each seed on which both have numbers; -1 where the first does not reach the level, else 1 where the
    second does not.
  """
  seeds = sorted({s for p in first for s in p.pooled} & {s for p in second for s in p.pooled})
  differences = []
  for seed in seeds:
    but = seed if len(seeds) > 1 else None
    level = top_level(every, but) if at is None else min(top_level(every, but), mean(at.own, but))
    a, b = at_level(first, level, but), at_level(second, level, but)
    if a is None:
      differences.append(-1.0)
    elif b is None:
      differences.append(1.0)
    else:
      differences.append(a.pooled.get(seed, math.nan) - b.pooled.get(seed, math.nan))
  return metrics.paired(differences, [0.0] * len(differences))


def leads(first: Sequence[Point], second: Sequence[Point], every: Sequence[Point]) -> list[Paired]:
  """`lead` at the level of each point of the second method's front."""
  return [lead(first, second, every, point) for point in front(second)]
