"""A run's ledger: rounds in which the generator rests, the parts against XLA's own count, totals done by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import nn, simulation
from apfl_jax.algorithms import ap_fl, fedavg
from apfl_jax.metrics import ledger
from apfl_jax.simulation import memory
from apfl_jax.simulation.cost import _alike
from apfl_jax.simulation.run import Record, Result
from apfl_jax.types import Data, LocalSGD, Received, Span, State, Store, Task, Visit
from tests import tasks

CLASSES, SHAPE, BATCH = 10, (28, 28, 1), 32


@functools.cache
def priced(name):
  build, inputs = functools.partial(tasks.build, name, tasks.NUM_CLIENTS), tasks.inputs(name)
  server = jax.eval_shape(tasks.simulator(name).init, inputs).server
  return simulation.prices(build, inputs, server, cohort_size=tasks.COHORT_SIZE)


def test_rounds_of_the_warm_up_cost_the_server_nothing():
  prices = priced("ap_fl")
  total = [prices.server([1] * n) for n in (0, 1, 2, 7)]  # a tenth of 10 rounds is the warm-up
  assert total == [0, 0, prices.aggregate, 6 * prices.aggregate] and total[2] > 0


def test_a_server_that_does_the_same_in_every_round():
  prices = priced("fl_fdms")  # K x K cosines
  assert prices.server([1] * 9) == 9 * prices.aggregate > 0
  assert priced("fedavg").server([1] * 9) == 0


def on_the_clock(cohort, **settings):
  """A server of a run of ten rounds whose uploads it aggregates one by one, `cohort` of them a round."""
  inputs = tasks.inputs("ap_fl")

  def build(given):
    embeddings = given["embeddings"]
    model = nn.classifier("mlp", tasks.IMAGE_SHAPE, tasks.NUM_CLASSES, head="free", embeddings=embeddings)
    sgd = LocalSGD(given["learning_rate"], BATCH, 1, 1, 200, "examples", "none")
    facts = tasks.NUM_CLIENTS, tasks.NUM_CLASSES, tasks.IMAGE_SHAPE
    task = Task(*facts, embeddings, model, sgd, given["rounds"], aggregations=cohort)
    _, process = tasks.build("ap_fl", tasks.NUM_CLIENTS, given)
    few = {"generator_steps": 2, "generator_final_steps": 2, "generator_batch": BATCH}
    client = {"friend": "global", "friend_steps": 0, "interpolation": "fixed"}  # what is the quickest to trace
    return ap_fl(task, **few, **client, **settings), process

  server = jax.eval_shape(lambda i: build(i.settings)[0].init(jax.random.key(0)), inputs)
  return simulation.prices(build, inputs, server, aggregations=cohort)


def test_uploads_one_by_one_cost_a_training_in_a_round_of_them():
  prices = on_the_clock(300)
  trained = [prices.server([300] * rounds) / prices.aggregate for rounds in (1, 2, 10)]
  assert trained == [0, 1, 9]
  assert prices.server([300, 150, 150]) == prices.aggregate  # where uploads get lost rounds are over later


MATCHED = {"source": "matched", "tier": "s2", "matching_steps": 2}


@pytest.mark.parametrize("settings", [{"generator_schedule": "final"}, pytest.param(MATCHED, marks=pytest.mark.slow)])
def test_a_server_that_trains_in_the_last_round_pays_once(settings):
  prices = on_the_clock(5, **settings)
  before = prices.server([5] * 9)  # a look at samples in each round, where nothing is trained
  assert prices.server([5] * 9 + [3]) - before == pytest.approx(prices.aggregate - before / 9)
  assert prices.aggregate > before / 3 and (before > 0) == ("source" in settings)


@pytest.mark.parametrize("calls", [[7], [3, 5, 0, 9, 4], [6] * 3, [1, 2]])
def test_calls_that_are_alike_begin_and_end_no_round(calls):
  runs = _alike(calls, 4)
  assert [sum(n for r, n in runs if r == round) for round in range(len(calls))] == calls
  numbers = np.cumsum([0, *(n for _, n in runs)])
  assert {*np.cumsum([0, *calls[:-1]])[np.array(calls) > 0], *range(3, sum(calls), 4)} <= set(numbers[:-1])
  assert all(n == 1 for (_, n), at in zip(runs, numbers, strict=False) if at % 4 == 3)


def _result(rows, scored, name):
  """A run in which clients took part 3, 0, 1, ... times and began once more.

  Of its `scored` lines the last two made personal models.
  """
  line = lambda i: {"personal_pooled_accuracy": 0.5 if i >= scored - 2 else None}
  record = Record([line(i) for i in range(scored)], [], [], [3, 0, 2], [], [])
  blank = np.zeros((len(rows), tasks.NUM_CLASSES, tasks.NUM_CLASSES), int)
  times = np.array([3, 0, 1, 0, 0, 1])
  state = State(jnp.int32(3), (), (), jnp.asarray(times), (), ())
  scores = simulation.Scores(blank, blank)
  plan = memory.MemoryPlan(*[0] * len(memory.MemoryPlan._fields))
  return Result(
    state, record, np.array(rows), np.zeros(0), 0, times + 1, np.zeros(6, bool), None, scores, plan, None
  ), times


@pytest.mark.parametrize(("name", "generates"), [("ap_fl", True), ("fl_fdms", False), ("fedavg", False)])
def test_totals_by_hand(name, generates):
  rows, scored = [1, 2, 5], 4
  result, times = _result(rows, scored, name)
  inputs, prices = tasks.inputs(name), priced(name)
  server = prices.server([1, 1])  # in the second of three rounds nothing arrived
  got = simulation.cost(prices, result, inputs, generates=generates)
  local, personal = (prices.local_update * (times + 1)).sum(), prices.personalize[rows].sum()
  assert got.local_flops == pytest.approx(local) and got.personalize_flops == pytest.approx(personal)
  assert (got.generator_flops, got.server_flops) == ((server, None) if generates else (None, server or None))
  assert got.generator_share == (pytest.approx(server / (server + local + personal)) if generates else None)
  batches = [-(-int(inputs.federation.test.size[row]) // 64) for row in rows]
  pooled = -(-int(inputs.pooled.size) // 64)
  evaluation = scored * prices.score_global * (sum(batches) + pooled)
  evaluation += 2 * prices.score_personal * (sum(batches) + 3 * pooled) + personal
  assert got.evaluation_flops == pytest.approx(evaluation)
  assert got.bytes_up == prices.upload * 5
  assert got.bytes_down == prices.read_locally * 11 + prices.read_personally * 3
  assert got.break_even_rounds == pytest.approx(prices.read_personally / (prices.upload + prices.read_locally))
  each = simulation.cost_per_client(prices, result)
  np.testing.assert_allclose(each.local_flops, prices.local_update * (times + 1))
  assert sum(x.sum() for x in each) == pytest.approx(local + personal + got.bytes_up + got.bytes_down)


def test_scoring_a_batch_is_one_pass_through_the_model():
  height, width, depth = tasks.IMAGE_SHAPE
  hidden = 200  # of the mlp
  one_pass = 2 * 64 * (height * width * depth * hidden + hidden * tasks.NUM_CLASSES)
  assert priced("fedavg").score_global == priced("fedavg").score_personal == one_pass
  assert priced("local").score_global == 0


@functools.cache
def _task():
  """Images of 28 x 28 and the small convolutional network: matrix products are nearly all the work there is."""
  embeddings = jnp.eye(CLASSES)
  model = nn.classifier("cnn_small", SHAPE, CLASSES, head="anchored", embeddings=embeddings)
  sgd = LocalSGD(jnp.float32(0.1), BATCH, 1, 1, 200, "examples", "none")
  return Task(2, CLASSES, SHAPE, embeddings, model, sgd, jnp.int32(10))


def _xla(function, *args):
  """What XLA counts, elementwise operations too, before it optimises; a loop's body once."""
  return jax.jit(function).lower(*args).cost_analysis()["flops"]


def test_one_step_of_the_generator_is_what_xla_counts():
  algorithm = ap_fl(_task(), generator_steps=1, generator_warmup=0.0, generator_batch=BATCH)
  shapes = jax.eval_shape(algorithm.init, jax.random.key(0)), _received(algorithm), jax.eval_shape(jax.random.key, 0)
  assert ledger.flops(algorithm.aggregate, *shapes) == pytest.approx(_xla(algorithm.aggregate, *shapes), rel=0.1)


def test_one_local_step_is_what_xla_counts():
  algorithm = fedavg(_task())
  known, unknown = _client(algorithm, np.int32(BATCH)), _client(algorithm, jax.ShapeDtypeStruct((), jnp.int32))
  assert ledger.flops(algorithm.local_update, *known) == pytest.approx(_xla(algorithm.local_update, *unknown), rel=0.1)


def _client(algorithm, size):
  """What a client's functions are given; it has `size` training examples."""
  shape = lambda *sizes, dtype=jnp.int32: jax.ShapeDtypeStruct(sizes, dtype)
  download = jax.eval_shape(lambda key: algorithm.download(algorithm.init(key)), jax.random.key(0))
  span = Span(np.int32(0), size)
  store = Store(shape(100, *SHAPE, dtype=jnp.uint8), shape(100), shape(100))
  zero = np.int32(0)
  visit = Visit(zero, zero, zero, zero, np.float32(1), zero)
  return download, (), Data(store, span, span), visit, jax.eval_shape(jax.random.key, 0)


def _received(algorithm):
  """What the server gets from one client."""
  _, upload = jax.eval_shape(algorithm.local_update, *_client(algorithm, np.int32(BATCH)))
  row = lambda dtype: jax.ShapeDtypeStruct((1,), dtype)
  kept = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), upload.kept)
  return Received(upload.update, upload.weight, kept, row(jnp.int32), row(bool), row(jnp.int32))
