"""MOON: Li, He and Song, Model-Contrastive Federated Learning, CVPR 2021.

  l = l_ce + mu l_con                                                                    (eq. 4)
  l_con = -log( exp(sim(z, z_glob) / tau) / (exp(sim(z, z_glob) / tau) + exp(sim(z, z_prev) / tau)) )      (eq. 3)

z, z_glob and z_prev are a batch's features under the model in training, the downloaded one and the client's own of its
last round; sim is the cosine. z is drawn to the global model's features and away from the client's old ones. The server
is FedAvg's.

What differs from the authors' code [C]: features are the classifier's own (PFLlib's choice [C]), there is no projection
head, so every method has the same network; one old model, as their default. At a client's first visit the old model is
the downloaded one, l_con is the constant log 2, and the visit is one of FedAvg; the authors take the initial model
there. Defaults are those of their code; the paper tunes mu in {.1, 1, 5, 10} [M].
"""

import jax
import jax.numpy as jnp
import optax

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Positive, Weight
from apfl_jax.types import Algorithm, Array, Task, Upload


def moon(task: Task, *, mu: Weight = 1.0, tau: Positive = 0.5) -> Algorithm:
  """FedAvg with a contrastive loss between models; the client keeps its last model.

  Args:
    task: the task.
    mu: weight of the contrastive loss; 0 is FedAvg.
    tau: temperature.
  """

  def local_update(download, last, data, visit, key):
    start = download.shared

    def loss(params, batch):
      prediction = training.predict(task.model, params, batch.images)
      to_global, to_last = (
        _cosine(prediction.features, task.model.base(other.base, batch.images)[0]) for other in (start, last)
      )
      contrast = jax.nn.softplus((to_last - to_global) / tau)
      return training.batch_mean(training.batch_cross_entropy(prediction.logits, batch) + mu * contrast, batch)

    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, start, data, steps, key)
    return params, Upload(optax.tree.sub(params, start), weight=training.weight(task.sgd, data.train.size))

  return fedavg(task)._replace(local_update=local_update, init_client=lambda download, key: download.shared)


def _cosine(a: Array, b: Array) -> Array:
  """Of each pair of rows [B, F] -> [B]; 0, with a finite gradient, where a row is all zeros (no unit is active)."""
  squares = jnp.sum(a**2, axis=-1) * jnp.sum(b**2, axis=-1)
  return jnp.sum(a * b, axis=-1) / jnp.sqrt(jnp.maximum(squares, 1e-16))
