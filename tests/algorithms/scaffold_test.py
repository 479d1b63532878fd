"""SCAFFOLD against its equations in NumPy, and against FedAvg where the two are one."""

import numpy as np

from apfl_jax.algorithms import fedavg, scaffold
from tests import linear


def test_rounds_are_those_of_the_paper():
  rate, server_rate = linear.STEPS * linear.LEARNING_RATE, 0.7
  rounds = linear.Rounds(scaffold(linear.task(), server_learning_rate=server_rate))
  x, control, own = linear.start(), linear.nothing(), dict.fromkeys(range(4), linear.nothing())
  for ids, lost in (((0, 1, 2), ()), ((0, 2, 3), (2,)), ((2, 3), ())):
    rounds.advance(ids, lost=lost)
    deltas, changes = [], []
    for id in ids:
      correction = linear.plus(control, (-1, own[id]))
      moved = linear.plus(linear.descend(id, x, lambda _, c=correction: c), (-1, x))
      new = linear.plus(own[id], (-1, control), (-1 / rate, moved))
      if id not in lost:
        deltas.append(moved)
        changes.append(linear.plus(new, (-1, own[id])))
      own[id] = new
    x = linear.plus(x, *((server_rate / len(deltas), d) for d in deltas))
    control = linear.plus(control, *((1 / len(linear.SIZES), c) for c in changes))
    linear.close(rounds.params, x)
    linear.close(rounds.server.control, control)
    for id in ids:
      linear.close(rounds.clients[id], own[id])


def test_the_first_round_is_uniform_fedavg_and_the_second_is_not():
  plain = linear.Rounds(fedavg(linear.task(weighting="uniform")))
  controlled = linear.Rounds(scaffold(linear.task()))
  for rounds in (plain, controlled):
    rounds.advance((0, 1, 2, 3))
  linear.close(controlled.params, plain.params, 1e-6)
  for rounds in (plain, controlled):
    rounds.advance((0, 1, 2, 3))
  assert np.abs(controlled.params.head - plain.params.head).max() > 1e-3


def test_a_client_without_examples_keeps_its_control_and_counts_nothing():
  with_it, without = (linear.Rounds(scaffold(linear.task())) for _ in range(2))
  with_it.advance((0, 1))
  without.advance((0, 1))
  with_it.advance((0, 1, 2), sizes={2: 0})
  without.advance((0, 1))
  linear.close(with_it.params, without.params, 1e-6)
  linear.close(with_it.server.control, without.server.control, 1e-6)
  assert not with_it.clients[2].head.any()
