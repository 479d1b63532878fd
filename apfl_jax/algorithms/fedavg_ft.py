"""FedAvg + fine-tuning: each client tunes the global model on its own data before it uses it.

The plainest personalisation (e.g. Wang et al., Federated Evaluation of On-device Personalization, 2019), and the
baseline that AP-FL must be compared with at an equal number of steps (method 2.8, budget parity [O]).
"""

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.types import Algorithm, Task


def fedavg_ft(task: Task) -> Algorithm:
  """FedAvg; `personalize` spends all of `personal_steps` on the client's training data."""
  loss = training.classification_loss(task)

  def personalize(download, client, data, visit, key):
    del client, visit
    return training.fine_tune(task, loss, download.shared, data, task.sgd.personal_steps, key)

  return fedavg(task)._replace(personalize=personalize)
