"""Classes that nobody trains on, taken out of a data set for open-set verification."""

from typing import Any

import numpy as np

from apfl_jax.data.datasets import Dataset
from apfl_jax.types import HeldOut

_EXAMPLES, _ALL = 40, 400  # at most, of each class and of all together: all pairs of them are compared


def hold_out(dataset: Dataset, classes: np.ndarray) -> tuple[Dataset, HeldOut]:
  """The data set without some classes, and examples of those from its own test split.

  The other classes close up. Examples of the classes taken out stay where they are, with label -1: nothing may refer to
  them, and images are not copied.

  Args:
    dataset: the whole.
    classes: int [V], which to take out.

  Returns:
    (the rest, at most 40 test examples of each class and 400 in all, the first ones; fewer leave padding, so that no
    shape depends on which classes they are)
  """
  others = np.setdiff1d(np.arange(len(dataset.class_names)), classes)
  number = np.full(len(dataset.class_names), -1, np.int32)
  number[others] = np.arange(len(others))
  rest = dataset._replace(
    labels=number[dataset.labels],
    test_labels=number[dataset.test_labels],
    class_names=tuple(dataset.class_names[c] for c in others),
  )
  each = max(min(_EXAMPLES, _ALL // len(classes)), 2)
  images = np.zeros((len(classes) * each, *dataset.test_images.shape[1:]), np.uint8)
  identity = np.full(len(images), -1, np.int32)
  for i, label in enumerate(classes):
    own = np.flatnonzero(dataset.test_labels == label)[:each]
    place = slice(i * each, i * each + len(own))
    images[place], identity[place] = dataset.test_images[own], i
  found: Any = (images, identity)  # on the host; they go to the device later
  return rest, HeldOut(*found)
