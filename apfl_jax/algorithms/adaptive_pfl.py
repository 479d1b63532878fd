"""Adaptive personalised FL, "APFL": Deng, Kamani and Mahdavi, Adaptive Personalized Federated Learning, 2020.

Not AP-FL (`ap_fl`). With vbar = alpha v + (1 - alpha) w, at every local step:

  w_i <- w_i - eta grad f_i(w_i)                                                    (algorithm 1)
  v_i <- v_i - eta alpha grad f_i(vbar_i)                                           (algorithm 1)
  alpha_i <- clip(alpha_i - eta <v_i - w_i, grad f_i(vbar_i)>, 0, 1)

The server averages the w_i. The last two are the gradient of f_i(vbar_i) with w_i held still, so all three are one
descent on f_i(w_i) + f_i(vbar_i), on the same batches. v_i starts at the first download. Traps avoided (method 4 [C]):
PFLlib mixes v into w once a round instead of in every gradient, moves alpha by alpha grad f(v) + (1 - alpha) grad f(w)
plus a ridge of .02 alpha, and starts it at 1. In the paper alpha moves once a round [M]; here at every step [O].
`personalize` freezes the downloaded w and trains v and alpha on (method 2.11); the personal model is vbar.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Share
from apfl_jax.types import Algorithm, Array, Params, Task, Upload


class Client(NamedTuple):
  """What a client keeps.

  Attributes:
    params: v.
    alpha: float32 [], the share of v in the personal model.
  """

  params: Params
  alpha: Array


def adaptive_pfl(task: Task, *, alpha: Share = 0.5, adapt: bool = True) -> Algorithm:
  """A personal model on each client, mixed with the global one by a weight that is learned.

  Args:
    task: the task.
    alpha: the share of the local model that a client starts with.
    adapt: whether that share is learned.
  """
  loss = training.classification_loss(task)

  def mixed(client, shared):
    return jax.tree.map(lambda v, w: client.alpha * v + (1.0 - client.alpha) * w, client.params, shared)

  def own_loss(client, shared, batch):
    if not adapt:
      client = client._replace(alpha=jax.lax.stop_gradient(client.alpha))
    return loss(mixed(client, jax.lax.stop_gradient(shared)), batch)

  def clipped(client):
    return client._replace(alpha=jnp.clip(client.alpha, 0.0, 1.0))

  def local_update(download, client, data, visit, key):
    shared = download.shared
    both = lambda models, batch: loss(models[0], batch) + own_loss(models[1], models[0], batch)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params, client = training.local_sgd(
      task, both, (shared, client), data, steps, key, project=lambda models: (models[0], clipped(models[1]))
    )
    delta = jax.tree.map(lambda new, old: new - old, params, shared)
    return client, Upload(update=delta, weight=training.weight(task.sgd, data.train.size))

  def personalize(download, client, data, visit, key):
    del visit
    shared = download.shared
    own = lambda client, batch: own_loss(client, shared, batch)
    return mixed(training.fine_tune(task, own, client, data, task.sgd.personal_steps, key, project=clipped), shared)

  return fedavg(task)._replace(
    local_update=local_update,
    init_client=lambda download, key: Client(download.shared, jnp.float32(alpha)),
    personalize=personalize,
  )
