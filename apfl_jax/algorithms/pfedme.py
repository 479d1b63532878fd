"""pFedMe: Dinh, Tran and Nguyen, Personalized Federated Learning with Moreau Envelopes, NeurIPS 2020.

  theta_i(w) ~ argmin_theta f_i(theta) + lambda/2 |theta - w|^2, by K gradient steps on one batch
  w_i <- w_i - eta lambda (w_i - theta_i(w_i))
  w   <- (1 - beta) w + beta mean_i w_i                                                                (algorithm 1)

The mean is uniform as in the paper, so `--weighting` has no effect; a client without examples counts nothing. Traps
avoided (method 4 [C]): beta is 1, for PFLlib's default of 0 freezes the global model; there is no hidden weight decay
of .001 inside the K steps; theta starts at w_i for each batch, whereas PFLlib goes on from the last batch's, so that
nothing but w_i is carried [O]. The personal model is made as a visit makes it, with `personal_steps` gradients in all:
w_i goes on from the download, K gradients a step, and theta_i(w_i) is the answer; PFLlib and the authors score theta_i
at the w_i that the last visit happened to leave [C], which a client that never took part has not. With K steps or fewer
it is theta_i(w).
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Limits, Positive, Share
from apfl_jax.types import Algorithm, Array, PyTree, Task, Upload


def pfedme(
  task: Task,
  *,
  inner_steps: Annotated[int, Limits(least=1)] = 5,
  inner_learning_rate: Positive = 0.01,
  envelope_weight: Positive = 15.0,
  beta: Share = 1.0,
) -> Algorithm:
  """The global model is the centre of the clients' Moreau envelopes.

  Args:
    task: the task.
    inner_steps: K.
    inner_learning_rate: of these steps; times `envelope_weight` it must stay below 2.
    envelope_weight: lambda.
    beta: how far the server goes towards the mean of the clients.
  """
  loss = training.classification_loss(task)
  uniform = task.sgd._replace(weighting="uniform")

  def nearby(params, batch, steps):
    """theta_i(params)."""
    own = lambda theta, _: loss(theta, batch)
    return proximal_point(own, params, steps, inner_learning_rate, envelope_weight)

  def trained(shared, next_batch, steps):
    """w_i."""

    def direction(params, step):
      theta = nearby(params, next_batch(step), jnp.int32(inner_steps))
      return jax.tree.map(lambda w, t: envelope_weight * (w - t), params, theta)

    return training.follow(direction, shared, steps, task.sgd.learning_rate)

  def local_update(download, client, data, visit, key):
    next_batch = training.batches(task, data, data.train, key)
    params = trained(download.shared, next_batch, training.num_steps(task.sgd, data.train.size, visit.work))
    delta = jax.tree.map(lambda new, old: new - old, params, download.shared)
    return client, Upload(update=delta, weight=training.weight(uniform, data.train.size))

  def personalize(download, client, data, visit, key):
    del client, visit
    next_batch = training.batches(task, data, data.train, key)
    moves = max(task.sgd.personal_steps // inner_steps - 1, 0)
    left = task.sgd.personal_steps - moves * inner_steps
    only = lambda steps: jnp.where(data.train.size > 0, steps, 0)
    own = lambda theta, step: loss(theta, next_batch(moves + step))
    params = trained(download.shared, next_batch, only(moves))
    return proximal_point(own, params, only(left), inner_learning_rate, envelope_weight)

  return fedavg(task)._replace(
    local_update=local_update,
    aggregate=lambda server, received, key: jax.tree.map(lambda w, d: w + beta * d, server, received.mean),
    personalize=personalize,
  )


def proximal_point(
  loss: Callable[[PyTree, Array], Array],
  centre: PyTree,
  steps: Array,
  learning_rate: Array | float,
  envelope_weight: Array | float,
) -> PyTree:
  """Gradient steps from `centre` on loss(theta, step) + envelope_weight / 2 |theta - centre|^2.

  Args:
    loss: (theta, int32 [] step) -> [].
    centre: pytree.
    steps: int32 [].
    learning_rate: float32 [].
    envelope_weight: lambda, float32 [].
  """
  enveloped = training.proximal(loss, centre, envelope_weight)
  return training.descend(enveloped, centre, steps, jnp.asarray(learning_rate))
