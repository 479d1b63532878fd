"""PersA-FL: Toghani, Lee and Uribe, PersA-FL: Personalized Asynchronous Federated Learning, arXiv 2210.01176.

From the downloaded w_0 = w, over Q local steps w_{q+1} = w_q - eta g:

  A (plain): g = grad f(w_q; D)
  B (MAML):  g = (I - alpha grad2 f(w_q; D'')) grad f(w_q - alpha grad f(w_q; D'); D)
  C (ME):    g = lambda (w_q - theta),  theta ~ argmin f(theta; D) + lambda / 2 |theta - w_q|^2 by K gradient steps
  server:    w <- w + beta s(tau) (w_Q - w_0) at each arrival, tau versions after its download
  personal:  A, B: w after a step of rate alpha; C: theta around w, which `pfedme` lets move first where
             there are steps for that

No code was found; the equations are recalled [M]. The server takes whatever arrived together as a mean (by
`--weighting`): one arrival at a time it is the paper's update, everybody without delay it is FedAvg with a server step.
s(tau) = (1 + tau)^-power; the paper's server step is constant [M], so power is 0 unless set. s scales the update, not
its weight, or a single arrival would not feel it.

What a client does is that of `fedavg_ft` (personalised at rate alpha), `per_fedavg` or `pfedme`. B leaves the Hessian
out, as `per_fedavg` does, unless `first_order` is false: then the Hessian-vector product is exact, with which training
fails on some seeds at rates that FedAvg stands (experiments/results/methods.md). The paper's personal model takes one
step [M], for which a rate of .01 is meant (method 3.2 [O]); here it takes `personal_steps`, for each option of its own
kind (A's and B's rates fall along a cosine, from which a single step sees nothing), hence the learning rate unless set.
"""

from typing import Annotated

import jax

from apfl_jax import training
from apfl_jax.algorithms import staleness
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.algorithms.fedavg_ft import fedavg_ft
from apfl_jax.algorithms.per_fedavg import per_fedavg, with_rate
from apfl_jax.algorithms.pfedme import pfedme
from apfl_jax.settings import Limits, Positive, Weight
from apfl_jax.types import Algorithm, Task, Upload

OPTIONS = ("a", "b", "c")


def persafl(
  task: Task,
  *,
  option: Annotated[str, Limits(choices=OPTIONS)] = "b",
  server_learning_rate: Positive = 1.0,
  staleness_power: Weight = 0.0,
  alpha: Positive = 1.0,
  first_order: bool = True,
  envelope_weight: Positive = 25.0,
  inner_steps: Annotated[int, Limits(least=1)] = 5,
  inner_learning_rate: Positive = 0.02,
) -> Algorithm:
  """Asynchronous FedAvg whose clients train the global model to be good after a step of their own.

  Args:
    task: the task.
    option: what a client's steps follow: 'a' plain, 'b' MAML, 'c' Moreau envelope.
    server_learning_rate: beta.
    staleness_power: exponent of the discount for staleness; 0 is none.
    alpha: rate of option b's inner step and of a's and b's personal ones, in units of the learning rate.
    first_order: option b without the Hessian; false takes exact Hessian-vector products.
    envelope_weight: option c's lambda.
    inner_steps: option c's K.
    inner_learning_rate: of option c's steps; times `envelope_weight` it must stay below 2.
  """
  synchronous = {
    "a": lambda: fedavg(task)._replace(personalize=fedavg_ft(with_rate(task, alpha)).personalize),
    "b": lambda: per_fedavg(task, alpha=alpha, first_order=first_order),
    "c": lambda: pfedme(
      task, inner_steps=inner_steps, inner_learning_rate=inner_learning_rate, envelope_weight=envelope_weight
    ),
  }[option]()

  def local_update(download, client, data, visit, key):
    client, upload = synchronous.local_update(download, client, data, visit, key)
    discount = staleness.polynomial(visit.staleness, staleness_power)
    update = jax.tree.map(lambda d: discount * d, upload.update)
    return client, Upload(update=update, weight=training.weight(task.sgd, data.train.size))

  def aggregate(server, received, key):
    return jax.tree.map(lambda w, d: w + server_learning_rate * d, server, received.mean)

  return synchronous._replace(local_update=local_update, aggregate=aggregate)
