"""Open-set verification: are two images of one class, of classes that nobody trained on? Judged by features.

A pair scores the cosine of its features and is accepted above a threshold. FAR is the share of impostor pairs (two
classes) that are accepted, FRR that of genuine pairs (one class) that are not, TAR = 1 - FRR (method 3.3).
"""

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax.types import Array

FAR = 1e-2  # at which TAR is told


def pairs(features: Array, identity: Array) -> tuple[Array, Array, Array]:
  """All Q = P (P - 1) / 2 pairs of P examples.

  Args:
    features: float32 [P, F].
    identity: int32 [P], the class of each; -1 for padding.

  Returns:
    (float32 [Q] cosines, bool [Q] genuine, bool [Q] counted: neither is padding)
  """
  unit = features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)
  i, j = np.triu_indices(features.shape[0], 1)
  there = identity >= 0
  return (unit @ unit.T)[i, j], identity[i] == identity[j], there[i] & there[j]


def rates(score: Array, genuine: Array, counted: Array) -> Array:
  """float32 [2]: the equal error rate, where FAR = FRR, and TAR at `FAR`; nan without pairs of either kind, or where a
  score that counts is not finite.

  Pairs of equal score are accepted together. The equal error rate is read off straight lines between the thresholds
  there are; TAR is that of the best threshold whose false acceptances are few enough.

  Args:
    score: float32 [Q], larger is more alike.
    genuine: bool [Q].
    counted: bool [Q], pairs that exist.
  """
  sound = jnp.all(jnp.isfinite(score) | ~counted)
  order = jnp.argsort(-jnp.where(counted, score, -jnp.inf))
  score, genuine, counted = score[order], genuine[order], counted[order]
  end = jnp.append((score[1:] != score[:-1]) | ~counted[1:], True)  # of a run of equal scores

  def accepted(kind: Array) -> Array:
    """int32 [Q + 1]: how many of a kind the thresholds accept, from none to all."""
    return jnp.append(0, jax.lax.cummax(jnp.where(end, jnp.cumsum(kind), 0)))

  right, wrong = accepted(genuine & counted), accepted(~genuine & counted)
  tar, far = right / right[-1], wrong / wrong[-1]
  gap = far + tar - 1.0  # FAR - FRR, rises from -1 to 1
  after = jnp.argmax(gap >= 0)
  before = after - 1
  share = -gap[before] / (gap[after] - gap[before])
  equal = far[before] + share * (far[after] - far[before])
  few = wrong <= jnp.floor(FAR * wrong[-1] + 1e-3)
  return jnp.where(
    sound & (right[-1] > 0) & (wrong[-1] > 0), jnp.stack([equal, jnp.max(jnp.where(few, tar, 0.0))]), jnp.nan
  )
