"""Losses of a classifier, and its prediction.

Two options change the softmax of every loss on a client's real data, for every method alike: it may run over some
classes only (`SOFTMAX_MASKS`; method 2.4, 8.2), and it may be the balanced softmax of Ren et al. 2020
(arXiv 2007.10740), which adds the log of the client's own label prior to the logits (`READOUTS`; method 8.3). Both are
one vector [C] that is added, `Data.logit_offset`.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from apfl_jax.training.batches import Batch
from apfl_jax.types import Array, Model, Params, Prediction, PyTree, Task

_X = TypeVar("_X")
Loss = Callable[[Params, Batch], Array]
SOFTMAX_MASKS = ("none", "present", "own")  # all classes; the client's and those of who is there; the client's
READOUTS = ("plain", "prior")
# The share of a class without training examples [O]: its logarithm, -27.6, is finite, and more than logits make good.
_LEAST_SHARE = 1e-12


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


def batch_cross_entropy(logits: Array, batch: Batch, classes: Array | None = None) -> Array:
  """Softmax cross-entropy float32 [B] of a batch's rows, under its offset: the way to any loss on a client's real data.

  Args:
    logits: float32 [B, C].
    batch: the rows.
    classes: as in `cross_entropy`, of the method's own accord; where the offset leaves out more, both hold.
  """
  if batch.logit_offset is None:
    return cross_entropy(logits, batch.targets, classes)
  # Left out by a mask and not by adding -inf, whose gradients are not finite.
  kept = batch.logit_offset > -jnp.inf
  offset = jnp.where(kept, batch.logit_offset, 0.0)
  return cross_entropy(logits + offset, batch.targets, kept if classes is None else kept & classes)


def log_prior(counts: Array) -> Array:
  """float32 [C] from the counts of a client's training examples [C]; zeros for a client that has none."""
  total = jnp.sum(counts)
  return jnp.where(total > 0, jnp.log(jnp.maximum(counts / jnp.maximum(total, 1.0), _LEAST_SHARE)), 0.0)


def logit_offset(counts: Array, present: Array | None, softmax_mask: str, readout: str) -> Array | None:
  """`Data.logit_offset`, float32 [C], or None where neither option is asked for.

  Args:
    counts: float32 [C], the client's training examples of each class.
    present: bool [C], classes of the clients that are there; read by the mask `present` alone.
    softmax_mask: one of `SOFTMAX_MASKS`.
    readout: one of `READOUTS`.
  """
  if softmax_mask == "none" and readout == "plain":
    return None
  offset = log_prior(counts) if readout == "prior" else jnp.zeros_like(counts)
  if softmax_mask == "none":
    return offset
  kept = counts > 0
  if softmax_mask == "present":
    assert present is not None
    kept |= present
  return jnp.where(kept | ~jnp.any(kept), offset, -jnp.inf)  # a softmax over no class is none


def batch_mean(each: Array, batch: Batch) -> Array:
  """The mean of float32 [B] over the batch's examples, []; 0 where it has none."""
  return jnp.sum(jnp.where(batch.mask > 0, each, 0.0)) / jnp.maximum(jnp.sum(batch.mask), 1.0)


def classification_loss(task: Task, classes: Array | None = None) -> Loss:
  """(params, batch) -> [], the mean cross-entropy over the batch's examples, optionally over some classes only."""

  def loss(params: Params, batch: Batch) -> Array:
    return batch_mean(batch_cross_entropy(predict(task.model, params, batch.images).logits, batch, classes), batch)

  return loss


def proximal(
  loss: Callable[[PyTree, _X], Array], centre: PyTree, weight: Array | float
) -> Callable[[PyTree, _X], Array]:
  """(params, x) -> loss(params, x) + weight / 2 |params - centre|^2, [].

  Args:
    loss: (params, x) -> [], where x is a batch, or the number of a step.
    centre: a pytree like the parameters.
    weight: float32 []; at 0 the loss and its gradient are those of `loss`.
  """

  def held(params: PyTree, x: _X) -> Array:
    return loss(params, x) + 0.5 * weight * optax.tree.norm(optax.tree.sub(params, centre), squared=True)

  return held


def feature_size(task: Task) -> int:
  """F, how many features the head reads."""
  images = jax.ShapeDtypeStruct((1, *task.image_shape), jnp.float32)
  features = lambda key, images: task.model.base(task.model.init(key).base, images)[0]
  return jax.eval_shape(features, jax.random.key(0), images).shape[-1]
