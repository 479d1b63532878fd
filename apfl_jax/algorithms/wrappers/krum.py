"""Krum: Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, NeurIPS 2017
(arXiv 1703.02757).

  score(i) = sum of |d_i - d_j|^2 over the K - f - 2 updates d_j nearest to d_i          (section 4)
  Krum takes the update of the smallest score, multi-Krum the m smallest                 (section 5)

K is how many updates arrived, f how many of them may be false. The paper proves it for K >= 2 f + 3. Where fewer came
the nearest one decides, which promises nothing, and a single one is taken as it is [O]. The updates chosen go on to the
method as if the others had been lost, with their weights: the paper's mean is uniform, `--weighting=uniform` here.

Distances are of `Upload.update`; what a method sends client by client beside it (`kept`) is not judged. The server must
hold the updates of a cohort one by one; of uploads that are aggregated one by one there is nothing to choose, so the
command line refuses the asynchronous clock, and a cohort of fewer than 2 f + 3.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax.errors import InputError
from apfl_jax.settings import Count, Limits
from apfl_jax.types import Algorithm, Array, PyTree, Task, Upload


class Kept(NamedTuple):
  """What the server wants client by client.

  Attributes:
    update: the method's.
    weight: float32 [], the method's.
    kept: the method's.
  """

  update: PyTree
  weight: Array
  kept: PyTree


def krum(
  algorithm: Algorithm, task: Task, *, byzantine: Count = 1, selected: Annotated[int, Limits(least=1)] = 1
) -> Algorithm:
  """The method sees only those updates that lie close together.

  Args:
    algorithm: the method; its uploads must hold an update.
    task: the task.
    byzantine: f, updates of a round that may be false.
    selected: m, updates that the method gets; 1 is Krum, more is multi-Krum.
  """
  if task.aggregations > 1:
    raise InputError(
      "wrappers: got krum where uploads are aggregated one by one, accepted are --clock=rounds and --clock=synchronous"
    )

  def local_update(download, client, data, visit, key):
    client, upload = algorithm.local_update(download, client, data, visit, key)
    if not jax.tree.leaves(upload.update):
      raise InputError("wrappers: got krum around a method that sends no update, accepted are methods that send one")
    return client, Upload(update=(), weight=upload.weight, kept=Kept(*upload))

  def aggregate(server, received, key):
    update, weight, kept = received.kept
    candidate = received.arrived & (weight > 0)  # an update of weight 0 is no update
    chosen = chosen_by_krum(update, candidate, byzantine, selected)
    only = lambda x: jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))
    weight = only(weight)
    total = jax.tree.map(lambda u: jnp.tensordot(weight, only(u), 1), update)
    kept = jax.tree.map(only, kept)
    received = received._replace(total=total, weight=jnp.sum(weight), kept=kept, arrived=chosen)
    return algorithm.aggregate(server, received, key)

  return algorithm._replace(local_update=local_update, aggregate=aggregate)


def least_uploads(*, byzantine: int, selected: int) -> int:
  """Updates of a round for which the paper has its proof."""
  del selected
  return 2 * byzantine + 3


def chosen_by_krum(update: PyTree, candidate: Array, byzantine: int, selected: int) -> Array:
  """bool [K]: which of the updates [K, ...] multi-Krum takes; `selected` of those with `candidate` bool [K], or all."""
  # Row by row: |a|^2 + |b|^2 - 2 ab would lose what is close together far from zero.
  to_all = lambda row: sum(
    jnp.sum((x - r) ** 2, axis=tuple(range(1, x.ndim)))
    for x, r in zip(jax.tree.leaves(update), jax.tree.leaves(row), strict=True)
  )
  distance = jax.lax.map(to_all, update)  # [K, K]
  count = candidate.shape[0]
  others = candidate & ~jnp.eye(count, dtype=bool)
  nearest = jnp.sort(jnp.where(others, distance, jnp.inf), axis=1)
  there = jnp.sum(candidate)
  neighbours = jnp.minimum(jnp.maximum(there - byzantine - 2, 1), there - 1)
  score = jnp.sum(jnp.where(jnp.arange(count) < neighbours, nearest, 0.0), axis=1)
  order = jnp.lexsort((score, ~candidate))  # an update far out may have an infinite score as well
  rank = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
  return candidate & (rank < selected)
