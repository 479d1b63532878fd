"""The softmax mask and the balanced softmax reach every method, through the offset of what it is given of a client."""

import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import algorithms, training
from apfl_jax.algorithms import METHODS
from apfl_jax.metrics import ledger
from apfl_jax.types import Download, Params
from tests import linear

CLIENT, ABSENT = 3, 2  # holds three examples of class 0 and three of class 1
OWN = np.float32([0.0, 0.0, -np.inf])
SMALL = {
  "ap_fl": {
    "generator_steps": 0,
    "tier": "s0",
    "friend_steps": 2,
    "synthetic_examples": 8,
    "grid_points": 2,
  },
  "fedgen": {"alpha": 0.0},  # synthetic features have labels of all classes
}
# Where a method has to be for its losses to be all there: classes seen by others, a generator that was trained.
LATER = {
  "ap_fl": lambda server: server._replace(counts=jnp.ones(linear.NUM_CLASSES)),
  "fedgen": lambda server: server._replace(shared=server.shared._replace(aggregations=jnp.int32(1))),
}


def source(name):
  """Of the file, or the package of files, that the method is in."""
  module = METHODS[name].make.__module__
  package = module.rpartition(".")[0]
  own = [module] if package == algorithms.__name__ else [m for m in sys.modules if m.startswith(f"{package}.")]
  return "".join(inspect.getsource(sys.modules[m]) for m in own)


# Methods with losses of their own; what all others have is `classification_loss`.
WITH_LOSSES = [name for name in METHODS if "batch_cross_entropy(" in source(name)]
assert {"ap_fl", "fedgen"} < set(WITH_LOSSES) < set(METHODS)


def make(name):
  """The method, and (key) -> download and client of the client's first visit."""
  algorithm = METHODS[name].make(linear.task(), **SMALL.get(name, {}))

  def first(key):
    server = LATER.get(name, lambda server: server)(algorithm.init(key))
    download = algorithm.download(server)
    download = Download(download.shared, jax.tree.map(lambda x: x[CLIENT], download.own))
    return download, algorithm.init_client(download, jax.random.key(1))

  return algorithm, first


def visit(name, offset):
  """(method, download, client, data) of the client's first visit."""
  algorithm, first = make(name)
  return algorithm, *jax.jit(first)(jax.random.key(0)), linear.data(CLIENT)._replace(logit_offset=offset)


def head_columns(tree):
  """The column of the absent class in whatever has the shape of a head."""
  return [np.asarray(leaf)[:, ABSENT] for leaf in jax.tree.leaves(tree) if np.shape(leaf) == linear.START.head.shape]


def moved(columns):
  """Whether a column is neither a weight that stayed, nor a difference of none, nor a share of one."""
  stayed = (linear.START.head[:, ABSENT], 0.0, 1.0)
  return [not any(np.allclose(column, there, atol=1e-6) for there in stayed) for column in columns]


@pytest.mark.parametrize("name", WITH_LOSSES)
def test_real_data_does_not_train_the_head_of_a_class_that_the_mask_leaves_out(name):
  algorithm, download, client, data = visit(name, jnp.asarray(OWN))
  client, upload = jax.jit(algorithm.local_update)(download, client, data, linear.visit(CLIENT), jax.random.key(2))
  columns = head_columns((client, upload))
  assert columns and not any(moved(columns))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((client, upload)))


@pytest.mark.parametrize("name", METHODS)
def test_whoever_learns_from_labels_reads_the_offset(name):
  def read(function):
    """Of the client's data, what the function needs."""
    call = lambda download, client, data, key: function(download, client, data, linear.visit(CLIENT), key)
    return ledger.read_leaves(call, download, client, data, jax.random.key(2), argnum=2)

  algorithm, first = make(name)
  download, client = jax.eval_shape(first, jax.random.key(0))
  data = linear.data(CLIENT)._replace(logit_offset=jnp.asarray(OWN))
  assert read(algorithm.local_update).logit_offset
  personal = read(algorithm.personalize)
  assert personal.logit_offset == personal.store.labels


def gradient(params, offset):
  """Of the mean cross-entropy of logits + offset, in double precision."""
  x, y = linear.oracle(CLIENT)
  hidden = x @ params.base
  logits = hidden @ params.head + offset
  chance = np.exp(logits - logits.max(1, keepdims=True))
  error = (chance / chance.sum(1, keepdims=True) - y) / len(y)
  return Params(x.T @ error @ params.head.T, hidden.T @ error)


def test_sgd_is_that_of_numpy():
  algorithm, download, client, data = visit("fedavg", None)
  run = jax.jit(algorithm.local_update)
  for mask, readout in (("none", "plain"), ("own", "plain"), ("none", "prior"), ("own", "prior")):
    offset = np.log([5 / 6, 1 / 6, 1e-12]) if readout == "prior" else np.zeros(3)
    if mask == "own":
      offset[ABSENT] = -np.inf
    given = training.logit_offset(jnp.float32([5.0, 1.0, 0.0]), None, mask, readout)
    data = data._replace(logit_offset=given)
    _, upload = run(download, client, data, linear.visit(CLIENT), jax.random.key(2))
    want = linear.start()
    for _ in range(linear.STEPS):
      want = linear.plus(want, (-linear.LEARNING_RATE, gradient(want, offset)))
    linear.close(upload.update, linear.plus(want, (-1.0, linear.start())))
    assert (given is None) == ((mask, readout) == ("none", "plain"))
    assert all(moved(head_columns(upload))) == (mask == "none" and readout == "plain")


def test_fedrod_is_balanced_once():
  """Its generic loss has the prior by itself; the personal one gets it with the read-out."""
  algorithm, download, client, data = visit("fedrod", None)
  run = jax.jit(algorithm.local_update)
  arguments = linear.visit(CLIENT), jax.random.key(2)
  plain_head, plain = run(download, client, data, *arguments)
  offset = training.logit_offset(jnp.float32([5.0, 1.0, 0.0]), None, "none", "prior")
  head, balanced = run(download, client, data._replace(logit_offset=offset), *arguments)
  linear.close(balanced.update, plain.update)
  assert np.abs(np.asarray(head) - np.asarray(plain_head)).max() > 1e-2


def test_knn_per_gives_back_the_votes_of_its_neighbours_with_the_prior():
  """Balanced votes, and the prior added: the answers are those of the plain datastore."""
  data = linear.data(0)  # classes 2 0 1 2 1
  settings = {"choice": "fixed", "share": 1.0, "neighbours": 3}
  algorithm = algorithms.knn_per(linear.task(), **settings)
  download = algorithm.download(algorithm.init(jax.random.key(0)))
  prior = jnp.log(jnp.float32([0.2, 0.4, 0.4]))
  images = np.float32(linear.IMAGES / 255)

  @jax.jit
  def logits(data):
    model = algorithm.personalize(download, (), data, linear.visit(0), jax.random.key(1))
    return algorithm.predict(model, images).logits

  plain, balanced = logits(data), logits(data._replace(logit_offset=prior))
  assert np.abs(np.exp(plain) - np.exp(balanced)).max() > 0.05
  np.testing.assert_allclose(jax.nn.softmax(balanced + prior), np.exp(plain), atol=1e-5)


def test_knn_per_chooses_by_the_likelihood_under_the_prior():
  algorithm = algorithms.knn_per(linear.task(), neighbours=5, tune_scale=False)
  download = algorithm.download(algorithm.init(jax.random.key(0)))
  share = np.array([4.0, 1.0, 3.0]) / 8
  data = linear.data(2)._replace(logit_offset=jnp.log(jnp.float32(share)))
  model = jax.jit(algorithm.personalize)(download, (), data, linear.visit(2), jax.random.key(1))
  predict = jax.jit(algorithm.predict)
  x, y = linear.oracle(2)
  images = np.float32(x.reshape(-1, *linear.IMAGE_SHAPE))
  likely = []
  for candidate in np.linspace(0, 1, 11):
    chance = np.exp(np.float64(predict(model._replace(share=jnp.float32(candidate)), images).logits)) * share
    likely.append(np.log((chance * y).sum(1) / chance.sum(1)).sum())
  np.testing.assert_allclose(model.share, np.linspace(0, 1, 11)[np.argmax(likely)])
  assert 0 < np.argmax(likely) < 10 and np.ptp(likely) > 0.05


def test_fedproto_answers_with_gaussian_likelihoods():
  algorithm, download, client, data = visit("fedproto", jnp.log(jnp.float32([0.5, 0.5, 1e-12])))
  model = jax.jit(algorithm.personalize)(download, client, data, linear.visit(CLIENT), jax.random.key(1))
  x, y = linear.oracle(CLIENT)
  features, mean = x @ np.float64(model.params.base), np.float64(model.prototypes.mean)
  square = ((features[:, None] - mean) ** 2).sum(-1)  # [examples, C]
  variance = (square * y).sum() / features.size
  images = np.float32(x.reshape(-1, *linear.IMAGE_SHAPE))
  got = np.asarray(algorithm.predict(model, images).logits)
  np.testing.assert_allclose(got[:, :2], -square[:, :2] / (2 * variance), rtol=1e-3)
