"""What every source of examples returns."""

from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
  """Images, labels and the set's own test split, on the host.

  Attributes:
    name: the set's own name, without a version; class embeddings are found by it.
    images: uint8 [M, height, width, channels]; may be memory-mapped, read-only.
    labels: int32 [M].
    test_images: uint8 [P, height, width, channels].
    test_labels: int32 [P].
    class_names: C names, in the order of the labels.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  class_names: tuple[str, ...]
