"""LG-FedAvg: Liang et al., Think Locally, Act Globally: Federated Learning with Local and Global Representations, 2020.

  (b_i, h_i) <- SGD on both from (b_i, h^t);  h <- h + sum_i n_i (h_i - h^t) / sum_i n_i      (algorithm 1)

The mirror of FedPer: the base stays on the client, the head is shared. The paper starts from some rounds of FedAvg
[M]; here, as in PFLlib [C], there are none and all bases start alike. `personalize` tunes both from the client's base
and the head of the download: a client that never took part has an untrained base, so the head alone would not do [O].
"""

import jax

from apfl_jax import training
from apfl_jax.algorithms.fedrep import fedrep
from apfl_jax.types import Algorithm, Params, Task, Upload


def lg_fedavg(task: Task) -> Algorithm:
  """A base on each client, a shared head."""
  loss = training.classification_loss(task)

  def local_update(download, client, data, visit, key):
    head = download.shared.head
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, Params(client, head), data, steps, key)
    delta = jax.tree.map(lambda new, old: new - old, params.head, head)
    return params.base, Upload(update=delta, weight=training.weight(task.sgd, data.train.size))

  def aggregate(server, received, key):
    return server._replace(head=jax.tree.map(lambda h, d: h + d, server.head, received.mean))

  def personalize(download, client, data, visit, key):
    del visit
    start = Params(client, download.shared.head)
    return training.fine_tune(task, loss, start, data, task.sgd.personal_steps, key)

  return fedrep(task)._replace(
    local_update=local_update,
    aggregate=aggregate,
    init_client=lambda download, key: download.shared.base,
    personalize=personalize,
  )
