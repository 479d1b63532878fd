"""A deliberately trivial task that anything learns in seconds: for tests, tutorials and a first run."""

import numpy as np

from apfl_jax.data.datasets import Dataset

_CLASSES = ("top left", "top right", "bottom left", "bottom right")
_TRAIN, _TEST = 2000, 400


def load() -> Dataset:
  """2,000 training and 400 test images, [4, 4, 1], always the same: the class is the quadrant that is lit.

  A pixel is uniform in 0..63, plus 96 in the lit quadrant, so the brightest quadrant names the class without error.
  """
  labels = np.arange(_TRAIN + _TEST, dtype=np.int32) % len(_CLASSES)
  half = np.arange(4) // 2
  row, column = np.divmod(labels[:, None, None], 2)
  lit = (half[:, None] == row) & (half == column)
  # The raw words of a bit generator do not change between NumPy's versions; its distributions may.
  noise = np.random.PCG64(0).random_raw(lit.size).reshape(lit.shape) >> np.uint64(58)
  images = (noise + 96 * lit.astype(np.uint64)).astype(np.uint8)[..., None]
  return Dataset("fast", images[:_TRAIN], labels[:_TRAIN], images[_TRAIN:], labels[_TRAIN:], _CLASSES)
