"""Centred kernel alignment, in closed form and against its definition by means of features."""

import numpy as np
import pytest

from apfl_jax import semantics
from apfl_jax.errors import InputError
from apfl_jax.semantics import alignment


def test_equal_up_to_factor_rotation_and_shift_is_one():
  rng = np.random.default_rng(0)
  table = rng.standard_normal((7, 4))
  moved = 3 * table @ np.linalg.qr(rng.standard_normal((4, 4)))[0] + rng.standard_normal(4)
  assert alignment(table @ table.T, moved @ moved.T) == pytest.approx(1)


def test_orthogonal_features_are_zero():
  first, second = np.array([[1.0, 1, -1, -1]]).T, np.array([[1.0, -1, 1, -1]]).T
  assert alignment(first @ first.T, second @ second.T) == pytest.approx(0)
  both = np.hstack([first, second])
  assert alignment(first @ first.T, both @ both.T) == pytest.approx(1 / np.sqrt(2))


def test_is_the_norm_of_the_cross_covariance():
  rng = np.random.default_rng(1)
  x, y = rng.standard_normal((12, 5)), rng.standard_normal((12, 8))
  u, v = x - x.mean(0), y - y.mean(0)
  expected = np.linalg.norm(u.T @ v) ** 2 / (np.linalg.norm(u.T @ u) * np.linalg.norm(v.T @ v))
  assert alignment(x @ x.T, y @ y.T) == pytest.approx(expected)
  assert alignment(y @ y.T, x @ x.T) == pytest.approx(expected)


def test_onehot_is_the_control_for_what_says_nothing():
  """With all classes equally far apart the alignment is tr K / (sqrt(C - 1) |K|), not zero."""
  table = semantics.normalise(np.random.default_rng(2).standard_normal((10, 64)))
  onehot = semantics.normalise(np.eye(10))
  centred = table.astype(float) - table.mean(0)
  gram = centred @ centred.T
  expected = np.trace(gram) / (3 * np.linalg.norm(gram))
  assert alignment(table @ table.T, onehot @ onehot.T) == pytest.approx(expected, abs=1e-6) and expected > 0.9


@pytest.mark.parametrize(
  "first, second, said",
  [
    (np.eye(3), np.eye(4), "[3, 3] and [4, 4]"),
    (np.ones((3, 2)), np.ones((3, 2)), "[C, C]"),
    (np.eye(3), np.full((3, 3), np.nan), "finite"),
    (np.eye(3), np.ones((3, 3)), "all classes are the same"),
  ],
)
def test_errors_are_one_clear_line(first, second, said):
  with pytest.raises(InputError) as error:
    alignment(first, second)
  assert said in str(error.value) and "\n" not in str(error.value)
