"""Per-FedAvg: its gradient in closed form on quadratics, its rounds in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.algorithms import fedavg_ft, per_fedavg
from apfl_jax.algorithms.per_fedavg import meta_gradient
from tests import linear


@pytest.mark.parametrize("first_order", [True, False])
def test_the_meta_gradient_of_quadratics_has_a_closed_form_and_reads_three_batches(first_order):
  rng = np.random.default_rng(0)
  batches = []  # (curvature, centre): f(w) = (w - c)' A (w - c) / 2
  for _ in range(3):
    root = rng.normal(size=(4, 4))
    batches.append((root @ root.T, rng.normal(size=4)))
  w, rate = rng.normal(size=4), 0.1
  loss = lambda p, batch: 0.5 * jnp.dot(p - batch[1], batch[0] @ (p - batch[1]))
  got = meta_gradient(loss, jnp.float32(w), *map(_float32, batches), jnp.float32(rate), first_order=first_order)

  (a, c), (b, d), (h, _) = batches
  want = a @ (w - rate * b @ (w - d) - c)
  if not first_order:
    want = want - rate * h @ want
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def _float32(batch):
  return tuple(map(jnp.float32, batch))


def hessian_product(id, params, direction, width=1e-5):
  ends = (linear.oracle(id).gradient(linear.plus(params, (sign * width, direction))) for sign in (1, -1))
  up, down = ends
  return linear.plus(up, (-1, down))._replace(
    **{k: (getattr(up, k) - getattr(down, k)) / (2 * width) for k in up._fields}
  )


@pytest.mark.parametrize("first_order", [True, False])
def test_rounds_are_those_of_the_paper(first_order):
  alpha = 0.6
  rounds = linear.Rounds(per_fedavg(linear.task(), alpha=alpha, first_order=first_order))
  server = linear.start()
  for ids, lost in (((0, 1, 2), (2,)), ((0, 2), ())):
    rounds.advance(ids, lost=lost)
    moved = []
    for id in set(ids) - set(lost):
      w, oracle = server, linear.oracle(id)
      for _ in range(linear.STEPS):
        gradient = oracle.gradient(linear.plus(w, (-alpha * linear.LEARNING_RATE, oracle.gradient(w))))
        if not first_order:
          product = hessian_product(id, w, gradient)
          gradient = linear.plus(gradient, (-alpha * linear.LEARNING_RATE, product))
        w = linear.plus(w, (-linear.LEARNING_RATE, gradient))
      moved.append(linear.plus(w, (-1, server)))
    server = linear.plus(server, *((1 / len(moved), d) for d in moved))  # uniform
    linear.close(rounds.server, server)


def test_one_personal_step_is_the_inner_step():
  task = linear.task(personal_steps=1)
  algorithm = per_fedavg(task, alpha=0.6)
  download = algorithm.download(algorithm.init(jax.random.key(0)))
  model = algorithm.personalize(download, (), linear.data(1), linear.visit(1), jax.random.key(1))
  linear.close(
    model, linear.plus(linear.start(), (-0.6 * linear.LEARNING_RATE, linear.oracle(1).gradient(linear.start())))
  )
  same = [
    method(linear.task()).personalize(download, (), linear.data(1), linear.visit(1), jax.random.key(1))
    for method in (per_fedavg, fedavg_ft)
  ]
  linear.close(*same, 1e-6)
