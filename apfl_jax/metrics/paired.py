"""Two methods on the same seeds: differences of pairs, because the seed moves both and the pair takes that out [O].

With the three to ten seeds of a study no asymptotic law holds. The test flips the signs of the differences, all ways
where they can be counted (Fisher 1935); p cannot be less than 2^-n. The interval is the percentile bootstrap's (Efron
1979), which is too narrow for few pairs: below five read it as a range.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from apfl_jax.errors import InputError

_EXACT = 14  # pairs whose signs are all tried; more are drawn
_DRAWS = 10_000


class Paired(NamedTuple):
  """What pairs say of a - b.

  Attributes:
    differences: float [n], nan pairs left out.
    mean: of the differences; None without any.
    std: of a sample (n - 1); None for fewer than two.
    low: lower end of the 95 % interval of the mean; None for fewer than two.
    high: upper end.
    p_value: share of the flips with a mean at least as large, that is of chance alone bringing a so far above b; None
      without pairs.
  """

  differences: np.ndarray
  mean: float | None
  std: float | None
  low: float | None
  high: float | None
  p_value: float | None


def paired(a: npt.ArrayLike, b: npt.ArrayLike) -> Paired:
  """Compares two methods pair by pair; the same input gives the same answer.

  Args:
    a: float [n], a score on each seed; nan where it is not known.
    b: float [n], the other's score on the same seeds.

  Raises:
    InputError: the two are not of one length.
  """
  first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if first.ndim != 1 or first.shape != second.shape:
    raise InputError(f"paired: got shapes {first.shape} and {second.shape}, accepted are two lists of one length")
  differences = first - second
  differences = differences[~np.isnan(differences)]
  count = differences.size
  if not count:
    return Paired(differences, None, None, None, None, None)
  mean, p_value = float(differences.mean()), _sign_flips(differences)
  if count == 1:
    return Paired(differences, mean, None, None, None, p_value)
  rows = np.random.default_rng(0).integers(0, count, (_DRAWS, count))
  low, high = np.quantile(differences[rows].mean(axis=1), [0.025, 0.975])
  return Paired(differences, mean, float(differences.std(ddof=1)), float(low), float(high), p_value)


def _sign_flips(differences: np.ndarray) -> float:
  """One-sided p of the mean; of drawn flips what was observed counts as one more."""
  count = differences.size
  if count <= _EXACT:
    signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    extra = 0
  else:
    signs = np.random.default_rng(1).choice([-1, 1], (_DRAWS, count))
    extra = 1
  rounding = 1e-12 * np.abs(differences).sum()
  as_large = int((signs @ differences >= differences.sum() - rounding).sum())
  return (as_large + extra) / (len(signs) + extra)
