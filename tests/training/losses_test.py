"""Cross-entropy, over all classes and over some, against NumPy in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import training
from apfl_jax.training.batches import Batch
from apfl_jax.types import LocalSGD, Model, Params, Task

ROWS, CLASSES = 12, 6
SOME = np.array([True, False, True, True, False, False])

loss = jax.jit(training.cross_entropy)
gradient = jax.jit(jax.grad(lambda *x: jnp.sum(training.cross_entropy(*x))))


def log_softmax(logits: np.ndarray) -> np.ndarray:
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def problem(scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
  """float32 [ROWS, CLASSES] logits and target distributions."""
  rng = np.random.default_rng(0)
  logits, targets = scale * rng.normal(size=(ROWS, CLASSES)), rng.dirichlet(np.ones(CLASSES), ROWS)
  return logits.astype(np.float32), targets.astype(np.float32)


@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_plain_value_and_gradient(scale):
  logits, targets = problem(scale)
  want = log_softmax(logits.astype(np.float64))
  np.testing.assert_allclose(loss(logits, targets), -np.sum(targets * want, axis=-1), rtol=2e-6)
  np.testing.assert_allclose(gradient(logits, targets), np.exp(want) - targets, atol=2e-6)


@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_over_some_classes_it_is_the_softmax_of_the_subset(scale):
  logits, targets = problem(scale)
  kept = targets[:, SOME].astype(np.float64)
  kept /= kept.sum(-1, keepdims=True)
  want = log_softmax(logits[:, SOME].astype(np.float64))
  np.testing.assert_allclose(loss(logits, targets, SOME), -np.sum(kept * want, axis=-1), rtol=2e-6)
  got = np.asarray(gradient(logits, targets, SOME))
  np.testing.assert_array_equal(got[:, ~SOME], 0)
  np.testing.assert_allclose(got[:, SOME], np.exp(want) - kept, atol=2e-6)


def test_over_all_classes_it_is_the_plain_one():
  logits, targets = problem()
  everything = np.ones(CLASSES, bool)
  np.testing.assert_allclose(loss(logits, targets, everything), loss(logits, targets), rtol=1e-6)
  np.testing.assert_allclose(gradient(logits, targets, everything), gradient(logits, targets), atol=1e-6)


@pytest.mark.parametrize("classes", [~SOME, np.zeros(CLASSES, bool), np.arange(CLASSES) == 1])
def test_targets_outside_the_classes_cost_nothing_and_stay_finite(classes):
  logits, _ = problem()
  targets = np.eye(CLASSES, dtype=np.float32)[[0, 2, 3] * 4]
  np.testing.assert_array_equal(loss(logits, targets, classes), 0)
  np.testing.assert_array_equal(gradient(logits, targets, classes), 0)


def linear_task() -> Task:
  model = Model(
    init=lambda key: Params((), jnp.zeros((4, CLASSES))),
    base=lambda params, images: (images.reshape(images.shape[0], -1), ()),
    head=lambda params, features: features @ params,
  )
  sgd = LocalSGD(jnp.float32(0.1), ROWS, 1, 0, 0, "examples", "none")
  return Task(1, CLASSES, (2, 2, 1), jnp.eye(CLASSES), model, sgd, jnp.int32(1))


@pytest.mark.parametrize("classes", [None, SOME])
@pytest.mark.parametrize("examples", [0, 1, 7, ROWS])
def test_classification_loss_is_the_mean_over_unmasked_rows(classes, examples):
  rng = np.random.default_rng(1)
  images, head = rng.random((ROWS, 2, 2, 1)), rng.normal(size=(4, CLASSES))
  targets = np.eye(CLASSES)[rng.choice(np.flatnonzero(SOME), ROWS)]
  batch = Batch(*(jnp.asarray(x, jnp.float32) for x in (images, targets, np.arange(ROWS) < examples)))
  got = training.classification_loss(linear_task(), classes)(Params((), jnp.float32(head)), batch)
  logits = images.reshape(ROWS, 4) @ head
  if classes is not None:
    logits = np.where(classes, logits, -np.inf)
  each = -log_softmax(logits)[targets > 0]
  np.testing.assert_allclose(got, each[:examples].mean() if examples else 0.0, rtol=1e-5)


def test_predict_gives_logits_and_what_the_head_reads():
  images = jnp.arange(8.0).reshape(2, 2, 2, 1)
  head = jnp.arange(4.0 * CLASSES).reshape(4, CLASSES)
  got = training.predict(linear_task().model, Params((), head), images)
  np.testing.assert_array_equal(got.features, np.arange(8.0).reshape(2, 4))
  np.testing.assert_array_equal(got.logits, np.arange(8.0).reshape(2, 4) @ np.asarray(head))


def offset_batch(offset: np.ndarray | None) -> tuple[np.ndarray, Batch]:
  logits, _ = problem()
  targets = np.eye(CLASSES)[np.random.default_rng(2).choice(np.flatnonzero(SOME), ROWS)]
  images = jnp.zeros((ROWS, 2, 2, 1))
  return logits, Batch(
    images, jnp.asarray(targets, jnp.float32), jnp.ones(ROWS), None if offset is None else jnp.float32(offset)
  )


@pytest.mark.parametrize("classes", [None, SOME, np.array([True, False, True, True, True, True])])
def test_an_offset_is_added_and_its_infinities_are_left_out_beside_the_classes(classes):
  offset = np.array([-0.5, -3.0, -1.5, -27.6, -np.inf, -2.0])
  kept = np.isfinite(offset) & (True if classes is None else classes)
  logits, batch = offset_batch(offset)
  each = lambda logits: training.batch_cross_entropy(logits, batch, classes)
  want = log_softmax((logits.astype(np.float64) + offset)[:, kept])
  targets = np.asarray(batch.targets)[:, kept]
  np.testing.assert_allclose(each(logits), -np.sum(targets * want, axis=-1), rtol=2e-5)
  got = np.asarray(jax.grad(lambda logits: each(logits).sum())(jnp.asarray(logits)))
  np.testing.assert_array_equal(got[:, ~kept], 0)
  np.testing.assert_allclose(got[:, kept], np.exp(want) - targets, atol=1e-5)


def test_without_an_offset_a_batch_has_the_plain_loss():
  logits, batch = offset_batch(None)
  np.testing.assert_array_equal(
    training.batch_cross_entropy(logits, batch), training.cross_entropy(logits, batch.targets)
  )


def test_the_prior_is_the_log_of_shares_with_a_finite_one_for_absent_classes():
  counts = np.float32([6, 0, 3, 1])
  np.testing.assert_allclose(training.log_prior(counts), np.log([0.6, 1e-12, 0.3, 0.1]), rtol=1e-6)
  np.testing.assert_array_equal(training.log_prior(np.zeros(4, np.float32)), 0)


@pytest.mark.parametrize(
  ("mask", "kept"), [("none", [1, 1, 1, 1]), ("own", [1, 0, 1, 0]), ("present", [1, 1, 1, 0])], ids=lambda x: str(x)
)
@pytest.mark.parametrize("readout", training.READOUTS)
def test_offsets_of_the_options(mask, kept, readout):
  counts, present = np.float32([3, 0, 1, 0]), np.array([True, True, False, False])
  got = training.logit_offset(jnp.asarray(counts), jnp.asarray(present), mask, readout)
  if (mask, readout) == ("none", "plain"):
    assert got is None
    return
  prior = training.log_prior(counts) if readout == "prior" else np.zeros(4)
  np.testing.assert_array_equal(got, np.where(kept, prior, -np.inf))
