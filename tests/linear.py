"""Rounds called by hand on a model that NumPy can follow: two linear layers, softmax, batches of all examples.

The simulation is not involved: what a method's functions return is put together here, client after client.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax import algorithms
from apfl_jax.types import (
  Algorithm,
  Data,
  Download,
  LocalSGD,
  Model,
  Params,
  PyTree,
  Received,
  Span,
  Store,
  Task,
  Visit,
)

NUM_CLASSES, IMAGE_SHAPE, FEATURES = 3, (2, 2, 1), 5
SIZES = (5, 3, 8, 6)  # training examples of each client
LEARNING_RATE, STEPS = 0.5, 4

_rng = np.random.default_rng(0)
IMAGES = _rng.integers(0, 256, (sum(SIZES), *IMAGE_SHAPE), np.uint8)
LABELS = _rng.integers(0, NUM_CLASSES, sum(SIZES))
STARTS = np.cumsum((0, *SIZES[:-1]))
START = Params(  # where every method starts
  np.float32(_rng.normal(size=(4, FEATURES)) / 2), np.float32(_rng.normal(size=(FEATURES, NUM_CLASSES)) / 2)
)

MODEL = Model(
  init=lambda key: jax.tree.map(jnp.asarray, START),
  base=lambda base, images: ((hidden := images.reshape(len(images), -1) @ base), (hidden,)),
  head=lambda head, features: features @ head,
)


def task(num_clients: int = len(SIZES), **sgd: Any) -> Task:
  """The task, with other settings of local training."""
  values = {
    "learning_rate": jnp.float32(LEARNING_RATE),
    "batch_size": max(SIZES),
    "epochs": 1,
    "steps": STEPS,
    "personal_steps": 3,
    "weighting": "examples",
    "augment": "none",
  }
  return Task(
    num_clients, NUM_CLASSES, IMAGE_SHAPE, jnp.eye(NUM_CLASSES), MODEL, LocalSGD(**(values | sgd)), jnp.int32(10)
  )


@functools.cache
def fedavg(**sgd: Any) -> Algorithm:
  """FedAvg on the `task`, the same one for all tests that ask for the same, so that it is compiled once."""
  return algorithms.fedavg(task(**sgd))


def data(client: int, size: int | None = None) -> Data:
  """What a method sees of a client; its validation examples are its training examples."""
  store = Store(jnp.asarray(IMAGES), jnp.asarray(LABELS, jnp.int32), jnp.arange(len(LABELS), dtype=jnp.int32))
  span = Span(jnp.int32(STARTS[client]), jnp.int32(SIZES[client] if size is None else size))
  return Data(store, span, span)


def visit(client: int, *, round: int = 0, times: int = 0, work: float = 1.0, wait: int = 0) -> Visit:
  """A client's circumstances."""
  zero = jnp.int32(0)
  return Visit(jnp.int32(client), jnp.int32(round), jnp.int32(times), zero, jnp.float32(work), jnp.int32(wait))


class Rounds:
  """A method between two rounds."""

  def __init__(self, algorithm: Algorithm):
    self.algorithm = algorithm
    self.server = jax.jit(algorithm.init)(jax.random.key(0))
    self.clients: dict[int, PyTree] = {}
    self._round = 0
    self._times = Counter[int]()
    self._update = jax.jit(algorithm.local_update)
    self._aggregate = jax.jit(algorithm.aggregate)

  def advance(
    self,
    ids: Sequence[int],
    *,
    lost: Sequence[int] = (),
    sizes: dict[int, int] | None = None,
    work: dict[int, float] | None = None,
    staleness: Sequence[int] | None = None,
    wait: int = 0,
  ) -> Received:
    """A round of these clients, some with other sizes or less work, some uploads lost; returns what the server got."""
    download = self.algorithm.download(self.server)
    uploads = []
    for id in ids:
      mine = Download(download.shared, jax.tree.map(lambda x, id=id: np.asarray(x)[id], download.own))
      client = self.algorithm.init_client(mine, jax.random.key(id)) if id not in self.clients else self.clients[id]
      key = jax.random.fold_in(jax.random.key(self._round), id)
      circumstances = visit(id, round=self._round, times=self._times[id], work=(work or {}).get(id, 1.0), wait=wait)
      size = (sizes or {}).get(id)
      self.clients[id], upload = self._update(mine, client, data(id, size), circumstances, key)
      uploads.append(jax.tree.map(np.asarray, upload))  # NumPy has nothing to compile
      self._times[id] += 1
    arrived = np.array([id not in lost for id in ids])
    weights = [np.float32(u.weight if a else 0) for a, u in zip(arrived, uploads, strict=True)]
    weighted = [jax.tree.map(lambda x, w=w: w * x, u.update) for w, u in zip(weights, uploads, strict=True)]
    stack = lambda *x: np.stack([each if a else np.zeros_like(each) for a, each in zip(arrived, x, strict=True)])
    received = Received(
      total=jax.tree.map(lambda *x: sum(x), *weighted),
      weight=sum(weights, start=np.float32(0)),
      kept=jax.tree.map(stack, *(u.kept for u in uploads)),
      ids=np.array(ids, np.int32),
      arrived=arrived,
      staleness=np.array(staleness or [0] * len(ids), np.int32),
    )
    self.server = self._aggregate(self.server, received, jax.random.key(100 + self._round))
    self._round += 1
    return received

  @property
  def params(self) -> PyTree:
    """The global model."""
    return self.algorithm.global_model(self.server)


# --- the same in NumPy and float64 ------------------------------------------------------------------------------------


class Oracle(NamedTuple):
  """A client's examples."""

  x: np.ndarray
  y: np.ndarray

  def loss(self, params: Params) -> float:
    """The mean cross-entropy."""
    logits = self.x @ params.base @ params.head
    return (np.log(np.exp(logits).sum(1)) - (logits * self.y).sum(1)).mean()

  def gradient(self, params: Params) -> Params:
    """Of the mean cross-entropy."""
    hidden = self.x @ params.base
    logits = hidden @ params.head
    chance = np.exp(logits - logits.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    error = (chance - self.y) / len(self.y)
    return Params(self.x.T @ error @ params.head.T, hidden.T @ error)


def oracle(client: int) -> Oracle:
  """A client's examples in NumPy."""
  rows = slice(STARTS[client], STARTS[client] + SIZES[client])
  return Oracle(IMAGES[rows].reshape(SIZES[client], -1) / 255, np.eye(NUM_CLASSES)[LABELS[rows]])


def start() -> Params:
  """The first model in float64."""
  return Params(*map(np.float64, START))


def nothing() -> Params:
  """Zeros in the shape of the model."""
  return Params(*(np.zeros(p.shape) for p in START))


def descend(
  client: int, params: Params, extra: Callable[[Params], Params] = lambda params: nothing(), steps: int = STEPS
) -> Params:
  """The client's SGD steps on its loss and on whatever else has this gradient."""
  for _ in range(steps):
    params = plus(params, (-LEARNING_RATE, oracle(client).gradient(params)), (-LEARNING_RATE, extra(params)))
  return params


def slope(loss: Callable[[Params], float], params: Params, step: float = 1e-5) -> Params:
  """The gradient of any loss, by central differences."""
  result = nothing()
  for part, values in enumerate(params):
    for place in np.ndindex(values.shape):
      nudge = nothing()
      nudge[part][place] = step
      result[part][place] = (loss(plus(params, (1, nudge))) - loss(plus(params, (-1, nudge)))) / (2 * step)
  return result


def plus(params: Params, *terms: tuple[float, Params]) -> Params:
  """The parameters and multiples of others."""
  return Params(*(p + sum(s * t[i] for s, t in terms) for i, p in enumerate(params)))


def close(actual: PyTree, expected: Params, tolerance: float = 1e-5) -> None:
  """Equal to rounding."""
  for a, b in zip(jax.tree.leaves(actual), expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
