"""GPFL: its loss in NumPy, its step by finite differences of that loss, its rounds by averaging."""

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax.algorithms import gpfl
from tests import linear

LAMBDA, DECAY = 0.3, 0.2


def valve(parts, features, context):
  def says(layer):
    hidden = np.maximum(context @ parts[layer]["kernel"] + parts[layer]["bias"], 0)
    normal = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
    return normal * parts[f"{layer}_norm"]["scale"] + parts[f"{layer}_norm"]["bias"]

  return np.maximum(features * (says("scale") + 1) + says("shift"), 0)


def entropy(logits, y):
  return np.mean(np.log(np.exp(logits).sum(1)) - (y * logits).sum(1))


def own_context(id, received):
  y = linear.oracle(id).y
  return y.mean(0) @ received.embeddings


def loss(id, shared, head, received):
  x, y = linear.oracle(id)
  features = x @ shared.base
  own = entropy(valve(shared.valve, features, own_context(id, received)) @ head, y)
  guided = valve(shared.valve, features, received.embeddings.mean(0))
  norm = lambda v: np.linalg.norm(v, axis=1, keepdims=True)
  cosine = (guided / norm(guided)) @ (shared.embeddings / norm(shared.embeddings)).T
  away = np.linalg.norm(guided - y @ received.embeddings)
  decayed = sum(np.sum(leaf**2) for leaf in jax.tree.leaves((shared.embeddings, shared.valve)))
  return own + entropy(cosine, y) + LAMBDA * away + DECAY / 2 * decayed


def gradient(id, shared, head, received, width=1e-6):
  """By central differences, number by number."""
  leaves, structure = jax.tree.flatten((shared, head))

  def at(leaf, place, by):
    moved = [x.copy() for x in leaves]
    moved[leaf][place] += by
    return loss(id, *jax.tree.unflatten(structure, moved), received)

  slopes = [np.zeros_like(x) for x in leaves]
  for leaf, x in enumerate(leaves):
    for place in np.ndindex(x.shape):
      slopes[leaf][place] = (at(leaf, place, width) - at(leaf, place, -width)) / (2 * width)
  return jax.tree.unflatten(structure, slopes)


def test_a_round_is_that_of_the_paper_and_its_code():
  rate = 0.1
  task = linear.task(steps=2, learning_rate=jnp.float32(rate))
  rounds = linear.Rounds(gpfl(task, lambda_level=LAMBDA, decay=DECAY))
  received = jax.tree.map(np.float64, rounds.server.shared)
  rounds.advance((0, 1))
  ends = {}
  for id in (0, 1):
    both = received, np.float64(linear.START.head)
    for _ in range(2):
      both = jax.tree.map(lambda p, g: p - rate * g, both, gradient(id, *both, received))
    ends[id] = both[0]
    np.testing.assert_allclose(rounds.clients[id], both[1], rtol=1e-3, atol=1e-4)
  share = linear.SIZES[0] / (linear.SIZES[0] + linear.SIZES[1])
  average = jax.tree.map(lambda a, b: share * a + (1 - share) * b, ends[0], ends[1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), rounds.server.shared, average)
  np.testing.assert_array_equal(rounds.server.head, linear.START.head)


def test_a_client_that_never_took_part_trains_its_head_under_its_own_context():
  rounds = linear.Rounds(gpfl(linear.task(), lambda_level=LAMBDA, decay=DECAY))
  rounds.advance((0, 1))
  algorithm, shared = rounds.algorithm, jax.tree.map(np.float64, rounds.server.shared)
  download = algorithm.download(rounds.server)
  fresh = algorithm.init_client(download, jax.random.key(0))
  model = algorithm.personalize(download, fresh, linear.data(2), linear.visit(2), jax.random.key(1))
  linear_features = lambda x: valve(shared.valve, x @ shared.base, own_context(2, shared))
  (x, y), head = linear.oracle(2), np.float64(linear.START.head)
  for rate in linear.LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(3) / 3)):
    features = linear_features(x)
    chance = np.exp(features @ head)
    head = head - rate * features.T @ (chance / chance.sum(1, keepdims=True) - y) / len(y)
  np.testing.assert_allclose(model.head, head, rtol=1e-4, atol=1e-4)
  images = np.float32(linear.IMAGES / 255)
  features = linear_features(images.reshape(len(images), -1))
  prediction = algorithm.predict(model, images)
  np.testing.assert_allclose(prediction.features, features, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(prediction.logits, features @ head, rtol=1e-3, atol=1e-4)
  assert rounds.params is None
