"""Servers that learn without data: FedGen, FedFTG and DENSE; their losses against NumPy, what they teach by effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.algorithms import data_free, dense, fedftg, fedgen
from apfl_jax.algorithms.ap_fl.statistics import Moments
from apfl_jax.algorithms.dense import Kept as DenseKept
from apfl_jax.algorithms.dense import generator_loss as dense_loss
from apfl_jax.algorithms.fedftg import Kept as FtgKept
from apfl_jax.algorithms.fedftg import generator_loss as ftg_loss
from apfl_jax.algorithms.fedftg import samples
from apfl_jax.algorithms.fedgen import teacher_loss
from apfl_jax.types import Download, Received
from tests import linear

RNG = np.random.default_rng(1)
BATCH, CLASSES = 7, linear.NUM_CLASSES
IMAGES = np.float32(RNG.uniform(size=(BATCH, *linear.IMAGE_SHAPE)))
LABEL = RNG.integers(0, CLASSES, BATCH)
MEMBERS = [linear.Params(*(np.float32(RNG.normal(size=p.shape)) for p in linear.START)) for _ in range(3)]
STACKED = jax.tree.map(lambda *x: jnp.stack(x), *MEMBERS)
SETTINGS = {
  fedgen: {"generator_steps": 3, "alpha": 2.0, "beta": 3.0},
  fedftg: {"iterations": 60, "server_learning_rate": 1.0, "lambda_cls": 5.0},
  dense: {"warmup": 0.7, "epochs": 10, "generator_steps": 3, "generator_batch": 32, "server_learning_rate": 0.3},
}
WARM = 2  # floor(.7 * 3), the round from which the server of DENSE distils


@functools.cache
def made_once(make):
  """One algorithm for all tests of a method: its server's step takes long to compile."""
  return make(linear.task()._replace(rounds=jnp.int32(3)), **SETTINGS[make])


def logits(params, images=IMAGES):
  return images.reshape(len(images), -1) @ params.base @ params.head


def softmax(x):
  return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def cross_entropy(x, target):
  return -(target * np.log(softmax(x))).sum(-1)


def apart(params, taught):
  """Mean KL divergence of the model's answers on `IMAGES` from those of these logits."""
  p = softmax(taught)
  return (p * np.log(p / softmax(logits(params)))).sum(1).mean()


def aggregated(make, server, kept):
  """The server after a round of four, of whom the last did not arrive."""
  kept = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:1])]), kept)
  ids = jnp.arange(4, dtype=jnp.int32)
  arrived = Received((), jnp.float32(1), kept, ids, ids < 3, jnp.zeros_like(ids))
  return jax.jit(made_once(make).aggregate)(server, arrived, jax.random.key(1))


# --- what they share --------------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_over_pairs():
  noise, made = RNG.normal(size=(4, 3)), RNG.normal(size=(4, 2, 2, 1))
  squares = ((noise[:, None] - noise) ** 2).mean(-1)
  apart = abs(made[:, None] - made).mean((2, 3, 4))
  np.testing.assert_allclose(
    data_free.diversity(jnp.asarray(noise), jnp.asarray(made)), np.exp(-(squares * apart).mean()), 1e-5
  )
  assert data_free.diversity(jnp.asarray(noise), jnp.ones((4, 5))) == 1


def test_shares_of_classes():
  shares = data_free.class_shares(jnp.asarray([[2.0, 0, 1], [6, 0, 0], [0, 0, 0]]))
  np.testing.assert_allclose(shares, [[0.25, 0, 1], [0.75, 0, 0], [0, 0, 0]])


def test_the_average_is_weighted():
  expected = linear.plus(linear.nothing(), (0.75, MEMBERS[0]), (0.25, MEMBERS[2]))
  linear.close(data_free.average(STACKED, jnp.asarray([6.0, 0.0, 2.0])), expected)


# DENSE is slow to compile.
@pytest.mark.parametrize("make", [pytest.param(make, marks=[pytest.mark.slow] * (make is dense)) for make in SETTINGS])
def test_a_client_without_examples_has_no_more_say_than_one_whose_upload_is_lost(make):
  lost, empty = (linear.Rounds(made_once(make)) for _ in range(2))
  for _ in range(WARM + 1 if make is dense else 1):
    lost.advance((0, 1, 2, 3), lost=(2, 3))
    empty.advance((0, 1, 2, 3), lost=(3,), sizes={2: 0})
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), empty.server, lost.server)


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.0, "beta": 0.0}])
def test_without_what_the_generator_teaches_fedgen_is_fedavg(settings):
  plain = linear.Rounds(linear.fedavg())
  other = linear.Rounds(fedgen(linear.task(), generator_steps=1, **settings) if settings else made_once(fedgen))
  for ids, same in (((0, 1, 3), True), ((0, 1, 2), bool(settings))):  # in the first round nothing is taught
    plain.advance(ids)
    other.advance(ids)
    gap = abs(np.asarray(other.params.head) - np.asarray(plain.params.head)).max()
    assert gap < 1e-6 if same else gap > 1e-3
  held = sum(linear.oracle(id).y.sum(0) for id in (0, 1, 2, 3)) > 0
  np.testing.assert_array_equal(other.server.shared.seen, held)


# --- FedGen -----------------------------------------------------------------------------------------------------------


def test_heads_teach_the_classes_that_their_clients_hold():
  features, shares = np.float32(RNG.normal(size=(BATCH, linear.FEATURES))), RNG.uniform(size=(3, CLASSES))
  expected = sum(
    share[LABEL] * cross_entropy(features @ member.head, np.eye(CLASSES)[LABEL])
    for share, member in zip(shares, MEMBERS, strict=True)
  ).mean()
  loss = jax.jit(functools.partial(teacher_loss, linear.task()))
  actual = loss(STACKED.head, jnp.asarray(shares), jnp.asarray(features), jnp.asarray(LABEL))
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_what_fedgens_generator_teaches_fades_by_rounds_however_many_uploads_make_one():
  often = fedgen(linear.task()._replace(aggregations=4), **SETTINGS[fedgen])
  start = jax.jit(made_once(fedgen).init)(jax.random.key(0)).shared
  updates = {1: jax.jit(made_once(fedgen).local_update), 4: jax.jit(often.local_update)}
  ends = []
  for each, so_far in ((1, 2), (4, 9), (4, 12)):
    shared = start._replace(aggregations=jnp.int32(so_far), seen=start.seen | True)
    told = updates[each](Download(shared), (), linear.data(0), linear.visit(0), jax.random.key(1))
    ends.append(told[1].update.head)
  np.testing.assert_array_equal(ends[0], ends[1])
  assert np.abs(ends[2] - ends[0]).max() > 1e-5


def test_a_client_of_fedgen_learns_from_the_generator():
  # A generator that does not look at the noise, and a single class seen, leave nothing to chance.
  alpha, beta, rounds_done = 2.0, 3.0, 4
  algorithm = fedgen(linear.task(steps=1), alpha=alpha, beta=beta)
  shared = jax.jit(algorithm.init)(jax.random.key(0)).shared
  generator = shared.generator
  deaf = generator["dense"]["kernel"].at[: -linear.NUM_CLASSES].set(0.0)
  generator = generator | {"dense": generator["dense"] | {"kernel": deaf}}
  seen = jnp.asarray([False, True, False])
  shared = shared._replace(generator=generator, seen=seen, aggregations=jnp.int32(rounds_done))

  hidden = np.float64(generator["dense"]["bias"]) + np.float64(deaf[-CLASSES:])  # [C, hidden]
  hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-6)
  hidden = np.maximum(hidden * np.float64(generator["norm"]["scale"]) + np.float64(generator["norm"]["bias"]), 0)
  made = np.maximum(hidden @ np.float64(generator["out"]["kernel"]) + np.float64(generator["out"]["bias"]), 0)
  client, start = linear.oracle(0), linear.start()
  target = softmax(made @ start.head)[client.y.argmax(1)]

  def loss(params):
    answer = softmax(client.x @ params.base @ params.head)
    distilled = (target * np.log(target / answer)).sum(1).mean()
    labelled = cross_entropy(made[1] @ params.head, np.eye(CLASSES)[1])
    return client.loss(params) + 0.98**rounds_done * (alpha * labelled + beta * distilled)

  update = jax.jit(algorithm.local_update)
  _, upload = update(Download(shared), (), linear.data(0), linear.visit(0), jax.random.key(1))
  step = linear.plus(linear.nothing(), (-linear.LEARNING_RATE, linear.slope(loss, start)))
  linear.close(upload.update, step, 1e-4)


# --- FedFTG -----------------------------------------------------------------------------------------------------------


def test_the_generator_of_fedftg_looks_for_what_the_mean_has_not_learned():
  share, weight = RNG.uniform(size=(3, BATCH)), 0.6
  target, mine = np.eye(CLASSES)[LABEL], logits(linear.START)
  expected = sum(
    a * (weight * cross_entropy(logits(member), target) - abs(mine - logits(member)).mean(1))
    for a, member in zip(share, MEMBERS, strict=True)
  ).mean()
  start = jax.tree.map(jnp.asarray, linear.START)
  loss = jax.jit(functools.partial(ftg_loss, linear.task()))
  actual = loss(STACKED, start, jnp.asarray(IMAGES), jnp.asarray(target), jnp.asarray(share), weight)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_fedftg_teaches_what_those_who_hold_a_class_say_of_it():
  # The first two have the same say in the mean, but only the first holds examples of any class.
  server = jax.jit(made_once(fedftg).init)(jax.random.key(0))
  kept = FtgKept(STACKED, jnp.asarray([1.0, 1.0, 0.0]), jnp.asarray([[3.0, 4, 5], [0, 0, 0], [0, 0, 0]]))
  after = aggregated(fedftg, server, kept)
  mean = linear.plus(linear.nothing(), (0.5, MEMBERS[0]), (0.5, MEMBERS[1]))
  assert apart(after.params, logits(MEMBERS[0])) < 0.3 * apart(mean, logits(MEMBERS[0]))
  assert apart(after.params, logits(MEMBERS[1])) > apart(mean, logits(MEMBERS[1]))

  draw = jax.jit(lambda server: samples(linear.task(), server, jax.random.key(2), 16))
  assert draw(server).shape == (CLASSES, 16, *linear.IMAGE_SHAPE)
  first, made = (np.asarray(draw(s)).reshape(-1, *linear.IMAGE_SHAPE) for s in (server, after))
  wanted = np.repeat(np.eye(CLASSES), 16, axis=0)
  wrong = lambda images: cross_entropy(logits(MEMBERS[0], images), wanted).mean()
  assert wrong(made) < wrong(first)


# --- DENSE ------------------------------------------------------------------------------------------------------------


def _dense_kept(weights):
  hidden = [IMAGES.reshape(BATCH, -1) @ member.base for member in MEMBERS]
  statistics = Moments(jnp.stack([h.mean(0) for h in hidden]) + 0.3, jnp.stack([(h**2).mean(0) for h in hidden]) + 0.5)
  return DenseKept(STACKED, jnp.asarray(weights), (statistics,), jnp.full(3, WARM, jnp.int32)), hidden


def test_the_generator_of_dense_fools_the_model_with_what_the_ensemble_knows():
  kept, hidden = _dense_kept([2.0, 0.0, 5.0])  # the second did not arrive
  target, bn, div = np.eye(CLASSES)[LABEL], 0.7, 1.5
  taught, mine = (logits(MEMBERS[0]) + logits(MEMBERS[2])) / 2, logits(linear.START)
  wrong = taught.argmax(1) != mine.argmax(1)
  assert 0 < wrong.sum() < BATCH
  p = softmax(taught)
  apart = (p * np.log(p / softmax(mine))).sum(1)
  off = 0
  for k in (0, 2):
    mean, square = np.asarray(kept.statistics[0].mean[k]), np.asarray(kept.statistics[0].square[k])
    variance, found = square - mean**2, hidden[k].var(0)
    off += ((hidden[k].mean(0) - mean) ** 2).mean() / variance.mean() / 2
    off += 0.1 * (np.log((found + 1e-4) / (variance + 1e-4)) ** 2).mean() / 2
  expected = cross_entropy(taught, target).mean() + bn * off - div * (apart * wrong).mean()
  start = jax.tree.map(jnp.asarray, linear.START)
  loss = jax.jit(functools.partial(dense_loss, linear.task()))
  actual = loss(kept, start, jnp.asarray(IMAGES), jnp.asarray(target), bn, div)
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_dense_teaches_the_ensemble_in_which_every_client_counts_alike():
  kept, _ = _dense_kept([9.0, 0.0, 1.0])
  after = aggregated(dense, jax.tree.map(jnp.asarray, linear.START), kept)
  mean = linear.plus(linear.nothing(), (0.9, MEMBERS[0]), (0.1, MEMBERS[2]))
  taught = (logits(MEMBERS[0]) + logits(MEMBERS[2])) / 2
  assert apart(after, taught) < 0.3 * apart(mean, taught)


def test_dense_warms_up_as_fedavg():
  plain = linear.Rounds(linear.fedavg())
  other = linear.Rounds(made_once(dense))
  for same in (*[True] * WARM, False):
    plain.advance((0, 1, 2, 3), lost=(2,))
    other.advance((0, 1, 2, 3), lost=(2,))
    gap = abs(np.asarray(other.params.head) - np.asarray(plain.params.head)).max()
    assert gap < 1e-6 if same else gap > 1e-4


def test_clients_of_dense_send_the_moments_of_their_layers():
  update, start = jax.jit(made_once(dense).local_update), jax.tree.map(jnp.asarray, linear.START)
  _, upload = update(Download(start), (), linear.data(1), linear.visit(1), jax.random.key(1))
  hidden = linear.oracle(1).x @ np.asarray(upload.kept.params.base)
  np.testing.assert_allclose(upload.kept.statistics[0].mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(upload.kept.statistics[0].square, (hidden**2).mean(0), rtol=1e-4, atol=1e-5)
