"""Other clients' models as friends: the `peer` friend of method 2.8, after FL-FDMS (Wang and Xu 2022).

  f = argmax_j cos(w_L - theta, w_j - theta),   w_F = w_f

FL-FDMS compares updates computed in the same round, on the server [C]. A returning client took part in no round, so it
compares its local model with the models that the server kept, all as seen from the present theta [O]. It picks by
itself and tells nobody what it holds; the price is that it downloads all the kept models, and the ledger says so.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax.types import Array, Params

MOST = 1000  # clients; the server keeps a model of each


class Peers(NamedTuple):
  """The last model of each client that arrived.

  Attributes:
    models: Params [N, ...], by client id.
    known: bool [N].
  """

  models: Params
  known: Array


def nobody(params: Params, num_clients: int) -> Peers:
  """Before any model arrived; `params` are any, for their shapes."""
  blank = jax.tree.map(lambda x: jnp.zeros((num_clients, *x.shape), x.dtype), params)
  return Peers(blank, jnp.zeros(num_clients, bool))


def remember(peers: Peers, models: Params, ids: Array, arrived: Array) -> Peers:
  """With the models [K, ...] of those of the clients int32 [K] that arrived, bool [K]."""
  place = jnp.where(arrived, ids, peers.known.shape[0])
  put = lambda all, new: all.at[place].set(new, mode="drop")
  return Peers(jax.tree.map(put, peers.models, models), peers.known.at[place].set(True, mode="drop"))


def nearest(peers: Peers, params: Params, local: Params, id: Array) -> Params:
  """The kept model of another client that is the most similar to `local` as seen from `params`; that if none is kept.

  Args:
    peers: what the server kept.
    params: theta.
    local: w_L.
    id: int32 [], the client itself, which is not its own friend.
  """
  flat = lambda tree, rows: jnp.concatenate([x.reshape(*rows, -1) for x in jax.tree.leaves(tree)], axis=-1)
  moved = flat(jax.tree.map(jnp.subtract, local, params), ())
  others = flat(jax.tree.map(jnp.subtract, peers.models, params), peers.known.shape)  # [N, numbers of a model]
  cosine = others @ moved / jnp.maximum(jnp.linalg.norm(others, axis=-1) * jnp.linalg.norm(moved), 1e-12)
  there = peers.known & (jnp.arange(len(cosine)) != id)
  friend = jnp.argmax(jnp.where(there, cosine, -jnp.inf))
  return jax.tree.map(lambda all, x: jnp.where(jnp.any(there), all[friend], x), peers.models, params)
