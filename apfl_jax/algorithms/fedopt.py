"""FedOpt: FedAvg whose server hands the mean update to an optimiser as if it were a gradient.

Reddi et al., Adaptive Federated Optimization, ICLR 2021, algorithms 1 and 2; FedAvgM is Hsu et al., Measuring the
Effects of Non-Identical Data Distribution for Federated Visual Classification, 2019.

  g = -sum_i n_i (w_i - w) / sum_i n_i;   w <- optimiser(w, g)

  FedAvgM   m = beta m + g;  w <- w - eta m
  FedAdam   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;                    w <- w - eta m / (sqrt(v) + tau)
  FedYogi   the same with v = v - (1 - b2) g^2 sign(v - g^2)

The optimisers are optax's, which divide m and v by 1 - b1^t and 1 - b2^t; algorithm 2 has no such correction but starts
v at tau^2 or more. Yogi's m and v start at 1e-6, which is tau^2 for the default tau. FedAvgM has no Nesterov step.
Defaults of b1, b2 and tau are the paper's [M]; eta, which it tunes for each task, is ours [O]. The mean follows
`--weighting`.
"""

from typing import Annotated, NamedTuple

import jax
import optax

from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Limits, Positive
from apfl_jax.types import Algorithm, Download, Params, PyTree, Task

Decay = Annotated[float, Limits(least=0, most=0.9999)]


class Server(NamedTuple):
  """The server between rounds.

  Attributes:
    params: the global model, all that clients download.
    optimizer: the optimiser's state.
  """

  params: Params
  optimizer: PyTree


def fedavgm(task: Task, *, server_learning_rate: Positive = 1.0, momentum: Decay = 0.9) -> Algorithm:
  """FedAvg with momentum on the server.

  Args:
    task: the task.
    server_learning_rate: eta.
    momentum: beta; 0 with eta 1 is FedAvg.
  """
  return _fedopt(task, optax.sgd(server_learning_rate, momentum))


def fedadam(
  task: Task, *, server_learning_rate: Positive = 0.01, b1: Decay = 0.9, b2: Decay = 0.99, tau: Positive = 1e-3
) -> Algorithm:
  """FedAvg with Adam on the server.

  Args:
    task: the task.
    server_learning_rate: eta.
    b1: decay of the first moment.
    b2: decay of the second moment.
    tau: how adaptive it is not; added to the root of the second moment.
  """
  return _fedopt(task, optax.adam(server_learning_rate, b1=b1, b2=b2, eps=tau))


def fedyogi(
  task: Task, *, server_learning_rate: Positive = 0.01, b1: Decay = 0.9, b2: Decay = 0.99, tau: Positive = 1e-3
) -> Algorithm:
  """FedAvg with Yogi on the server.

  Args:
    task: the task.
    server_learning_rate: eta.
    b1: decay of the first moment.
    b2: decay of the second moment.
    tau: how adaptive it is not; added to the root of the second moment.
  """
  return _fedopt(task, optax.yogi(server_learning_rate, b1=b1, b2=b2, eps=tau))


def _fedopt(task: Task, optimizer: optax.GradientTransformation) -> Algorithm:
  def init(key):
    params = task.model.init(key)
    return Server(params, optimizer.init(params))

  def aggregate(server, received, key):
    gradient = jax.tree.map(lambda d: -d, received.mean)
    updates, state = optimizer.update(gradient, server.optimizer, server.params)
    return Server(optax.apply_updates(server.params, updates), state)

  return fedavg(task)._replace(
    init=init,
    download=lambda server: Download(shared=server.params),
    aggregate=aggregate,
    global_model=lambda server: server.params,
  )
