"""FedGen: Zhu, Hong and Zhou, Data-Free Knowledge Distillation for Heterogeneous Federated Learning, ICML 2021.

  server   min_G  sum_k mean_b a_k(y_b) CE(h_k(G(z_b, y_b)), y_b) + eta L_div        (eq. 4), h_k the clients' heads,
           a_k(y) the share of class y that client k holds among those that arrived, y uniform over classes held
  client   min_w  CE(w(x), y) + alpha CE(h(G(z, y')), y') + beta KL(h(G(z, y)) || w(x)),   y' uniform over classes seen
  mean of the clients' models by examples, as FedAvg's

G makes features, what the head reads. Clients send their head beside the update, and a histogram of their labels.

As in the authors' code [C]: alpha and beta fall by 2 % a round, not under 1e-4, and are 0 until there is a trained
generator; the target of the KL term is a constant; labels are one-hot; Adam with an L2 penalty, its rate falls by 2 % a
round. Where uploads are aggregated one by one, each trains the generator, under that client's head alone; the decays go
by rounds all the same.

What differs: features are those of the classifier (there a layer of 32 units), not negative; LayerNorm in place of
BatchNorm, because a generator must not depend on who is in its batch; z is normal as in the paper (uniform in the
code); the histogram is of a client's training examples (there of what its batches happened to hold); the synthetic
batch is as large as the real one; no adversarial term, which is off there. The KL term compares two answers to the same
real example, so under `--softmax_mask` and `--readout` both are offset alike; the labelled synthetic term is as it was.

A trap: their alpha and beta of 10 go with a client's rate of .01. At the rates of .05 to .1 that are usual here such
steps wreck the head; the defaults of 1 keep the product (PFLlib's alpha is 1 too, its beta 0 [C]).
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apfl_jax import nn, random, training
from apfl_jax.algorithms.data_free import APART, class_shares, diversity
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Count, Limits, Positive, Weight
from apfl_jax.types import Algorithm, Array, Download, Params, PyTree, Task, Upload

_DECAY, _LEAST = 0.98, 1e-4  # of alpha and beta a round, and where it ends


class Shared(NamedTuple):
  """What a client downloads.

  Attributes:
    params: the global model.
    generator: the generator's parameters.
    seen: bool [C], classes that a client held whose upload ever arrived.
    aggregations: int32 [], so far.
  """

  params: Params
  generator: PyTree
  seen: Array
  aggregations: Array


class Server(NamedTuple):
  """The server between rounds.

  Attributes:
    shared: what clients download.
    optimizer: the generator's optax state.
  """

  shared: Shared
  optimizer: PyTree


class Kept(NamedTuple):
  """What the server wants client by client.

  Attributes:
    head: the local model's head.
    counts: float32 [C], the client's training examples of each class.
  """

  head: PyTree
  counts: Array


def fedgen(
  task: Task,
  *,
  alpha: Weight = 1.0,
  beta: Weight = 1.0,
  eta: Weight = 1.0,
  generator_steps: Count = 50,
  generator_batch: Annotated[int, Limits(least=2)] = 32,
  generator_learning_rate: Positive = 3e-4,
  weight_decay: Weight = 1e-2,
) -> Algorithm:
  """FedAvg with a generator of features that tells clients what the others know.

  Args:
    task: the task.
    alpha: weight of the labelled synthetic features in a client's loss.
    beta: weight of the distillation from synthetic features of the batch's labels.
    eta: weight of the generator's diversity loss.
    generator_steps: Adam steps of the generator an aggregation.
    generator_batch: synthetic features a step.
    generator_learning_rate: of Adam.
    weight_decay: of the generator, added to the gradient.
  """
  model, num_classes, batch_size = task.model, task.num_classes, task.sgd.batch_size
  generator = nn.feature_generator(num_classes, training.feature_size(task))
  schedule = optax.exponential_decay(
    generator_learning_rate, max(generator_steps, 1) * task.aggregations, 0.98, staircase=True
  )
  optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(schedule))

  def init(key):
    drawn = generator.init(jax.random.fold_in(key, APART))
    shared = Shared(model.init(key), drawn, jnp.zeros(num_classes, bool), jnp.int32(0))
    return Server(shared, optimizer.init(drawn))

  def local_update(download, client, data, visit, key):
    shared = download.shared
    next_batch = training.batches(task, data, data.train, key)
    noise_key = jax.random.fold_in(key, APART)
    rounds = shared.aggregations // task.aggregations
    decayed = lambda start: jnp.maximum(start * _DECAY**rounds, jnp.minimum(start, _LEAST))
    labelled, distilled = (jnp.where(shared.aggregations > 0, decayed(weight), 0.0) for weight in (alpha, beta))

    def loss(params, step):
      batch = next_batch(step)
      label_key, first_key, second_key = jax.random.split(jax.random.fold_in(noise_key, step), 3)
      noise = lambda key: jax.random.normal(key, (batch_size, generator.noise_size))
      # Until somebody was heard there is no class to draw from; the term is off, the draw only stays finite.
      seen = jnp.where(jnp.any(shared.seen), shared.seen, True).astype(jnp.float32)
      other = jax.nn.one_hot(random.categorical(label_key, seen, (batch_size,)), num_classes)
      answer = lambda key, label: model.head(params.head, generator.apply(shared.generator, noise(key), label))

      logits = training.predict(model, params, batch.images).logits
      offset = 0.0 if batch.logit_offset is None else batch.logit_offset
      target = jax.lax.stop_gradient(jax.nn.softmax(answer(second_key, batch.targets) + offset))
      entropy = training.cross_entropy(jnp.log(target + 1e-12), target)
      gap = training.batch_cross_entropy(logits, batch._replace(targets=target)) - entropy
      real = training.batch_mean(training.batch_cross_entropy(logits, batch) + distilled * gap, batch)
      return real + labelled * jnp.mean(training.cross_entropy(answer(first_key, other), other))

    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.descend(loss, shared.params, steps, task.sgd.learning_rate)
    kept = Kept(params.head, training.label_histogram(data.store, data.train, num_classes))
    delta = optax.tree.sub(params, shared.params)
    return client, Upload(update=delta, weight=training.weight(task.sgd, data.train.size), kept=kept)

  def aggregate(server, received, key):
    old, kept = server.shared, received.kept
    shares = class_shares(kept.counts)  # [K, C], 0 for who did not arrive
    held = jnp.any(shares > 0, axis=0)

    def step(i, carry):
      params, state = carry
      label_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
      label = random.categorical(label_key, held.astype(jnp.float32), (generator_batch,))
      noise = jax.random.normal(noise_key, (generator_batch, generator.noise_size))

      def loss(params):
        features = generator.apply(params, noise, jax.nn.one_hot(label, num_classes))
        return teacher_loss(task, kept.head, shares, features, label) + eta * diversity(noise, features)

      updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      return optax.apply_updates(params, updates), state

    trained, state = jax.lax.fori_loop(0, generator_steps, step, (old.generator, server.optimizer))
    params = optax.tree.add(old.params, received.mean)
    return Server(Shared(params, trained, old.seen | held, old.aggregations + 1), state)

  return fedavg(task)._replace(
    init=init,
    download=lambda server: Download(shared=server.shared),
    local_update=local_update,
    aggregate=aggregate,
    global_model=lambda server: server.shared.params,
    personalize=lambda download, client, data, visit, key: download.shared.params,
  )


def teacher_loss(task: Task, heads: PyTree, shares: Array, features: Array, label: Array) -> Array:
  """sum_k mean_b a_k(y_b) CE(h_k(f_b), y_b), [].

  Args:
    task: the task.
    heads: pytree [K, ...].
    shares: a, float32 [K, C]; 0 for a head that did not arrive.
    features: f, float32 [B, F].
    label: y, int32 [B].
  """
  target = jax.nn.one_hot(label, task.num_classes)
  each = jax.vmap(lambda head: training.cross_entropy(task.model.head(head, features), target))(heads)  # [K, B]
  return jnp.sum(jnp.mean(shares[:, label] * each, axis=1))
