"""Decoupled interpolation: one coefficient for the base, another for the head (method 2.9 [O]; the idea is [R]).

  w_P = (lambda_b b_L + (1 - lambda_b) b_F,  lambda_h h_L + (1 - lambda_h) h_F)

L is the local model, F the friend model. The coefficients have the least J on a grid, or come from J's gradient
(2.9 b), also one for each layer (2.9 d), or from the number of examples (2.9 c). Controls: one coefficient for both (as
Deng et al. 2020 have), and answers mixed in place of weights (as kNN-Per has). 8.3's pilots want the plain minimum [P],
so the rule of one standard error (2.9 a) is off unless asked for.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from apfl_jax.types import Array, Params, PyTree

STARTED = 3  # in `Choice.guard`: the start
_STEPS, _RATE, _RIDGE = 50, 0.1, 0.02  # of coefficients by gradient (method 2.9 b)


class Losses(NamedTuple):
  """What coefficients are chosen by, of P candidates.

  Attributes:
    total: J, float32 [P], to be small.
    real: float32 [P], the part of J that is the loss on the client's own validation examples.
    variance: float32 [P], of J as an estimate from so many examples, its standard error squared.
  """

  total: Array
  real: Array
  variance: Array


Objective = Callable[[PyTree, PyTree], Losses]  # (base, heads stacked [P, ...]) -> [P]


class Choice(NamedTuple):
  """What a client chose and what it saw; told to people, read by no model.

  Attributes:
    lambda_base: float32 [], the mean over layers where each has its own.
    lambda_head: float32 [].
    guard: int32 [], what the guard put in the place of the interpolated model: 0 nothing, 1 the local model, 2 the
      friend, 3 the start.
    barrier: float32 [], the validation loss half-way between friend and local model, less the mean of the two; 0
      without validation examples. Far above 0, a line between the two leads over a hill. () where nothing was tried.
    surface: J, float32 [P, P], at the points of the grid, base by head; (), likewise.
  """

  lambda_base: Array
  lambda_head: Array
  guard: Array
  barrier: Array | tuple[()] = ()
  surface: Array | tuple[()] = ()


def _mix(local: PyTree, friend: PyTree, share: Array | float) -> PyTree:
  # Exact at the ends, also where the other end is not finite.
  return jax.tree.map(
    lambda a, b: jnp.where(share == 1.0, a, jnp.where(share == 0.0, b, share * a + (1.0 - share) * b)), local, friend
  )


def interpolate(local: Params, friend: Params, shares: Params) -> Params:
  """The personal model at coefficients [] in [0, 1]; 1 is exactly `local` and 0 exactly `friend`.

  Args:
    local: L.
    friend: F.
    shares: a coefficient in the place of any part of the model, e.g. `Params(lambda_b, lambda_h)`.
  """
  return jax.tree.map(lambda share, a, b: _mix(a, b, share), shares, local, friend)


def for_each_layer(base: PyTree, share: Array | float) -> PyTree:
  """A coefficient for each layer of a base, all the same; a base that is no dict of layers is one layer."""
  return dict.fromkeys(base, share) if isinstance(base, dict) else share


def by_size(size: Array, *, coupled: bool = False) -> Params:
  """Coefficients from the number of training examples alone (method 2.9 c), n0 = 50.

  n / (n + 4 n0) and n / (n + n0 / 4): with few examples the features are shared for longer than the classifier.
  Coupled, n / (n + n0) for both.
  """
  n = size.astype(jnp.float32)
  return Params(n / (n + 50.0), n / (n + 50.0)) if coupled else Params(n / (n + 200.0), n / (n + 12.5))


def by_gradient(slope: Callable[[PyTree], PyTree], prior: PyTree) -> PyTree:
  """Coefficients by 50 steps of Adam on J + .02 sum (lambda - prior)^2, lambda = sigmoid(s) (method 2.9 b).

  Args:
    slope: coefficients -> the gradient of J by them.
    prior: coefficients [] in any structure, where the descent starts.
  """
  optimizer = optax.adam(_RATE)
  # The sigmoid reaches neither end.
  start = jax.tree.map(lambda p: jax.scipy.special.logit(jnp.clip(p, 0.01, 0.99)), prior)

  def step(_, carry):
    s, state = carry
    shares = jax.tree.map(jax.nn.sigmoid, s)
    by_s = lambda gradient, share, p: (gradient + 2 * _RIDGE * (share - p)) * share * (1 - share)
    updates, state = optimizer.update(jax.tree.map(by_s, slope(shares), shares, prior), state)
    return optax.apply_updates(s, updates), state

  s, _ = jax.lax.fori_loop(0, _STEPS, step, (start, optimizer.init(start)))
  return jax.tree.map(jax.nn.sigmoid, s)


def _guard(chosen: Array, local: Array, friend: Array, start: Array, guarded: Array, with_start: Array) -> Array:
  """int32 []: which of four values is the least, the first where they are equal or nothing is guarded."""
  start = jnp.where(with_start, start, jnp.inf)
  return jnp.where(guarded, jnp.argmin(jnp.stack([chosen, local, friend, start])), 0)


def choose(
  objective: Objective,
  local: Params,
  friend: Params,
  start: Params,
  *,
  points: int,
  on_grid: Array,
  given: Params,
  guarded: Array,
  with_start: Array,
  coupled: bool = False,
  prior: tuple[Array | float, Array | float] | None = None,
) -> tuple[Params, Choice]:
  """The personal model: the best pair on a grid or given coefficients, guarded by the end points and the start.

  The features depend on the base alone, so the grid costs `points` passes through it, not `points` squared. The middle,
  the given coefficients and the start are rows of the same pass.

  Args:
    objective: J, to be small.
    local: L, at (1, 1).
    friend: F, at (0, 0).
    start: the model both came from.
    points: coefficients an axis of the grid.
    on_grid: bool [], whether the pair of the smallest J on the grid is chosen; `given` otherwise.
    given: coefficients as in `interpolate`; the head's is one.
    guarded: bool [], whether L or F replaces the choice if its J is smaller (method 2.9, guard).
    with_start: bool [], whether the start does so too; where guarded.
    coupled: whether only pairs of equal coefficients are chosen.
    prior: (lambda_b, lambda_h), to take that pair of the grid which is the nearest to it among those whose J exceeds
      the smallest by at most one standard error (method 2.9 a); None for the smallest.
  """
  grid = jnp.linspace(0.0, 1.0, points)
  rows = points + jnp.arange(3)  # of the middle, of what is given, of the start
  shares = jax.tree.map(lambda share: jnp.concatenate([grid, jnp.stack([0.5, share, 0.0])]), given)
  heads = jax.vmap(lambda share: _mix(local.head, friend.head, share))(grid)

  def row(item):
    shares, starts = item
    mixed = interpolate(local, friend, shares)
    mixed = jax.tree.map(lambda a, b: jnp.where(starts, a, b), start, mixed)
    return objective(mixed.base, jax.tree.map(lambda all, x: jnp.concatenate([all, x[None]]), heads, mixed.head))

  losses = jax.lax.map(row, (shares, jnp.arange(points + 3) == rows[2]))  # [points + 3, points + 1]
  values = jnp.where(jnp.isfinite(losses.total), losses.total, jnp.inf)  # a model that diverged is never chosen for it
  surface = values[:points, :points]
  _, given_value, start_value = values[points:, -1]

  allowed = jnp.where(jnp.eye(points, dtype=bool), surface, jnp.inf) if coupled else surface
  best = jnp.argmin(allowed)
  if prior is not None:
    error = jnp.sqrt(jnp.maximum(losses.variance[best // points, best % points], 0.0))
    away = (grid[:, None] - prior[0]) ** 2 + (grid - prior[1]) ** 2
    away = jnp.where(allowed <= jnp.min(allowed) + error, away, jnp.inf)
    # Between points of a grid a prior has several neighbours; of these the best.
    best = jnp.argmin(jnp.where(away <= jnp.min(away) + 1e-4, allowed, jnp.inf))
  pick = lambda found, share: jnp.where(on_grid, grid[found], share)
  chosen = Params(jax.tree.map(lambda share: pick(best // points, share), given.base), pick(best % points, given.head))

  # What lies within a standard error of the smallest counts as that, or the guard would undo the rule.
  value = jnp.where(on_grid, jnp.min(allowed), given_value)
  winner = _guard(value, surface[-1, -1], surface[0, 0], start_value, guarded, with_start)
  chosen = jax.tree.map(lambda share: jnp.select([winner == 1, winner == 2], [1.0, 0.0], share), chosen)
  mixed = interpolate(local, friend, chosen)
  real = losses.real
  return (
    jax.tree.map(lambda a, b: jnp.where(winner == STARTED, a, b), start, mixed),
    Choice(
      lambda_base=jnp.mean(jnp.stack(jax.tree.leaves(chosen.base))),
      lambda_head=chosen.head,
      guard=winner,
      barrier=real[points, -1] - 0.5 * (real[0, 0] + real[points - 1, points - 1]),
      surface=surface,
    ),
  )


def choose_share(values: Array, *, on_grid: Array, given: Array, guarded: Array, with_start: Array) -> Choice:
  """One coefficient for mixed answers, chosen as `choose` does.

  Args:
    values: J, float32 [P + 2]: along a grid from friend to local model, at `given`, and of the start.
    on_grid: bool [], whether the best point of the grid is chosen; `given` otherwise.
    given: float32 [].
    guarded: bool [], as in `choose`.
    with_start: bool [], likewise.
  """
  values = jnp.where(jnp.isfinite(values), values, jnp.inf)
  surface, given_value, start_value = values[:-2], values[-2], values[-1]
  share = jnp.where(on_grid, jnp.linspace(0.0, 1.0, len(surface))[jnp.argmin(surface)], given)
  value = jnp.where(on_grid, jnp.min(surface), given_value)
  winner = _guard(value, surface[-1], surface[0], start_value, guarded, with_start)
  share = jnp.select([winner == 1, winner == 2], [1.0, 0.0], share)
  return Choice(share, share, winner)
