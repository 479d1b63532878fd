"""Decoupled interpolation: one coefficient for the base, another for the head (method.md 2.9 [O]; idea [R]).

  w_P = (lambda_b b_L + (1 - lambda_b) b_F,  lambda_h h_L + (1 - lambda_h) h_F)

L is the local model, F the friend model.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from apfl_jax.types import Array, Params, PyTree

Objective = Callable[[PyTree, PyTree], Array]  # (base, heads stacked [P, ...]) -> J [P]


def mix(local: PyTree, friend: PyTree, share: Array) -> PyTree:
  """share * local + (1 - share) * friend; exactly `local` at 1 and `friend` at 0."""
  return jax.tree.map(lambda a, b: share * a + (1.0 - share) * b, local, friend)


def interpolate(local: Params, friend: Params, lambda_base: Array, lambda_head: Array) -> Params:
  """The personal model at a pair of coefficients, each [] in [0, 1]."""
  return Params(mix(local.base, friend.base, lambda_base), mix(local.head, friend.head, lambda_head))


def surface(objective: Objective, local: Params, friend: Params, points: int) -> tuple[Array, Array]:
  """J over the grid of pairs.

  Features depend on lambda_b only, so a grid of `points`^2 pairs costs `points` passes through the base.

  Returns:
    (the coefficients float32 [points] from 0 to 1, J float32 [points, points] indexed by base, head).
  """
  shares = jnp.linspace(0.0, 1.0, points)
  heads = jax.vmap(lambda share: mix(local.head, friend.head, share))(shares)
  return shares, jax.lax.map(lambda share: objective(mix(local.base, friend.base, share), heads), shares)


def by_grid(objective: Objective, local: Params, friend: Params, points: int) -> tuple[Array, Array]:
  """(lambda_b, lambda_h) of the smallest J on the grid."""
  shares, values = surface(objective, local, friend, points)
  best = jnp.argmin(values)
  return shares[best // points], shares[best % points]


def by_size(size: Array) -> tuple[Array, Array]:
  """(lambda_b, lambda_h) from the number of training examples alone (method.md 2.9 c), n0 = 50:
  n / (n + 4 n0) and n / (n + n0 / 4): features are shared longer than the classifier."""
  n = size.astype(jnp.float32)
  return n / (n + 200.0), n / (n + 12.5)


def guard(objective: Objective, candidates: tuple[Params, ...]) -> Params:
  """The candidate of the smallest J; of equal ones the first (method.md 2.9, guard)."""
  one = lambda head: jax.tree.map(lambda x: x[None], head)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *candidates)
  values = jax.lax.map(lambda c: objective(c.base, one(c.head))[0], stacked)
  best = jnp.argmin(values)
  return jax.tree.map(lambda x: x[best], stacked)
