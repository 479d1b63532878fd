"""Central training: FedAvg among clients that all draw from the pooled federation. The upper bound [O].

The training examples of all clients are one pool, with those of clients that never take part: a bound to hold methods
against, not a method that anybody may use. `Method.pools` says that every client's training and validation spans are
the pool (`data.pooled`); test examples stay each client's own.

A client takes as many steps as if its share were 1 / N of the pool, so that a round is no more work than FedAvg's, each
in an order of its own; all count alike.
"""

import optax

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.types import Algorithm, Task, Upload


def central(task: Task) -> Algorithm:
  """FedAvg in which no data are a client's own; its global model is everyone's."""
  loss = training.classification_loss(task)

  def local_update(download, client, data, visit, key):
    share = (data.train.size + task.num_clients - 1) // task.num_clients
    steps = training.num_steps(task.sgd, share, visit.work)
    params = training.local_sgd(task, loss, download.shared, data, steps, key)
    update = optax.tree.sub(params, download.shared)
    return client, Upload(update=update, weight=training.weight(task.sgd, data.train.size))

  return fedavg(task)._replace(local_update=local_update)
