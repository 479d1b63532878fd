"""FedAvg against FedAvg: one hidden layer, forward and backward by hand, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import random, training
from tests import tasks


@jax.jit
def _draw(federation, seed, round, id, row):
  """int32 [S, B] example numbers of a client's round, and mask [S, B]: labels that number examples tell which."""
  many = len(federation.store.labels)
  store = federation.store._replace(labels=jnp.arange(many))
  span = jax.tree.map(lambda x: x[row], federation.train)
  # The first half is for the order, the second for augmentation: see `training.sgd.batches`.
  key, _ = jax.random.split(random.key(seed, random.Purpose.LOCAL_UPDATE, round, id))
  one = lambda step: training.draw(store, span, step, tasks.BATCH_SIZE, many, key)
  batches = jax.lax.map(one, jnp.arange(tasks.STEPS))
  return batches.targets.argmax(-1), batches.mask


def _sgd(weights, federation, seed, round, id, row):
  """The client's weights after its steps."""
  hidden, bias, head, head_bias = weights
  store = federation.store
  for numbers, mask in zip(*map(np.asarray, _draw(federation, seed, round, id, row)), strict=True):
    x = store.images[numbers].reshape(len(numbers), -1) / 255 * 2 - 1
    before = x @ hidden + bias
    features = np.maximum(before, 0)
    logits = features @ head + head_bias
    chance = np.exp(logits - logits.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    d_logits = (chance - np.eye(tasks.NUM_CLASSES)[store.labels[numbers]]) * mask[:, None] / mask.sum()
    d_before = d_logits @ head.T * (before > 0)
    gradients = x.T @ d_before, d_before.sum(0), features.T @ d_logits, d_logits.sum(0)
    hidden, bias, head, head_bias = (
      w - tasks.LEARNING_RATE * g for w, g in zip((hidden, bias, head, head_bias), gradients, strict=True)
    )
  return hidden, bias, head, head_bias


def _weights(params):
  layers = params.base["dense"], params.head
  return tuple(np.float64(layer[name]) for layer in layers for name in ("kernel", "bias"))


def _distance(weights, state):
  return max(np.abs(a - b).max() for a, b in zip(weights, _weights(state.server), strict=True))


@pytest.mark.parametrize("how", ["sequential", pytest.param("vmap", marks=pytest.mark.slow)])  # vmap_test.py has it
def test_fedavg_is_fedavg(how):
  # One client is done with an epoch after four steps, the last of two examples; one has less than a batch.
  inputs, simulator = tasks.with_sizes(tasks.inputs("fedavg"), train=[50, 7]), tasks.simulator("fedavg", how=how)
  federation, sizes = tasks.on_host(inputs.federation), np.asarray(inputs.federation.train.size)
  weights = _weights(simulator.init(inputs).server)
  start = weights
  for round, (state, metrics) in enumerate(tasks.each_round(simulator, inputs, 20)):
    assert (metrics.status == 2).all()
    trained = [_sgd(weights, federation, 0, round, id, id) for id in metrics.ids]
    share = sizes[metrics.ids] / sizes[metrics.ids].sum()
    weights = tuple(sum(s * w for s, w in zip(share, layer, strict=True)) for layer in zip(*trained, strict=True))
    assert _distance(weights, state) < (1e-5 if round == 0 else 1e-4)
  assert _distance(start, state) > 0.05  # it did move


def test_a_population_of_one_is_plain_sgd():
  inputs, simulator = tasks.inputs("fedavg", num_clients=1), tasks.simulator("fedavg", num_clients=1)
  federation = tasks.on_host(inputs.federation)
  weights = _weights(simulator.init(inputs).server)
  for round, (state, _) in enumerate(tasks.each_round(simulator, inputs, 20)):
    weights = _sgd(weights, federation, 0, round, 0, 0)
    assert _distance(weights, state) < (1e-5 if round == 0 else 1e-4)
