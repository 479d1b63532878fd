"""SCAFFOLD: Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020.

  y_i  <- y_i - eta_l (g_i(y_i) - c_i + c)   K times, from x       (algorithm 1, eq. 3)
  c_i+  = c_i - c + (x - y_i) / (K eta_l)                          (eq. 4, option II)
  x    <- x + eta_g mean_i (y_i - x);  c <- c + |S| / N mean_i (c_i+ - c_i)     (eq. 5)

The client keeps its control c_i, the server c. Option II is what the paper runs [M] and PFLlib implements [C]. K is the
number of steps that this client really takes, so its control is a mean gradient whatever its size.

The means are uniform, as in the paper: c is the mean of the c_i only if every client counts alike, so `--weighting`
has no effect. A client without examples counts nothing. The trap that implementations fall into is avoided (method 4
[C]): the difference of the controls is taken before the old one is overwritten. A client whose upload is lost has moved
its c_i all the same, and c no longer is their mean; the paper knows of no losses. Clients that never come count in N
with a control of zero: where some are gone for good, c is too small by their share and the steps of others get shorter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Positive
from apfl_jax.types import Algorithm, Params, Task, Upload


class Server(NamedTuple):
  """What the server holds, and a client downloads.

  Attributes:
    params: the global model, x.
    control: c, in the shape of `params`.
  """

  params: Params
  control: Params


class Sent(NamedTuple):
  """What a client's update holds.

  Attributes:
    delta: y_i - x.
    control: c_i+ - c_i.
  """

  delta: Params
  control: Params


def scaffold(task: Task, *, server_learning_rate: Positive = 1.0) -> Algorithm:
  """FedAvg whose clients correct their drift by control variates (option II).

  Args:
    task: the task.
    server_learning_rate: eta_g.
  """
  loss = training.classification_loss(task)
  uniform = task.sgd._replace(weighting="uniform")

  def init(key):
    params = task.model.init(key)
    return Server(params, jax.tree.map(jnp.zeros_like, params))

  def local_update(download, client, data, visit, key):
    start, control = download.shared
    correction = jax.tree.map(lambda c, c_i: c - c_i, control, client)
    # The gradient of an inner product is its other factor.
    controlled = lambda params, batch: loss(params, batch) + optax.tree.vdot(correction, params)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, controlled, start, data, steps, key)
    delta = jax.tree.map(lambda y, x: y - x, params, start)
    travelled = jnp.maximum(steps, 1) * task.sgd.learning_rate
    # Without steps nothing was learned of the gradient: the control stays.
    change = jax.tree.map(lambda c, d: jnp.where(steps > 0, -c - d / travelled, 0.0), control, delta)
    client = jax.tree.map(lambda c_i, d: c_i + d, client, change)
    return client, Upload(update=Sent(delta, change), weight=training.weight(uniform, data.train.size))

  def aggregate(server, received, key):
    mean = received.mean
    share = received.weight / task.num_clients  # |S| / N
    return Server(
      params=jax.tree.map(lambda x, d: x + server_learning_rate * d, server.params, mean.delta),
      control=jax.tree.map(lambda c, d: c + share * d, server.control, mean.control),
    )

  return fedavg(task)._replace(
    init=init,
    local_update=local_update,
    aggregate=aggregate,
    global_model=lambda server: server.params,
    init_client=lambda download, key: jax.tree.map(jnp.zeros_like, download.shared.control),
    personalize=lambda download, client, data, visit, key: download.shared.params,
  )
