"""AP-FL's coefficients against brute force and against Adam in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.algorithms.ap_fl import interpolation
from apfl_jax.algorithms.ap_fl.interpolation import Losses
from apfl_jax.types import Params
from tests import tasks

POINTS = 6
GRID = np.linspace(0, 1, POINTS)
PAIR = Params(jnp.float32(0.25), jnp.float32(0.6))


def quadratic(target, variance=0.0):
  """J = |base - target.base|^2 + 2 |head - target.head|^2 + base . head / 3, half of it real, on plain vectors."""

  def objective(base, heads):
    total = jnp.sum((base - target.base) ** 2) + 2 * jnp.sum((heads - target.head) ** 2, axis=-1) + heads @ base / 3
    return Losses(total, 0.5 * total, jnp.full_like(total, variance))

  return objective


def vector(seed):
  return Params(*jax.random.normal(jax.random.key(seed), (2, 4)))


@jax.jit
def mixed(local, friend, base, head):
  return interpolation.interpolate(local, friend, Params(jnp.float32(base), jnp.float32(head)))


@jax.jit
def value(target, model):
  return quadratic(target)(model.base, model.head[None]).total[0]


@functools.partial(jax.jit, static_argnames="coupled")
def chosen(
  local, friend, start, target, *, grid=True, guard=False, with_start=True, coupled=False, prior=None, variance=0.0
):
  return interpolation.choose(
    quadratic(target, variance),
    local,
    friend,
    start,
    points=POINTS,
    on_grid=jnp.asarray(grid),
    given=PAIR,
    guarded=jnp.asarray(guard),
    with_start=jnp.asarray(with_start),
    coupled=coupled,
    prior=prior,
  )


def surface_of(local, friend, target):
  return np.array([[value(target, mixed(local, friend, b, h)) for h in GRID] for b in GRID])


@pytest.mark.parametrize("seed", range(8))
def test_choose_is_the_brute_force_minimum_over_the_grid_the_ends_and_the_start(seed):
  local, friend, start, target = (vector(4 * seed + i) for i in range(4))
  target = [target, local, friend, start][seed % 4]  # so that every candidate wins for some seed
  models = local, friend, start, target
  of = lambda model: float(value(target, model))

  surface = surface_of(local, friend, target)
  best, choice = chosen(*models)
  assert of(best) == pytest.approx(surface.min(), rel=1e-5)
  np.testing.assert_allclose(choice.surface, surface, rtol=1e-4)
  np.testing.assert_allclose(
    (choice.lambda_base, choice.lambda_head), GRID[list(np.unravel_index(surface.argmin(), surface.shape))], rtol=1e-6
  )
  middle = 0.5 * of(mixed(local, friend, 0.5, 0.5))
  np.testing.assert_allclose(choice.barrier, middle - 0.25 * (surface[0, 0] + surface[-1, -1]), rtol=1e-3, atol=1e-4)
  assert int(choice.guard) == 0

  best, choice = chosen(*models, guard=True)
  assert of(best) == pytest.approx(min(surface.min(), of(start)), rel=1e-5)
  assert (int(choice.guard) == 3) == (of(start) < surface.min())
  given = mixed(local, friend, *PAIR)
  jax.tree.map(np.testing.assert_allclose, chosen(*models, grid=False)[0], given)
  best, choice = chosen(*models, grid=False, guard=True)
  assert of(best) == pytest.approx(min(map(of, (given, local, friend, start))), rel=1e-5)
  if int(choice.guard) in (1, 2):
    assert float(choice.lambda_base) == float(choice.lambda_head) == {1: 1.0, 2: 0.0}[int(choice.guard)]

  best, choice = chosen(*models, grid=False, guard=True, with_start=False)
  assert of(best) == pytest.approx(min(map(of, (given, local, friend))), rel=1e-5) and int(choice.guard) != 3

  best, choice = chosen(*models, coupled=True)
  assert float(choice.lambda_base) == float(choice.lambda_head)
  assert of(best) == pytest.approx(np.diag(surface).min(), rel=1e-5)


@pytest.mark.parametrize("prior", [(0.3, 0.7), (0.93, 0.42)])
@pytest.mark.parametrize("error", [0.0, 0.5, 3.0])
def test_one_standard_error_takes_the_nearest_to_the_prior_among_those_as_good(error, prior):
  local, friend, start, target = (vector(i) for i in range(4))
  surface = surface_of(local, friend, target)
  candidates = [
    (round((b - prior[0]) ** 2 + (h - prior[1]) ** 2, 6), surface[i, j], b, h)
    for (i, b) in enumerate(GRID)
    for (j, h) in enumerate(GRID)
    if surface[i, j] <= surface.min() + error + 1e-6
  ]
  _, choice = chosen(local, friend, start, target, prior=prior, variance=error**2)
  np.testing.assert_allclose((choice.lambda_base, choice.lambda_head), min(candidates)[2:], rtol=1e-6)
  assert (error == 0) == (len(candidates) == 1)


def test_interpolation_is_exact_at_its_ends_and_decoupled_between():
  local, friend = vector(0), vector(1)
  tasks.assert_same(mixed(local, friend, 1, 1), local)
  tasks.assert_same(mixed(local, friend, 0, 0), friend)
  tasks.assert_same(mixed(local, friend, 1, 0), Params(local.base, friend.head))
  layers = lambda seed: Params(
    {"a": {"kernel": vector(seed).base}, "b": {"kernel": vector(seed).head}}, vector(seed).base
  )
  shares = Params(interpolation.for_each_layer(layers(0).base, 1.0) | {"b": 0.0}, 0.25)
  model = interpolation.interpolate(layers(0), layers(1), shares)
  tasks.assert_same(model.base, {"a": layers(0).base["a"], "b": layers(1).base["b"]})
  np.testing.assert_allclose(model.head, 0.25 * layers(0).head + 0.75 * layers(1).head, rtol=1e-6)


def test_coefficients_by_size():
  sizes = jnp.array([0, 50, 200])
  base, head = interpolation.by_size(sizes)
  np.testing.assert_allclose(base, [0, 0.2, 0.5], rtol=1e-6)
  np.testing.assert_allclose(head, [0, 0.8, 200 / 212.5], rtol=1e-6)
  for share in interpolation.by_size(sizes, coupled=True):
    np.testing.assert_allclose(share, [0, 0.5, 0.8], rtol=1e-6)


def test_a_flat_objective_leaves_the_prior():
  found = interpolation.by_gradient(lambda share: jnp.zeros_like(share), jnp.float32(0.3))
  assert float(found) == pytest.approx(0.3, abs=1e-3)


def test_one_share_of_mixed_answers_is_the_best_of_its_grid():
  values = jnp.array([3.0, 1.0, 2.0, 5.0, 0.5, 0.7])  # at 0, 1/3, 2/3, 1, given, start
  choose = lambda grid, guard, with_start=True, values=values: interpolation.choose_share(
    values,
    on_grid=jnp.bool_(grid),
    given=jnp.float32(0.25),
    guarded=jnp.bool_(guard),
    with_start=jnp.bool_(with_start),
  )
  assert float(choose(True, False).lambda_base) == pytest.approx(1 / 3)
  assert float(choose(False, False).lambda_head) == 0.25
  assert int(choose(True, True).guard) == 3 and int(choose(False, True).guard) == 0
  assert int(choose(True, True, False).guard) == 0
  worse = choose(False, True, values=values.at[0].set(0.1))
  assert int(worse.guard) == 2 and float(worse.lambda_base) == 0
