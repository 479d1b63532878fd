"""How accuracy is spread over clients and over classes: a mean hides the ones that a method fails.

See method 2.11, 6.5 and 6.6 [O]. Jain's index is that of Jain, Chiu and Hawe 1984 [M]. `unseen` follows generalised
zero-shot learning, in which each class counts once however many examples it has: Xian et al., CVPR 2017 [M].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from apfl_jax.metrics.confusion import recall


def summarise(
  accuracy: npt.ArrayLike, examples: npt.ArrayLike, dropped: npt.ArrayLike, monopolist: npt.ArrayLike
) -> dict[str, float | None]:
  """Accuracy over all clients and over the groups of them that dropout treats differently.

  Args:
    accuracy: float [N], in [0, 1]; nan for a client without test examples, which is left out of everything.
    examples: [N], the clients' weights in `weighted_mean`, their numbers of test examples.
    dropped: bool [N], the client never took part or left for good.
    monopolist: bool [N], the client holds a class that only dropped clients hold.

  Returns:
    `mean`, `weighted_mean`, `std` (of the population), `worst_decile` (mean over the worst tenth of the clients,
    rounded up), `gini` (0 where all have the same, up to 1) and `jain` (1 where all have the same, down to 1 / N); the
    means over the `dropped`, the `present` (not dropped) and the `monopolists`, and the gaps `dropped_gap` (dropped
    less present) and `monopolist_gap` (monopolists less all others); None where there is no such client.
  """
  values = np.asarray(accuracy, np.float64)
  known = ~np.isnan(values)
  values = values[known]
  weight = np.asarray(examples, np.float64)[known]
  gone, alone = np.asarray(dropped, bool)[known], np.asarray(monopolist, bool)[known]
  return {
    "mean": _mean(values),
    "weighted_mean": float(values @ weight / weight.sum()) if weight.sum() > 0 else None,
    "std": float(values.std()) if values.size else None,
    "worst_decile": _mean(np.sort(values)[: -(-values.size // 10)]),
    "gini": gini(values),
    "jain": jain(values),
    "dropped": _mean(values[gone]),
    "present": _mean(values[~gone]),
    "monopolists": _mean(values[alone]),
    "dropped_gap": _gap(values[gone], values[~gone]),
    "monopolist_gap": _gap(values[alone], values[~alone]),
  }


def gini(values: npt.ArrayLike) -> float | None:
  """Gini's coefficient of values >= 0: their mean difference over all pairs, over twice their mean.

  0 where all are equal, also where all are 0; None without values.
  """
  ordered = np.sort(np.asarray(values, np.float64))
  if not ordered.size:
    return None
  total = ordered.sum()
  rank = 2 * np.arange(1, ordered.size + 1) - ordered.size - 1
  return float(rank @ ordered / (ordered.size * total)) if total else 0.0


def jain(values: npt.ArrayLike) -> float | None:
  """Jain's index, (sum x)^2 / (n sum x^2): 1 where all are equal, also where all are 0; None without values."""
  array = np.asarray(values, np.float64)
  if not array.size:
    return None
  squares = array.size * (array @ array)
  return float(array.sum() ** 2 / squares) if squares else 1.0


def classes(recalls: npt.ArrayLike) -> dict[str, Any]:
  """How recall is spread over classes.

  Args:
    recalls: float [C], or [R, C] of R models, whose mean over models is taken; nan where a class has no examples.

  Returns:
    `each`, a number or None for each class; their `mean`, `std` (of the population) and `least`; None without any.
  """
  rows = np.atleast_2d(np.asarray(recalls, np.float64))
  each = [_mean(column) for column in rows.T]
  known = np.array([value for value in each if value is not None])
  return {
    "each": each,
    "mean": _mean(known),
    "std": float(known.std()) if known.size else None,
    "least": float(known.min()) if known.size else None,
  }


def reweighted(recalls: npt.ArrayLike, histogram: npt.ArrayLike) -> np.ndarray:
  """float [R]: accuracy that each client can expect on its own mix of classes, sum_c p(c) recall(c).

  With recalls on a balanced set all classes are judged by as many examples, which own test examples, few as they are,
  do not allow (method 8.3).

  Args:
    recalls: float [R, C], of each client's model; nan where a class has no examples, which then does not count.
    histogram: [R, C], how many examples of each class the client has; nan results for one that has none.
  """
  recall_of, counts = np.asarray(recalls, np.float64), np.asarray(histogram, np.float64)
  known = ~np.isnan(recall_of) & (counts > 0)
  weights = np.where(known, counts, 0.0)
  total = weights.sum(1)
  right = (weights * np.where(known, recall_of, 0.0)).sum(1)
  return np.divide(right, total, out=np.full(len(total), np.nan), where=total > 0)


def harm(with_it: npt.ArrayLike, without: npt.ArrayLike, threshold: float = 0.01) -> dict[str, float | None]:
  """What something did to clients one by one, e.g. synthetic data: the same clients in a run with and one without it.

  Args:
    with_it: float [N], accuracies; nan where it is not known.
    without: float [N], of the same clients on the same seed.
    threshold: loss from which on a client counts as harmed.

  Returns:
    `harmed`, the share of clients that lost more than `threshold`; `helped`, that gained more; the `mean` difference
    and the `worst`; None without clients.
  """
  difference = np.asarray(with_it, np.float64) - np.asarray(without, np.float64)
  difference = difference[~np.isnan(difference)]
  edge = threshold + 1e-9  # a difference of accuracies that is a point to the digit is no more than a point
  return {
    "harmed": _mean((difference < -edge).astype(float)),
    "helped": _mean((difference > edge).astype(float)),
    "mean": _mean(difference),
    "worst": float(difference.min()) if difference.size else None,
  }


def unseen(confusion: npt.ArrayLike, restricted: npt.ArrayLike, classes: Sequence[int]) -> dict[str, Any]:
  """How well a model does on classes that nobody could teach it.

  Args:
    confusion: [C, C], predictions by the argmax over all classes.
    restricted: [C, C], predictions by the argmax over `classes` only; integer or fractional counts, so that the
      caller may split a tie. Only the rows of `classes` are read.
    classes: the unseen classes.

  Returns:
    `classes`; `accuracy` and `seen_accuracy`, mean recall over the unseen and over the other classes;
    `harmonic_mean` of the two; `restricted_accuracy`, mean recall of the unseen when told that it is one of them
    (chance is one over their number). None where nothing is unseen, or a group has no examples.
  """
  wanted = sorted(int(c) for c in classes)
  if not wanted:
    return {"classes": [], "accuracy": None, "seen_accuracy": None, "harmonic_mean": None, "restricted_accuracy": None}
  recalls = recall(confusion)
  accuracy = _mean(recalls[wanted])
  seen_accuracy = _mean(np.delete(recalls, wanted))
  harmonic_mean = None
  if accuracy is not None and seen_accuracy is not None:
    total = accuracy + seen_accuracy
    harmonic_mean = 2 * accuracy * seen_accuracy / total if total else 0.0
  return {
    "classes": wanted,
    "accuracy": accuracy,
    "seen_accuracy": seen_accuracy,
    "harmonic_mean": harmonic_mean,
    "restricted_accuracy": _mean(recall(restricted)[wanted]),
  }


def _gap(first: np.ndarray, second: np.ndarray) -> float | None:
  return float(first.mean() - second.mean()) if first.size and second.size else None


def _mean(values: np.ndarray) -> float | None:
  values = values[~np.isnan(values)]
  return float(values.mean()) if values.size else None
