"""Confusion matrices and what follows from them.

`confusion` runs inside the compiled evaluation, for one client; everything after it is NumPy on the host. Rows are
true classes, columns predicted ones, so that matrices of batches, clients or shards add up.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from apfl_jax.types import Array


def confusion(labels: Array, predictions: Array, mask: Array, num_classes: int) -> Array:
  """Counts (true class, predicted class) pairs.

  Args:
    labels: int [B], the true classes; ignored where `mask` is False.
    predictions: int [B], in `[0, num_classes)`; or float32 [B, C], answers shared out as by `shared_answers`.
    mask: bool [B], False for padding.
    num_classes: C.

  Returns:
    int32 [C, C], of shared answers float32; rows are true classes. Exact below 2**24 examples a call.
  """
  # A matmul of one-hots, not a scatter: it stays a dense batched product under vmap on every backend.
  true = jax.nn.one_hot(jnp.where(mask, labels, -1), num_classes)
  if predictions.ndim == 2:
    return true.T @ jnp.where(mask[:, None], predictions, 0.0)
  return (true.T @ jax.nn.one_hot(predictions, num_classes)).astype(jnp.int32)


def shared_answers(logits: Array, classes: Array) -> Array:
  """The best of some classes, float32 [..., C] with rows of sum 1: a class is not favoured for coming first in a tie.

  Args:
    logits: float32 [..., C]. Those within a millionth of the best tie with it, for equal ones may differ by rounding;
      nan is the worst.
    classes: bool [C], not all False.
  """
  kept = jnp.where(classes & ~jnp.isnan(logits), logits, -jnp.inf)
  best = jnp.max(kept, axis=-1, keepdims=True)
  tied = (kept >= best - 1e-6 * jnp.maximum(jnp.abs(best), 1.0)) & classes
  return tied / jnp.sum(tied, axis=-1, keepdims=True)


def accuracy(confusion: npt.ArrayLike) -> np.ndarray:
  """The share of examples predicted right; [..., C, C] -> float64 [...], nan where there are no examples."""
  counts = np.asarray(confusion, np.float64)
  return _ratio(np.trace(counts, axis1=-2, axis2=-1), counts.sum((-2, -1)))


def recall(confusion: npt.ArrayLike) -> np.ndarray:
  """Accuracy class by class; [..., C, C] -> float64 [..., C], nan where a class has no examples."""
  counts = np.asarray(confusion, np.float64)
  return _ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
  return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
