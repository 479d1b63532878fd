"""Adaptive personalised FL against its equations in NumPy, and at both ends of its mixing weight."""

import jax
import numpy as np
import pytest

from apfl_jax.algorithms import adaptive_pfl, local
from tests import linear


def mixed(alpha, v, w):
  return linear.plus(w, (alpha, v), (-alpha, w))


def step(id, v, w, alpha, rate):
  gradient = linear.oracle(id).gradient(mixed(alpha, v, w))
  slope = sum(np.sum((a - b) * g) for a, b, g in zip(v, w, gradient, strict=True))
  return linear.plus(v, (-rate * alpha, gradient)), np.clip(alpha - rate * slope, 0, 1)


@pytest.mark.parametrize("alpha", [0.5, 0.97])
def test_rounds_are_those_of_the_paper(alpha):
  rounds, plain = linear.Rounds(adaptive_pfl(linear.task(), alpha=alpha)), linear.Rounds(linear.fedavg())
  own, clipped = {}, False
  for ids, lost in (((0, 1, 2), (2,)), ((0, 2), ()), ((1, 2), ()), ((1, 2), ())):
    before = plain.params
    for one in (rounds, plain):
      one.advance(ids, lost=lost)
    linear.close(rounds.params, plain.params, 1e-6)
    for id in ids:
      w = before
      v, share = own.get(id, (w, alpha))
      for _ in range(linear.STEPS):
        gradient = linear.oracle(id).gradient(w)
        v, share = step(id, v, w, share, linear.LEARNING_RATE)
        w = linear.plus(w, (-linear.LEARNING_RATE, gradient))
      own[id] = v, share
      clipped |= share == 1
      linear.close(rounds.clients[id].params, v)
      np.testing.assert_allclose(rounds.clients[id].alpha, share, rtol=1e-5)
  assert clipped == (alpha > 0.9)

  v, share = own[0]
  for rate in linear.LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(3) / 3)):
    v, share = step(0, v, rounds.params, share, rate)
  download = rounds.algorithm.download(rounds.server)
  model = rounds.algorithm.personalize(download, rounds.clients[0], linear.data(0), linear.visit(0), jax.random.key(6))
  linear.close(model, mixed(share, v, rounds.params))


def test_at_one_it_is_local_training_and_at_zero_the_global_model():
  task = linear.task()
  alone, nothing, plain = (
    linear.Rounds(algorithm)
    for algorithm in (
      adaptive_pfl(task, alpha=1.0, adapt=False),
      adaptive_pfl(task, alpha=0.0, adapt=False),
      local(task),
    )
  )
  for rounds in (alone, nothing, plain):
    for _ in range(3):
      rounds.advance((0, 2))
  linear.close(alone.clients[2].params, plain.clients[2], 1e-6)
  assert float(alone.clients[2].alpha) == 1
  model = nothing.algorithm.personalize(
    nothing.algorithm.download(nothing.server), nothing.clients[2], linear.data(2), linear.visit(2), jax.random.key(6)
  )
  linear.close(model, nothing.params, 0)
