"""Verification against scikit-learn's ROC curve, with ties and padding, and where it can be read off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_curve

from apfl_jax.metrics import verification


def _oracle(score, genuine):
  """EER where straight lines between the curve's points cross FAR = FRR, and TAR at FAR."""
  far, tar, _ = roc_curve(genuine, score, drop_intermediate=False)
  gap = far + tar - 1
  k = np.flatnonzero(gap >= 0)[0]
  share = -gap[k - 1] / (gap[k] - gap[k - 1])
  return far[k - 1] + share * (far[k] - far[k - 1]), tar[far <= verification.FAR + 1e-9].max()


@pytest.mark.parametrize("steps", [0, 3, 30])  # how coarse scores are: few values, many ties
@pytest.mark.parametrize("apart", [0.0, 1.0, 8.0])
def test_it_is_the_roc_curve(steps, apart):
  rng = np.random.default_rng(0)
  genuine = rng.random(800) < 0.3
  score = rng.normal(size=800) + apart * genuine
  score = np.round(score * steps) / steps if steps else score
  counted = rng.random(800) < 0.9
  got = jax.jit(verification.rates)(jnp.asarray(score), jnp.asarray(genuine), jnp.asarray(counted))
  np.testing.assert_allclose(got, _oracle(np.float32(score)[counted], genuine[counted]), atol=1e-5)


def test_the_ends():
  genuine = jnp.arange(10) < 5
  everyone = jnp.ones(10, bool)
  rates = lambda score, counted=everyone: verification.rates(jnp.asarray(score, jnp.float32), genuine, counted)
  np.testing.assert_allclose(rates(genuine), [0, 1])
  np.testing.assert_allclose(rates(~genuine), [1, 0])
  np.testing.assert_allclose(rates(np.zeros(10)), [0.5, 0])
  assert np.isnan(rates(np.arange(10), counted=genuine)).all()


def test_features_that_are_not_numbers_have_no_rates():
  genuine, counted = jnp.arange(10) < 5, jnp.arange(10) > 0
  score = jnp.arange(10.0)
  assert np.isnan(verification.rates(score.at[3].set(jnp.nan), genuine, counted)).all()
  assert np.isfinite(verification.rates(score.at[0].set(jnp.nan), genuine, counted)).all()  # not counted


def test_pairs_are_those_of_examples_that_exist():
  rng = np.random.default_rng(1)
  features, identity = np.float32(rng.normal(size=(7, 5))), np.array([0, 0, -1, 1, 1, 1, -1])
  features[4] = 0
  score, genuine, counted = verification.pairs(jnp.asarray(features), jnp.asarray(identity))
  place = 0
  for i in range(7):
    for j in range(i + 1, 7):
      norms = np.linalg.norm(features[i]) * np.linalg.norm(features[j])
      np.testing.assert_allclose(score[place], features[i] @ features[j] / norms if norms else 0, atol=1e-6)
      assert counted[place] == (identity[i] >= 0 and identity[j] >= 0)
      assert not counted[place] or genuine[place] == (identity[i] == identity[j])
      place += 1
  assert place == len(score)
