"""FedAsync: Xie, Koyejo and Gupta, Asynchronous Federated Optimization, 2019 (arXiv 1903.03934).

  client: w_i from SGD on F_i(w) + rho / 2 ||w - w_tau||^2, from the download w_tau
  server: w <- (1 - a_t) w + a_t w_i,  a_t = alpha s(t - tau), on each arrival     (algorithm 1)

s is one of `staleness`. Clients count alike, as in the paper; `--weighting` has no effect. What arrives together is
mixed in one after another: tau counts the versions that an arrival is late and the arrivals mixed in before it in the
same round, which are server versions too (with alpha = 1 and s = 1 / (1 + tau) fresh models give uniform FedAvg). A
model that is more than `max_staleness` versions late is not mixed in; in the paper that is the bound of the simulated
delays, 4 or 16 [M], and on a clock with C clients at work C - 1 is the mean of tau. Defaults are the paper's [M], of
which it tunes alpha. It divides alpha by 2 once [M]; here it is constant.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import training
from apfl_jax.algorithms import staleness as discounts
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.algorithms.fedprox import fedprox
from apfl_jax.settings import Count, Limits, Positive, Share, Weight
from apfl_jax.types import Algorithm, Array, Params, Task, Upload

STALENESS = ("constant", "polynomial", "hinge")


class Kept(NamedTuple):
  """What the server wants client by client.

  Attributes:
    params: w_i.
    counts: bool [], whether the client has examples.
  """

  params: Params
  counts: Array


def fedasync(
  task: Task,
  *,
  alpha: Share = 0.6,
  staleness: Annotated[str, Limits(choices=STALENESS)] = "polynomial",
  exponent: Weight = 0.5,
  hinge_slope: Positive = 10.0,
  hinge_start: Weight = 4.0,
  rho: Weight = 0.005,
  max_staleness: Count = 16,
) -> Algorithm:
  """The server mixes each model that comes into its own.

  Args:
    task: the task.
    alpha: share of a fresh model in the mixture.
    staleness: how that falls with staleness: 'constant', 'polynomial' or 'hinge'.
    exponent: a of 'polynomial'.
    hinge_slope: a of 'hinge'.
    hinge_start: b of 'hinge', the most versions that cost nothing.
    rho: weight of the proximal term.
    max_staleness: versions; older models are left out.
  """
  local = fedprox(task, mu=rho)
  uniform = task.sgd._replace(weighting="uniform")
  discount = {
    "constant": lambda tau: jnp.ones(tau.shape),
    "polynomial": lambda tau: discounts.polynomial(tau, exponent),
    "hinge": lambda tau: discounts.hinge(tau, hinge_slope, hinge_start),
  }[staleness]

  def local_update(download, client, data, visit, key):
    client, upload = local.local_update(download, client, data, visit, key)
    params = jax.tree.map(lambda w, d: w + d, download.shared, upload.update)
    kept = Kept(params, data.train.size > 0)
    return client, Upload(update=(), weight=training.weight(uniform, data.train.size), kept=kept)

  def aggregate(server, received, key):
    def arrival(server, item):
      params, counts, share = item
      return jax.tree.map(lambda w, p: jnp.where(counts, w + share * (p - w), w), server, params), None

    counts = received.arrived & received.kept.counts & (received.staleness <= max_staleness)
    before = jnp.cumsum(counts) - counts
    items = received.kept.params, counts, alpha * discount(received.staleness + before)
    return jax.lax.scan(arrival, server, items)[0]

  return fedavg(task)._replace(local_update=local_update, aggregate=aggregate)
