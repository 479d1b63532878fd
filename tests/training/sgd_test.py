"""Local SGD against closed forms and against logistic regression in NumPy."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import training
from apfl_jax.training import sgd as lib
from apfl_jax.types import Array, Data, LocalSGD, Model, Params, Span, Store, Task

CLASSES, PIXELS, BATCH, RATE = 5, 30, 8, 0.3


def settings(**changes: Any) -> LocalSGD:
  return LocalSGD(jnp.float32(RATE), BATCH, 2, 0, 0, "examples", "none")._replace(**changes)


def cosine(steps: int) -> np.ndarray:
  """float64 [steps], what the rate is multiplied by."""
  return 0.5 * (1 + np.cos(np.pi * np.arange(steps) / max(steps, 1)))


@pytest.mark.parametrize(
  ("changes", "work", "sizes", "steps"),
  [
    ({}, 1.0, [0, 1, 8, 9, 16, 17], [0, 2, 2, 4, 4, 6]),
    ({"epochs": 5, "batch_size": 10}, 1.0, [0, 1, 10, 99, 101], [0, 5, 5, 50, 55]),
    ({"steps": 7}, 1.0, [0, 1, 8, 1000], [0, 7, 7, 7]),
    ({"steps": 10}, 0.25, [0, 1, 1000], [0, 2, 2]),  # 2.5 rounds to even
    ({"steps": 10}, 0.36, [5], [4]),
    ({}, 0.5, [0, 1, 9, 17], [0, 1, 2, 3]),
    ({}, 0.01, [0, 1, 17], [0, 1, 1]),  # whoever takes part does a step
  ],
)
def test_num_steps(changes, work, sizes, steps):
  got = lib.num_steps(settings(**changes), jnp.array(sizes), jnp.float32(work))
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, steps)


@pytest.mark.parametrize(("weighting", "want"), [("examples", [0, 1, 250]), ("uniform", [0, 1, 1])])
def test_weight(weighting, want):
  got = lib.weight(settings(weighting=weighting), jnp.array([0, 1, 250]))
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("falling", [False, True])
def test_descend_on_a_quadratic_has_a_closed_form_for_any_number_of_steps(falling):
  curvature, centre, start = np.array([0.2, 1.0, 3.0]), np.array([1.0, -2.0, 0.5]), np.array([4.0, 0.0, -1.0])

  traces = 0

  @jax.jit
  def descend(steps, rate):
    nonlocal traces
    traces += 1
    # The second leaf's slope is the step's number: it shows which steps are asked for.
    loss = lambda p, step: 0.5 * jnp.sum(curvature * (p[0] - centre) ** 2) + step * p[1]
    return lib.descend(loss, (jnp.asarray(start, jnp.float32), jnp.float32(0)), steps, rate, cosine=falling)

  for steps in (0, 1, 2, 10):
    for rate in (0.1, 0.5):
      rates = rate * (cosine(steps) if falling else np.ones(steps))
      left = np.prod(1 - rates[:, None] * curvature, axis=0)
      quadratic, linear = descend(steps, rate)
      np.testing.assert_allclose(quadratic, centre + left * (start - centre), rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(linear, -np.sum(rates * np.arange(steps)), rtol=1e-5, atol=1e-6)
  assert traces == 1


def test_follow_needs_no_loss_and_projects_after_each_step():
  turning = lambda p, step: jnp.stack([p[1], -p[0]])  # the gradient of nothing
  got = lib.follow(turning, jnp.array([1.0, 0.0]), jnp.int32(3), 0.5, project=lambda p: jnp.clip(p, -1.0, 0.7))
  want = np.array([1.0, 0.0])
  for _ in range(3):
    want = np.clip(want - 0.5 * np.array([want[1], -want[0]]), -1.0, 0.7)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def logistic(**changes: Any) -> Task:
  model = Model(
    init=lambda key: Params((), (jnp.zeros((PIXELS, CLASSES)), jnp.zeros(CLASSES))),
    base=lambda params, images: (images.reshape(images.shape[0], -1), ()),
    head=lambda params, features: features @ params[0] + params[1],
  )
  return Task(1, CLASSES, (6, 5, 1), jnp.eye(CLASSES), model, settings(**changes), jnp.int32(1))


def client(store: Store, start: int, size: Array | int) -> Data:
  return Data(store, Span(jnp.int32(start), jnp.int32(size)), Span(jnp.int32(0), jnp.int32(0)))


def start_params() -> Params:
  rng = np.random.default_rng(3)
  return Params((), (jnp.float32(0.1 * rng.normal(size=(PIXELS, CLASSES))), jnp.float32(rng.normal(size=CLASSES))))


def numpy_sgd(params: Params, batches: Iterable[training.Batch], rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  weights, bias = (np.asarray(x, np.float64) for x in params.head)
  for batch, rate in zip(batches, rates, strict=True):
    images, targets, mask = (np.asarray(x, np.float64) for x in batch[:3])
    features = images.reshape(len(images), -1)
    logits = features @ weights + bias
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    error = mask[:, None] * (probability - targets) / mask.sum()
    weights, bias = weights - rate * features.T @ error, bias - rate * error.sum(0)
  return weights, bias


@pytest.mark.parametrize("augment", ["none", "full"])
def test_local_sgd_is_logistic_regression_on_the_same_batches(store, augment):
  task, key = logistic(augment=augment), jax.random.key(7)

  @jax.jit
  def train(size, steps):
    data = client(store, 50, size)
    return lib.local_sgd(task, training.classification_loss(task), start_params(), data, steps, key)

  @jax.jit
  def batches(size):
    data = client(store, 50, size)
    return jax.vmap(lib.batches(task, data, data.train, key))(jnp.arange(7))

  for size, steps in ((20, 7), (5, 3), (20, 0)):  # with short batches, with a batch that is larger than the span
    fed = batches(size)
    assert 0 < np.sum(fed.mask) < fed.mask.size
    fed = [jax.tree.map(lambda x, step=step: x[step], fed) for step in range(steps)]
    want = numpy_sgd(start_params(), fed, np.full(steps, RATE))
    for got, expected in zip(train(size, steps).head, want, strict=True):
      np.testing.assert_allclose(got, expected, atol=1e-5)


def test_augmentation_keeps_the_order_of_the_examples_and_changes_by_step(store):
  data = client(store, 50, BATCH)  # an epoch a step

  def batches(augment):
    draw = lambda step: lib.batches(logistic(augment=augment), data, data.train, jax.random.key(0))(step)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(jnp.arange(2)))

  plain, mixed = batches("none"), batches("full")
  labels = np.asarray(store.labels)[np.asarray(store.index)[50 : 50 + BATCH]]
  np.testing.assert_array_equal(np.sort(np.argmax(plain.targets, -1)), [np.sort(labels)] * 2)
  # Of a mixture the larger part stays in place, so its class is the most likely one or level with it.
  own = np.sum(mixed.targets * plain.targets, axis=-1)
  np.testing.assert_allclose(own, mixed.targets.max(-1), atol=1e-6)
  # Each step mixes anew: where the partner is of another class, both times, the shares differ.
  other = np.all(np.sum(plain.targets * np.roll(plain.targets, 1, axis=1), axis=-1) == 0, axis=0)
  assert np.any(other) and not np.any(np.isclose(own[0], own[1]) & other)


def test_fine_tune_lets_the_rate_fall_along_a_cosine(store):
  task, key, steps = logistic(), jax.random.key(9), 6

  @jax.jit
  def tune(size):
    data = client(store, 100, size)
    return lib.fine_tune(task, training.classification_loss(task), start_params(), data, steps, key)

  data = client(store, 100, 20)
  batch = lib.batches(task, data, data.train, key)
  want = numpy_sgd(start_params(), [batch(jnp.int32(step)) for step in range(steps)], RATE * cosine(steps))
  for got, expected in zip(tune(20).head, want, strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_fine_tune_leaves_a_client_without_examples_alone(store):
  # A loss that has a slope without any example, as one with a penalty has.
  penalty = lambda params, batch: jnp.sum(params.head[1])
  tune = jax.jit(
    lambda size: lib.fine_tune(logistic(), penalty, start_params(), client(store, 0, size), 6, jax.random.key(0))
  )
  np.testing.assert_array_equal(tune(0).head[1], start_params().head[1])
  np.testing.assert_allclose(tune(1).head[1], start_params().head[1] - RATE * np.sum(cosine(6)), rtol=1e-5)
