"""DENSE: Zhang et al., DENSE: Data-Free One-Shot Federated Learning, NeurIPS 2022.

The server distils the ensemble of the clients' models, D(x) = mean_k w_k(x), into a model w (algorithm 1). An epoch is
  1. a new generator G and new noise z, trained together by Adam for some steps on one batch of labels y, x = G(z):
       CE(D(x), y) + lambda_bn L_BN - lambda_div mean_b [argmax D(x) != argmax w(x)] KL(D(x) || w(x))
     of whose images those with the smallest loss are put in a pool;
  2. SGD steps with momentum of w on the pool, on KL(D(x) || w(x)).

The paper is one-shot: `--rounds=1` with many local epochs. In a longer run the first rounds are FedAvg's and each of
the last tenth does all this anew [O]; w starts at the mean of the clients' models (there at a model of its own, since
clients' networks may differ). Of uploads that are aggregated one by one each is a round, its client the ensemble.

As in the authors' code [C]: labels are uniform over all classes, G does not see them, z is trained, the ensemble takes
every client alike. What differs: there are no BatchNorm layers, so clients send channel moments of their
pre-activations on one batch instead, and L_BN is their scale-free distance, a mean over clients; images are shifted
before the teacher, by one offset a batch, not flipped (a digit's mirror image is none); the smooth generator without
batch statistics; 128 images a batch (there 256); w takes as many steps an epoch as the full pool has batches, through
the pool in the order in which it was filled (there one shuffled pass over the pool as it is).
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apfl_jax import nn, training
from apfl_jax.algorithms.ap_fl.statistics import Moments, distance, moments
from apfl_jax.algorithms.data_free import APART, answers, average
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Limits, Positive, Share, Weight
from apfl_jax.types import Algorithm, Array, Params, Task, Upload

_Many = Annotated[int, Limits(least=1)]


class Kept(NamedTuple):
  """What the server wants client by client.

  Attributes:
    params: the local model.
    weight: float32 [], what it counts in the mean.
    statistics: Moments of each layer under that model.
    round: int32 [], the round of the upload.
  """

  params: Params
  weight: Array
  statistics: tuple[Moments, ...]
  round: Array


def dense(
  task: Task,
  *,
  warmup: Share = 0.9,
  epochs: _Many = 10,
  generator_steps: _Many = 20,
  generator_batch: Annotated[int, Limits(least=2)] = 128,
  generator_learning_rate: Positive = 1e-3,
  server_learning_rate: Positive = 0.01,
  momentum: Share = 0.9,
  lambda_bn: Weight = 1.0,
  lambda_div: Weight = 1.0,
) -> Algorithm:
  """FedAvg whose server distils the clients' models into their mean.

  Args:
    task: the task.
    warmup: share of the run's rounds that are FedAvg's, before the server distils.
    epochs: new generators a round, each followed by as many steps of the model.
    generator_steps: Adam steps of each generator.
    generator_batch: images that each adds to the pool.
    generator_learning_rate: of Adam (beta1 .5).
    server_learning_rate: of the model's SGD.
    momentum: of the model's SGD.
    lambda_bn: weight of the distance to the clients' layer statistics.
    lambda_div: weight of the disagreement between ensemble and model.
  """
  loss = training.classification_loss(task)
  generator = nn.generator(task.image_shape, 1)
  blind = jnp.zeros((generator_batch, 1))  # in place of a class
  adam, sgd = optax.adam(generator_learning_rate, b1=0.5), optax.sgd(server_learning_rate, momentum)
  most = training.max_shift(task.image_shape[0])

  def local_update(download, client, data, visit, key):
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, download.shared, data, steps, key)
    apart = jax.random.fold_in(key, APART)
    batch = training.draw(data.store, data.train, jnp.int32(0), task.sgd.batch_size, task.num_classes, apart)
    statistics = moments(task.model.base(params.base, batch.images)[1], batch.mask)
    weight = training.weight(task.sgd, data.train.size)
    return client, Upload(update=(), weight=weight, kept=Kept(params, weight, statistics, visit.round))

  def aggregate(server, received, key):
    kept = received.kept
    mean = average(kept.params, kept.weight)
    started = jnp.max(kept.round) >= jnp.floor(warmup * task.rounds)
    return jax.lax.cond(started, distil, lambda params, kept, key: params, mean, kept, key)

  def distil(params, kept, key):
    def synthesise(params, key):
      """A batch of images [B, ...] from a new generator."""
      generator_key, noise_key, label_key, shift_key = jax.random.split(key, 4)
      label = jax.random.randint(label_key, (generator_batch,), 0, task.num_classes)
      target = jax.nn.one_hot(label, task.num_classes)
      noise = jax.random.normal(noise_key, (generator_batch, generator.noise_size))

      def cost(made, key):
        weights, noise = made
        images = generator.apply(weights, noise, blind)
        offset = jnp.broadcast_to(jax.random.randint(key, (1, 2), -most, most + 1), (generator_batch, 2))
        moved = training.shift(images, offset)
        return generator_loss(task, kept, params, moved, target, lambda_bn, lambda_div), images

      def step(i, carry):
        made, state, least, best = carry
        (value, images), gradient = jax.value_and_grad(cost, has_aux=True)(made, jax.random.fold_in(shift_key, i))
        best = jnp.where(value < least, images, best)
        updates, state = adam.update(gradient, state)
        return optax.apply_updates(made, updates), state, jnp.minimum(value, least), best

      made = (generator.init(generator_key), noise)
      start = (made, adam.init(made), jnp.inf, jnp.zeros((generator_batch, *task.image_shape)))
      return jax.lax.fori_loop(0, generator_steps, step, start)[-1]

    def epoch(i, carry):
      params, state, pool, answered = carry
      images = synthesise(params, jax.random.fold_in(key, i))
      pool, answered = pool.at[i].set(images), answered.at[i].set(ensemble(kept, answers(task, kept.params, images)[0]))

      def step(j, carry):
        params, state = carry
        slot = j % (i + 1)
        apart = lambda p: jnp.mean(divergence(training.predict(task.model, p, pool[slot]).logits, answered[slot]))
        updates, state = sgd.update(jax.grad(apart)(params), state)
        return optax.apply_updates(params, updates), state

      params, state = jax.lax.fori_loop(0, epochs, step, (params, state))
      return params, state, pool, answered

    pool = jnp.zeros((epochs, generator_batch, *task.image_shape))
    answered = jnp.zeros((epochs, generator_batch, task.num_classes))
    return jax.lax.fori_loop(0, epochs, epoch, (params, sgd.init(params), pool, answered))[0]

  return fedavg(task)._replace(local_update=local_update, aggregate=aggregate)


def ensemble(kept: Kept, values: Array) -> Array:
  """The mean of values [K, ...] over the clients that arrived with examples, every one alike."""
  counted = jnp.where(kept.weight > 0, 1.0, 0.0)
  return jnp.tensordot(counted, values, 1) / jnp.sum(counted)


def divergence(logits: Array, taught: Array) -> Array:
  """KL(softmax(taught) || softmax(logits)) of each row, [B]."""
  target = jax.nn.softmax(taught)
  return training.cross_entropy(logits, target) - training.cross_entropy(taught, target)


def generator_loss(
  task: Task,
  kept: Kept,
  params: Params,
  images: Array,
  target: Array,
  lambda_bn: Array | float,
  lambda_div: Array | float,
) -> Array:
  """What the generator minimises, [].

  Args:
    task: the task.
    kept: the clients' models and layer statistics, [K, ...].
    params: the model being taught.
    images: float32 [B, height, width, channels].
    target: one-hot float32 [B, C].
    lambda_bn: weight of L_BN.
    lambda_div: weight of the disagreement.
  """
  logits, taps = answers(task, kept.params, images)
  taught, mine = ensemble(kept, logits), training.predict(task.model.frozen, params, images).logits
  found = jax.vmap(lambda taps: moments(taps, jnp.ones(len(images))))(taps)
  wrong = jnp.argmax(taught, axis=-1) != jnp.argmax(mine, axis=-1)
  off = jnp.where(kept.weight > 0, jax.vmap(distance)(found, kept.statistics), 0.0)
  apart = jnp.mean(jnp.where(wrong, divergence(mine, taught), 0.0))
  return jnp.mean(training.cross_entropy(taught, target)) + lambda_bn * ensemble(kept, off) - lambda_div * apart
