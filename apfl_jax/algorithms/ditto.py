"""Ditto: Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021.

  w by FedAvg;  v_i <- v_i - eta (grad f_i(v_i) + lambda (v_i - w^t))     (algorithm 1)

w^t is the global model as downloaded, at which v_i starts at the client's first visit. Both models take the same number
of steps on the same batches, as one descent on the sum of two losses that share nothing [O]; PFLlib passes over the
data twice [C]. The trap avoided (method 4 [C]): PFLlib's lambda is 0 unless set, which is training alone. The global
model is averaged by `--weighting`; the paper leaves its solver open.
"""

import jax

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Weight
from apfl_jax.types import Algorithm, Task, Upload


def ditto(task: Task, *, proximal_weight: Weight = 0.1) -> Algorithm:
  """FedAvg, and beside it a personal model on each client, held near the global one.

  Args:
    task: the task.
    proximal_weight: lambda; 0 is local training alone.
  """
  loss = training.classification_loss(task)
  near_to = lambda shared: training.proximal(loss, shared, proximal_weight)

  def local_update(download, client, data, visit, key):
    shared = download.shared
    near = near_to(shared)
    both = lambda models, batch: loss(models[0], batch) + near(models[1], batch)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params, client = training.local_sgd(task, both, (shared, client), data, steps, key)
    delta = jax.tree.map(lambda new, old: new - old, params, shared)
    return client, Upload(update=delta, weight=training.weight(task.sgd, data.train.size))

  def personalize(download, client, data, visit, key):
    del visit
    return training.fine_tune(task, near_to(download.shared), client, data, task.sgd.personal_steps, key)

  return fedavg(task)._replace(
    local_update=local_update,
    init_client=lambda download, key: download.shared,
    personalize=personalize,
  )
