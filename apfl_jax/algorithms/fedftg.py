"""FedFTG: Zhang et al., Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID Federated Learning,
CVPR 2022.

The server averages the clients' models as FedAvg does, then fine-tunes the mean w on images of a generator that looks
for what the mean has not learned from them (section 3):
  G   min  sum_k mean_b a_k(y_b) (CE(w_k(x_b), y_b) lambda_cls - |w(x_b) - w_k(x_b)|_1) + lambda_dis L_div,  x = G(z, y)
  w   min  mean_b H(sum_k a_k(y_b) softmax w_k(x_b), softmax w(x_b))
a_k(y) is the share of class y that client k holds among those that arrived (class-level ensemble), y is drawn by the
number of examples (customised label sampling). Ten times, one step of G, five of w on the same z and y.

As in the authors' code [C]: the gap is the absolute difference of logits, a mean over classes, constant in w_k; H is a
mean over classes too, as the rate of w wants it; Adam starts anew each round, the generator goes on.
What differs: one step of G on the sum over clients (there one step for each client); CE weighs each example by a_k
(there the mean CE by the mean of a_k); a smooth generator without batch statistics; no weight decay, no decay of rates;
built on FedAvg only (there also on FedProx, SCAFFOLD, FedDyn and MOON). Of uploads that are aggregated one by one each
is a round, and its model the only teacher.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apfl_jax import nn, random, training
from apfl_jax.algorithms.data_free import APART, answers, average, class_shares, diversity
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Count, Limits, Positive, Weight
from apfl_jax.types import Algorithm, Array, Download, Generator, Key, Params, PyTree, Task, Upload


class Server(NamedTuple):
  """The server between rounds.

  Attributes:
    params: the global model, all that clients download.
    generator: the generator's parameters.
  """

  params: Params
  generator: PyTree


class Kept(NamedTuple):
  """What the server wants client by client.

  Attributes:
    params: the local model.
    weight: float32 [], what it counts in the mean.
    counts: float32 [C], the client's training examples of each class.
  """

  params: Params
  weight: Array
  counts: Array


def fedftg(
  task: Task,
  *,
  iterations: Count = 10,
  model_steps: Count = 5,
  generator_batch: Annotated[int, Limits(least=2)] = 50,
  generator_learning_rate: Positive = 0.01,
  server_learning_rate: Positive = 0.1,
  lambda_cls: Weight = 1.0,
  lambda_dis: Weight = 1.0,
) -> Algorithm:
  """FedAvg whose server fine-tunes the mean by distillation from the clients' models.

  Args:
    task: the task.
    iterations: steps of the generator a round; 0 is FedAvg.
    model_steps: SGD steps of the model for each of them.
    generator_batch: images a step.
    generator_learning_rate: of the generator's Adam.
    server_learning_rate: of the model's SGD.
    lambda_cls: weight of the labels in the generator's loss.
    lambda_dis: weight of its diversity loss.
  """
  loss = training.classification_loss(task)
  generator = _generator(task)
  optimizer = optax.adam(generator_learning_rate)

  def init(key):
    return Server(task.model.init(key), generator.init(jax.random.fold_in(key, APART)))

  def local_update(download, client, data, visit, key):
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, download.shared, data, steps, key)
    counts = training.label_histogram(data.store, data.train, task.num_classes)
    weight = training.weight(task.sgd, data.train.size)
    return client, Upload(update=(), weight=weight, kept=Kept(params, weight, counts))

  def aggregate(server, received, key):
    kept = received.kept
    counts = jnp.sum(kept.counts, axis=0)
    shares = class_shares(kept.counts)  # [K, C], 0 for who did not arrive

    def iteration(i, carry):
      params, generated, state = carry
      label_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
      label = random.categorical(label_key, counts, (generator_batch,))
      noise = jax.random.normal(noise_key, (generator_batch, generator.noise_size))
      target, share = jax.nn.one_hot(label, task.num_classes), shares[:, label]  # [B, C], [K, B]

      def search(generated):
        images = generator.apply(generated, noise, target)
        loss = generator_loss(task, kept.params, params, images, target, share, lambda_cls)
        return loss + lambda_dis * diversity(noise, images)

      updates, state = optimizer.update(jax.grad(search)(generated), state)
      generated = optax.apply_updates(generated, updates)

      images = generator.apply(generated, noise, target)
      taught = jnp.sum(share[:, :, None] * jax.nn.softmax(answers(task, kept.params, images)[0]), axis=0)  # [B, C]

      def distillation(params, step):
        each = training.cross_entropy(training.predict(task.model, params, images).logits, taught)
        return jnp.mean(each) / task.num_classes

      rate = jnp.float32(server_learning_rate)
      return training.descend(distillation, params, jnp.int32(model_steps), rate), generated, state

    carry = (average(kept.params, kept.weight), server.generator, optimizer.init(server.generator))
    params, generated, _ = jax.lax.fori_loop(0, iterations, iteration, carry)
    return Server(params, generated)

  return fedavg(task)._replace(
    init=init,
    download=lambda server: Download(shared=server.params),
    local_update=local_update,
    aggregate=aggregate,
    global_model=lambda server: server.params,
  )


def generator_loss(
  task: Task, members: Params, params: Params, images: Array, target: Array, share: Array, lambda_cls: Array | float
) -> Array:
  """What the generator minimises but for its diversity, [].

  Args:
    task: the task.
    members: the clients' models, [K, ...].
    params: the model being fine-tuned.
    images: x, float32 [B, height, width, channels].
    target: y, one-hot float32 [B, C].
    share: a_k(y_b), float32 [K, B].
    lambda_cls: weight of the labels.
  """
  logits, _ = answers(task, members, images)  # [K, B, C]
  mine = training.predict(task.model.frozen, params, images).logits
  gap = jnp.mean(jnp.abs(mine - jax.lax.stop_gradient(logits)), axis=-1)
  right = jax.vmap(lambda x: training.cross_entropy(x, target))(logits)
  return jnp.sum(jnp.mean(share * (lambda_cls * right - gap), axis=1))


def samples(task: Task, server: Server, key: Key, count: int, **settings: Any) -> Array:
  """Generated images float32 [C, count, height, width, channels] in [0, 1], all classes."""
  generator = _generator(task)
  label = jnp.repeat(jnp.eye(task.num_classes), count, axis=0)
  noise = jax.random.normal(key, (len(label), generator.noise_size))
  return generator.apply(server.generator, noise, label).reshape(task.num_classes, count, *task.image_shape)


def _generator(task: Task) -> Generator:
  return nn.generator(task.image_shape, task.num_classes)  # of one-hot labels, whatever the embeddings say
