"""Batches against the list of a span's examples: once an epoch each, in another order, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import training
from apfl_jax.training.batches import images_of
from apfl_jax.types import Span

BATCH, CLASSES, STEPS = 16, 5, 12


@pytest.fixture(scope="module")
def drawn(store):
  """(start, size, seed) -> Batch [STEPS, BATCH, ...]; one compilation for all."""

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(None, None, None, 0))
  def draw(start, size, seed, step):
    return training.draw(store, Span(start, size), step, BATCH, CLASSES, jax.random.key(seed))

  return lambda start, size, seed=0: jax.tree.map(np.asarray, draw(start, size, seed, jnp.arange(STEPS)))


def numbers(images: np.ndarray) -> np.ndarray:
  """int [...], which examples the images [..., 6, 5, 1] are."""
  low, high = np.round(255 * images[..., 0, 0, 0]), np.round(255 * images[..., 0, 1, 0])
  return (low + 256 * high).astype(int)


@pytest.mark.parametrize(("start", "size"), [(0, 1), (7, 5), (100, 15), (0, 16), (313, 17), (40, 40), (298, 32)])
def test_each_epoch_visits_each_example_of_the_span_once(drawn, store, start, size):
  batch = drawn(start, size)
  per_epoch = -(-size // BATCH)
  sizes = [
    min(BATCH, size - BATCH * (step % per_epoch)) for step in range(STEPS)
  ]  # the last batch of an epoch is short
  np.testing.assert_array_equal(batch.mask, np.arange(BATCH) < np.array(sizes)[:, None])
  example = numbers(batch.images)
  epochs = [
    np.concatenate([example[step][batch.mask[step] > 0] for step in range(first, first + per_epoch)])
    for first in range(0, STEPS - STEPS % per_epoch, per_epoch)
  ]
  own = np.asarray(store.index)[start : start + size]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.sort(own))
  if size >= 15:  # equal orders have a chance of one in 15!
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
  # Padding too, since mixup may look at it, is of the client's own.
  assert np.all(np.isin(example, own))


def test_rows_are_the_examples_pixels_and_labels(drawn, store):
  batch = drawn(40, 40)
  example = numbers(batch.images)
  np.testing.assert_allclose(batch.images, np.asarray(store.images)[example] / 255.0, rtol=1e-6)
  np.testing.assert_array_equal(batch.targets, np.eye(CLASSES)[np.asarray(store.labels)[example]])


def test_keys_give_different_orders(drawn):
  first, second = (numbers(drawn(0, 64, seed).images) for seed in (0, 1))
  assert np.any(first != second)


@pytest.mark.parametrize("start", [0, 330])
def test_an_empty_span_is_all_padding(drawn, start):
  batch = drawn(start, 0)
  assert not np.any(batch.mask)
  assert np.all((batch.images >= 0) & (batch.images <= 1))  # also says that nothing is nan


def test_images_of_scales_bytes_to_the_unit_interval():
  got = images_of(jnp.arange(256, dtype=jnp.uint8))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, np.arange(256) / 255, rtol=1e-6)


def test_label_histogram_counts_spans_of_any_size(store):
  sizes = np.arange(301)
  starts = np.where(sizes % 2, 330 - sizes, sizes % 30)  # every second span ends where the index does
  histogram = jax.jit(jax.vmap(lambda start, size: training.label_histogram(store, Span(start, size), CLASSES)))
  got = histogram(starts, sizes)
  labels, index = np.asarray(store.labels), np.asarray(store.index)
  want = [np.bincount(labels[index[a : a + n]], minlength=CLASSES) for a, n in zip(starts, sizes, strict=True)]
  np.testing.assert_array_equal(got, want)
