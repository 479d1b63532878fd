"""Losses of a classifier, and its prediction."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from apfl_jax.training.batches import Batch
from apfl_jax.types import Array, Model, Params, Prediction, Task

Loss = Callable[[Params, Batch], Array]


def predict(model: Model, params: Params, images: Array) -> Prediction:
  """Logits and features of images float32 [B, height, width, channels] in [0, 1]."""
  features, _ = model.base(params.base, images)
  return Prediction(model.head(params.head, features), features)


def cross_entropy(logits: Array, targets: Array, classes: Array | None = None) -> Array:
  """Softmax cross-entropy of each row.

  Args:
    logits: float32 [B, C].
    targets: float32 [B, C], distributions.
    classes: bool [C] or None. The softmax runs over these classes only, so that no other class is pushed down
      by examples that cannot be of it (method 2.4 [O]); targets are renormalised over them.

  Returns:
    float32 [B].
  """
  if classes is None:
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
  kept = jnp.where(classes, targets, 0.0)
  kept = kept / jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1e-12)
  log_probability = jax.nn.log_softmax(jnp.where(classes, logits, -jnp.inf))
  return -jnp.sum(kept * jnp.where(classes, log_probability, 0.0), axis=-1)


def batch_mean(each: Array, batch: Batch) -> Array:
  """The mean of float32 [B] over the batch's examples, []; 0 where it has none."""
  return jnp.sum(jnp.where(batch.mask > 0, each, 0.0)) / jnp.maximum(jnp.sum(batch.mask), 1.0)


def classification_loss(task: Task, classes: Array | None = None) -> Loss:
  """(params, batch) -> [], the mean cross-entropy over the batch's examples, optionally over some classes only."""

  def loss(params: Params, batch: Batch) -> Array:
    each = cross_entropy(predict(task.model, params, batch.images).logits, batch.targets, classes)
    return batch_mean(each, batch)

  return loss
