"""A model's confusion matrix and loss over a span."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax.metrics import confusion, shared_answers, verification
from apfl_jax.training.batches import gather, images_of
from apfl_jax.training.losses import cross_entropy
from apfl_jax.types import Array, HeldOut, Prediction, Span, Store

BATCH = 64  # examples a pass


class Evaluation(NamedTuple):
  """Counts, so that any mean can be taken later.

  Attributes:
    confusion: int32 [C, C], or float32 where some classes were asked for; rows are true classes.
    loss: float32 [], summed cross-entropy.
  """

  confusion: Array
  loss: Array


def evaluate(
  predict: Callable[[Array], Prediction], store: Store, span: Span, num_classes: int, classes: Array | None = None
) -> Evaluation:
  """Scores `predict(images [B, ...])` on a span; an empty span gives zeros.

  Args:
    predict: images float32 in [0, 1] -> Prediction.
    store: the examples.
    span: Span [].
    num_classes: C.
    classes: bool [C]; if given, the answer is the best of these classes only, and ties are shared out.
  """

  def body(i, total):
    batch = gather(store, span, i * BATCH + jnp.arange(BATCH), num_classes)
    logits = predict(batch.images).logits
    answer = jnp.argmax(logits, axis=-1) if classes is None else shared_answers(logits, classes)
    counts = confusion(jnp.argmax(batch.targets, axis=-1), answer, batch.mask > 0, num_classes)
    loss = jnp.sum(jnp.where(batch.mask > 0, cross_entropy(logits, batch.targets), 0.0))
    return Evaluation(total.confusion + counts, total.loss + loss)

  counted = jnp.int32 if classes is None else jnp.float32
  empty = Evaluation(jnp.zeros((num_classes, num_classes), counted), jnp.zeros(()))
  return jax.lax.fori_loop(0, (span.size + BATCH - 1) // BATCH, body, empty)


def verify(predict: Callable[[Array], Prediction], held_out: HeldOut) -> Array:
  """float32 [2]: see `metrics.verification.rates`, of the features of `predict(images [B, ...])`."""
  size = held_out.images.shape[0]
  batch = max(b for b in range(1, BATCH + 1) if size % b == 0)
  images = held_out.images.reshape(-1, batch, *held_out.images.shape[1:])
  features = jax.lax.map(lambda x: predict(images_of(x)).features, images).reshape(size, -1)
  return verification.rates(*verification.pairs(features, held_out.identity))
