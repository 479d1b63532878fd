"""How accuracy is spread over clients and over classes: a mean hides the ones that a method fails.

See method 2.11 [O]. `unseen` follows generalised zero-shot learning, in which each class counts once however many
examples it has: Xian et al., CVPR 2017 [M].
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
    rounded up), and the means over the `dropped`, the `present` (not dropped) and the `monopolists`; None where
    there is no such client.
  """
  values = np.asarray(accuracy, np.float64)
  known = ~np.isnan(values)
  values = values[known]
  weight = np.asarray(examples, np.float64)[known]
  gone = np.asarray(dropped, bool)[known]
  return {
    "mean": _mean(values),
    "weighted_mean": float(values @ weight / weight.sum()) if weight.sum() > 0 else None,
    "std": float(values.std()) if values.size else None,
    "worst_decile": _mean(np.sort(values)[: -(-values.size // 10)]),
    "dropped": _mean(values[gone]),
    "present": _mean(values[~gone]),
    "monopolists": _mean(values[np.asarray(monopolist, bool)[known]]),
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


def _mean(values: np.ndarray) -> float | None:
  values = values[~np.isnan(values)]
  return float(values.mean()) if values.size else None
