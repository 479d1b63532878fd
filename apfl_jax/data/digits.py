"""The 8 x 8 handwritten digits, shipped with the package: real data without a download.

The 1,797 images of the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository 1998, doi 10.24432/C50P49, CC BY 4.0), as distributed by scikit-learn.
"""

from importlib import resources

import numpy as np

from apfl_jax.data.datasets import Dataset

_CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEST_PER_CLASS = 36  # 360 of 1,797, 20 %


def load() -> Dataset:
  """1,437 training and 360 test images, [8, 8, 1], grey values 0..16 stretched to 0..255.

  The test split is fixed, so that it is the same for everyone: 36 examples of each class, evenly spaced in the order of
  the file. It is ours [O]: the file has no split of its own, and writers are in both parts.
  """
  with resources.files("apfl_jax.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
    images, labels = arrays["images"], arrays["labels"].astype(np.int32)
  images = np.rint(images[..., None] * (255 / 16)).astype(np.uint8)
  test = np.zeros(len(labels), bool)
  for label in range(len(_CLASSES)):
    own = np.flatnonzero(labels == label)
    test[own[np.arange(_TEST_PER_CLASS) * len(own) // _TEST_PER_CLASS]] = True
  return Dataset("digits", images[~test], labels[~test], images[test], labels[test], _CLASSES)
