"""Augmentation against padding and slicing, and mixtures solved for their share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.training.augment import AUGMENTATIONS, augment, max_shift, shift
from apfl_jax.training.batches import Batch

SIZE, HEIGHT, WIDTH, CLASSES = 64, 9, 7, 5
compiled = jax.jit(augment, static_argnums=0)


def moved(image: np.ndarray, down: int, right: int, most: int) -> np.ndarray:
  padded = np.pad(image, ((most, most), (most, most), (0, 0)), mode="edge")
  return padded[most - down : most - down + HEIGHT, most - right : most - right + WIDTH]


def batch(images: np.ndarray | None = None) -> Batch:
  rng = np.random.default_rng(0)
  images = rng.random((SIZE, HEIGHT, WIDTH, 2)) if images is None else images
  targets = np.eye(CLASSES)[rng.integers(0, CLASSES, SIZE)]
  mask = np.arange(SIZE) < SIZE - 3
  return Batch(*(jnp.asarray(x, jnp.float32) for x in (images, targets, mask)))


def test_shift_is_a_slice_of_the_edge_padded_image():
  images = np.asarray(batch().images)
  offset = np.random.default_rng(1).integers(-4, 5, (SIZE, 2))
  want = [moved(image, down, right, 4) for image, (down, right) in zip(images, offset, strict=True)]
  np.testing.assert_array_equal(shift(jnp.asarray(images), jnp.asarray(offset)), want)


@pytest.mark.parametrize(("side", "most"), [(4, 1), (8, 1), (14, 1), (28, 2), (32, 2), (64, 5), (224, 16)])
def test_max_shift_is_a_fourteenth(side, most):
  assert max_shift(side) == most


def test_none_changes_nothing():
  given = batch()
  for before, after in zip(given, compiled("none", given, jax.random.key(0)), strict=True):
    np.testing.assert_array_equal(before, after)


def test_shift_moves_each_image_by_its_own_offset():
  given = batch()
  got = compiled("shift", given, jax.random.key(0))
  np.testing.assert_array_equal(got.targets, given.targets)
  found = []
  for before, after in zip(np.asarray(given.images), np.asarray(got.images), strict=True):
    offsets = [(d, r) for d in (-1, 0, 1) for r in (-1, 0, 1) if np.array_equal(moved(before, d, r, 1), after)]
    assert len(offsets) == 1
    found.append(offsets[0])
  assert len(set(found)) == 9  # one of the nine is missing with a chance of 0.5 %; the key is fixed


def test_full_mixes_an_image_and_its_target_alike_and_smooths():
  level = np.random.default_rng(2).permutation(SIZE) / SIZE  # flat images: shifting them is nothing
  given = batch(np.broadcast_to(level[:, None, None, None], (SIZE, HEIGHT, WIDTH, 1)))
  got = jax.tree.map(np.asarray, compiled("full", given, jax.random.key(0)))
  assert np.ptp(got.images, axis=(1, 2, 3)).max() < 1e-6
  partner = (np.arange(SIZE) - 1) % int(given.mask.sum())  # of the real rows: padding is no partner
  other, targets = level[partner], np.asarray(given.targets)
  share = (got.images[:, 0, 0, 0] - other) / (level - other)
  assert share.min() >= 0.5 - 1e-4 and share.max() <= 1 + 1e-4 and np.ptp(share) > 0.4
  mixed = share[:, None] * targets + (1 - share[:, None]) * targets[partner]
  np.testing.assert_allclose(got.targets, 0.9 * mixed + 0.1 / CLASSES, atol=1e-4)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_images_stay_in_range_targets_distributions_and_masks_untouched(kind):
  given = batch()
  got = jax.vmap(functools.partial(augment, kind, given))(jax.random.split(jax.random.key(3), 20))
  images, targets = np.asarray(got.images), np.asarray(got.targets)
  assert images.min() >= 0 and images.max() <= 1
  assert targets.min() >= 0
  np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
  np.testing.assert_array_equal(got.mask, np.broadcast_to(given.mask, got.mask.shape))


def test_smoothing_follows_the_offset_of_the_client():
  share = np.array([0.5, 0.0, 0.3, 0.2, 0.0])
  given = batch()._replace(logit_offset=jnp.log(jnp.float32(share)))
  got, plain = compiled("full", given, jax.random.key(0)), compiled("full", batch(), jax.random.key(0))
  np.testing.assert_allclose(got.targets, np.asarray(plain.targets) - 0.1 / CLASSES + 0.1 * share, atol=1e-6)
  np.testing.assert_array_equal(got.images, plain.images)
  np.testing.assert_array_equal(got.logit_offset, given.logit_offset)
