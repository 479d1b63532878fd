"""Evaluation over a span against one pass in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import training
from apfl_jax.types import Prediction, Span

CLASSES, PIXELS = 5, 30
SOME = np.array([False, True, False, True, True])
BIAS = -100.0  # logits below 0: classes that are left out must not win by being 0
HEAD = np.random.default_rng(0).normal(size=(PIXELS, CLASSES))


@pytest.fixture(scope="module")
def evaluate(store):
  """(start, size, classes) -> Evaluation; a compilation with classes and one without."""

  def predict(images):
    features = images.reshape(images.shape[0], -1)
    return Prediction(features @ jnp.float32(HEAD) + BIAS, features)

  return jax.jit(
    lambda start, size, classes: training.evaluate(predict, store, Span(start, size), CLASSES, classes=classes)
  )


@pytest.mark.parametrize("classes", [None, SOME])
@pytest.mark.parametrize(("start", "size"), [(0, 0), (330, 0), (9, 1), (20, 63), (0, 64), (265, 65), (130, 200)])
def test_evaluate_counts_what_numpy_counts(evaluate, store, start, size, classes):
  got = evaluate(start, size, classes)
  example = np.asarray(store.index)[start : start + size]
  labels = np.asarray(store.labels)[example]
  logits = np.asarray(store.images)[example].reshape(size, PIXELS) / 255 @ HEAD + BIAS
  answers = np.argmax(logits if classes is None else np.where(classes, logits, -np.inf), axis=-1)
  want = np.zeros((CLASSES, CLASSES), int)
  np.add.at(want, (labels, answers), 1)
  assert got.confusion.dtype == (jnp.int32 if classes is None else jnp.float32)
  np.testing.assert_array_equal(got.confusion, want)
  log_total = np.log(np.sum(np.exp(logits), axis=-1))
  np.testing.assert_allclose(got.loss, np.sum(log_total - logits[np.arange(size), labels]), rtol=1e-5)


def test_classes_that_tie_share_the_answer(store):
  """The first of them is not favoured, and a class that is left out has no part."""
  predict = lambda images: Prediction(jnp.zeros((len(images), CLASSES)), images)
  got = training.evaluate(predict, store, Span(jnp.int32(20), jnp.int32(90)), CLASSES, classes=jnp.asarray(SOME))
  labels = np.asarray(store.labels)[np.asarray(store.index)[20:110]]
  np.testing.assert_allclose(got.confusion, np.outer(np.bincount(labels, minlength=CLASSES), SOME / 3), rtol=1e-5)
