"""FedProto against its equations in NumPy."""

import jax
import numpy as np
import pytest

from apfl_jax.algorithms import fedproto
from apfl_jax.types import Params
from tests import linear

WEIGHT = 0.7


def sgd(id, params, prototypes, known, rates):
  x, y = linear.oracle(id)
  for rate in rates:
    gradient = linear.oracle(id).gradient(params)
    away = np.where((y @ known > 0)[:, None], x @ params.base - y @ prototypes, 0)
    pull = x.T @ away * 2 * WEIGHT / len(x) / linear.FEATURES
    params = Params(params.base - rate * (gradient.base + pull), params.head - rate * gradient.head)
  return params


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_rounds_are_those_of_the_paper(weighting):
  rounds = linear.Rounds(fedproto(linear.task(weighting=weighting), prototype_weight=WEIGHT))
  prototypes, known = np.zeros((linear.NUM_CLASSES, linear.FEATURES)), np.zeros(linear.NUM_CLASSES)
  own = {}
  # The second client lacks a class; alone in a round it leaves that class's prototype as it was.
  for ids, lost in (((1,), ()), ((0, 1, 2), (2,)), ((0, 1, 3), ()), ((1,), ())):
    rounds.advance(ids, lost=lost)
    total, count = np.zeros_like(prototypes), np.zeros_like(known)
    for id in ids:
      rates = np.full(linear.STEPS, linear.LEARNING_RATE)
      own[id] = sgd(id, own.get(id, linear.start()), prototypes, known, rates)
      linear.close(rounds.clients[id], own[id], 1e-4)
      if id not in lost:
        x, y = linear.oracle(id)
        held = y.sum(0)
        each = 1 / np.maximum(held, 1) if weighting == "uniform" else np.ones_like(held)
        total += each[:, None] * (y.T @ x @ own[id].base)
        count += each * held
    before = known
    prototypes = np.where((count > 0)[:, None], total / np.maximum(count, 1e-9)[:, None], prototypes)
    known = np.maximum(known, count > 0)
    np.testing.assert_allclose(rounds.server.prototypes.mean, prototypes, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(rounds.server.prototypes.known, known)
  assert before.all() and (linear.oracle(1).y.sum(0) == 0).any()


def test_answers_are_the_nearest_prototypes_and_the_clients_own_where_there_is_none():
  rounds = linear.Rounds(fedproto(linear.task(), prototype_weight=WEIGHT))
  rounds.advance((1,))
  server, algorithm = rounds.server, rounds.algorithm
  known = np.asarray(server.prototypes.known, float)
  missing = np.flatnonzero(known == 0)
  x, y = linear.oracle(2)
  assert missing.size == 1 and y[:, missing].any()  # a monopolist, whom the server has never seen
  download = algorithm.download(server)
  fresh = algorithm.init_client(download, jax.random.key(0))
  model = algorithm.personalize(download, fresh, linear.data(2), linear.visit(2), jax.random.key(1))
  falling = linear.LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(3) / 3))
  params = sgd(2, linear.start(), np.float64(server.prototypes.mean), known, falling)
  linear.close(model.params, params, 1e-4)

  prototypes = np.float64(server.prototypes.mean)
  prototypes[missing] = (y.T @ x @ params.base / y.sum(0)[:, None])[missing]
  distance = np.mean(((x @ params.base)[:, None] - prototypes) ** 2, -1)
  prediction = algorithm.predict(model, np.float32(x).reshape(len(x), *linear.IMAGE_SHAPE))
  np.testing.assert_allclose(prediction.logits, -distance, rtol=1e-3, atol=1e-4)
  assert rounds.params is None


def test_before_any_upload_only_own_classes_are_answered():
  algorithm = fedproto(linear.task())
  download = algorithm.download(algorithm.init(jax.random.key(0)))
  fresh = algorithm.init_client(download, jax.random.key(0))
  model = algorithm.personalize(download, fresh, linear.data(1), linear.visit(1), jax.random.key(1))
  held = linear.oracle(1).y.sum(0) > 0
  np.testing.assert_array_equal(model.prototypes.known, held)
  answers = algorithm.predict(model, np.float32(linear.IMAGES / 255)).logits.argmax(-1)
  assert held[np.asarray(answers)].all() and not held.all()
