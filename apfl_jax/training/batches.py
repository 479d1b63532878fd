"""Batches: a gather from the store, in an epoch order that is a keyed permutation, not a sorted table."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import random
from apfl_jax.types import Array, Key, Span, Store


class Batch(NamedTuple):
  """Examples as a loss sees them.

  Attributes:
    images: float32 [B, height, width, channels] in [0, 1].
    targets: float32 [B, C], distributions over classes (one-hot unless augmented).
    mask: float32 [B], 0 for padding and 1 for an example.
    logit_offset: of the client whose examples they are, see `Data`; None for any others.
  """

  images: Array
  targets: Array
  mask: Array
  logit_offset: Array | None = None


def images_of(images: Array) -> Array:
  """uint8 [...] -> float32 [...] in [0, 1]."""
  return images.astype(jnp.float32) / 255.0


def gather(store: Store, span: Span, position: Array, num_classes: int) -> Batch:
  """The examples at int32 [B] positions of a span; positions outside it are padding."""
  inside = position < span.size
  example = store.index[span.start + jnp.minimum(position, jnp.maximum(span.size - 1, 0))]
  return Batch(
    images=images_of(store.images[example]),
    targets=jax.nn.one_hot(store.labels[example], num_classes),
    mask=inside.astype(jnp.float32),
  )


def draw(store: Store, span: Span, step: Array, batch_size: int, num_classes: int, key: Key) -> Batch:
  """The batch of SGD step `step`: epochs follow each other, each in its own order, the last batch of one is short.

  Args:
    store: the examples.
    span: Span [], the client's; not empty.
    step: int32 [], counted from 0 over all epochs.
    batch_size: B.
    num_classes: C.
    key: of the client and the round; epochs fold in their number.
  """
  per_epoch = jnp.maximum((span.size + batch_size - 1) // batch_size, 1)
  epoch, step = step // per_epoch, step % per_epoch
  position = step * batch_size + jnp.arange(batch_size)
  order = random.permutation_key(jax.random.fold_in(key, epoch))
  shuffled = random.permute(order, position, span.size)
  return gather(store, span, jnp.where(position < span.size, shuffled, span.size), num_classes)


def label_histogram(store: Store, span: Span, num_classes: int) -> Array:
  """float32 [C]: how many examples of each class a span holds."""
  block = 128

  def count(i, total):
    batch_position = i * block + jnp.arange(block)
    inside = batch_position < span.size
    labels = store.labels[store.index[span.start + jnp.where(inside, batch_position, 0)]]
    return total + jnp.zeros(num_classes).at[labels].add(inside.astype(jnp.float32))

  return jax.lax.fori_loop(0, (span.size + block - 1) // block, count, jnp.zeros(num_classes))
