"""What a class means: class embeddings, one row a class.

A table says how classes relate, so that what is learnt on the classes seen can reach those unseen. `onehot` and
`random` say nothing and are the controls of every comparison; `attributes` and `hierarchy` are human prior knowledge,
`minilm`, `bert` and `clip` that of a pretrained language model: no baseline gets either, so say it beside every figure.
"""

import os

import numpy as np

from apfl_jax.errors import InputError
from apfl_jax.semantics.alignment import alignment
from apfl_jax.semantics.attributes import ATTRIBUTES, attributes
from apfl_jax.semantics.hierarchy import HIERARCHIES, hierarchy
from apfl_jax.semantics.text import TEXT_KINDS, TextTable, read_table, table_path, text, write_table

KINDS = ("onehot", "random", "attributes", "hierarchy", *TEXT_KINDS)
_SIZE = 64  # of a random table, and the most that a longer one is reduced to


def parts(kinds: str) -> tuple[str, ...]:
  """The parts of an ensemble, `attributes+minilm`: names of kinds, or absolute paths of tables.

  Raises:
    InputError: a part that is neither, or one that comes twice.
  """
  names = [part.strip() for part in kinds.split("+")]
  for name in names:
    if name not in KINDS and not name.endswith(".npz"):
      raise InputError(
        f"embeddings: got {name!r}, accepted are {', '.join(KINDS)}, the path of a table (.npz), or several joined by +"
      )
  found = tuple(name if name in KINDS else os.path.abspath(os.path.expanduser(name)) for name in names)
  if len(set(found)) < len(found):
    raise InputError(f"embeddings: got {kinds!r}, accepted is each part at most once")
  return found


def embeddings(
  kinds: str,
  class_names: tuple[str, ...],
  dataset_name: str,
  *,
  rng: np.random.Generator,
  influence: float = 1.0,
  whitening: bool = False,
) -> np.ndarray:
  """float32 [C, D], rows in the order of `class_names`, of norm 1, each part centred over classes.

  Parts of an ensemble stand side by side, each weighted alike, so that its cosine is the mean of theirs. With
  `influence` k in [0, 1] the rows are normalise(k e (+) (1 - k) onehot), (+) standing for side by side (method 2.3):
  cosines are (k^2 cos(e, e') + (1 - k)^2 cos(onehot, onehot')) / (k^2 + (1 - k)^2). What has no weight is left out: at
  1 the table is e alone, at 0 that of `onehot`.

  Args:
    kinds: `onehot` (D = C), `random` (D = 64, normal), `attributes` (made by hand, see `semantics.attributes`),
      `hierarchy` (class trees made by hand, see `semantics.hierarchy`), `minilm`, `bert`, `clip` or the path of a table
      (see `semantics.text`); or several joined by +.
    class_names: C names, at least 2.
    dataset_name: by which tables are found.
    rng: consumed by `random` only.
    influence: k.
    whitening: see `normalise`; of each part.

  Raises:
    InputError: another kind, fewer than two classes, or no table for this data set or its classes.
  """
  size = len(class_names)
  if size < 2:
    raise InputError(f"embeddings: got {size} classes, need at least 2")

  def part(kind: str) -> np.ndarray:
    if kind == "onehot":
      return normalise(np.eye(size), max_size=size, whitening=whitening)
    if kind == "random":
      return normalise(rng.standard_normal((size, _SIZE)), whitening=whitening)
    if kind == "attributes":
      return normalise(attributes(class_names, dataset_name), whitening=whitening)
    if kind == "hierarchy":
      # The classes of a group are all equally far apart: fewer than C - 1 columns would tell some of them apart and
      # others not.
      return normalise(hierarchy(class_names, dataset_name), max_size=size, whitening=whitening)
    return normalise(text(class_names, dataset_name, kind), whitening=whitening)

  tables = [part(kind) for kind in parts(kinds)]
  weights = [influence / np.sqrt(len(tables))] * len(tables) + [1 - influence]
  tables.append(normalise(np.eye(size), max_size=size))
  weighted = [(weight, table) for weight, table in zip(weights, tables, strict=True) if weight > 0]
  if len(weighted) == 1:
    return weighted[0][1]
  joined = np.concatenate([weight * np.asarray(table, np.float64) for weight, table in weighted], axis=1)
  return (joined / np.linalg.norm(joined, axis=1, keepdims=True)).astype(np.float32)


def normalise(table: np.ndarray, max_size: int = _SIZE, whitening: bool = False) -> np.ndarray:
  """A table as every method gets it: centred over classes, reduced to `max_size` columns, rows of norm 1.

  See method 2.3 [O]; the norm is taken last, so that it is 1 also after the reduction. A table of more than `max_size`
  columns keeps its min(C - 1, max_size) principal components, which for C <= max_size + 1 changes no angle.

  Whitening, which comes before the reduction, is by the covariance shrunk half-way to a multiple of the identity [O]:
  the singular value s of a direction becomes s / sqrt(s^2 + m), but for a factor; m is the mean of s^2 over the
  min(C - 1, D) directions that there can be. Whitened fully, any table of affinely independent rows is `onehot`.

  Args:
    table: float [C, D], C at least 2.
    max_size: most columns kept.
    whitening: weakens directions of large variance.

  Returns:
    float32 [C, min(D, max_size)], or [C, min(C - 1, max_size)] after reduction.

  Raises:
    InputError: values that are not finite, or a class that has no direction left, being the mean of all.
  """
  table = np.asarray(table, np.float64)
  if table.ndim != 2 or len(table) < 2 or not np.isfinite(table).all():
    raise InputError(f"embeddings: got shape {list(table.shape)}; need finite numbers [C, D] of at least 2 classes")
  centred = table - table.mean(0)
  if whitening:
    left, scale, right = np.linalg.svd(centred, full_matrices=False)
    mean = np.sum(scale**2) / min(len(table) - 1, table.shape[1])
    centred = (left * scale * np.sqrt(2 * mean / (scale**2 + mean + np.finfo(float).tiny))) @ right
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


__all__ = [
  "ATTRIBUTES",
  "HIERARCHIES",
  "KINDS",
  "TEXT_KINDS",
  "TextTable",
  "alignment",
  "attributes",
  "embeddings",
  "hierarchy",
  "normalise",
  "parts",
  "read_table",
  "table_path",
  "text",
  "write_table",
]
