"""How good generated samples are, from what classifiers and real images say of them; NumPy on the host.

Method 2.11 and 8.4. A judge is a classifier trained on real images elsewhere: what it says is for reports only, no
method may read it. Judge agreement rewards prototypes and does not tell how useful samples are (8.4 [P]): what a fresh
network learns from them alone, scored on real images, does.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_BLOCK = 512  # rows of distances at a time


class Nearest(NamedTuple):
  """The nearest of some images to each of others.

  Attributes:
    place: int64 [n], which one; the first of equal ones.
    distance: float64 [n], Euclidean, over the root of the number of pixels, so that sizes compare.
  """

  place: np.ndarray
  distance: np.ndarray


def nearest(images: npt.ArrayLike, others: npt.ArrayLike) -> Nearest:
  """The nearest of `others` to each of `images`.

  Args:
    images: [n, ...], numbers; n may be 0.
    others: [m, ...], of the same shape, m > 0.
  """
  flat = lambda x: np.asarray(x, np.float32).reshape(len(x), math.prod(x.shape[1:]))
  a, b = flat(np.asarray(images)), flat(np.asarray(others))
  length = np.einsum("ij,ij->i", b, b)
  place = np.array(
    [i for start in range(0, len(a), _BLOCK) for i in np.argmin(length - 2 * a[start : start + _BLOCK] @ b.T, axis=1)],
    np.int64,
  )
  # The distance anew: the expanded square loses what matters most, small ones.
  distance = np.sqrt(np.mean((a.astype(np.float64) - b[place]) ** 2, axis=1)) if len(a) else np.zeros(0)
  return Nearest(place, distance)


def modes(place: npt.ArrayLike, labels: npt.ArrayLike, num_classes: int) -> np.ndarray:
  """int64 [C]: how many different real images are the nearest one of some sample, class by class.

  As many as there are samples where each is an image of its own; 1 where all of a class look alike.

  Args:
    place: int [n], the nearest real image of each sample.
    labels: int [n], the class that was asked for.
    num_classes: C.
  """
  found, label = np.asarray(place), np.asarray(labels)
  return np.array([len(np.unique(found[label == c])) for c in range(num_classes)], np.int64)


def calibration(trust: npt.ArrayLike, agreement: npt.ArrayLike) -> dict[str, Any]:
  """How well trust in a class's samples foretells what a judge says of them.

  Args:
    trust: float [C] in [0, 1].
    agreement: float [C], the judge's share of samples that are of their class; nan for classes left out.

  Returns:
    `correlation` (Pearson's; None for fewer than three classes or without any spread) and `error`, the mean absolute
    difference (None without classes).
  """
  first, second = np.asarray(trust, np.float64), np.asarray(agreement, np.float64)
  known = ~(np.isnan(first) | np.isnan(second))
  first, second = first[known], second[known]
  varied = first.size > 2 and first.std() > 1e-9 and second.std() > 1e-9
  return {
    "correlation": float(np.corrcoef(first, second)[0, 1]) if varied else None,
    "error": float(np.abs(first - second).mean()) if first.size else None,
  }
