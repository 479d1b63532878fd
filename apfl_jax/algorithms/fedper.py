"""FedPer: Arivazhagan et al., Federated Learning with Personalization Layers, 2019.

  (b_i, h_i) <- SGD on both from (b^t, h_i);  b <- b + sum_i n_i (b_i - b^t) / sum_i n_i      (algorithms 1 and 2)

One personalisation layer, the head. As `fedrep` in all but the local steps: it is trained together with the base.
`personalize` trains the head alone on the base of the download (method 2.11); the paper has no such step, and with no
personal steps its model is what remains.
"""

import jax

from apfl_jax import training
from apfl_jax.algorithms.fedrep import fedrep
from apfl_jax.types import Algorithm, Params, Task, Upload


def fedper(task: Task) -> Algorithm:
  """A shared base, a head on each client, trained together."""
  loss = training.classification_loss(task)

  def local_update(download, client, data, visit, key):
    base = download.shared.base
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, Params(base, client), data, steps, key)
    delta = jax.tree.map(lambda new, old: new - old, params.base, base)
    return params.head, Upload(update=delta, weight=training.weight(task.sgd, data.train.size))

  return fedrep(task)._replace(local_update=local_update)
