"""PersA-FL: its options where they are other methods, its server step and its discount for staleness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.algorithms import fedavg_ft, per_fedavg, persafl, pfedme
from apfl_jax.types import Download, Params
from tests import linear

SCHEDULE = (((0, 1, 2), (2,)), ((0, 2), ()))
FAST = {"inner_learning_rate": 0.05, "envelope_weight": 3.0}
SAME = {
  "a": ({}, lambda task: fedavg_ft(task)),
  "b": ({"alpha": 0.6}, lambda task: per_fedavg(task, alpha=0.6, first_order=True)),
  "b exact": (
    {"option": "b", "alpha": 0.6, "first_order": False},
    lambda task: per_fedavg(task, alpha=0.6, first_order=False),
  ),
  "c": (FAST, lambda task: pfedme(task, **FAST)),
}


TASK = linear.task(weighting="uniform", batch_size=4)


def advanced(algorithm):
  rounds = linear.Rounds(algorithm)
  for ids, lost in SCHEDULE:
    rounds.advance(ids, lost=lost)
  return rounds


@functools.cache
def after(option):
  """PersA-FL's rounds with an option, for all tests of it."""
  return advanced(persafl(TASK, **({"option": option} | SAME[option][0])))


# "b" is slow to compile: it is told from the exact one below, and common_test.py trains with it, the default.
@pytest.mark.parametrize("option", [pytest.param(name, marks=[pytest.mark.slow] * (name == "b")) for name in SAME])
def test_without_delay_it_is_the_synchronous_method_and_personalises_as_that_does(option):
  both = [after(option), advanced(SAME[option][1](TASK))]
  linear.close(both[0].server, both[1].server, 1e-6)
  models = [
    jax.jit(rounds.algorithm.personalize)(
      Download(rounds.server), (), linear.data(3), linear.visit(3), jax.random.key(1)
    )
    for rounds in both
  ]
  linear.close(*models, 1e-6)


def test_the_plain_option_has_a_rate_of_its_own_when_it_personalises_and_there_alone():
  task, alpha = linear.task(personal_steps=1), 0.5
  both = [linear.Rounds(persafl(task, option="a", alpha=alpha)), linear.Rounds(linear.fedavg())]
  for rounds in both:
    rounds.advance((0, 1, 2))
  linear.close(both[0].server, both[1].server, 1e-6)
  download = Download(both[0].server)
  personal = both[0].algorithm.personalize(download, (), linear.data(3), linear.visit(3), jax.random.key(1))
  before = Params(*map(np.float64, both[0].server))
  slope = linear.oracle(3).gradient(before)
  linear.close(personal, linear.plus(before, (-alpha * linear.LEARNING_RATE, slope)), 1e-5)


def test_the_options_differ_and_so_does_the_first_order_of_b():
  ends = [np.asarray(after(option).server.head) for option in SAME]
  assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(ends) for b in ends[:i])


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_plain_and_without_delay_it_is_fedavg_with_a_server_step(weighting):
  task, beta = linear.task(weighting=weighting), 0.6
  usual = linear.fedavg(weighting=weighting)
  one = linear.Rounds(persafl(task, option="a", server_learning_rate=beta))
  expected = linear.start()
  for ids, lost in SCHEDULE:
    plain = linear.Rounds(usual)
    plain.server = one.server
    one.advance(ids, lost=lost)
    plain.advance(ids, lost=lost)
    expected = linear.plus(expected, *((beta * s, p) for s, p in ((1, plain.server), (-1, expected))))
    linear.close(one.server, expected, 1e-5)


@pytest.mark.parametrize(("power", "discount"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.25)])
def test_a_single_late_arrival_counts_less(power, discount):
  algorithm = persafl(linear.task(), option="a", staleness_power=power)
  download = algorithm.download(algorithm.init(jax.random.key(0)))
  update = jax.jit(algorithm.local_update)
  late = linear.visit(0)._replace(staleness=jnp.int32(3))
  (_, upload), (_, fresh) = (
    update(download, (), linear.data(0), visit, jax.random.key(1)) for visit in (late, linear.visit(0))
  )
  linear.close(upload.update, jax.tree.map(lambda x: discount * x, fresh.update), 1e-6)
  assert upload.weight == fresh.weight
