"""Measures of generated samples against loops over all pairs and figures done by hand."""

import math

import numpy as np
import pytest

from apfl_jax.metrics import samples


def test_nearest_is_the_smallest_of_all_distances():
  rng = np.random.default_rng(0)
  images, others = (rng.integers(0, 256, (n, 3, 3, 1), np.uint8) for n in (700, 20))  # more than one block
  got = samples.nearest(images, others)
  for i in (0, 1, 511, 512, 699):
    distance = [math.sqrt(np.mean((images[i].astype(float) - other) ** 2)) for other in others]
    assert got.place[i] == int(np.argmin(distance))
    assert got.distance[i] == pytest.approx(min(distance))


def test_an_image_is_its_own_nearest_at_distance_zero():
  images = np.random.default_rng(1).integers(0, 256, (30, 28, 28, 1), np.uint8)
  got = samples.nearest(images, images)
  np.testing.assert_array_equal(got.place, np.arange(30))
  np.testing.assert_array_equal(got.distance, 0)
  assert samples.nearest(images[:0], images).distance.shape == (0,)


def test_modes_are_different_neighbours():
  got = samples.modes([4, 4, 4, 7, 8, 7], [0, 0, 0, 2, 2, 2], 3)
  np.testing.assert_array_equal(got, [1, 0, 2])


def test_calibration_by_hand():
  got = samples.calibration([0.9, 0.5, 0.1, 1.0], [0.7, 0.5, 0.3, math.nan])
  assert got == pytest.approx({"correlation": 1.0, "error": 0.4 / 3})
  upside_down = samples.calibration([0.1, 0.5, 0.9], [0.7, 0.5, 0.3])
  assert upside_down["correlation"] == pytest.approx(-1)


def test_calibration_without_spread_or_classes():
  assert samples.calibration([1.0, 1.0, 1.0], [0.2, 0.4, 0.6])["correlation"] is None
  assert samples.calibration([math.nan], [0.5]) == {"correlation": None, "error": None}
