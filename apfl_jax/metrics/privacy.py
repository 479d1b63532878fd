"""What a generator or a model gives away of the examples it was trained with; NumPy on the host (method 6.7 [O]).

An attacker scores examples and guesses that those of high score were trained with. The area under its ROC curve is one
half where it learns nothing (Shokri et al. 2017; the loss as score: Yeom et al. 2018 [M]). Members and others must hold
the same classes equally often, or the attack finds classes and not examples: `matched`.
"""

import numpy as np
import numpy.typing as npt


def auc(members: npt.ArrayLike, others: npt.ArrayLike) -> float | None:
  """The chance that a member scores above another example, ties half: Mann and Whitney's statistic; None without any.

  Args:
    members: float [n], scores of examples that were trained with.
    others: float [m], of examples that were not.
  """
  a, b = np.asarray(members, np.float64), np.sort(np.asarray(others, np.float64))
  if not a.size or not b.size:
    return None
  below, up_to = (np.searchsorted(b, a, side=side) for side in ("left", "right"))
  return float((below + up_to).sum() / (2 * a.size * b.size))


def matched(
  labels: npt.ArrayLike, other_labels: npt.ArrayLike, rng: np.random.Generator, most: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
  """Places in two lists of examples such that both have equally many of each class.

  Args:
    labels: int [n], classes of the first list; negative ones are left out.
    other_labels: int [m], of the second.
    rng: consumed.
    most: examples of each list, all classes together.

  Returns:
    (int64 [k], int64 [k]), class by class
  """
  a, b = np.asarray(labels), np.asarray(other_labels)
  common = np.intersect1d(a[a >= 0], b[b >= 0])
  each = most // max(len(common), 1)
  chosen = []
  for c in common:
    here, there = np.flatnonzero(a == c), np.flatnonzero(b == c)
    size = min(len(here), len(there), each)
    chosen.append((rng.permutation(here)[:size], rng.permutation(there)[:size]))
  if not chosen:
    return np.zeros(0, np.int64), np.zeros(0, np.int64)
  first, second = zip(*chosen, strict=True)
  return np.concatenate(first), np.concatenate(second)


def closer(to_members: npt.ArrayLike, to_others: npt.ArrayLike) -> float | None:
  """The share of samples that lie nearer to a member than to any other example, ties half; None without samples.

  One half where the generator has memorised nothing. Both sets must be of one size: the nearest of more is nearer.

  Args:
    to_members: float [n], each sample's distance to the nearest example that was trained with.
    to_others: float [n], to the nearest of as many that were not.
  """
  a, b = np.asarray(to_members, np.float64), np.asarray(to_others, np.float64)
  return float(((a < b) + 0.5 * (a == b)).mean()) if a.size else None
