"""FedProx: Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020.

  h_i(w; w^t) = F_i(w) + mu / 2 ||w - w^t||^2      (eq. 2), minimised inexactly, from w^t
  w^{t+1}     = the mean of what clients found     (algorithm 2)

A client that does a share of its steps (`visit.work`) sends what it has, where FedAvg's paper would leave it out; here
every method is given partial work, so what remains of FedProx is the proximal term. Means follow `--weighting`, as
FedAvg's do. Trap avoided: PFLlib's default mu is 0, which is FedAvg (method 4 [C]); papers use .001 to 1 [M].
"""

import optax

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Weight
from apfl_jax.types import Algorithm, Task, Upload


def fedprox(task: Task, *, mu: Weight = 0.1) -> Algorithm:
  """FedAvg whose clients are held to the global model.

  Args:
    task: the task.
    mu: weight of the proximal term; 0 is FedAvg.
  """
  loss = training.classification_loss(task)

  def local_update(download, client, data, visit, key):
    start = download.shared
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, training.proximal(loss, start, mu), start, data, steps, key)
    return client, Upload(update=optax.tree.sub(params, start), weight=training.weight(task.sgd, data.train.size))

  return fedavg(task)._replace(local_update=local_update)
