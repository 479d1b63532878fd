"""FedDBE against its loss in NumPy, and against FedAvg before its terms set in."""

import jax
import numpy as np

from apfl_jax.algorithms import feddbe
from apfl_jax.types import Params
from tests import linear

KAPPA = 3.0


def step(id, params, bias, consensus, rate):
  """`consensus` None: the first round."""
  x, y = linear.oracle(id)
  features = x @ params.base + bias
  logits = features @ params.head
  chance = np.exp(logits - logits.max(1, keepdims=True))
  error = (chance / chance.sum(1, keepdims=True) - y) / len(y)
  back = error @ params.head.T
  base = x.T @ back
  if consensus is not None:
    mean = x.mean(0) @ params.base
    base = base + KAPPA * np.outer(x.mean(0), mean - consensus) / linear.FEATURES
  return Params(params.base - rate * base, params.head - rate * features.T @ error), bias - rate * back.sum(0)


def test_rounds_are_those_of_the_paper():
  rounds = linear.Rounds(feddbe(linear.task(), kappa=KAPPA))
  server, consensus, own = linear.start(), None, {}
  for ids, lost in (((0, 1, 2), (2,)), ((0, 2), ()), ((1, 2), ())):
    rounds.advance(ids, lost=lost)
    trained, means = {}, {}
    for id in ids:
      params, bias = server, own.get(id, np.zeros(linear.FEATURES))
      for _ in range(linear.STEPS):
        params, bias = step(id, params, bias, consensus, linear.LEARNING_RATE)
      own[id] = bias
      np.testing.assert_allclose(rounds.clients[id], bias, rtol=1e-4, atol=1e-5)
      if id not in lost:
        trained[id], means[id] = params, linear.oracle(id).x.mean(0) @ params.base
    share = {id: linear.SIZES[id] / sum(linear.SIZES[i] for i in trained) for id in trained}
    server = Params(*(sum(share[id] * p[i] for id, p in trained.items()) for i in range(2)))
    if consensus is None:
      consensus = sum(share[id] * mean for id, mean in means.items())
    linear.close(rounds.server.params, server)
    np.testing.assert_allclose(rounds.server.consensus, consensus, rtol=1e-4, atol=1e-5)
    assert rounds.server.missing == 0

  algorithm = rounds.algorithm
  params, bias = server, np.zeros(linear.FEATURES)
  for rate in linear.LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(3) / 3)):
    params, bias = step(3, params, bias, consensus, rate)
  download = algorithm.download(rounds.server)
  fresh = algorithm.init_client(download, jax.random.key(0))
  model = algorithm.personalize(download, fresh, linear.data(3), linear.visit(3), jax.random.key(1))
  linear.close(model.params, params)
  images = np.float32(linear.IMAGES / 255)
  x = images.reshape(len(images), -1)
  np.testing.assert_allclose(
    algorithm.predict(model, images).logits, (x @ params.base + bias) @ params.head, rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(
    algorithm.predict(rounds.params, images).logits, x @ server.base @ server.head, rtol=1e-4, atol=1e-4
  )


def test_the_consensus_of_uploads_one_by_one_is_that_of_as_many_as_make_a_round():
  rounds = linear.Rounds(feddbe(linear.task()._replace(aggregations=3), kappa=KAPPA))
  means = []
  for id in (0, 1, 2, 3, 0):
    params, bias = rounds.server.params, rounds.clients.get(id, np.zeros(linear.FEATURES))
    known = rounds.server.consensus if len(means) >= 3 else None
    rounds.advance((id,))
    for _ in range(linear.STEPS):
      params, bias = step(id, params, bias, known, linear.LEARNING_RATE)
    linear.close(rounds.server.params, params)
    means.append(linear.oracle(id).x.mean(0) @ params.base)
    np.testing.assert_allclose(rounds.server.consensus, np.mean(means[:3], axis=0), rtol=1e-4, atol=1e-5)
