"""GPFL: Zhang, Hua et al., GPFL: Simultaneously Learning Global and Personalized Feature Information, ICCV 2023.

  valve:    CoV(f, u) = ReLU(f (gamma(u) + 1) + beta(u)),  gamma, beta = LayerNorm(ReLU(linear(u)))
  contexts: g = mean_c C_c;  p_i = sum_c p_i(c) C_c,  p_i(c) the client's label histogram, once a round
  loss:     CE(h_i(CoV(f, p_i)), y) + CE(cos(CoV(f, g), C_.), y) + lambda |CoV(f, g) - C^received_y|
            + mu / 2 (|C|^2 + |CoV|^2);  the third norm is Frobenius over the batch, neither squared nor a mean
  server:   b, C, CoV averaged by examples; the head h_i stays on the client;  answers h_i(CoV(b(x), p_i))

Read in TsingZ0/GPFL and PFLlib [C]. Cosines have no temperature; mu is the weight decay of SGD on C and all of CoV, so
it is a term of the loss here. lambda and mu are the repository's for the four-layer CNN; PFLlib's are 1 and 0 unless
set. Differing: PFLlib computes both contexts from the client's previous C, before the new one arrives [C], here from
the one downloaded; batches are shuffled and the last, short one is used [O]. All heads start alike.
`personalize` trains the head on the download, p_i from the client's histogram: a client that never took part can do
that too (method 3.4). With no personal steps it is what PFLlib scores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from apfl_jax import nn, training
from apfl_jax.settings import Weight
from apfl_jax.types import Algorithm, Array, Download, Prediction, PyTree, Task, Upload

# Folded into a key that is also used as it is: the children of a split are fold_in of 0, 1, ..., so no small number.
_APART = 0x4750464C


class Valve(nnx.Module):
  """The conditional valve: features scaled and shifted by what a context says."""

  def __init__(self, features: int, *, rngs: nnx.Rngs):
    """Args: F, rngs."""
    make = lambda: nnx.Linear(features, features, kernel_init=nnx.initializers.lecun_uniform(), rngs=rngs)
    norm = lambda: nnx.LayerNorm(features, epsilon=1e-5, rngs=rngs)
    self.scale, self.scale_norm, self.shift, self.shift_norm = make(), norm(), make(), norm()

  def __call__(self, features: Array, context: Array) -> Array:
    """Features [B, F] and context [F] -> [B, F]."""
    gamma = self.scale_norm(nnx.relu(self.scale(context)))
    beta = self.shift_norm(nnx.relu(self.shift(context)))
    return nnx.relu(features * (gamma + 1) + beta)


class Shared(NamedTuple):
  """What clients train together.

  Attributes:
    base: images to features.
    embeddings: C, float32 [C, F], one row a class.
    valve: the conditional valve.
  """

  base: PyTree
  embeddings: Array
  valve: PyTree


class Server(NamedTuple):
  """What the server holds and clients download.

  Attributes:
    shared: the part that is averaged.
    head: where every client's head starts; never changes.
  """

  shared: Shared
  head: PyTree


class Personal(NamedTuple):
  """A personal model.

  Attributes:
    shared: the downloaded part.
    head: the client's.
    context: p_i, float32 [F].
  """

  shared: Shared
  head: PyTree
  context: Array


def gpfl(task: Task, *, lambda_level: Weight = 0.01, decay: Weight = 0.1) -> Algorithm:
  """Features guided by common class embeddings, and by the client's own mixture of them.

  Args:
    task: the task.
    lambda_level: lambda, weight of the distance to the received embedding of the label.
    decay: mu, weight decay of embeddings and valve.
  """
  model, num_classes, size = task.model, task.num_classes, training.feature_size(task)
  init_valve, apply_valve = nn.functional(Valve, size)

  def init(key):
    params = model.init(key)  # every method's model starts alike under one seed
    embedding_key, valve_key = jax.random.split(jax.random.fold_in(key, _APART))
    embeddings = jax.random.normal(embedding_key, (num_classes, size))
    return Server(Shared(params.base, embeddings, init_valve(valve_key)), params.head)

  def through(shared, context, features):
    return apply_valve(shared.valve, features, context)

  def own_context(shared, data):
    """p_i; zeros for a client without examples."""
    counts = training.label_histogram(data.store, data.train, num_classes)
    return counts / jnp.maximum(jnp.sum(counts), 1.0) @ shared.embeddings

  def mean_loss(logits, batch):
    return training.batch_mean(training.batch_cross_entropy(logits, batch), batch)

  def round_loss(received, context):
    general = jnp.mean(received.embeddings, axis=0)  # g

    def loss(parameters, batch):
      shared, head = parameters
      features, _ = model.base(shared.base, batch.images)
      own = mean_loss(model.head(head, through(shared, context, features)), batch)
      guided = through(shared, general, features)
      angle = mean_loss(_unit(guided) @ _unit(shared.embeddings).T, batch)
      away = jnp.where(batch.mask[:, None] > 0, guided - batch.targets @ received.embeddings, 0.0)
      decayed = optax.tree.norm((shared.embeddings, shared.valve), squared=True)
      return own + angle + lambda_level * _norm(away) + 0.5 * decay * decayed

    return loss

  def local_update(download, client, data, visit, key):
    received = download.shared.shared
    loss = round_loss(received, own_context(received, data))
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    trained, client = training.local_sgd(task, loss, (received, client), data, steps, key)
    delta = jax.tree.map(lambda new, old: new - old, trained, received)
    return client, Upload(update=delta, weight=training.weight(task.sgd, data.train.size))

  def aggregate(server, received, key):
    return server._replace(shared=jax.tree.map(lambda w, d: w + d, server.shared, received.mean))

  def personalize(download, client, data, visit, key):
    del visit
    shared = download.shared.shared
    context = own_context(shared, data)

    def loss(head, batch):
      features, _ = model.base(shared.base, batch.images)
      return mean_loss(model.head(head, through(shared, context, features)), batch)

    return Personal(shared, training.fine_tune(task, loss, client, data, task.sgd.personal_steps, key), context)

  def predict(personal, images):
    features, _ = model.base(personal.shared.base, images)
    features = through(personal.shared, personal.context, features)
    return Prediction(model.head(personal.head, features), features)

  return Algorithm(
    init=init,
    download=lambda server: Download(shared=server),
    local_update=local_update,
    aggregate=aggregate,
    predict=predict,
    global_model=lambda server: None,
    init_client=lambda download, key: download.shared.head,
    personalize=personalize,
  )


def _norm(x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
  """The square root of the sum of squares, with gradient 0 at 0."""
  square = jnp.sum(x**2, axis=axis, keepdims=keepdims)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _unit(x: Array) -> Array:
  """Rows [..., F] of norm 1; rows of zeros stay."""
  return x / jnp.maximum(_norm(x, axis=-1, keepdims=True), 1e-12)
