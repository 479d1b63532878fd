"""FedDBE: Zhang et al., Eliminating Domain Bias for Federated Learning in Representation Space, NeurIPS 2023.

  client's loss: CE(h(b(x) + z_i), y) + kappa mean_F (mean_B b(x) - zbar)^2 / 2
  (b, h) averaged over clients; z_i [F] stays on the client;  zbar = sum_i n_i mean b_i(x) / sum_i n_i, set once

z_i, the personal part of the mean representation, takes the client's bias out of the base; the second term holds the
means of all clients together. In the paper and in PFLlib zbar comes from a round before the first, whose models are
thrown away [C]; here from the first round, which has no second term and whose models count [O]. The running mean of the
paper is the batch's mean, momentum 1, its setting for the small CNN [M]; so is kappa = 50. The trap avoided: PFLlib's
kappa is 0 unless set [C]. The global model answers with z = 0. `personalize` trains all of it from the download and the
client's z_i; with no personal steps it is what PFLlib scores, the global model under z_i [C].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Weight
from apfl_jax.types import Algorithm, Array, Params, Prediction, Task, Upload


class Server(NamedTuple):
  """What the server holds and clients download.

  Attributes:
    params: the global model.
    consensus: zbar, float32 [F].
    known: bool [], whether zbar is set.
  """

  params: Params
  consensus: Array
  known: Array


class Debiased(NamedTuple):
  """A model with its mean representation.

  Attributes:
    params: base and head.
    bias: z, float32 [F], added to the features.
  """

  params: Params
  bias: Array


def feddbe(task: Task, *, kappa: Weight = 50.0) -> Algorithm:
  """FedAvg with the client's bias in a vector of its own.

  Args:
    task: the task.
    kappa: weight of the mean regularisation.
  """
  model = task.model

  def init(key):
    params = model.init(key)
    images = jax.ShapeDtypeStruct((1, *task.image_shape), jnp.float32)
    size = jax.eval_shape(lambda images: model.base(params.base, images)[0], images).shape[-1]
    return Server(params, jnp.zeros(size), jnp.bool_(False))

  def loss_of(shared):
    def loss(debiased, batch):
      features, _ = model.base(debiased.params.base, batch.images)
      logits = model.head(debiased.params.head, features + debiased.bias)
      fit = training.batch_mean(training.cross_entropy(logits, batch.targets), batch)
      mean = jax.vmap(training.batch_mean, (1, None))(features, batch)  # [F]
      apart = 0.5 * jnp.mean((mean - shared.consensus) ** 2)
      return fit + jnp.where(shared.known, kappa * apart, 0.0)

    return loss

  def local_update(download, client, data, visit, key):
    shared = download.shared
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    start = Debiased(shared.params, client)
    trained = training.local_sgd(task, loss_of(shared), start, data, steps, key)
    delta = jax.tree.map(lambda new, old: new - old, trained.params, shared.params)
    # Once zbar is set nobody needs the mean, and an empty span costs nothing.
    span = data.train._replace(size=jnp.where(shared.known, 0, data.train.size))
    features = lambda images: model.base(trained.params.base, images)[0]
    total, count = training.class_sums(features, data.store, span, task.num_classes)
    mean = jnp.sum(total, axis=0) / jnp.maximum(jnp.sum(count), 1.0)
    return trained.bias, Upload(update=(delta, mean), weight=training.weight(task.sgd, data.train.size))

  def aggregate(server, received, key):
    delta, mean = received.mean
    return Server(
      params=jax.tree.map(lambda w, d: w + d, server.params, delta),
      consensus=jnp.where(server.known, server.consensus, mean),
      known=jnp.bool_(True),
    )

  def personalize(download, client, data, visit, key):
    del visit
    start = Debiased(download.shared.params, client)
    return training.fine_tune(task, loss_of(download.shared), start, data, task.sgd.personal_steps, key)

  def predict(debiased, images):
    features, _ = model.base(debiased.params.base, images)
    features = features + debiased.bias
    return Prediction(model.head(debiased.params.head, features), features)

  return fedavg(task)._replace(
    init=init,
    local_update=local_update,
    aggregate=aggregate,
    predict=predict,
    global_model=lambda server: Debiased(server.params, jnp.zeros_like(server.consensus)),
    init_client=lambda download, key: jnp.zeros_like(download.shared.consensus),
    personalize=personalize,
  )
