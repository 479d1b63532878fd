"""Decoupled interpolation: one coefficient for the base, another for the head (method 2.9 [O]; the idea is [R]).

  w_P = (lambda_b b_L + (1 - lambda_b) b_F,  lambda_h h_L + (1 - lambda_h) h_F)

L is the local model, F the friend model.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from apfl_jax.types import Array, Params, PyTree

Objective = Callable[[PyTree, PyTree], Array]  # (base, heads stacked [P, ...]) -> J [P]


def _mix(local: PyTree, friend: PyTree, share: Array | float) -> PyTree:
  # Exact at the ends, also where the other end is not finite.
  return jax.tree.map(
    lambda a, b: jnp.where(share == 1.0, a, jnp.where(share == 0.0, b, share * a + (1.0 - share) * b)), local, friend
  )


def interpolate(local: Params, friend: Params, lambda_base: Array | float, lambda_head: Array | float) -> Params:
  """The personal model at a pair of coefficients, each [] in [0, 1]; 1 is exactly `local` and 0 exactly `friend`."""
  return Params(_mix(local.base, friend.base, lambda_base), _mix(local.head, friend.head, lambda_head))


def by_size(size: Array) -> tuple[Array, Array]:
  """(lambda_b, lambda_h) from the number of training examples alone (method 2.9 c), n0 = 50.

  n / (n + 4 n0) and n / (n + n0 / 4): with few examples the features are shared for longer than the classifier.
  """
  n = size.astype(jnp.float32)
  return n / (n + 200.0), n / (n + 12.5)


def choose(
  objective: Objective,
  local: Params,
  friend: Params,
  start: Params,
  *,
  points: int,
  on_grid: Array,
  pair: tuple[Array, Array],
  guarded: Array,
) -> Params:
  """The personal model: the best pair on a grid or a given pair, guarded by the end points and the start.

  The features depend on lambda_b alone, so the grid costs `points` passes through the base, not `points` squared; the
  given pair and the start are rows of the same pass.

  Args:
    objective: J, to be small.
    local: L, at (1, 1).
    friend: F, at (0, 0).
    start: the model both came from.
    points: coefficients an axis of the grid.
    on_grid: bool [], whether the pair of the smallest J on the grid is chosen; `pair` otherwise.
    pair: (lambda_b, lambda_h), [] each.
    guarded: bool [], whether L, F or the start replaces the choice if its J is smaller (method 2.9, guard).
  """
  grid = jnp.linspace(0.0, 1.0, points)
  base_shares = jnp.concatenate([grid, jnp.stack([pair[0], jnp.zeros(())])])
  head_shares = jnp.append(grid, pair[1])
  is_start = jnp.arange(points + 2) == points + 1
  heads = jax.vmap(lambda share: _mix(local.head, friend.head, share))(head_shares)

  def row(item):
    share, starts = item
    pick = lambda a, b: jnp.where(starts, a, b)
    base = jax.tree.map(pick, start.base, _mix(local.base, friend.base, share))
    return objective(base, jax.tree.map(pick, start.head, heads))

  values = jax.lax.map(row, (base_shares, is_start))  # [points + 2, points + 1]
  values = jnp.where(jnp.isfinite(values), values, jnp.inf)  # a model that diverged is never chosen for it
  surface = values[:points, :points]
  best = jnp.argmin(surface)
  lambda_base = jnp.where(on_grid, grid[best // points], pair[0])
  lambda_head = jnp.where(on_grid, grid[best % points], pair[1])
  chosen = jnp.where(on_grid, jnp.min(surface), values[points, points])

  rivals = jnp.stack([chosen, surface[-1, -1], surface[0, 0], values[-1, 0]])
  winner = jnp.where(guarded, jnp.argmin(rivals), 0)
  lambda_base = jnp.select([winner == 1, winner == 2], [1.0, 0.0], lambda_base)
  lambda_head = jnp.select([winner == 1, winner == 2], [1.0, 0.0], lambda_head)
  mixed = interpolate(local, friend, lambda_base, lambda_head)
  return jax.tree.map(lambda a, b: jnp.where(winner == 3, a, b), start, mixed)
