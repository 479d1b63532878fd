"""PAFedFV: Mu, Guo, Han and Sun, PAFedFV: Personalized and Asynchronous Federated Learning for Finger Vein Recognition,
arXiv 2404.13237.

Reported [R]: personal models are aggregated on the server, and clients go on training while they wait for it. What
follows is a reconstruction of that (method 3.3), all of it ours [O]:

  client k: b <- b^_k + mu (b_wait - b_up)          b^_k its own base from the server; the term is what waiting brought
            (b_up, h) <- SGD on (b, h_k) over a round's steps; b_up is sent
            (b_wait, h_k) <- as many more steps as the server is late (`visit.wait`)
  server:   on the arrival of b_k:  B_k <- b_k,  E_k <- the mean of B_k's past, an EMA over about H rounds
            s_kj = cos(E_k - b0, E_j - b0)          b0 the first base
            a_kj = zeta [j = k] + (1 - zeta) n_j exp(s_kj / T) / sum_l n_l exp(s_kl / T)
            b^_k <- sum_j a_kj B_j                  over all clients heard of so far

The head stays on the client, whose classes nobody else may have. n follows `--weighting`. The server remembers the last
base of each client, so that an arrival alone is aggregated as well; a client never heard of is given their mean. That
is three tables of N bases: for federations of silos, as in the paper (six clients). `personalize` trains the head alone
on the client's own base, as FedPer's does; the steps of waiting are on top of a round's, for the client would have been
idle. Without waiting it is the synchronous form, to the bit.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apfl_jax import training
from apfl_jax.errors import InputError
from apfl_jax.settings import Limits, Positive, Share
from apfl_jax.types import Algorithm, Array, Download, Params, PyTree, Task, Upload

_MOST = 10_000  # clients


class Server(NamedTuple):
  """The server between rounds.

  Attributes:
    first: the first model.
    own: pytree [N, ...], b^: what each client downloads.
    sent: pytree [N, ...], B: the last base of each client; its first base if it was never heard of.
    past: pytree [N, ...], E.
    weight: float32 [N], n; 0 for a client never heard of.
  """

  first: Params
  own: PyTree
  sent: PyTree
  past: PyTree
  weight: Array


class Client(NamedTuple):
  """What a client keeps.

  Attributes:
    waited: b_wait - b_up.
    head: h.
  """

  waited: PyTree
  head: PyTree


class Kept(NamedTuple):
  """What the server wants client by client.

  Attributes:
    base: b_up.
    weight: float32 [], n.
  """

  base: PyTree
  weight: Array


def pafedfv(
  task: Task,
  *,
  zeta: Share = 0.5,
  temperature: Positive = 0.1,
  mu: Share = 0.5,
  history: Annotated[int, Limits(least=1)] = 3,
  asynchronous: bool = True,
) -> Algorithm:
  """A base of each client's own, mixed from similar ones; a head that stays; training while the server is late.

  Args:
    task: the task.
    zeta: share of the client's own base in what it gets back.
    temperature: T; large weighs all others by their examples, small only the most similar.
    mu: share of what waiting brought that is kept.
    history: H, rounds that similarity looks back.
    asynchronous: train while the server is late; else wait.
  """
  if task.num_clients > _MOST:
    raise InputError(f"pafedfv: got num_clients={task.num_clients}, accepted is at most {_MOST}: it keeps N models")
  loss = training.classification_loss(task)

  def init(key):
    first = task.model.init(key)
    everyone = jax.tree.map(lambda b: jnp.broadcast_to(b, (task.num_clients, *b.shape)), first.base)
    return Server(first, everyone, everyone, everyone, jnp.zeros(task.num_clients))

  def init_client(download, key):
    return Client(jax.tree.map(jnp.zeros_like, download.own), download.shared)

  def merged(download, client):
    return jax.tree.map(lambda b, d: b + mu * d, download.own, client.waited)

  def local_update(download, client, data, visit, key):
    key, wait_key = jax.random.split(key)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    sent = training.local_sgd(task, loss, Params(merged(download, client), client.head), data, steps, key)
    idle = jnp.where(data.train.size > 0, visit.wait, 0) if asynchronous else jnp.int32(0)
    waited = training.local_sgd(task, loss, sent, data, idle, wait_key)
    weight = training.weight(task.sgd, data.train.size)
    client = Client(optax.tree.sub(waited.base, sent.base), waited.head)
    return client, Upload(update=(), weight=weight, kept=Kept(sent.base, weight))

  def aggregate(server, received, key):
    base, weight = received.kept
    ids = received.ids
    place = jnp.where(received.arrived & (weight > 0), ids, task.num_clients)
    written = lambda table, rows: jax.tree.map(lambda t, r: t.at[place].set(r, mode="drop"), table, rows)
    rate = jnp.where(server.weight[ids] > 0, 2.0 / (history + 1), 1.0)
    slower = lambda e, b: e[ids] + rate.reshape(-1, *[1] * (b.ndim - 1)) * (b - e[ids])
    past = written(server.past, jax.tree.map(slower, server.past, base))
    sent, weight = written(server.sent, base), written(server.weight, weight)

    moved = jax.tree.map(lambda e, b: (e - b).reshape(len(e), -1), past, server.first.base)  # [N, ...]
    norm = jnp.sqrt(sum(jnp.sum(m**2, axis=1) for m in jax.tree.leaves(moved)))
    inner = sum(m[ids] @ m.T for m in jax.tree.leaves(moved))  # [K, N]
    cosine = inner / jnp.maximum(norm[ids][:, None] * norm, 1e-12)
    heard = weight > 0
    weights = jnp.log(jnp.where(heard, weight, 1.0)) + cosine / temperature
    share = zeta * jax.nn.one_hot(ids, task.num_clients) + (1.0 - zeta) * jax.nn.softmax(weights, where=heard)
    own = written(server.own, jax.tree.map(lambda b: jnp.tensordot(share, b, 1), sent))

    mean = jax.tree.map(lambda b: jnp.tensordot(weight / jnp.sum(weight), b, 1), sent)
    unless = lambda b, m: jnp.where(heard.reshape(-1, *[1] * m.ndim), b, m)
    return Server(server.first, jax.tree.map(unless, own, mean), sent, past, weight)

  def personalize(download, client, data, visit, key):
    del visit
    base = merged(download, client)
    own = lambda head, batch: loss(Params(base, head), batch)
    return Params(base, training.fine_tune(task, own, client.head, data, task.sgd.personal_steps, key))

  return Algorithm(
    init=init,
    download=lambda server: Download(shared=server.first.head, own=server.own),
    local_update=local_update,
    aggregate=aggregate,
    predict=lambda model, images: training.predict(task.model, model, images),
    global_model=lambda server: None,
    init_client=init_client,
    personalize=personalize,
  )
