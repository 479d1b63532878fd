"""FedAvg + fine-tuning: each client tunes the global model on its own data before it uses it.

The plainest personalisation (e.g. Wang et al., Federated Evaluation of On-device Personalization, 2019), and the
baseline that AP-FL must be compared with at an equal number of steps (method 2.8, budget parity [O]). Tuning the head
alone forgets less of what the global model knows than tuning all of it (experiments/results/claims.md).
"""

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Personal
from apfl_jax.types import Algorithm, Task


def fedavg_ft(task: Task, *, head_only: Personal[bool] = False) -> Algorithm:
  """FedAvg; `personalize` spends all of `personal_steps` on the client's training data.

  Args:
    task: the task.
    head_only: whether the base stays as it is.
  """
  loss = training.classification_loss(task)

  def personalize(download, client, data, visit, key):
    del client, visit
    steps, shared = task.sgd.personal_steps, download.shared
    if head_only:
      of_head = lambda head, batch: loss(shared._replace(head=head), batch)
      return shared._replace(head=training.fine_tune(task, of_head, shared.head, data, steps, key))
    return training.fine_tune(task, loss, shared, data, steps, key)

  return fedavg(task)._replace(personalize=personalize)
