"""FedDyn: Acar et al., Federated Learning Based on Dynamic Regularization, ICLR 2021, algorithm 1.

  w_i  = argmin_w  L_i(w) - <g_i, w> + alpha / 2 ||w - w^t||^2,  from w^t      g_i <- g_i - alpha (w_i - w^t)
  h    <- h - alpha / N sum_i (w_i - w^t);     w^{t+1} = mean_i w_i - h / alpha

As in public code of it (FedFTG's repository [C]), what is kept is divided by -alpha: the client holds s_i = -g_i /
alpha, the sum of its moves so far, and the server -h / alpha, their mean over all N. Both means are uniform, as in the
paper; `--weighting` has no effect. Clients without examples count nothing.

What differs from that code: alpha is the same for every client (there it is divided by the client's share of the
examples), no clipping of gradients at norm 10, no weight decay. The minimum is sought by the round's SGD steps. A trap
of other code is avoided: PFLlib's proximal term is the norm and not its square [C].

The sum of moves is never forgotten, so few and inexact local steps can make the global model overshoot; a smaller
learning rate or a larger alpha helps. A lost upload moves s_i but not the server's mean.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Positive
from apfl_jax.types import Algorithm, Download, Params, Task, Upload


class Server(NamedTuple):
  """The server between rounds.

  Attributes:
    params: the global model, all that clients download.
    moves: -h / alpha, in the shape of `params`.
  """

  params: Params
  moves: Params


def feddyn(task: Task, *, alpha: Positive = 0.01) -> Algorithm:
  """FedDyn; the client keeps the sum of its moves.

  Args:
    task: the task.
    alpha: weight of the dynamic regulariser.
  """
  loss = training.classification_loss(task)
  uniform = task.sgd._replace(weighting="uniform")

  def init(key):
    params = task.model.init(key)
    return Server(params, jax.tree.map(jnp.zeros_like, params))

  def local_update(download, moves, data, visit, key):
    start = download.shared
    tilted = lambda params, batch: loss(params, batch) + alpha * optax.tree.vdot(moves, params)
    regularised = training.proximal(tilted, start, alpha)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, regularised, start, data, steps, key)
    delta = optax.tree.sub(params, start)
    upload = Upload(update=delta, weight=training.weight(uniform, data.train.size))
    return optax.tree.add(moves, delta), upload

  def aggregate(server, received, key):
    moves = jax.tree.map(lambda s, d: s + d / task.num_clients, server.moves, received.total)
    return Server(jax.tree.map(lambda w, d, s: w + d + s, server.params, received.mean, moves), moves)

  return fedavg(task)._replace(
    init=init,
    download=lambda server: Download(shared=server.params),
    local_update=local_update,
    aggregate=aggregate,
    global_model=lambda server: server.params,
    init_client=lambda download, key: jax.tree.map(jnp.zeros_like, download.shared),
  )
