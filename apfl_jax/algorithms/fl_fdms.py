"""FL-FDMS: Wang and Xu, Friends to Help: Saving Federated Learning from Client Dropout, 2022 (arXiv 2205.13222).

  r_ij = (cos(d_i, d_j) + 1) / 2       for clients i, j that are both there; d_i = w_i - w
  M_ij = the mean of r_ij over the rounds in which both were there
  an absent i is given the update d_f of its friend f = argmax_{j there} M_ij
  w <- w + 1 / N sum_i (d_i, or d_f where i is absent)

Means are uniform, as in the paper; `--weighting` has no effect. In the authors' code everybody takes part in the first
round [C], so that M is known; here a client that met nobody who is there is left out of the mean, which gives it the
mean of the others. The server keeps two N x N tables and needs the updates one by one: for federations of silos.
Clients that arrive one by one never meet: on the asynchronous clock nobody has a friend.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax.algorithms import one_by_one
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.errors import InputError
from apfl_jax.types import Algorithm, Array, Download, Params, Task

_MOST = 10_000  # clients; the tables then take 800 MB


class Server(NamedTuple):
  """The server between rounds.

  Attributes:
    params: the global model, all that clients download.
    total: float32 [N, N], the sum of r_ij so far.
    met: float32 [N, N], in how many rounds both were there.
  """

  params: Params
  total: Array
  met: Array


def fl_fdms(task: Task) -> Algorithm:
  """FedAvg in which the most similar client that is there stands in for one that is not."""
  if task.num_clients > _MOST:
    raise InputError(f"fl_fdms: got num_clients={task.num_clients}, accepted is at most {_MOST}: it keeps N x N tables")

  def init(key):
    blank = jnp.zeros((task.num_clients, task.num_clients))
    return Server(task.model.init(key), blank, jnp.zeros_like(blank))

  def aggregate(server, received, key):
    delta, there = received.kept.delta, received.arrived & received.kept.counts  # [K, ...], bool [K]
    ids = jnp.where(there, received.ids, task.num_clients)
    inner = sum(x.reshape(len(x), -1) @ x.reshape(len(x), -1).T for x in jax.tree.leaves(delta))  # [K, K]
    norm = jnp.sqrt(jnp.diagonal(inner))
    similarity = 0.5 + 0.5 * inner / jnp.maximum(norm[:, None] * norm, 1e-12)
    total = server.total.at[ids[:, None], ids].add(similarity, mode="drop")
    met = server.met.at[ids[:, None], ids].add(1.0, mode="drop")

    known = (met[:, received.ids] > 0) & there  # [N, K]
    mean = jnp.where(known, total[:, received.ids] / jnp.maximum(met[:, received.ids], 1.0), -1.0)
    absent = jnp.ones(task.num_clients, bool).at[ids].set(False, mode="drop")
    replaced = absent & jnp.any(known, axis=1)
    # A friend's update counts once more for each client that it stands in for.
    times = there + jnp.zeros(len(ids)).at[jnp.argmax(mean, axis=1)].add(replaced)
    share = times / jnp.sum(times)
    params = jax.tree.map(lambda w, d: w + jnp.tensordot(share, d, 1), server.params, delta)
    return Server(params, total, met)

  return fedavg(task)._replace(
    init=init,
    download=lambda server: Download(shared=server.params),
    local_update=one_by_one.local_update(task),
    aggregate=aggregate,
    global_model=lambda server: server.params,
  )
