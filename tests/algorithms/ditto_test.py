"""Ditto against its equations in NumPy, and against local training and FedAvg where it is both."""

import jax
import numpy as np
import pytest

from apfl_jax.algorithms import ditto, local
from tests import linear

SCHEDULE = (((0, 1, 2), (2,)), ((0, 2), ()), ((1, 2, 3), ()))  # who comes, whose upload is lost


def near(id, v, w, weight, rates):
  for rate in rates:
    v = linear.plus(v, (-rate, linear.oracle(id).gradient(v)), (-rate * weight, v), (rate * weight, w))
  return v


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_personal_models_are_held_near_the_downloaded_one(weight):
  rounds, plain = (linear.Rounds(method) for method in (ditto(linear.task(), proximal_weight=weight), linear.fedavg()))
  own = {}
  rates = np.full(linear.STEPS, linear.LEARNING_RATE)
  for ids, lost in SCHEDULE:
    w = plain.params
    for one in (rounds, plain):
      one.advance(ids, lost=lost)
    linear.close(rounds.params, plain.params, 1e-6)
    for id in ids:
      own[id] = near(id, own.get(id, w), w, weight, rates)
      linear.close(rounds.clients[id], own[id])

  download = rounds.algorithm.download(rounds.server)
  falling = linear.LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(3) / 3))
  model = rounds.algorithm.personalize(download, rounds.clients[0], linear.data(0), linear.visit(0), jax.random.key(6))
  linear.close(model, near(0, own[0], rounds.params, weight, falling))


def test_without_proximal_term_it_is_local_training():
  both = [
    linear.Rounds(method(linear.task(batch_size=4)))
    for method in (lambda task: ditto(task, proximal_weight=0.0), local)
  ]
  for rounds in both:
    for _ in range(3):
      rounds.advance((0, 2))
  for id in (0, 2):
    linear.close(both[0].clients[id], both[1].clients[id], 1e-6)
    models = [
      rounds.algorithm.personalize(
        rounds.algorithm.download(rounds.server),
        rounds.clients[id],
        linear.data(id),
        linear.visit(id),
        jax.random.key(6),
      )
      for rounds in both
    ]
    linear.close(*models, 1e-6)
