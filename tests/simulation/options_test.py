"""What the engine makes of softmax mask and read-out: offsets of clients, classes of those present, scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import data, simulation
from apfl_jax.errors import InputError
from apfl_jax.types import Algorithm, Download, Prediction, PyTree, Span, Upload
from tests import tasks

N, COHORT, CHUNK, CLASSES = 6, 2, 3, tasks.NUM_CLASSES


def _recorder(settings: PyTree) -> Any:
  """A client keeps the offset of its last visit; its model says the last class whose offset is above -inf."""

  def predict(model, images):
    return Prediction(jnp.broadcast_to(model, (len(images), CLASSES)), jnp.zeros((len(images), 1)))

  offset = lambda data: jnp.zeros(CLASSES) if data.logit_offset is None else data.logit_offset
  algorithm = Algorithm(
    init=lambda key: jnp.float32(0),
    download=lambda server: Download(shared=server),
    local_update=lambda download, client, data, visit, key: (offset(data), Upload(0.0 * visit.work, visit.work)),
    aggregate=lambda server, received, key: server + received.total,
    predict=predict,
    global_model=lambda server: jnp.zeros(CLASSES) + server,
    init_client=lambda download, key: jnp.zeros(CLASSES),
    personalize=lambda download, client, data, visit, key: (offset(data) > -jnp.inf) * 100.0 * jnp.arange(CLASSES),
  )
  return algorithm, tasks.build("fedavg", N, settings)[1]


@functools.cache
def _inputs() -> simulation.Inputs:
  """Client i has training examples of class i % 3 alone, and only client 5 one of class 3; half never come."""
  inputs = jax.tree.map(np.asarray, tasks.with_settings(tasks.inputs("fedavg", N), drop_rates=[0.5, 0.0]))
  store = inputs.federation.store
  labels, train = store.labels.copy(), inputs.federation.train
  for client in range(N):
    mine = store.index[train.start[client] : train.start[client] + train.size[client]]
    labels[mine] = client % 3
  labels[store.index[train.start[5]]] = 3
  return inputs._replace(federation=inputs.federation._replace(store=store._replace(labels=labels)))


@functools.cache
def _simulator(mask: str, readout: str, cohort: int = COHORT) -> simulation.Simulator:
  options: dict[str, Any] = {"softmax_mask": mask, "readout": readout, "how": "sequential", "chunk": CHUNK}
  return simulation.simulator(_recorder, _inputs(), CLASSES, population_size=N, cohort_size=cohort, **options)


def _counts() -> np.ndarray:
  return data.histogram(_inputs().federation, CLASSES)


def _prior(counts: np.ndarray) -> np.ndarray:
  return np.log(np.maximum(counts / counts.sum(-1, keepdims=True), 1e-12))


@pytest.mark.parametrize(("mask", "readout"), [("own", "plain"), ("present", "plain"), ("present", "prior")])
def test_a_visit_has_the_offset_of_its_client_and_cohort(mask, readout):
  simulator, inputs = _simulator(mask, readout), jax.tree.map(jnp.asarray, _inputs())
  counts, seen = _counts(), set()
  for state, metrics in tasks.each_round(simulator, inputs, 8):
    ids = metrics.ids[metrics.status > 0]
    assert len(ids) == COHORT
    seen.add(tuple(sorted(ids)))
    for id in ids:
      kept = counts[id] > 0 if mask == "own" else (counts[ids] > 0).any(axis=0)
      offset = _prior(counts[id]) if readout == "prior" else np.zeros(CLASSES)
      np.testing.assert_allclose(state.clients[id], np.where(kept, offset, -np.inf), rtol=1e-6)
  assert len(seen) > 1


@pytest.mark.parametrize("place", simulation.PLACES)
def test_personal_models_get_the_classes_of_all_who_are_there(tmp_path, place):
  simulator, inputs = _simulator("present", "plain"), _inputs()
  places = {"data_on": place, "client_state": place, "directory": tmp_path}
  result = simulation.run(simulator, inputs, rounds=7, gone=np.zeros(N, bool), eval_every=0, progress=False, **places)
  there = np.asarray(result.state.times) > 0
  assert there.sum() == 3
  kept = (_counts() > 0) | (_counts()[there] > 0).any(axis=0)
  assert 0 < kept.sum() < kept.size
  last = np.array([np.flatnonzero(row)[-1] for row in kept])
  answers = result.personal_scores.pooled.sum(axis=1)  # [N, C]
  np.testing.assert_array_equal(answers.argmax(axis=1), last)
  np.testing.assert_array_equal((answers > 0).sum(axis=1), 1)


def test_the_prior_is_added_on_own_test_examples_alone():
  inputs = jax.tree.map(jnp.asarray, _inputs())
  everything, rows = np.ones(CLASSES, bool), (jnp.arange(N), jnp.ones(N, bool))
  answers = {}
  for readout in ("plain", "prior"):
    simulator = _simulator("none", readout)
    state = simulator.init(inputs)
    pooled = np.asarray(simulator.score_pooled(state, inputs, everything))
    own = np.asarray(simulator.score_global(state, inputs, *rows).own)
    answers[readout] = own.sum(axis=1).argmax(axis=1)
    np.testing.assert_array_equal(pooled.sum(axis=0).argmax(), 0)  # all logits are alike: the first class
  np.testing.assert_array_equal(answers["plain"], 0)
  np.testing.assert_array_equal(answers["prior"], np.arange(N) % 3)


def test_a_personal_model_is_read_out_with_the_prior_on_its_own():
  simulator, inputs = _simulator("none", "prior"), jax.tree.map(jnp.asarray, _inputs())
  scores = simulator.score_personal(simulator.init(inputs), inputs, jnp.arange(N), jnp.ones(N, bool))
  # 300 for class 3 and 0 for class 0 against a prior of -27.6 at the least: no prior is that strong.
  np.testing.assert_array_equal(np.asarray(scores.own).sum(axis=1).argmax(axis=1), 3)
  np.testing.assert_array_equal(np.asarray(scores.pooled).sum(axis=1).argmax(axis=1), 3)


@pytest.mark.parametrize("readout", ["plain", "prior"])
def test_pooled_examples_are_also_read_out_as_own_ones(readout):
  """A model without an opinion answers with the first class, and with its client's where the prior is added."""

  def undecided(settings):
    algorithm, process = _recorder(settings)
    return algorithm._replace(personalize=lambda download, client, data, visit, key: jnp.zeros(CLASSES)), process

  inputs = jax.tree.map(jnp.asarray, _inputs())
  options: dict[str, Any] = {"readout": readout, "how": "sequential", "chunk": CHUNK}
  simulator = simulation.simulator(undecided, inputs, CLASSES, population_size=N, cohort_size=COHORT, **options)
  scores = simulator.score_personal(simulator.init(inputs), inputs, jnp.arange(N), jnp.ones(N, bool))
  answers = lambda counts: np.asarray(counts).sum(axis=1).argmax(axis=1)
  np.testing.assert_array_equal(answers(scores.pooled), 0)
  if readout == "plain":
    assert scores.as_own == ()
  else:
    np.testing.assert_array_equal(answers(scores.as_own), np.arange(N) % 3)
    np.testing.assert_array_equal(np.asarray(scores.as_own).sum((1, 2)), inputs.pooled.size)


def test_a_client_without_examples_is_left_alone():
  train = _inputs().federation.train
  empty: Any = Span(train.start, np.zeros_like(train.size))
  inputs = jax.tree.map(jnp.asarray, _inputs())
  inputs = inputs._replace(federation=inputs.federation._replace(train=jax.tree.map(jnp.asarray, empty)))
  for mask in ("own", "present"):
    for state, metrics in tasks.each_round(_simulator(mask, "plain"), inputs, 1):
      np.testing.assert_array_equal(state.clients[metrics.ids], 0)


def test_other_options_are_refused():
  with pytest.raises(InputError, match="softmax_mask: got 'all', accepted are none, present, own"):
    _simulator("all", "plain")
  with pytest.raises(InputError, match="readout: got 'bayes', accepted are plain, prior"):
    _simulator("none", "bayes")
