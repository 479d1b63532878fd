"""Clients at once are clients one after another, for every method; those slow to compile by `pytest -m slow`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.algorithms import METHODS
from tests import tasks

_ALWAYS = ("fedavg", "local", "scaffold")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in _ALWAYS)) for n in METHODS])
def test_vmap_is_sequential_to_rounding(name):
  inputs = tasks.with_settings(tasks.inputs(name), drop_rates=[0.5, 0.0])  # with rows to mask
  start = tasks.simulator(name).init
  one, _ = tasks.simulator(name).advance(start(inputs), inputs, jnp.int32(1))
  other, _ = tasks.simulator(name, how="vmap").advance(start(inputs), inputs, jnp.int32(1))
  assert int(one.times.sum()) == 3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), other, one)
