"""FedAvgM, FedAdam and FedYogi: FedAvg's mean update as a gradient, optimised in NumPy."""

import numpy as np
import pytest

from apfl_jax.algorithms import fedadam, fedavg, fedavgm, fedyogi
from tests import linear

RATE, B1, B2, TAU = 0.3, 0.8, 0.9, 0.05
ADAPTIVE = {"server_learning_rate": RATE, "b1": B1, "b2": B2, "tau": TAU}


def test_without_momentum_it_is_fedavg():
  plain, other = linear.Rounds(fedavg(linear.task())), linear.Rounds(fedavgm(linear.task(), momentum=0.0))
  for _ in range(2):
    plain.advance((0, 1, 3))
    other.advance((0, 1, 3))
  linear.close(other.params, plain.params, 1e-6)


def _momentum(w, g, m, v, t):
  m = B1 * m + g
  return w - RATE * m, m, v


def _adam(w, g, m, v, t):
  m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
  return w - RATE * m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + TAU), m, v


def _yogi(w, g, m, v, t):
  m, v = B1 * m + (1 - B1) * g, v - (1 - B2) * g**2 * np.sign(v - g**2)
  return w - RATE * m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + TAU), m, v


@pytest.mark.parametrize(
  ("make", "settings", "step", "first"),
  [
    (fedavgm, {"server_learning_rate": RATE, "momentum": B1}, _momentum, 0),
    (fedadam, ADAPTIVE, _adam, 0),
    (fedyogi, ADAPTIVE, _yogi, 1e-6),
  ],
)
def test_the_server_is_the_optimiser(make, settings, step, first):
  rounds = linear.Rounds(make(linear.task(), **settings))
  w = linear.start()
  m, v = ([np.full(p.shape, float(first)) for p in w] for _ in range(2))
  for t in range(1, 5):
    ids = (0, 2) if t % 2 else (1, 2, 3)
    total = sum(linear.SIZES[id] for id in ids)
    new = linear.plus(w, *((linear.SIZES[id] / total, linear.plus(linear.descend(id, w), (-1, w))) for id in ids))
    rounds.advance(ids)
    for i, (old, target) in enumerate(zip(w, new, strict=True)):
      changed, m[i], v[i] = step(old, old - target, m[i], v[i], t)
      w = w._replace(**{w._fields[i]: changed})
    linear.close(rounds.params, w)
