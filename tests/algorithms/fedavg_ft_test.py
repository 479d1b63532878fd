"""Fine-tuning, of all or of the head alone, against gradient descent in NumPy."""

import jax
import numpy as np
import pytest

from apfl_jax.algorithms import fedavg_ft
from apfl_jax.types import Params
from tests import linear


@pytest.mark.parametrize("head_only", [False, True])
def test_it_descends_along_a_cosine_and_may_leave_the_base(head_only):
  algorithm = fedavg_ft(linear.task(), head_only=head_only)
  server = algorithm.init(jax.random.key(0))
  model = algorithm.personalize(algorithm.download(server), (), linear.data(2), linear.visit(2), jax.random.key(1))
  x, y = linear.oracle(2)
  params = linear.start()
  for rate in linear.LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(3) / 3)):
    features = x @ params.base
    chance = np.exp(features @ params.head)
    error = (chance / chance.sum(1, keepdims=True) - y) / len(y)
    base = params.base if head_only else params.base - rate * x.T @ error @ params.head.T
    params = Params(base, params.head - rate * features.T @ error)
  linear.close(model, params)
  if head_only:
    np.testing.assert_array_equal(model.base, server.base)
