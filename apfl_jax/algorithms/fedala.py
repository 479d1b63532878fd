"""FedALA: Zhang et al., FedALA: Adaptive Local Aggregation for Personalized Federated Learning, AAAI 2023.

At each visit, before training, with the client's last model (b_l, h_l) and the downloaded one (b, h):

  start = (b, h_l + (h - h_l) * W),   W <- clip(W - eta grad_start f_i * (h - h_l), 0, 1)
  w_i <- SGD from start;   w <- w + sum_i n_i (w_i - w) / sum_i n_i                            (algorithm 1)

W weighs each number of the head: the paper's p = 1 layer, and PFLlib's p = 2, which counts its kernel and its bias [C].
The step is the gradient of f_i(start) by W, taken on `percent` of the training examples. W stays on the client and
starts at one. At the first visit both models are the same, so W has no gradient; at the second it is trained for
several passes, otherwise for one. The official code ends those passes when the last ten losses deviate by less than
.1, which is tested from the 11th on [C]; here there are 11, so that the work is known beforehand [O]. Its share is a
random run of examples, here a random subset, and another one each time [O].
`personalize` trains W as a visit would, then fine-tunes; a client that never took part starts at the global model.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Limits, Positive
from apfl_jax.types import Algorithm, Params, PyTree, Task, Upload


class Client(NamedTuple):
  """What a client keeps.

  Attributes:
    params: its model after its last training.
    weights: W, in the shape of the head.
  """

  params: Params
  weights: PyTree


def fedala(
  task: Task,
  *,
  weight_learning_rate: Positive = 1.0,
  percent: Annotated[int, Limits(least=1, most=100)] = 80,
  first_passes: Annotated[int, Limits(least=1)] = 11,
) -> Algorithm:
  """FedAvg that starts each client between its own head and the global one.

  Args:
    task: the task.
    weight_learning_rate: eta, of W.
    percent: of the training examples, for a pass of W.
    first_passes: passes of W at a client's second visit.
  """
  loss = training.classification_loss(task)
  single_pass = task.sgd._replace(epochs=1, steps=0)

  def aggregated(client, shared, weights):
    between = lambda old, new, weight: old + (new - old) * weight
    return Params(shared.base, jax.tree.map(between, client.params.head, shared.head, weights))

  def learned_weights(client, shared, data, visit, key):
    passes = jnp.where(visit.times == 1, first_passes, 1)  # at the first visit the pass changes nothing
    next_batch = training.batches(task, data, data.train, key)
    per_pass = training.num_steps(single_pass, data.train.size)  # of an epoch; of which `taken` are read
    taken = training.num_steps(single_pass, data.train.size, percent / 100)
    # The first steps of an epoch are a random subset of the examples, each epoch another.
    subset = lambda step: next_batch(step // jnp.maximum(taken, 1) * per_pass + step % jnp.maximum(taken, 1))
    return training.descend(
      lambda weights, step: loss(aggregated(client, shared, weights), subset(step)),
      client.weights,
      passes * taken,
      jnp.asarray(weight_learning_rate),
      project=lambda weights: jax.tree.map(lambda w: jnp.clip(w, 0.0, 1.0), weights),
    )

  def local_update(download, client, data, visit, key):
    weight_key, train_key = jax.random.split(key)
    shared = download.shared
    weights = learned_weights(client, shared, data, visit, weight_key)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, aggregated(client, shared, weights), data, steps, train_key)
    delta = jax.tree.map(lambda new, old: new - old, params, shared)
    return Client(params, weights), Upload(update=delta, weight=training.weight(task.sgd, data.train.size))

  def personalize(download, client, data, visit, key):
    weight_key, tune_key = jax.random.split(key)
    shared = download.shared
    weights = learned_weights(client, shared, data, visit, weight_key)
    start = aggregated(client, shared, weights)
    return training.fine_tune(task, loss, start, data, task.sgd.personal_steps, tune_key)

  return fedavg(task)._replace(
    local_update=local_update,
    init_client=lambda download, key: Client(download.shared, jax.tree.map(jnp.ones_like, download.shared.head)),
    personalize=personalize,
  )
