"""FedRoD: Chen and Chao, On Bridging Generic and Personalized Federated Learning for Image Classification, ICLR 2022.

  generic:  (b, g) <- SGD on CE(g(b(x)) + log n_i, y), the balanced softmax with the client's counts n_i
  personal: p_i <- SGD on CE(sg(g(f)) + p_i(sg(f)), y), f = b(x)
  answers:  generic g(f); personal g(f) + p_i(f)

b and g are averaged by `--weighting`, p_i stays on the client; sg stops the gradient. A class that the client lacks has
log 0: it takes no part in the client's softmax. As in PFLlib p_i is linear, the paper's variant without a hypernetwork
[C]. PFLlib starts p_i as a copy of the generic head [C], so that the first answer is the generic one doubled; here it
starts at zero [O], and a client that never took part answers generically until it has trained p_i on its own data.
The generic loss is balanced and over the client's own classes by itself, so `--readout` and `--softmax_mask` reach the
personal loss alone: with `--readout=prior` nothing is added twice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.types import Algorithm, Params, Prediction, PyTree, Task, Upload


class Decoupled(NamedTuple):
  """A model with two predictors.

  Attributes:
    generic: base and generic head.
    personal: the personal head, in the shape of the generic one.
  """

  generic: Params
  personal: PyTree


def fedrod(task: Task) -> Algorithm:
  """A balanced generic model for all, and on each client a head that adds to its logits."""
  model = task.model

  def logits(models, images):
    """Features and both heads' logits, the personal one reading features that it does not train."""
    features, _ = model.base(models.generic.base, images)
    personal = model.head(models.personal, jax.lax.stop_gradient(features))
    return features, model.head(models.generic.head, features), personal

  def personal_loss(generic_logits, personal_logits, batch):
    both = jax.lax.stop_gradient(generic_logits) + personal_logits
    return training.batch_mean(training.batch_cross_entropy(both, batch), batch)

  def local_update(download, client, data, visit, key):
    shared = download.shared
    counts = training.label_histogram(data.store, data.train, task.num_classes)
    prior = jnp.log(jnp.maximum(counts, 1.0))  # absent classes are left out of the softmax altogether

    def loss(models, batch):
      _, generic, personal = logits(models, batch.images)
      each = training.cross_entropy(generic + prior, batch.targets, counts > 0)
      return training.batch_mean(each, batch) + personal_loss(generic, personal, batch)

    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params, client = training.local_sgd(task, loss, Decoupled(shared, client), data, steps, key)
    delta = jax.tree.map(lambda new, old: new - old, params, shared)
    return client, Upload(update=delta, weight=training.weight(task.sgd, data.train.size))

  def personalize(download, client, data, visit, key):
    del visit
    shared = download.shared

    def loss(personal, batch):
      _, generic, personal = logits(Decoupled(shared, personal), batch.images)
      return personal_loss(generic, personal, batch)

    return Decoupled(shared, training.fine_tune(task, loss, client, data, task.sgd.personal_steps, key))

  def predict(models, images):
    features, generic, personal = logits(models, images)
    return Prediction(generic + personal, features)

  nothing = lambda params: jax.tree.map(jnp.zeros_like, params.head)
  return fedavg(task)._replace(
    local_update=local_update,
    predict=predict,
    global_model=lambda server: Decoupled(server, nothing(server)),
    init_client=lambda download, key: nothing(download.shared),
    personalize=personalize,
  )
