"""FedRoD against its two losses in NumPy."""

import jax
import numpy as np

from apfl_jax.algorithms import fedrod
from apfl_jax.types import Params
from tests import linear


def softmax(logits):
  chance = np.exp(logits - logits.max(1, keepdims=True))
  return chance / chance.sum(1, keepdims=True)


def step(id, params, personal, rate):
  x, y = linear.oracle(id)
  with np.errstate(divide="ignore"):
    prior = np.log(y.sum(0))  # a class that the client lacks has no chance at all
  features = x @ params.base
  generic = features @ params.head
  error = (softmax(generic + prior) - y) / len(y)
  own = (softmax(generic + features @ personal) - y) / len(y)
  trained = Params(params.base - rate * x.T @ error @ params.head.T, params.head - rate * features.T @ error)
  return trained, personal - rate * features.T @ own


def test_rounds_are_those_of_the_paper():
  assert (linear.oracle(1).y.sum(0) == 0).any()  # one lacks a class
  rounds = linear.Rounds(fedrod(linear.task()))
  server, own = linear.start(), {}
  for ids, lost in (((0, 1, 2), (2,)), ((0, 2), ()), ((1, 2), ())):
    rounds.advance(ids, lost=lost)
    trained = {}
    for id in ids:
      params, personal = server, own.get(id, np.zeros_like(server.head))
      for _ in range(linear.STEPS):
        params, personal = step(id, params, personal, linear.LEARNING_RATE)
      own[id] = personal
      np.testing.assert_allclose(rounds.clients[id], personal, rtol=1e-5, atol=1e-5)
      if id not in lost:
        trained[id] = params
    total = sum(linear.SIZES[id] for id in trained)
    server = Params(
      *(
        sum(linear.SIZES[i] / total * p for i, p in zip(trained, part, strict=True))
        for part in zip(*trained.values(), strict=True)
      )
    )
    linear.close(rounds.server, server)

  # A client that never took part trains its own head alone, from nothing.
  algorithm, personal = rounds.algorithm, np.zeros_like(server.head)
  for rate in linear.LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(3) / 3)):
    _, personal = step(3, server, personal, rate)
  download = algorithm.download(rounds.server)
  fresh = algorithm.init_client(download, jax.random.key(0))
  model = algorithm.personalize(download, fresh, linear.data(3), linear.visit(3), jax.random.key(6))
  linear.close(model.generic, server)
  np.testing.assert_allclose(model.personal, personal, rtol=1e-5, atol=1e-5)

  images = np.float32(linear.IMAGES / 255)
  features = images.reshape(len(images), -1) @ server.base
  answers = algorithm.predict(model, images), algorithm.predict(algorithm.global_model(rounds.server), images)
  np.testing.assert_allclose(answers[0].logits, features @ (server.head + personal), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(answers[1].logits, features @ server.head, rtol=1e-4, atol=1e-4)
