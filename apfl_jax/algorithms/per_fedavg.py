"""Per-FedAvg: Fallah, Mokhtari and Ozdaglar, Personalized Federated Learning with Theoretical Guarantees, NeurIPS 2020.

  F_i(w) = f_i(w - alpha grad f_i(w))
  w_i <- w_i - eta (I - alpha grad2 f_i(w_i; D'')) grad f_i(w_i - alpha grad f_i(w_i; D'); D)
  w   <- w + mean_i (w_i - w)                                                                     (algorithm 1)

D, D', D'' are three batches of the client. `first_order` leaves the Hessian out (Per-FedAvg (FO), what PFLlib has, with
two batches [C]); otherwise the Hessian-vector product is exact. The mean is uniform as in the paper, so `--weighting`
has no effect; a client without examples counts nothing. Like PFLlib's [C], alpha is the learning rate unless set.
The personal model is w after SGD steps of rate alpha on the client: one step is the paper's, `personal_steps` are taken
(the rate falling along a cosine, from which a single step sees nothing). w itself is a start and no model: before a
step it may answer one class alone, so there is no global model.
"""

from collections.abc import Callable

import jax

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.settings import Positive
from apfl_jax.training import Batch
from apfl_jax.types import Algorithm, Array, PyTree, Task, Upload


def per_fedavg(task: Task, *, alpha: Positive = 1.0, first_order: bool = True) -> Algorithm:
  """A global model that one step of SGD turns into a good personal one.

  Args:
    task: the task.
    alpha: rate of the inner step and of personalisation, in units of the learning rate.
    first_order: leave out the Hessian.
  """
  loss = training.classification_loss(task)
  inner = with_rate(task, alpha)
  uniform = task.sgd._replace(weighting="uniform")

  def local_update(download, client, data, visit, key):
    next_batch = training.batches(task, data, data.train, key)

    def direction(params, step):
      batches = next_batch(3 * step), next_batch(3 * step + 1), next_batch(3 * step + 2)
      return meta_gradient(loss, params, *batches, inner.sgd.learning_rate, first_order=first_order)

    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.follow(direction, download.shared, steps, task.sgd.learning_rate)
    delta = jax.tree.map(lambda new, old: new - old, params, download.shared)
    return client, Upload(update=delta, weight=training.weight(uniform, data.train.size))

  def personalize(download, client, data, visit, key):
    del client, visit
    return training.fine_tune(inner, loss, download.shared, data, task.sgd.personal_steps, key)

  return fedavg(task)._replace(local_update=local_update, global_model=lambda server: None, personalize=personalize)


def with_rate(task: Task, share: Array | float) -> Task:
  """The task with the learning rate multiplied by `share`."""
  return task._replace(sgd=task.sgd._replace(learning_rate=share * task.sgd.learning_rate))


def meta_gradient(
  loss: Callable[[PyTree, Batch], Array],
  params: PyTree,
  outer: Batch,
  inner: Batch,
  curvature: Batch,
  rate: Array,
  *,
  first_order: bool,
) -> PyTree:
  """(I - rate Hessian(params; curvature)) gradient(params - rate gradient(params; inner); outer).

  Args:
    loss: (params, batch) -> [].
    params: pytree.
    outer: D.
    inner: D'.
    curvature: D'', not read if `first_order`.
    rate: alpha, float32 [].
    first_order: leave the Hessian out.
  """
  gradient = jax.grad(loss)
  adapted = jax.tree.map(lambda p, g: p - rate * g, params, gradient(params, inner))
  direction = gradient(adapted, outer)
  if first_order:
    return direction
  _, product = jax.jvp(lambda p: gradient(p, curvature), (params,), (direction,))  # forward over reverse
  return jax.tree.map(lambda g, h: g - rate * h, direction, product)
