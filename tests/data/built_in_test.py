"""The sets that need no download, and that importing them stays light."""

import subprocess
import sys

import numpy as np
import pytest

from apfl_jax import data


@pytest.mark.parametrize("name, shape, train, test", [("digits", (8, 8, 1), 1437, 360), ("fast", (4, 4, 1), 2000, 400)])
def test_shapes_types_and_balance(name, shape, train, test):
  dataset = data.load(name)
  assert dataset.name == name
  assert dataset.images.shape == (train, *shape)
  assert dataset.test_images.shape == (test, *shape)
  assert dataset.images.dtype == dataset.test_images.dtype == np.uint8
  assert dataset.labels.dtype == dataset.test_labels.dtype == np.int32
  assert len(np.unique(np.bincount(dataset.test_labels, minlength=len(dataset.class_names)))) == 1
  np.testing.assert_array_equal(dataset.images, data.load(name).images)


def test_digits_are_those_of_scikit_learn():
  source = pytest.importorskip("sklearn.datasets").load_digits()
  dataset = data.load("digits")
  images = np.concatenate([dataset.images, dataset.test_images])[..., 0]
  labels = np.concatenate([dataset.labels, dataset.test_labels])

  def rows(pixels, labels):  # as a set: each row is an image and its label
    return sorted(zip(map(bytes, pixels.astype(np.uint8)), labels.tolist(), strict=True))

  assert rows(np.floor(source.images * 255 / 16 + 0.5), source.target) == rows(images, labels)
  assert dataset.class_names[7] == "seven"


def test_fast_is_solved_by_the_brightest_quadrant():
  dataset = data.load("fast")
  quadrants = dataset.test_images.reshape(-1, 2, 2, 2, 2).astype(float).mean((2, 4)).reshape(-1, 4)
  np.testing.assert_array_equal(quadrants.argmax(1), dataset.test_labels)
  assert dataset.class_names == ("top left", "top right", "bottom left", "bottom right")
  assert len(np.unique(dataset.images.reshape(2000, -1), axis=0)) == 2000


def test_import_is_light():
  heavy = "{'tensorflow_datasets', 'tensorflow', 'PIL', 'sklearn', 'matplotlib', 'transformers', 'tqdm'}"
  code = f"import sys, apfl_jax.data, apfl_jax.semantics; print({heavy} & set(sys.modules))"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "set()"
