"""FedProto: Tan et al., FedProto: Federated Prototype Learning across Heterogeneous Clients, AAAI 2022.

  c_i,j = mean of b_i(x) over client i's examples of class j
  c_j   = sum_i n_i,j c_i,j / sum_i n_i,j
  w_i  <- SGD on CE + lambda mean |b_i(x) - c_y|^2 over the F features and the batch
  answer: the class of the nearest prototype

Models stay on the clients; only prototypes travel. `--weighting=uniform` counts the clients that hold a class alike, as
PFLlib does [C]. The squared distance is a mean over features, as in PFLlib [C]. There prototypes are collected while
the model still trains [C], here after it has [O]; there a class that nobody uploads in a round loses its prototype [C],
here it keeps the last one [O]. An example of a class without prototype has no second term. A class that never had one
is answered by the client's own mean, if it holds that class [O]: the server has never seen a monopolist's classes.
All clients start from one model, so that features mean the same everywhere. There is no global model.
With `--readout=prior` (or a softmax mask) logits are log-likelihoods up to a constant, -F mean_F (b(x) - c_j)^2 / 2 s:
Gaussians about the prototypes, isotropic, s the variance of the client's training examples about theirs [O]. The log
prior added to them is Bayes' rule; without it the nearest prototype wins as before.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import training
from apfl_jax.settings import Weight
from apfl_jax.types import Algorithm, Array, Download, Params, Prediction, Task, Upload

_BLOCK = 64
_NO_PROTOTYPE = 1e6  # the squared distance of a class that has none
_LEAST_VARIANCE = 1e-6


class Prototypes(NamedTuple):
  """Means of features, class by class.

  Attributes:
    mean: float32 [C, F].
    known: bool [C], whether there is one.
  """

  mean: Array
  known: Array


class Server(NamedTuple):
  """What the server holds and clients download.

  Attributes:
    params: the model that clients start from; never changes.
    prototypes: the global ones.
  """

  params: Params
  prototypes: Prototypes


class Prototyped(NamedTuple):
  """A personal model: features and what to compare them with.

  Attributes:
    params: base and head.
    prototypes: of all classes, as far as there are any.
    precision: what a mean squared distance is multiplied by, float32 [].
  """

  params: Params
  prototypes: Prototypes
  precision: Array


def fedproto(task: Task, *, prototype_weight: Weight = 1.0) -> Algorithm:
  """Local models whose features are drawn to common prototypes.

  Args:
    task: the task.
    prototype_weight: lambda.
  """
  model, feature_size = task.model, training.feature_size(task)

  def init(key):
    params = model.init(key)
    nothing = Prototypes(jnp.zeros((task.num_classes, feature_size)), jnp.zeros(task.num_classes, bool))
    return Server(params, nothing)

  def prototype_loss(prototypes):
    def loss(params, batch):
      features, _ = model.base(params.base, batch.images)
      distance = _squared_distance(features, prototypes)  # [B, C]
      near = jnp.sum(jnp.where(prototypes.known, batch.targets * distance, 0.0), axis=-1)
      fit = training.batch_cross_entropy(model.head(params.head, features), batch)
      return training.batch_mean(fit + prototype_weight * near, batch)

    return loss

  def own_features(params, data):
    """float32 [C, F] and [C]: sums of features and counts of examples, class by class."""

    def add(i, sums):
      batch = training.gather(data.store, data.train, i * _BLOCK + jnp.arange(_BLOCK), task.num_classes)
      member = jnp.where(batch.mask[:, None] > 0, batch.targets, 0.0)  # [B, C]
      features, _ = model.base(params.base, batch.images)
      return sums[0] + member.T @ features, sums[1] + jnp.sum(member, axis=0)

    nothing = jnp.zeros((task.num_classes, feature_size)), jnp.zeros(task.num_classes)
    return jax.lax.fori_loop(0, (data.train.size + _BLOCK - 1) // _BLOCK, add, nothing)

  def variance(params, prototypes, data):
    """Mean squared distance of the client's training examples to their prototypes, float32 []; 1 without examples."""

    def add(i, total):
      batch = training.gather(data.store, data.train, i * _BLOCK + jnp.arange(_BLOCK), task.num_classes)
      distance = _squared_distance(model.base(params.base, batch.images)[0], prototypes)
      return total + jnp.sum(jnp.where(batch.mask[:, None] > 0, batch.targets * distance, 0.0))

    total = jax.lax.fori_loop(0, (data.train.size + _BLOCK - 1) // _BLOCK, add, jnp.zeros(()))
    return jnp.where(data.train.size > 0, jnp.maximum(total / jnp.maximum(data.train.size, 1), _LEAST_VARIANCE), 1.0)

  def local_update(download, client, data, visit, key):
    loss = prototype_loss(download.shared.prototypes)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, client, data, steps, key)
    total, count = own_features(params, data)
    if task.sgd.weighting == "uniform":
      total, count = total / jnp.maximum(count, 1.0)[:, None], jnp.minimum(count, 1.0)
    # Weight 1 and ratios: each class is a mean of its own.
    return params, Upload(update=(total, count), weight=jnp.where(data.train.size > 0, 1.0, 0.0))

  def aggregate(server, received, key):
    (total, count), (mean, known) = received.total, server.prototypes
    there = count > 0
    new = total / jnp.where(there, count, 1.0)[:, None]
    return server._replace(prototypes=Prototypes(jnp.where(there[:, None], new, mean), known | there))

  def personalize(download, client, data, visit, key):
    del visit
    (mean, known) = prototypes = download.shared.prototypes
    params = training.fine_tune(task, prototype_loss(prototypes), client, data, task.sgd.personal_steps, key)
    total, count = own_features(params, data)
    own = total / jnp.maximum(count, 1.0)[:, None]
    prototypes = Prototypes(jnp.where(known[:, None], mean, own), known | (count > 0))
    if data.logit_offset is None:
      return Prototyped(params, prototypes, jnp.float32(1.0))
    return Prototyped(params, prototypes, 0.5 * mean.shape[1] / variance(params, prototypes, data))

  def predict(personal, images):
    features, _ = model.base(personal.params.base, images)
    distance = _squared_distance(features, personal.prototypes)
    distance = personal.precision * jnp.where(personal.prototypes.known, distance, _NO_PROTOTYPE)
    return Prediction(-distance, features)

  return Algorithm(
    init=init,
    download=lambda server: Download(shared=server),
    local_update=local_update,
    aggregate=aggregate,
    predict=predict,
    global_model=lambda server: None,
    init_client=lambda download, key: download.shared.params,
    personalize=personalize,
  )


def _squared_distance(features: Array, prototypes: Prototypes) -> Array:
  """float32 [B, C]: mean over the F features of the squared difference, [B, F] against [C, F]."""
  return jnp.mean((features[:, None, :] - prototypes.mean) ** 2, axis=-1)
