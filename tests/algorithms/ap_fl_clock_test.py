"""AP-FL's server where uploads are aggregated one by one: what it knows of real data, and how often it draws."""

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax.algorithms import ap_fl
from apfl_jax.algorithms.ap_fl import statistics
from apfl_jax.algorithms.ap_fl.statistics import ByClass, Moments
from tests import linear


def test_layer_moments_are_a_mean_over_about_a_round_of_uploads():
  rng = np.random.default_rng(0)
  values, weights, each = rng.normal(size=(30, 5)), rng.uniform(1, 9, 30), 4
  mean, weight = (Moments(jnp.zeros(5), jnp.zeros(5)),), jnp.float32(0)
  take = jax.jit(statistics.fading, static_argnums=4)
  for x, w in zip(values, weights, strict=True):
    mean, weight = take(mean, weight, (Moments(jnp.asarray(w * x), jnp.asarray(w * x**2)),), jnp.float32(w), each)
  share = weights * 0.75 ** np.arange(30)[::-1]
  np.testing.assert_allclose(mean[0].mean, share @ values / share.sum(), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(mean[0].square, share @ values**2 / share.sum(), rtol=1e-5)
  np.testing.assert_allclose(weight, share.sum(), rtol=1e-5)
  alone, _ = take(mean, weight, (Moments(jnp.asarray(values[0]), jnp.asarray(values[1])),), jnp.float32(2), 1)
  np.testing.assert_array_equal(alone[0].mean, np.float32(values[0]) / 2)  # nothing of what was before


def test_sums_by_class_fade_by_a_tenth_in_a_round_of_uploads():
  of = lambda x: Moments(jnp.full((2, 1), x), jnp.full((2, 1), x))
  sums = ByClass(jnp.array([8.0, 8.0]), (of(8.0),), of(8.0), of(8.0))
  tiny = ByClass(jnp.array([1e-6, 0.0]), (of(0.0),), of(0.0), of(0.0))
  for _ in range(5):
    sums = statistics.merge(sums, tiny, 5)
  np.testing.assert_allclose(sums.counts, [7.2, 8.0], rtol=1e-5)
  np.testing.assert_allclose(sums.features.mean[:, 0], [7.2, 8.0], rtol=1e-5)


def test_a_source_that_does_not_learn_is_asked_once_in_a_round_of_uploads():
  task = linear.task()._replace(aggregations=3)
  rounds = linear.Rounds(ap_fl(task, source="noise", friend_steps=0))
  asked = []
  for id in (0, 1, 2, 3, 0, 1):
    before = rounds.server.trust
    rounds.advance((id,))
    asked.append(bool((rounds.server.trust != before).any()))
  assert asked.index(True) == 2 and not any(asked[3:5])
