"""What a method calls personal, rounds do not depend on: runs that differ in nothing else share them."""

import functools
import re

import jax
import numpy as np
import pytest

from apfl_jax import algorithms, population, simulation
from apfl_jax.algorithms import METHODS
from tests import tasks

# Few enough personal steps for the task; and a kind of interpolation that may be coupled.
_SMALL, _TOGETHER = {"ap_fl": {"friend_steps": 5}}, {"ap_fl": {"friend_steps": 6, "interpolation": "size"}}


def personal(name):
  return {key: setting for key, setting in algorithms.settings(name).items() if setting.personal}


def another(setting):
  if setting.limits.choices:
    return next(choice for choice in setting.limits.choices if choice != setting.default)
  if isinstance(setting.default, bool):
    return not setting.default
  return setting.default + 1 if isinstance(setting.default, int) else setting.default / 2


@functools.cache
def program(name, **settings):
  """The rounds as text, without what differs from one trace to the next."""
  inputs, settings = tasks.inputs("fedavg"), _SMALL.get(name, {}) | settings

  def build(traced):
    made_for = tasks.task(tasks.NUM_CLIENTS, traced)
    return METHODS[name].make(made_for, **settings), population.make(("cold",), tasks.NUM_CLIENTS, (0.5,))

  made = simulation.simulator(
    build, inputs, tasks.NUM_CLASSES, population_size=tasks.NUM_CLIENTS, cohort_size=3, chunk=2, how="sequential"
  )
  state = jax.eval_shape(made.init, inputs)
  return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(made.advance)(state, inputs, np.int32(1))))


@pytest.mark.parametrize("name", [name for name in METHODS if personal(name) or METHODS[name].rounds_of])
def test_rounds_are_the_same_with_other_personal_settings(name):
  whose = METHODS[name].rounds_of
  if whose:
    assert personal(name) == algorithms.settings(name)
  others = {key: another(setting) for key, setting in personal(name).items()} | _TOGETHER.get(name, {})
  assert program(name, **others) == program(whose or name)


def test_a_setting_that_rounds_read_makes_them_others():
  usual = algorithms.settings("ap_fl")["generator_steps"].default
  assert program("ap_fl", generator_steps=usual + 1) != program("ap_fl")
