"""Local SGD: every client its own number of steps, by a loop with a traced bound."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from apfl_jax.training.augment import augment
from apfl_jax.training.batches import Batch, draw
from apfl_jax.types import Array, Data, Key, LocalSGD, PyTree, Span, Task


def num_steps(sgd: LocalSGD, size: Array, work: Array | float = 1.0) -> Array:
  """int32 []: SGD steps of a round for a client with `size` training examples that does the share `work` of them."""
  full = jnp.int32(sgd.steps) if sgd.steps else sgd.epochs * ((size + sgd.batch_size - 1) // sgd.batch_size)
  done = jnp.maximum(jnp.round(full * work).astype(jnp.int32), 1)
  return jnp.where(size > 0, done, 0)


def weight(sgd: LocalSGD, size: Array) -> Array:
  """float32 []: what a client's update counts; 0 for a client without training examples."""
  return jnp.where(size > 0, size.astype(jnp.float32) if sgd.weighting == "examples" else 1.0, 0.0)


def descend(
  loss: Callable[[PyTree, Array], Array],
  params: PyTree,
  steps: Array,
  learning_rate: Array,
  *,
  cosine: bool = False,
  project: Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
  """Plain gradient descent on `loss(params, step)` for a traced number of steps; arguments as in `follow`."""
  return follow(jax.grad(loss), params, steps, learning_rate, cosine=cosine, project=project)


def follow(
  direction: Callable[[PyTree, Array], PyTree],
  params: PyTree,
  steps: Array,
  learning_rate: Array,
  *,
  cosine: bool = False,
  project: Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
  """Steps against `direction(params, step)`, the gradient of something or not, for a traced number of steps.

  Args:
    direction: (params, int32 [] step) -> pytree like params.
    params: pytree.
    steps: int32 [].
    learning_rate: float32 [].
    cosine: let the rate fall to 0 along half a cosine over the steps.
    project: applied to the parameters after each step.
  """

  def body(step, params):
    rate = learning_rate
    if cosine:
      rate = rate * 0.5 * (1.0 + jnp.cos(jnp.pi * step / jnp.maximum(steps, 1)))
    params = jax.tree.map(lambda p, d: p - rate * d, params, direction(params, step))
    return project(params) if project else params

  return jax.lax.fori_loop(0, steps, body, params)


def local_sgd(
  task: Task,
  loss: Callable[[PyTree, Batch], Array],
  params: PyTree,
  data: Data,
  steps: Array,
  key: Key,
  *,
  cosine: bool = False,
  project: Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
  """SGD over the client's training examples, epoch after epoch, with the task's rate, batch size and augmentation.

  Args:
    task: the task.
    loss: (params, batch) -> [].
    params: pytree to start from.
    data: the client's.
    steps: int32 [], usually `num_steps(task.sgd, data.train.size, visit.work)`.
    key: consumed.
    cosine: see `follow`.
    project: see `follow`.
  """
  next_batch = batches(task, data, data.train, key)
  objective = lambda p, step: loss(p, next_batch(step))
  return descend(objective, params, steps, task.sgd.learning_rate, cosine=cosine, project=project)


def batches(task: Task, data: Data, span: Span, key: Key) -> Callable[[Array], Batch]:
  """(step) -> the augmented batch of that step; any step can be asked for, none is stored. The key is consumed."""
  order_key, augment_key = jax.random.split(key)

  def next_batch(step: Array) -> Batch:
    batch = draw(data.store, span, step, task.sgd.batch_size, task.num_classes, order_key)
    batch = batch._replace(logit_offset=data.logit_offset)
    return augment(task.sgd.augment, batch, jax.random.fold_in(augment_key, step))

  return next_batch


def fine_tune(
  task: Task,
  loss: Callable[[PyTree, Batch], Array],
  params: PyTree,
  data: Data,
  steps: int,
  key: Key,
  *,
  project: Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
  """The one fine-tuning that methods share: `steps` SGD steps, the rate falling to 0 along a cosine (method 2.8)."""
  taken = jnp.where(data.train.size > 0, steps, 0)
  return local_sgd(task, loss, params, data, taken, key, cosine=True, project=project)
