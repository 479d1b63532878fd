"""Methods that share one part of the model and keep or fix the other: their rounds against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.algorithms import METHODS
from apfl_jax.types import Params
from tests import linear

# The shared part, what each pass of a round trains, what personalisation trains.
KINDS = {
  "fedrep": ("base", (("head",), ("base",)), ("head",)),
  "fedper": ("base", (("base", "head"),), ("head",)),
  "fedbabu": ("base", (("base",),), ("base", "head")),
  "lg_fedavg": ("head", (("base", "head"),), ("base", "head")),
}
SCHEDULE = (((0, 1, 2), (2,)), ((0, 2), ()), ((1, 2), ()))  # who comes, whose upload is lost; the fourth never does
PERSONAL_STEPS = 3


def sgd(id: int, params: Params, parts: tuple[str, ...], rates: np.ndarray) -> Params:
  for rate in rates:
    gradient = linear.oracle(id).gradient(params)
    params = params._replace(**{part: getattr(params, part) - rate * getattr(gradient, part) for part in parts})
  return params


@functools.cache
def after_rounds(name: str) -> tuple[linear.Rounds, Params, dict[int, np.ndarray]]:
  """The method's rounds, the shared model by the oracle, and the part that each client keeps by the oracle."""
  shared, passes, _ = KINDS[name]
  kept = "head" if shared == "base" else "base"
  rounds = linear.Rounds(METHODS[name].make(linear.task()))
  server, own = linear.start(), {}
  for ids, lost in SCHEDULE:
    rounds.advance(ids, lost=lost)
    trained = {}
    for id in ids:
      params = server._replace(**{kept: own.get(id, getattr(linear.start(), kept))})
      for parts in passes:
        params = sgd(id, params, parts, np.full(linear.STEPS, linear.LEARNING_RATE))
      own[id] = getattr(params, kept)
      if id not in lost:
        trained[id] = getattr(params, shared)
    total = sum(linear.SIZES[id] for id in trained)
    server = server._replace(**{shared: sum(linear.SIZES[id] / total * x for id, x in trained.items())})
  return rounds, server, own


@pytest.mark.parametrize("name", KINDS)
def test_rounds_are_those_of_the_paper(name):
  rounds, server, own = after_rounds(name)
  linear.close(rounds.server, server)
  if name == "fedbabu":
    assert all(client == () for client in rounds.clients.values())
    linear.close(rounds.params, server)
  else:
    for id, part in own.items():
      np.testing.assert_allclose(rounds.clients[id], part, rtol=1e-5, atol=1e-5)
    assert rounds.params is None


@pytest.mark.parametrize("id", [2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_personalisation_trains_what_the_method_says(name, id):
  shared, _, tuned = KINDS[name]
  rounds, server, own = after_rounds(name)
  algorithm, download = rounds.algorithm, rounds.algorithm.download(rounds.server)
  client = rounds.clients.get(id, algorithm.init_client(download, jax.random.key(5)))
  model = algorithm.personalize(download, client, linear.data(id), linear.visit(id), jax.random.key(6))
  kept = "head" if shared == "base" else "base"
  start = server._replace(**{kept: own.get(id, getattr(linear.start(), kept))})
  rates = linear.LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(PERSONAL_STEPS) / PERSONAL_STEPS))
  linear.close(model, sgd(id, start, tuned, rates))


@pytest.mark.parametrize("part", ["base", "head"])
def test_fedbabu_tunes_one_part_alone_if_told_so(part):
  algorithm = METHODS["fedbabu"].make(linear.task(), tune=part)
  start = algorithm.init(jax.random.key(0))
  model = algorithm.personalize(algorithm.download(start), (), linear.data(0), linear.visit(0), jax.random.key(6))
  for name in ("base", "head"):
    assert bool(jnp.all(getattr(model, name) == getattr(start, name))) == (name != part)


def test_fedrep_takes_more_steps_for_the_head_if_told_so():
  rounds = linear.Rounds(METHODS["fedrep"].make(linear.task(), head_epochs=3))
  rounds.advance((0,))
  steps = np.full(3 * linear.STEPS, linear.LEARNING_RATE)
  np.testing.assert_allclose(rounds.clients[0], sgd(0, linear.start(), ("head",), steps).head, rtol=1e-5, atol=1e-5)
