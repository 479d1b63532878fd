"""What every method must do; one that is listed in the registry is under these tests, a wrapper around FedAvg."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from apfl_jax import metrics, simulation
from apfl_jax.algorithms import METHODS, WRAPPERS
from apfl_jax.types import Received
from tests import tasks

pytestmark = pytest.mark.parametrize("name", [*METHODS, *(f"fedavg|{wrapper}" for wrapper in WRAPPERS)])


def _without_class(inputs, label):
  """All examples of a class, also test examples, become examples of class 0."""
  store = inputs.federation.store
  store = store._replace(labels=jnp.where(store.labels == label, 0, store.labels))
  return inputs._replace(federation=inputs.federation._replace(store=store))


HARD = {
  "uploads are lost": lambda inputs: tasks.with_settings(inputs, drop_rates=[0.0, 0.7]),
  "no upload arrives": lambda inputs: tasks.with_settings(inputs, drop_rates=[0.0, 1.0]),
  "one client is there": lambda inputs: tasks.with_settings(inputs, drop_rates=[5 / 6, 0.0]),
  "one example or none": lambda inputs: tasks.with_sizes(inputs, train=[1, 0], validation=[0, 0]),
  "nobody has examples": lambda inputs: tasks.with_sizes(inputs, train=[0] * 6, validation=[0] * 6),
  "no validation": lambda inputs: tasks.with_sizes(inputs, validation=[0] * 6),
  "no test": lambda inputs: tasks.with_sizes(inputs, test=[0] * 6),
  "a class is nowhere": lambda inputs: _without_class(inputs, 3),
}


def test_the_same_bits_twice_and_in_any_chunks(name):
  simulator, inputs = tasks.simulator(name), tasks.inputs(name)
  state, again = tasks.run(simulator, inputs, 4), tasks.run(simulator, inputs, 4)
  tasks.assert_same(again, state)
  tasks.assert_same(tasks.run(simulator, inputs, 4, chunk=1), state)
  tasks.assert_same(tasks.personal(simulator, again, inputs), tasks.personal(simulator, state, inputs))


def test_compiles_once(name):
  with simulation.Stopwatch() as watch:
    jax.jit(lambda x: x + len(name))(np.float32(0.0))
  assert watch.read()["compilations"] == 1  # or the counter would be blind

  simulator, inputs = tasks.simulator(name), tasks.inputs(name)
  others = [
    inputs._replace(seed=jnp.uint32(7)),
    tasks.with_settings(inputs, learning_rate=0.03),
    tasks.with_settings(inputs, drop_rates=[0.5, 0.5]),
    _without_class(tasks.with_sizes(inputs, train=[3, 0]), 1),
    inputs._replace(settings=inputs.settings | {"method": {k: v * 0.5 for k, v in inputs.settings["method"].items()}}),
  ]
  tasks.personal(simulator, tasks.run(simulator, inputs, 1), inputs)
  with simulation.Stopwatch() as watch:
    for other in others:
      tasks.personal(simulator, tasks.run(simulator, other, 3, chunk=2), other)
  assert watch.read()["compilations"] == 0


class _Traced(NamedTuple):
  """What was seen of a method's functions."""

  program: ClosedJaxpr  # of all of them; its first arguments are the key of the visit, and its share of work
  visit: list  # whether each of the results is one of the visit
  server: tuple  # its shapes before and after a round
  wrote: list  # the functions that wrote into their arguments
  splits: int  # how often keys were split
  clashes: list  # (into how many parts a key was split, what was folded into it)


@functools.cache
def _traced(name):
  """Every function of a method, traced in the order of a round."""
  wrote = []
  splits, folds = [], []  # (key, how many parts), (key, number); keys are told apart by their identity
  split, fold_in = jax.random.split, jax.random.fold_in

  def call(function, *arguments):
    seen = lambda: [(path, id(leaf)) for path, leaf in jax.tree.leaves_with_path(arguments)]
    before = seen()
    result = function(*arguments)
    if seen() != before:
      wrote.append(function)
    return result

  def recorded_split(key, num=2):
    splits.append((key, num))
    return split(key, num)

  def recorded_fold_in(key, data):
    folds.append((key, data))
    return fold_in(key, data)

  inputs = tasks.inputs(name)
  algorithm, _ = tasks.build(name, tasks.NUM_CLIENTS, inputs.settings)

  def everything(key, work, federation, init, init_client, *keys):
    keys_of_visit = init, init_client, key
    server, arguments, (client, upload) = tasks.first_visit(algorithm, federation, keys_of_visit, work, call)
    download, _, data, visit, _ = arguments
    kept = jax.tree.map(lambda x: x[None], upload.kept)
    one = jnp.zeros(1, jnp.int32)
    received = Received(upload.update, upload.weight, kept, one, one == 0, one)
    after = call(algorithm.aggregate, server, received, keys[0])
    model = call(algorithm.personalize, download, client, data, visit, keys[1])
    answer = call(algorithm.predict, model, jnp.zeros((2, *tasks.IMAGE_SHAPE)))
    shared = call(algorithm.global_model, server)
    return {"server": (server, after), "visit": (client, upload), "others": (model, answer, shared)}

  key, *keys = jax.random.split(jax.random.key(0), 5)
  with pytest.MonkeyPatch.context() as recorded:
    recorded.setattr(jax.random, "split", recorded_split)
    recorded.setattr(jax.random, "fold_in", recorded_fold_in)
    program, results = jax.make_jaxpr(everything, return_shape=True)(key, jnp.float32(1.0), inputs.federation, *keys)
  clashes = [
    (parts, number)
    for split_key, parts in splits
    for folded_key, number in folds
    if split_key is folded_key and not (isinstance(number, int) and number >= parts)
  ]
  visit = [path[0].key == "visit" for path, _ in jax.tree.leaves_with_path(results)]
  return _Traced(program, visit, results["server"], wrote, len(splits), clashes)


def test_functions_leave_their_arguments_alone(name):
  """By the identity of tracers: a dict that is written into would show."""
  traced = _traced(name)
  assert not traced.wrote
  before, after = traced.server
  assert after == before


def test_a_visit_hangs_on_its_key_and_its_share_of_work(name):
  traced = _traced(name)
  assert any(traced.visit)
  assert not tasks.ignored(traced.program, ["key", "work"], traced.visit)


def test_keys_from_folding_are_not_keys_from_splitting(name):
  """`split(key, n)[i]` is `fold_in(key, i)` for i < n, which JAX's own check does not know."""
  key = jax.random.key(1)
  np.testing.assert_array_equal(
    jax.random.key_data(jax.random.split(key)[1]), jax.random.key_data(jax.random.fold_in(key, 1))
  )
  traced = _traced(name)
  assert traced.splits and not traced.clashes


def test_keys_are_not_used_twice(name):
  def reusing(key):
    return jax.random.normal(key) + jax.random.uniform(key)

  def check(program):
    # Anew, since what was traced before is not looked at again; from the program, which takes less than the functions.
    with jax.debug_key_reuse(True):
      jax.jit(jaxpr_as_fun(program)).trace(*program.in_avals)

  with pytest.raises(jax.errors.KeyReuseError):
    check(jax.make_jaxpr(reusing)(jax.random.key(0)))
  check(_traced(name).program)


def test_learns(name):
  simulator, inputs = tasks.simulator(name), tasks.inputs(name)
  state = tasks.run(simulator, inputs, 10)
  accuracy = metrics.accuracy(tasks.personal(simulator, state, inputs).own)
  assert accuracy.shape == (tasks.NUM_CLIENTS,)
  assert accuracy.min() > 0.9
  if simulator.has_global_model:
    pooled = simulator.score_pooled(state, inputs, jnp.ones(tasks.NUM_CLASSES, bool))
    assert metrics.accuracy(pooled) > 0.9
  if name in METHODS and METHODS[name].group == "global":  # its clients have no other
    rows = jnp.arange(tasks.NUM_CLIENTS)
    shared = simulator.score_global(state, inputs, rows, rows >= 0).own
    np.testing.assert_array_equal(tasks.personal(simulator, state, inputs).own, shared)


@pytest.mark.parametrize("case", HARD)
def test_stays_finite(name, case):
  simulator, inputs = tasks.simulator(name), HARD[case](tasks.inputs(name))
  state = tasks.run(simulator, inputs, 5)
  scores = tasks.personal(simulator, state, inputs)
  tasks.assert_finite((state, scores))
  np.testing.assert_array_equal(scores.own.sum((1, 2)), inputs.federation.test.size)


def test_without_anybody_the_server_stays(name):
  simulator, inputs = tasks.simulator(name), tasks.with_settings(tasks.inputs(name), drop_rates=[1.0, 0.0])
  before = simulator.init(inputs)
  after, happened = simulator.advance(simulator.init(inputs), inputs, jnp.int32(3))
  tasks.assert_same(after.server, before.server)
  tasks.assert_same((after.clients, after.times), (before.clients, before.times))
  assert int(after.round) == 3
  assert not np.any(happened.present) and not np.any(happened.arrived) and not np.any(happened.status)
  tasks.assert_finite(tasks.personal(simulator, after, inputs))


def test_a_client_that_never_took_part_is_personalised(name):
  simulator, inputs = tasks.simulator(name), tasks.with_settings(tasks.inputs(name), drop_rates=[0.5, 0.0])
  state = tasks.run(simulator, inputs, 10)  # methods of one's own run here too, and some start slowly, as q-FedAvg
  scores = tasks.personal(simulator, state, inputs)
  never = np.asarray(state.times) == 0
  assert never.sum() == 3
  tasks.assert_finite(scores)
  assert metrics.accuracy(scores.own)[never].min() > 0.5


@pytest.mark.slow  # to compile; one client among absent ones is among the hard cases
def test_a_population_of_one(name):
  simulator, inputs = tasks.simulator(name, num_clients=1), tasks.inputs(name, num_clients=1)
  state = tasks.run(simulator, inputs, 5)
  scores = tasks.personal(simulator, state, inputs)
  tasks.assert_finite((state, scores))
  assert metrics.accuracy(scores.own)[0] > 0.9


def test_its_work_can_be_priced(name):
  inputs = tasks.inputs(name)
  server = jax.eval_shape(tasks.simulator(name).init, inputs).server
  build = lambda settings: tasks.build(name, tasks.NUM_CLIENTS, settings)
  prices = simulation.prices(build, inputs, server)
  assert prices.local_update.shape == (tasks.NUM_CLIENTS,) and (prices.local_update > 0).all()
  assert prices.personalize.shape == (tasks.NUM_CLIENTS,) and prices.aggregate >= 0
  assert 0 <= prices.server([1] * 3) <= 3 * prices.aggregate and prices.score_personal > 0
