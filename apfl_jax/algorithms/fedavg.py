"""FedAvg: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.

  w_i = w - eta * sum of gradients over E epochs (or S steps) on client i        (Algorithm 1, ClientUpdate)
  w  <- w + sum_i n_i (w_i - w) / sum_i n_i                                      (Algorithm 1, server)

The sums run over the clients whose uploads arrived. `--weighting=uniform` counts every client alike.
"""

import jax

from apfl_jax import training
from apfl_jax.types import Algorithm, Download, Task, Upload


def fedavg(task: Task) -> Algorithm:
  """The weighted mean of what clients have trained; it is everyone's model."""
  loss = training.classification_loss(task)

  def local_update(download, client, data, visit, key):
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, download.shared, data, steps, key)
    delta = jax.tree.map(lambda new, old: new - old, params, download.shared)
    return client, Upload(update=delta, weight=training.weight(task.sgd, data.train.size))

  return Algorithm(
    init=task.model.init,
    download=lambda server: Download(shared=server),
    local_update=local_update,
    aggregate=lambda server, received, key: jax.tree.map(lambda w, d: w + d, server, received.mean),
    predict=lambda model, images: training.predict(task.model, model, images),
    global_model=lambda server: server,
    init_client=lambda download, key: (),
    personalize=lambda download, client, data, visit, key: download.shared,
  )
