"""Confusion matrices against counting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import metrics


def count(labels, predictions, mask, num_classes):
  result = np.zeros((num_classes, num_classes), int)
  for label, prediction, counted in zip(labels, predictions, mask, strict=True):
    if counted:
      result[label, prediction] += 1
  return result


def batch(seed, size=57, num_classes=6):
  rng = np.random.default_rng(seed)
  return rng.integers(0, num_classes, size), rng.integers(0, num_classes, size), rng.random(size) < 0.7


def test_confusion_counts_pairs():
  labels, predictions, mask = batch(0)
  got = metrics.confusion(jnp.asarray(labels), jnp.asarray(predictions), jnp.asarray(mask), 6)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, count(labels, predictions, mask, 6))


def test_confusion_under_jit_and_vmap_is_one_matrix_a_client():
  labels, predictions, mask = (np.stack(x) for x in zip(*map(batch, range(5)), strict=True))
  got = jax.jit(jax.vmap(lambda y, p, m: metrics.confusion(y, p, m, 6)))(labels, predictions, mask)
  want = [count(*rows, 6) for rows in zip(labels, predictions, mask, strict=True)]
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("padding", [0, -1, 99])
def test_padding_is_never_counted_whatever_it_holds(padding):
  labels = jnp.array([1, 2, padding])
  got = metrics.confusion(labels, jnp.array([1, 0, 2]), jnp.array([True, True, False]), 3)
  np.testing.assert_array_equal(got, [[0, 0, 0], [0, 1, 0], [1, 0, 0]])


def test_accuracy_and_recall_of_stacked_matrices():
  stacked = np.array([[[3, 1], [2, 4]], [[0, 0], [5, 0]], [[0, 0], [0, 0]]])
  np.testing.assert_allclose(metrics.accuracy(stacked), [0.7, 0.0, np.nan])
  np.testing.assert_allclose(metrics.recall(stacked), [[0.75, 4 / 6], [np.nan, 0.0], [np.nan, np.nan]])
  assert metrics.accuracy(stacked[0]) == pytest.approx(0.7)


def test_shared_answers_split_ties_and_only_ties():
  logits = np.array([[1, 2, 2, 5], [3, 1, 1, 0], [2, 2, 2, 2], [np.nan, 0, -1, 9], [-1000, -1000.01, -2000, 0]], float)
  classes = np.array([True, True, True, False])
  third = 1 / 3
  want = [[0, 0.5, 0.5, 0], [1, 0, 0, 0], [third, third, third, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
  got = jax.jit(metrics.shared_answers)(logits, classes)
  np.testing.assert_allclose(got, want, atol=1e-6)
  counts = metrics.confusion(jnp.array([1, 0, 2, 1, 1]), got, jnp.array([True, True, True, True, False]), 4)
  np.testing.assert_allclose(
    counts, [[1, 0, 0, 0], [0, 1.5, 0.5, 0], [third, third, third, 0], [0, 0, 0, 0]], atol=1e-6
  )


def test_what_differs_by_rounding_ties():
  logits = jnp.array([[0.3, 0.1 + 0.2, 0.0]]) * 7
  np.testing.assert_allclose(metrics.shared_answers(logits, jnp.ones(3, bool)), [[0.5, 0.5, 0]], atol=1e-6)
  nothing = metrics.shared_answers(jnp.full((1, 3), jnp.nan), jnp.array([True, False, True]))
  np.testing.assert_allclose(nothing, [[0.5, 0, 0.5]], atol=1e-6)
