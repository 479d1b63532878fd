"""FedBuff and FedAsync: arrivals one by one in NumPy, stale ones, lost ones, several at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import random, simulation
from apfl_jax.algorithms import fedasync, fedavg, fedbuff, fedprox, staleness
from apfl_jax.types import Params
from tests import linear, tasks

# Clients, whose upload is lost, how stale each is.
ARRIVALS = (((0, 1, 2), (), (0, 3, 1)), ((3,), (), (5,)), ((1,), (), (2,)), ((3, 0, 1), (0,), (6, 0, 4)))
# One client without examples among them.
SIZES = {0: {1: 0}}


def _rounds(algorithm, each):
  """Runs ARRIVALS; `each(w, trained, staleness)` returns the next model of the oracle."""
  rounds, w = linear.Rounds(algorithm), linear.start()
  for number, (ids, lost, stale) in enumerate(ARRIVALS):
    without = SIZES.get(number, {})
    rounds.advance(ids, lost=lost, sizes=without, staleness=stale)
    w = each(w, {id: tau for id, tau in zip(ids, stale, strict=True) if id not in lost and id not in without})
    linear.close(rounds.params, w)
  return rounds


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_fedbuff_steps_when_its_buffer_is_full(size, momentum):
  exponent, rate = 0.7, 0.6
  buffer, velocity = [], linear.nothing()

  def each(w, arrived):
    nonlocal buffer, velocity
    start, steps = w, 0
    for id in arrived:
      buffer.append(((1 + steps) ** -exponent, linear.plus(linear.descend(id, start), (-1, start))))
      if len(buffer) == size:
        mean = linear.plus(linear.nothing(), *((s / size, d) for s, d in buffer))
        velocity = linear.plus(linear.nothing(), (momentum, velocity), (1, mean))
        w, buffer, steps = linear.plus(w, (rate, velocity)), [], steps + 1
    return w

  settings = {"server_learning_rate": rate, "server_momentum": momentum, "staleness_exponent": exponent}
  rounds = _rounds(fedbuff(linear.task(), buffer_size=size, **settings), each)
  assert rounds.server.held == len(buffer)
  linear.close(rounds.server.buffer, linear.plus(linear.nothing(), *buffer))


def test_fedbuff_counts_its_own_steps_since_the_download():
  """Whatever else the simulation calls a version."""
  algorithm = fedbuff(linear.task(), buffer_size=2, staleness_exponent=1.0)
  rounds = linear.Rounds(algorithm)
  old = algorithm.download(rounds.server)
  for ids in ((0, 1, 2, 3), (1, 2)):
    rounds.advance(ids)
  before = rounds.params
  algorithm = algorithm._replace(download=lambda server: old)
  rounds.algorithm = algorithm
  rounds.advance((0, 3), staleness=(0, 7))
  start = linear.start()
  moved = [(1 / (1 + 3) / 2, linear.plus(linear.descend(id, start), (-1, start))) for id in (0, 3)]
  linear.close(rounds.params, linear.plus(Params(*map(np.float64, before)), *moved))


def test_fedbuff_of_a_cohort_is_uniform_fedavg():
  plain = linear.Rounds(fedavg(linear.task(weighting="uniform")))
  other = linear.Rounds(fedbuff(linear.task(), buffer_size=3, staleness_exponent=0.0))
  for ids in ((0, 1, 2), (1, 2, 3)):
    plain.advance(ids)
    other.advance(ids, staleness=(4, 0, 1))
  linear.close(other.params, plain.params)


@pytest.mark.parametrize(
  ("kind", "discount"),
  [
    ("constant", lambda tau: 1.0),
    ("polynomial", lambda tau: (1 + tau) ** -0.8),
    ("hinge", lambda tau: 1.0 if tau <= 2 else 1 / (1.5 * (tau - 2) + 1)),
  ],
)
def test_fedasync_mixes_each_arrival(kind, discount):
  alpha, rho, most = 0.55, 0.2, 5

  def each(w, arrived):
    start, mixed = w, 0
    for id, tau in arrived.items():
      if tau <= most:
        held = lambda p: linear.plus(linear.nothing(), (rho, p), (-rho, start))
        a, mixed = alpha * discount(tau + mixed), mixed + 1
        w = linear.plus(linear.nothing(), (1 - a, w), (a, linear.descend(id, start, held)))
    return w

  settings = {"exponent": 0.8, "hinge_slope": 1.5, "hinge_start": 2.0, "max_staleness": most}
  _rounds(fedasync(linear.task(), alpha=alpha, staleness=kind, rho=rho, **settings), each)


def test_fedasync_of_one_client_that_replaces_the_server_is_its_model():
  rounds = linear.Rounds(fedasync(linear.task(), alpha=1.0, staleness="constant", rho=0.0))
  rounds.advance((2,))
  linear.close(rounds.params, linear.descend(2, linear.start()))


def test_fedasync_of_fresh_models_is_uniform_fedprox_where_the_jth_counts_one_in_j():
  held = linear.Rounds(fedasync(linear.task(), alpha=1.0, exponent=1.0, rho=0.3))
  plain = linear.Rounds(fedprox(linear.task(weighting="uniform"), mu=0.3))
  for rounds in (held, plain):
    rounds.advance((1, 0, 3))
  linear.close(held.params, plain.params)


def test_discounts_begin_at_one_and_fall():
  tau = jnp.arange(8)
  for s in (staleness.polynomial(tau, 0.5), staleness.hinge(tau, 10.0, 4.0)):
    assert s[0] == 1 and np.all(np.diff(s) <= 0) and s[-1] < 0.5
  np.testing.assert_array_equal(staleness.hinge(tau, 10.0, 4.0)[:5], 1)


def test_arrivals_come_in_the_order_in_which_they_were_drawn():
  """Through the engine, which computes clients by their work: that order must not be the server's."""
  order = []

  def build(settings):
    algorithm, process = tasks.build("fedbuff", tasks.NUM_CLIENTS, settings)
    recorded = lambda server, received, key: server._replace(held=jnp.where(received.arrived, received.ids, -1))
    init = lambda key: algorithm.init(key)._replace(held=jnp.full(tasks.NUM_CLIENTS, -1))
    return algorithm._replace(init=init, aggregate=recorded), process

  inputs = tasks.with_sizes(tasks.inputs("fedbuff"), train=[1, 9, 2, 8, 3, 7])
  made = simulation.simulator(
    build, inputs, tasks.NUM_CLASSES, population_size=tasks.NUM_CLIENTS, cohort_size=tasks.NUM_CLIENTS, chunk=1
  )
  state = made.init(inputs)
  for number in range(4):
    drawn = random.permute(
      random.permutation_key(random.key(inputs.seed, random.Purpose.COHORT, number)),
      jnp.arange(tasks.NUM_CLIENTS),
      tasks.NUM_CLIENTS,
    )
    state, _ = made.advance(state, inputs, jnp.int32(1))
    np.testing.assert_array_equal(state.server.held, drawn)
    order.append(tuple(np.asarray(drawn)))
  assert len(set(order)) > 1
