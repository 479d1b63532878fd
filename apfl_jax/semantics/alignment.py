"""Semantic alignment: how alike two views of the same classes are, by centred kernel alignment.

Kornblith et al. 2019, arXiv 1905.00414, equations 3 and 4: the biased estimator. It needs the control beside it: with C
classes of which each is far from all others, any two tables are alike to some degree (`onehot` too, without meaning).
"""

import numpy as np

from apfl_jax.errors import InputError


def alignment(first: np.ndarray, second: np.ndarray) -> float:
  """Centred kernel alignment, in [0, 1] for Gram matrices; 1 if they are equal up to a factor and centring.

  Args:
    first: float [C, C], symmetric, e.g. `table @ table.T`.
    second: float [C, C], e.g. of the classes' mean features.

  Raises:
    InputError: other shapes, values that are not finite, or a matrix in which all classes are the same.
  """
  matrices = [np.asarray(first, np.float64), np.asarray(second, np.float64)]
  for matrix in matrices:
    if matrix.ndim != 2 or matrix.shape != (len(matrices[0]),) * 2 or not np.isfinite(matrix).all():
      shapes = " and ".join(str(list(m.shape)) for m in matrices)
      raise InputError(f"alignment: got shapes {shapes}; need two finite matrices [C, C]")
  centred = [m - m.mean(0) - m.mean(1, keepdims=True) + m.mean() for m in matrices]
  norms = [np.linalg.norm(m) for m in centred]
  if any(norm <= 1e-9 * np.abs(m).max() * len(m) for norm, m in zip(norms, matrices, strict=True)):
    raise InputError("alignment: got a matrix in which all classes are the same; need classes that differ")
  return float(np.sum(centred[0] * centred[1]) / (norms[0] * norms[1]))
