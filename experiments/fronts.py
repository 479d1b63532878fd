"""Fronts of own against pooled accuracy: what a method can reach when its settings are tuned, beside what others can.

A personal model that only has to know its client's classes is easy to get (method 8.3): at equal accuracy on its own
mix of classes the question is how much it knows of all. One setting of a baseline is no baseline, so a method is the
whole set of its variants: a variant counts at a level of own accuracy if its mean over seeds reaches it, and the best
of those is compared, seed by seed.
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


def mean(values: Mapping[int, float]) -> float:
  """Over seeds; nan without any."""
  return sum(values.values()) / len(values) if values else math.nan


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


def at_level(points: Sequence[Point], level: float) -> Point | None:
  """The point with the best pooled accuracy among those whose own accuracy reaches the level; None without any."""
  reached = [point for point in points if mean(point.own) >= level - 1e-9]
  return max(reached, key=lambda point: mean(point.pooled), default=None)


def top_level(points: Iterable[Point]) -> float:
  """The best own accuracy of all, less a point: the level at which methods are told apart by what else they know."""
  return max((mean(point.own) for point in points), default=math.nan) - SLACK


def lead(first: Sequence[Point], second: Sequence[Point], level: float) -> Paired | None:
  """Pooled accuracy of the first method less the second's at a level; None where one of them does not reach it."""
  a, b = at_level(first, level), at_level(second, level)
  if a is None or b is None:
    return None
  seeds = [seed for seed in a.pooled if seed in b.pooled]
  return metrics.paired([a.pooled[s] for s in seeds], [b.pooled[s] for s in seeds])


def least_lead(first: Sequence[Point], second: Sequence[Point], top: float) -> Paired | None:
  """The smallest `lead` at the levels of the second method's front; None where the first does not reach one of them.

  Levels above `top` count as `top`.
  """
  leads = [lead(first, second, min(mean(point.own), top)) for point in front(second)]
  if not leads or any(found is None or found.mean is None for found in leads):
    return None
  return min((found for found in leads if found is not None), key=lambda found: found.mean or 0.0)
