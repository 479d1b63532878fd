"""FedBuff: Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, AISTATS 2022 (arXiv 2106.06639).

  on each arrival of d_i = w_i - w, computed on a server tau versions old:
    buffer <- buffer + s(tau) d_i
    when K updates are in it:  w <- w + eta buffer / K;  buffer <- 0             (algorithm 1)
  s(tau) = (1 + tau)^-a, a = .5

Every client counts alike, as in the paper; `--weighting` has no effect. What arrives together is taken one after
another, so that the buffer may be emptied several times in a round, or not at all. A version is what a server's step
makes: its number goes down with the model and comes back with the update, and tau is how many steps the server took in
between. What is in the buffer at the end of a run stays there. The server's step is FedAvgM's, whose momentum is 0 here
unless set; the authors' FLSim has .9 with eta .7 in its example [C], and can divide by s of the mean staleness [C],
which the paper does not.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax.algorithms import fedopt, one_by_one, staleness
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Limits, Positive, Weight
from apfl_jax.types import Algorithm, Array, Download, Params, Task


class Server(NamedTuple):
  """The server between arrivals.

  Attributes:
    model: the global model and its optimiser.
    buffer: the sum of s(tau) d_i.
    held: int32 [], how many updates are in it; less than the buffer's size.
    version: int32 [], its steps so far.
  """

  model: fedopt.Server
  buffer: Params
  held: Array
  version: Array


class Shared(NamedTuple):
  """What a client downloads.

  Attributes:
    params: the global model.
    version: int32 [].
  """

  params: Params
  version: Array


class Kept(NamedTuple):
  """What the server wants client by client.

  Attributes:
    plain: d_i, and whether the client has examples.
    version: int32 [], that of its download.
  """

  plain: one_by_one.Kept
  version: Array


def fedbuff(
  task: Task,
  *,
  buffer_size: Annotated[int, Limits(least=1)] = 10,
  staleness_exponent: Weight = 0.5,
  server_learning_rate: Positive = 1.0,
  server_momentum: fedopt.Decay = 0.0,
) -> Algorithm:
  """FedAvg whose server waits for a number of updates, not for clients.

  Args:
    task: the task.
    buffer_size: K, updates a server step.
    staleness_exponent: a of the discount for staleness; 0 is none.
    server_learning_rate: eta.
    server_momentum: of the server's steps.
  """
  plain = one_by_one.local_update(task)
  stepping = fedopt.fedavgm(task, server_learning_rate=server_learning_rate, momentum=server_momentum)

  def init(key):
    model = stepping.init(key)
    return Server(model, jax.tree.map(jnp.zeros_like, model.params), jnp.int32(0), jnp.int32(0))

  def local_update(download, client, data, visit, key):
    client, upload = plain(Download(download.shared.params), client, data, visit, key)
    return client, upload._replace(kept=Kept(upload.kept, download.shared.version))

  def aggregate(server, received, key):
    def emptied(server):
      filled = received._replace(total=server.buffer, weight=server.held)
      empty = jax.tree.map(jnp.zeros_like, server.buffer)
      return Server(stepping.aggregate(server.model, filled, key), empty, jnp.int32(0), server.version + 1)

    def arrival(server, item):
      delta, counts, version = item
      scale = staleness.polynomial(server.version - version, staleness_exponent)
      buffer = jax.tree.map(lambda b, d: jnp.where(counts, b + scale * d, b), server.buffer, delta)
      server = server._replace(buffer=buffer, held=server.held + counts)
      return jax.lax.cond(server.held >= buffer_size, emptied, lambda server: server, server), None

    update, version = received.kept
    return jax.lax.scan(arrival, server, (update.delta, received.arrived & update.counts, version))[0]

  return fedavg(task)._replace(
    init=init,
    download=lambda server: Download(Shared(server.model.params, server.version)),
    local_update=local_update,
    aggregate=aggregate,
    global_model=lambda server: server.model.params,
    personalize=lambda download, client, data, visit, key: download.shared.params,
  )
