"""MIFA: Gu et al., Fast Federated Learning in the Presence of Arbitrary Device Unavailability, NeurIPS 2021.

  U_i <- (w_i - w) / eta for every client that is there, from its local SGD;  all others keep their last U_i
  w   <- w + eta mean_i U_i  over all clients, there or not                      (algorithm 1)

The memory of an absent client's last update keeps the mean unbiased whoever is absent. It is on the clients: each sends
its update less the one that the server has of it, and the server holds the running sum. The rate is constant in a run,
so it drops out of U_i; the authors let it fall as 1 / t [C]. The mean is uniform, as in the paper.

The paper has everybody there in the first round. The authors' code either waits until everybody has come once, which
some never do here, or counts a client never heard of as U_i = 0 [C], which shortens the server's steps by the share of
such clients. Here the mean is over the clients heard of so far [O]; once everybody has come it is the paper's.

If an upload is lost the server still has the client's older update, which the client cannot know; so the server tells
each client the number of its last upload that arrived (four bytes), and a client keeps two updates, the one known to
have arrived and the one sent last. The paper knows of no losses [O].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.types import Algorithm, Array, Download, Params, Task, Upload


class Server(NamedTuple):
  """The server between rounds.

  Attributes:
    params: the global model.
    memory: the sum of all clients' last updates that arrived.
    heard: int32 [N], the number of each client's last upload that arrived, from 0; -1 for none.
  """

  params: Params
  memory: Params
  heard: Array


class Client(NamedTuple):
  """What a client keeps.

  Attributes:
    known: its last update known to have arrived.
    sent: its last update.
    number: int32 [], how many visits there were before that one.
  """

  known: Params
  sent: Params
  number: Array


def mifa(task: Task) -> Algorithm:
  """FedAvg over the last updates of all clients, there or not; the client keeps two of its own."""
  loss = training.classification_loss(task)
  uniform = task.sgd._replace(weighting="uniform")

  def init(key):
    params = task.model.init(key)
    return Server(params, jax.tree.map(jnp.zeros_like, params), jnp.full(task.num_clients, -1, jnp.int32))

  def init_client(download, key):
    nothing = jax.tree.map(jnp.zeros_like, download.shared)
    return Client(nothing, nothing, jnp.int32(-2))

  def local_update(download, client, data, visit, key):
    arrived = download.own == client.number
    known = jax.tree.map(lambda sent, known: jnp.where(arrived, sent, known), client.sent, client.known)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, download.shared, data, steps, key)
    delta = optax.tree.sub(params, download.shared)
    number = jnp.where(data.train.size > 0, visit.times, -1)  # without examples it is not heard of
    upload = Upload(optax.tree.sub(delta, known), training.weight(uniform, data.train.size), kept=number)
    return Client(known, delta, visit.times), upload

  def aggregate(server, received, key):
    memory = optax.tree.add(server.memory, received.total)
    ids = jnp.where(received.arrived, received.ids, task.num_clients)
    heard = server.heard.at[ids].max(received.kept, mode="drop")
    count = jnp.sum(heard >= 0)
    return Server(jax.tree.map(lambda w, u: w + u / count, server.params, memory), memory, heard)

  return fedavg(task)._replace(
    init=init,
    download=lambda server: Download(shared=server.params, own=server.heard),
    local_update=local_update,
    aggregate=aggregate,
    global_model=lambda server: server.params,
    init_client=init_client,
  )
