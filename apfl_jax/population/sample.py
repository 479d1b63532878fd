"""Makes `sample.csv`, a synthetic trace in the shape of those of phones; run as `python -m apfl_jax.population.sample`.

No device was observed. A phone counts as there while it charges: most nights for about 7 hours, and now and then by
day for about an hour; phones are in four time zones, and their speeds are log-normal. All numbers are ours [O].
"""

import csv

import numpy as np

from apfl_jax.population.traces import SAMPLE

_CLIENTS, _DAYS = 60, 7
_ZONES = (0, 6, 8, 16)  # hours


def rows(rng: np.random.Generator) -> list[tuple[int, float, float, float]]:
  """(client, start, end, speed) of all intervals, in hours over a week."""
  result = []
  for client in range(_CLIENTS):
    zone, bedtime, habit = rng.choice(_ZONES), rng.normal(23, 1), rng.uniform(0.5, 1)
    speed = round(float(np.exp(rng.normal(0, 0.5))), 3)
    spans = []
    for day in range(-1, _DAYS):
      midnight = 24 * day + zone
      if rng.random() < habit:
        start = midnight + bedtime + rng.normal(0, 0.5)
        spans.append((start, start + max(1.0, rng.normal(7, 1))))
      for _ in range(rng.poisson(0.6)):
        start = midnight + rng.uniform(8, 22)
        spans.append((start, start + rng.exponential(1.0)))
    end = 0.0
    for start, stop in sorted(spans):
      start, stop = max(round(start, 2), end), min(round(stop, 2), 24.0 * _DAYS)
      if start < stop:
        result.append((client, start, stop, speed))
        end = stop
  return result


if __name__ == "__main__":
  with open(SAMPLE, "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("client", "start", "end", "speed"))
    writer.writerows(rows(np.random.default_rng(0)))
