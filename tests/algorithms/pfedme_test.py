"""pFedMe against its equations in NumPy, and its inner problem in closed form on a quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.algorithms import pfedme
from apfl_jax.algorithms.pfedme import proximal_point
from tests import linear


def inner(id, w, steps, rate, weight):
  theta = w
  for _ in range(steps):
    theta = linear.plus(theta, (-rate, linear.oracle(id).gradient(theta)), (-rate * weight, theta), (rate * weight, w))
  return theta


def test_the_inner_problem_of_a_quadratic_has_a_closed_form():
  curvature, minimum = np.array([0.2, 1.0, 3.0]), np.array([1.0, -2.0, 0.5])
  centre, weight = np.array([4.0, 0.0, -1.0]), 2.0
  theta = proximal_point(
    lambda t, step: 0.5 * jnp.sum(curvature * (t - minimum) ** 2), jnp.float32(centre), jnp.int32(200), 0.2, weight
  )
  np.testing.assert_allclose(theta, (curvature * minimum + weight * centre) / (curvature + weight), rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
def test_rounds_are_those_of_the_paper(beta):
  steps, rate, weight = 3, 0.05, 4.0
  algorithm = pfedme(linear.task(), inner_steps=steps, inner_learning_rate=rate, envelope_weight=weight, beta=beta)
  rounds, server = linear.Rounds(algorithm), linear.start()
  for ids, lost in (((0, 1, 2), (2,)), ((0, 2), ())):
    rounds.advance(ids, lost=lost)
    moved = []
    for id in set(ids) - set(lost):
      w = server
      for _ in range(linear.STEPS):
        theta = inner(id, w, steps, rate, weight)
        w = linear.plus(w, *((s * linear.LEARNING_RATE * weight, t) for s, t in ((-1, w), (1, theta))))
      moved.append(linear.plus(w, (-1, server)))
    server = linear.plus(server, *((beta / len(moved), d) for d in moved))  # uniform
    linear.close(rounds.params, server)

  download = algorithm.download(rounds.server)
  model = algorithm.personalize(download, (), linear.data(3), linear.visit(3), jax.random.key(6))
  linear.close(model, inner(3, server, 3, rate, weight))

  # Of 7 gradients, two moves of w_i would leave one: a move, and theta by the other four.
  settings = {"inner_steps": steps, "inner_learning_rate": rate, "envelope_weight": weight}
  longer = pfedme(linear.task(personal_steps=7), **settings)
  model = longer.personalize(download, (), linear.data(3), linear.visit(3), jax.random.key(6))
  theta = inner(3, server, steps, rate, weight)
  moved = linear.plus(server, *((s * linear.LEARNING_RATE * weight, t) for s, t in ((-1, server), (1, theta))))
  linear.close(model, inner(3, moved, 4, rate, weight))
