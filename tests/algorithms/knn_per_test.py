"""kNN-Per against brute force in NumPy, and at both ends of its interpolation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.algorithms import knn_per
from apfl_jax.types import Span
from tests import linear

IMAGES = np.float32(linear.IMAGES / 255)


@functools.cache
def compiled(**static):
  """`personalize` and answers with these settings that are not numbers; the numbers are traced."""

  def run(floats, data, visit, key):
    algorithm = knn_per(linear.task(), **static, **floats)
    model = algorithm.personalize(algorithm.download(algorithm.init(key)), (), data, visit, key)
    return model, algorithm.predict(model, IMAGES).logits

  return jax.jit(run)


def personal(id, *, size=None, validation=None, **settings):
  """(model, probabilities of all images) of a client that never took part."""
  values = {"tune_scale": False} | settings
  floats = {name: jnp.float32(values.pop(name)) for name in ("scale", "share") if name in values}
  data = linear.data(id, size)
  if validation is not None:
    data = data._replace(validation=Span(data.validation.start, jnp.int32(validation)))
  model, logits = compiled(**values)(floats, data, linear.visit(id), jax.random.key(1))
  return model, np.exp(logits)


def features(x):
  return x @ np.float64(linear.START.base)


def softmax(x):
  chance = np.exp(features(x) @ linear.START.head)
  return chance / chance.sum(1, keepdims=True)


def neighbours(id, k, scale, queries):
  x, y = linear.oracle(id)
  distance = ((features(queries)[:, None] - features(x)) ** 2).sum(-1)
  result = np.zeros((len(queries), linear.NUM_CLASSES))
  for row, d in enumerate(distance):
    for j in np.argsort(d)[:k]:
      result[row] += np.exp(-d[j] / (linear.FEATURES * scale)) * y[j]
  return result / result.sum(1, keepdims=True)


@pytest.mark.parametrize(("k", "scale", "share"), [(1, 1.0, 1.0), (3, 0.2, 1.0), (3, 0.2, 0.4), (50, 1.0, 0.4)])
def test_answers_are_those_of_brute_force(k, scale, share):
  settings = {"neighbours": k, "scale": scale, "choice": "fixed", "share": share, "capacity": 70}
  model, chance = personal(2, **settings)
  assert int(model.memory.stored.sum()) == linear.SIZES[2]
  x = IMAGES.reshape(len(IMAGES), -1)
  expected = share * neighbours(2, k, scale, x) + (1 - share) * softmax(x)
  np.testing.assert_allclose(chance, expected, rtol=1e-3, atol=1e-5)


def test_at_zero_it_is_the_model():
  model, _ = personal(1, choice="fixed", share=0.0)
  algorithm = knn_per(linear.task())
  expected = linear.fedavg().predict(linear.MODEL.init(None), IMAGES)
  prediction = algorithm.predict(model, IMAGES)
  np.testing.assert_allclose(prediction.logits, jax.nn.log_softmax(expected.logits), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(prediction.features, expected.features)
  of_all = algorithm.predict(algorithm.global_model(algorithm.init(jax.random.key(0))), IMAGES)
  np.testing.assert_array_equal(of_all.logits, expected.logits)


def test_the_share_is_the_best_on_validation_examples():
  x, y = linear.oracle(2)  # which are the training examples here, so that the memory is never wrong
  model, _ = personal(2, neighbours=5, scale=1.0)
  shares = np.linspace(0, 1, 11)
  likely = [np.log((y * (s * neighbours(2, 5, 1.0, x) + (1 - s) * softmax(x))).sum(1)).mean() for s in shares]
  assert np.argmax(likely) > 0
  np.testing.assert_allclose(model.share, shares[np.argmax(likely)])
  assert float(personal(2, validation=0, share=0.3)[0].share) == np.float32(0.3)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])  # the best is .1 for client 3, whichever place it has
def test_the_scale_can_be_chosen_with_the_share(scale):
  x, y = linear.oracle(3)
  settings = {"neighbours": 5, "scale": scale}
  model, chance = personal(3, tune_scale=True, **settings)
  likely = {
    (share, tried): np.log((y * (share * neighbours(3, 5, tried, x) + (1 - share) * softmax(x))).sum(1)).mean()
    for share in np.linspace(0, 1, 11)
    for tried in (0.1 * scale, scale, 10 * scale)
  }
  np.testing.assert_allclose((model.share, model.scale), max(likely, key=likely.get), rtol=1e-5)
  flat = IMAGES.reshape(len(IMAGES), -1)
  expected = model.share * neighbours(3, 5, float(model.scale), flat) + (1 - model.share) * softmax(flat)
  np.testing.assert_allclose(chance, expected, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(personal(3, **settings)[0].scale, scale, rtol=1e-6)
  np.testing.assert_allclose(personal(3, validation=0, tune_scale=True, **settings)[0].scale, scale, rtol=1e-6)


def test_a_full_datastore_holds_a_random_subset_and_an_empty_one_leaves_the_model():
  model, _ = personal(2, capacity=3)
  assert model.memory.stored.all()
  own = features(linear.oracle(2).x)
  distance = ((np.asarray(model.memory.keys)[:, None] - own) ** 2).sum(-1)
  assert len(set(distance.argmin(1))) == 3 and distance.min(1).max() < 1e-8
  assert set(distance.argmin(1)) != {0, 1, 2}
  model, chance = personal(2, size=0, validation=0)
  assert not model.memory.stored.any() and float(model.share) == 0
  np.testing.assert_allclose(chance, softmax(IMAGES.reshape(len(IMAGES), -1)), rtol=1e-4)
