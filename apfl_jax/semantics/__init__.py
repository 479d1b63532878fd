"""What a class means: class embeddings, one row a class.

A table says how classes relate, so that what is learnt on the classes seen can reach those unseen. `onehot` and
`random` say nothing and are the controls of every comparison; `attributes` is human prior knowledge about images.
"""

import numpy as np

from apfl_jax.errors import InputError
from apfl_jax.semantics.attributes import ATTRIBUTES, attributes

KINDS = ("onehot", "random", "attributes")
_SIZE = 64  # of a random table, and the most that a longer one is reduced to


def embeddings(kind: str, class_names: tuple[str, ...], dataset_name: str, *, rng: np.random.Generator) -> np.ndarray:
  """float32 [C, D], rows in the order of `class_names`, centred over classes and of norm 1.

  Args:
    kind: `onehot` (D = C), `random` (D = 64, normal) or `attributes` (made by hand, see `semantics.attributes`).
    class_names: C names, at least 2.
    dataset_name: by which the attribute table is found.
    rng: consumed by `random` only.

  Raises:
    InputError: another kind, fewer than two classes, or no attribute table for this data set or its classes.
  """
  if len(class_names) < 2:
    raise InputError(f"embeddings: got {len(class_names)} classes, need at least 2")
  if kind == "onehot":
    return normalise(np.eye(len(class_names)), max_size=len(class_names))
  if kind == "random":
    return normalise(rng.standard_normal((len(class_names), _SIZE)))
  if kind == "attributes":
    return normalise(attributes(class_names, dataset_name))
  raise InputError(f"embeddings: got {kind!r}, accepted are {', '.join(KINDS)}")


def normalise(table: np.ndarray, max_size: int = _SIZE) -> np.ndarray:
  """A table as every method gets it: centred over classes, reduced to `max_size` columns, rows of norm 1.

  See method 2.3 [O]; the norm is taken last, so that it is 1 also after the reduction. A table of more than `max_size`
  columns keeps its min(C - 1, max_size) principal components, which for C <= max_size + 1 changes no angle.

  Args:
    table: float [C, D], C at least 2.
    max_size: most columns kept.

  Returns:
    float32 [C, min(D, max_size)], or [C, min(C - 1, max_size)] after reduction.

  Raises:
    InputError: values that are not finite, or a class that has no direction left, being the mean of all.
  """
  table = np.asarray(table, np.float64)
  if table.ndim != 2 or len(table) < 2 or not np.isfinite(table).all():
    raise InputError(f"embeddings: got shape {list(table.shape)}; need finite numbers [C, D] of at least 2 classes")
  centred = table - table.mean(0)
  if centred.shape[1] > max_size:
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    kept = min(len(table) - 1, max_size)
    centred = left[:, :kept] * scale[:kept]
    # Singular vectors are free in sign: the largest entry of each component is made positive.
    centred *= np.sign(np.take_along_axis(centred, np.abs(centred).argmax(0)[None], 0))
  norm = np.linalg.norm(centred, axis=1, keepdims=True)
  if norm.min() <= 1e-6 * np.abs(table).max():
    raise InputError(f"embeddings: class {norm.argmin()} is the mean of all classes, so it has no direction")
  return (centred / norm).astype(np.float32)


__all__ = ["ATTRIBUTES", "KINDS", "attributes", "embeddings", "normalise"]
