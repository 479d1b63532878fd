"""FedNova: Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, 2020.

  d_i = (w_i - w) / tau_i                           the mean step of a client that took tau_i steps
  w <- w + (sum_i p_i tau_i) (sum_i p_i d_i)        p_i its weight among those that arrived

So a client with many steps does not pull the model further than its weight allows. Local training is plain SGD, for
which the paper's accumulation vector is all ones and its norm is tau_i; no momentum, no proximal term. With equal steps
it is FedAvg: `--local_epochs` (not `--local_steps`) and `visit.work` are what makes clients differ. p_i follows
`--weighting`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.types import Algorithm, Array, Params, Task, Upload


class Sent(NamedTuple):
  """What a client's update holds.

  Attributes:
    direction: d_i.
    steps: float32 [], tau_i.
  """

  direction: Params
  steps: Array


def fednova(task: Task) -> Algorithm:
  """FedAvg over normalised updates."""
  loss = training.classification_loss(task)

  def local_update(download, client, data, visit, key):
    start = download.shared
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, start, data, steps, key)
    direction = jax.tree.map(lambda new, old: (new - old) / jnp.maximum(steps, 1), params, start)
    sent = Sent(direction, steps.astype(jnp.float32))
    return client, Upload(update=sent, weight=training.weight(task.sgd, data.train.size))

  def aggregate(server, received, key):
    mean = received.mean
    return jax.tree.map(lambda w, d: w + mean.steps * d, server, mean.direction)

  return fedavg(task)._replace(local_update=local_update, aggregate=aggregate)
