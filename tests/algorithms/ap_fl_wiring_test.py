"""AP-FL's losses and switches one by one: each makes the difference that it is there for.

The server trains a generator with two parameters here, on a model of two linear layers, so that NumPy can follow it;
what needs images is told by what a round of the semantic generator does with and without it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import algorithms, nn, semantics
from apfl_jax.algorithms.ap_fl import generation, projections, server, sources, statistics, unseen
from apfl_jax.algorithms.ap_fl.state import Kept, Sent
from apfl_jax.types import Generator, LocalSGD, Model, Params, Received, Task
from tests import linear, tasks
from tests.algorithms.ap_fl_server_test import examples, make_task

# --- the server's training, followed in NumPy -------------------------------------------------------------------------

C, ROUNDS, STEPS, BANK = linear.NUM_CLASSES, 20, 2, 3
RATE, DECAY = 0.05, 0.3
CENTRES = np.random.default_rng(2).uniform(size=(C, linear.FEATURES)).astype(np.float32)  # where classes are drawn
FLOATS = {"learning_rate": RATE, "decay": DECAY, "diversity": 1.0}


def plain_source(task):
  """Features drawn around a centre of each class: those of a pair lie as far apart as their noise, times the scale."""

  def apply(params, noise, embedding):
    return embedding @ params["centres"] + params["scale"] * noise

  def sample(weights, label, key):
    return apply(weights, jax.random.normal(key, (*label.shape, linear.FEATURES)), task.embeddings[label])

  init = lambda key: {"centres": jnp.asarray(CENTRES), "scale": jnp.float32(1)}
  generator = Generator(init, apply, linear.FEATURES)
  return sources.source(task, "feature")._replace(generator=generator, init=init, sample=sample)


@functools.cache
def plain(schedule, tier):
  """(server at the start, a round of it) with every switch on that leaves the scale alone; floats are traced."""
  given = {name: setting.default for name, setting in algorithms.settings("ap_fl").items()}
  named = {name: given.get(name, given.get(f"generator_{name}")) for name in server.Settings._fields}
  switches = {"tier": tier, "schedule": schedule, "steps": STEPS, "batch": 20, "warmup": 0.0, "keep_models": False}
  if (tier, schedule) == ("s1", "round"):
    switches |= {"early_stop": True, "ship": "bank", "bank_size": BANK, "memory": "both", "memory_patience": 1}

  def federated(floats):
    task = linear.task()._replace(rounds=jnp.int32(ROUNDS))
    settings = server.Settings(
      **named
      | switches
      | {name: floats[name] for name in ("learning_rate", "decay")}
      | {"weights": generation.Weights(0.0, floats["diversity"], 0.0, 0.0)}
      | {"unseen": unseen.Settings("prototypes" if tier == "s1" else "none", 1.0, 0.8, 0.3)}
    )
    return server.federated(task, plain_source(task), settings)

  start = jax.jit(lambda: federated(FLOATS).init(jax.random.key(0)))()
  return start, jax.jit(lambda floats, *rest: federated(floats).aggregate(*rest))


class Plain:
  """The server between two rounds."""

  def __init__(self, schedule="round", tier="s1", **floats):
    self.server, self._aggregate = plain(schedule, tier)
    self._floats = jax.tree.map(jnp.float32, FLOATS | floats)
    self.round = 0

  def step(self, *held, delta=0.0):
    """A round in which one client arrives with these examples of each class, and every weight moves by `delta`."""
    received = Received(
      total=Sent(
        jax.tree.map(lambda w: jnp.full_like(w, delta), self.server.params),
        jax.tree.map(jnp.ones_like, self.server.statistics.layers),
        (),
      ),
      weight=jnp.float32(1),
      kept=Kept(jnp.asarray([held], jnp.float32), jnp.asarray([self.round])),
      ids=jnp.zeros(1, jnp.int32),
      arrived=jnp.ones(1, bool),
      staleness=jnp.zeros(1, jnp.int32),
    )
    self.server = self._aggregate(self._floats, self.server, received, jax.random.key(self.round))
    self.round += 1
    return self.server

  def holds(self, **average):
    """Puts these weights in the place of the average, which then stays."""
    source = self.server.source
    average = source.average | jax.tree.map(jnp.float32, average)
    source = source._replace(average=average, rounds=jnp.int32(10**6))
    self.server = self.server._replace(source=source)


def followed(rates):
  """(scale, its moving average) after each step: of one class there is nothing to tell apart, L_div alone remains.

  L_div = 1 / (scale + .01), for a pair differs by its noise times the scale.
  """
  scale = average = 1.0
  first = second = 0.0
  for t, rate in enumerate(rates, 1):
    gradient = -1 / (scale + 0.01) ** 2
    first, second = 0.5 * first + 0.5 * gradient, 0.999 * second + 0.001 * gradient**2
    scale -= rate * (first / (1 - 0.5**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    decay = min(DECAY, t / (9 + t))  # a young average forgets faster
    average = decay * average + (1 - decay) * scale
    yield scale, average


def test_a_round_is_adam_at_a_rate_that_falls_by_two_percent_and_clients_get_the_moving_average():
  rounds = Plain()
  expected = list(followed(RATE * 0.98 ** (np.arange(6 * STEPS) / STEPS)))[STEPS - 1 :: STEPS]
  for scale, average in expected:
    source = rounds.step(5, 0, 0).source
    np.testing.assert_allclose((source.params["scale"], source.average["scale"]), (scale, average), rtol=2e-5)
    np.testing.assert_allclose(source.params["centres"], CENTRES, atol=1e-6)
  assert abs(scale - average) > 0.01  # far more than what is tolerated


def test_in_a_single_training_at_the_end_the_rate_falls_along_a_cosine():
  rounds = Plain("final", "s0")
  rounds.round = ROUNDS - 1
  source = rounds.step(5, 0, 0).source
  *_, expected = followed(RATE * 0.5 * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS)))
  np.testing.assert_allclose((source.params["scale"], source.average["scale"]), expected, rtol=2e-5)


@pytest.mark.parametrize(("diversity", "trained"), [(0.0, 6), (1.0, 9)])
def test_training_rests_once_the_loss_of_recognised_samples_has_not_fallen_for_five_rounds(diversity, trained):
  """One class is always recognised. Without L_div there is no loss that could fall; with it, it falls every round."""
  rounds = Plain(diversity=diversity)
  for _ in range(9):
    rounds.step(5, 0, 0)
  assert int(rounds.server.source.rounds) == trained


def test_the_bank_is_filled_anew_from_the_average_of_each_round():
  rounds = Plain(decay=1.0)
  before = np.asarray(rounds.server.bank.values)
  rounds.holds(scale=0.0)  # samples are the centres
  bank = rounds.step(5, 5, 0).bank
  expected = np.repeat(CENTRES[:, None] / CENTRES.max() * 255, BANK, axis=1)
  np.testing.assert_allclose(np.float32(bank.values), expected, atol=0.6)
  np.testing.assert_allclose(bank.most, CENTRES.max(), rtol=1e-3)
  assert np.abs(np.float32(before) - expected).max() > 10


def test_without_real_features_unseen_classes_are_read_off_samples_of_seen_ones():
  rounds = Plain(decay=1.0)
  rounds.holds(scale=0.0)
  found = rounds.step(5, 5, 0).reading.source
  middle = CENTRES[:2].mean(0)
  np.testing.assert_allclose(found.centre, middle, atol=1e-4)
  np.testing.assert_allclose(found.direction[:2], linear_unit(CENTRES[:2] - middle), atol=1e-3)


def linear_unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_both_memories_distil_what_left_into_the_head_of_the_mean_model():
  rounds = Plain()
  old = tasks.on_host(rounds.step(5, 5, 5).params)
  rounds.server = rounds.server._replace(params=old._replace(head=old.head + np.float32([0, 0, -3])))
  rounds.round = ROUNDS - 2
  mean = jax.tree.map(lambda a, b: (a + b) / 2, tasks.on_host(rounds.step(5, 5, 0, delta=0.1).params), old)
  tasks.assert_same(rounds.server.memory.params, old)
  linear.close(rounds.server.memory.answer, mean)
  new = tasks.on_host(rounds.step(5, 5, 0).params)
  answer = rounds.server.memory.answer
  linear.close((answer.base,), (mean.base,))  # features are the mean model's
  scale, centres = (np.asarray(rounds.server.source.average[name]) for name in ("scale", "centres"))
  features = centres[:, None] + scale * np.random.default_rng(0).normal(size=(C, 200, linear.FEATURES))
  chance = lambda head: np.asarray(jax.nn.softmax(features @ np.asarray(head) / 2))
  target = np.concatenate([chance(new.head)[:2], chance(old.head)[2:]])  # class 2 left
  apart = lambda head: (target * np.log(target / chance(head))).sum(-1).mean()
  assert apart(answer.head) < 0.8 * apart(mean.head)


def test_without_histograms_every_update_counts_and_all_seen_classes_are_asked_for_alike():
  """How many updates showed a class says little of how much of it there is; where counts are known they decide."""

  def told(tier, *held):
    """(centres before a training, after it), where one client holds this."""
    rounds = Plain("final" if tier == "s0" else "round", tier)  # which other tests have compiled
    rounds.round = ROUNDS - 1
    return np.asarray(rounds.server.source.params["centres"]), np.asarray(rounds.step(*held).source.params["centres"])

  (before, few), (_, many) = (told("s0", *held) for held in ((1, 1, 0), (1, 90, 0)))
  assert np.abs(few - before).max() > 1e-3
  np.testing.assert_array_equal(few, many)
  (_, few), (_, many) = (told("s1", *held) for held in ((1, 1, 0), (1, 90, 0)))
  assert np.abs(few - many).max() > 1e-3
  for tier, counts in (("s0", [2, 2, 1]), ("s1", [1, 1, 0])):  # of the same client, twice
    rounds = Plain("final" if tier == "s0" else "round", tier)
    rounds.step(1, 1, 0)
    np.testing.assert_array_equal(rounds.step(1, 1, 1).counts, counts)


# --- what a client sends ----------------------------------------------------------------------------------------------


def test_moments_are_of_the_model_that_the_client_has_trained():
  """So that they are of about the model to come: those of the downloaded one would be a round late."""
  rounds = linear.Rounds(algorithms.ap_fl(linear.task(), source="none", mask_softmax=False, friend_steps=0))
  rounds.advance([0, 1, 2], lost=[1])
  features = {id: linear.oracle(id).x @ linear.descend(id, linear.start()).base for id in (0, 2)}
  share = {id: linear.SIZES[id] / (linear.SIZES[0] + linear.SIZES[2]) for id in features}
  [layer] = rounds.server.statistics.layers
  mean = sum(share[id] * x.mean(0) for id, x in features.items())
  np.testing.assert_allclose(layer.mean, mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(layer.square, sum(share[id] * (x**2).mean(0) for id, x in features.items()), rtol=1e-4)
  old = sum(share[id] * (linear.oracle(id).x @ linear.start().base).mean(0) for id in features)
  assert np.abs(mean - old).max() > 0.01


# --- a round of the semantic generator of images ----------------------------------------------------------------------

WEIGHTS = ("statistics", "class", "covariance", "diversity", "semantic", "variation", "adversarial", "memory")
IMAGE = {"generator_batch": 40, "generator_steps": 1, "generator_learning_rate": 0.05, "generator_warmup": 0.0}
OFF = {f"lambda_{name}": 0.0 for name in WEIGHTS} | {"film_after": 1.0, "unseen_warmup": 1.0}
TABLE = jnp.asarray(semantics.normalise(np.random.default_rng(0).normal(size=(tasks.NUM_CLASSES, 3))))


@functools.cache
def image():
  """(server in whose next round a class has left, that round): every switch is on, weights and times are traced."""

  def ap_fl(floats):
    model = nn.classifier("mlp", tasks.IMAGE_SHAPE, tasks.NUM_CLASSES, head="anchored", embeddings=TABLE)
    sgd = LocalSGD(jnp.float32(0.1), 16, 1, 5, 10, "examples", "none")
    task = Task(20, tasks.NUM_CLASSES, tasks.IMAGE_SHAPE, TABLE, model, sgd, jnp.int32(10))
    switches = {"tier": "s2", "adversary": True, "film_refresh": True, "memory": "average", "memory_patience": 1}
    return algorithms.ap_fl(task, friend_steps=0, **switches, **IMAGE, **floats)

  @jax.jit
  def step(floats, server, held):
    is_moments = lambda x: isinstance(x, statistics.Moments)
    of_one = lambda x: statistics.Moments(0 * x.mean + 1, 0 * x.square + 3) if is_moments(x) else 0 * x + 1
    real = jax.tree.map(of_one, server.statistics, is_leaf=is_moments)
    low = projections.coefficients(real.classes.images.mean)
    within = jnp.eye(low.shape[1]) + low[:, :, None] * low[:, None, :]  # a covariance of 1
    real = real._replace(classes=real.classes._replace(products=within))
    received = Received(
      total=Sent(jax.tree.map(jnp.zeros_like, server.params), real.layers, real.classes),
      weight=jnp.float32(1),
      kept=Kept(held[None], server.rounds[None]),
      ids=server.rounds[None],
      arrived=jnp.ones(1, bool),
      staleness=jnp.zeros(1, jnp.int32),
    )
    return ap_fl(floats).aggregate(server, received, jax.random.key(1))

  start = jax.jit(lambda: ap_fl(OFF).init(jax.random.key(0)))()
  server = step(jax.tree.map(jnp.float32, OFF), start, jnp.float32([5, 5, 5, 0]))
  # The smallest loss so far is that of the round to come.
  server = server._replace(source=server.source._replace(least=jnp.float32(3e38)))
  return server, lambda floats, server: step(jax.tree.map(jnp.float32, OFF | floats), server, jnp.float32([5, 5, 0, 0]))


def image_round(rounds=1, **floats):
  """The generator in training after a round, `rounds` of them before it."""
  start, step = image()
  return step(floats, start._replace(rounds=jnp.int32(rounds))).source


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weight_reaches_the_loss_of_a_round(name):
  """With its sign: all but L_adv, which is at most 0, are distances, estimates of one or their inverse."""
  weigh = lambda weight: image_round(**{f"lambda_{name}": weight})
  none, once, thrice = map(weigh, (0.0, 1.0, 3.0))
  term = float(once.least - none.least)
  assert (term < -1e-3) if name == "adversarial" else (term > 1e-3)
  assert float(thrice.least - none.least) == pytest.approx(3 * term, rel=1e-2)
  assert any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), once.params, none.params)))


def test_no_two_weights_are_mistaken_for_each_other(monkeypatch):
  found = []
  federated = server.federated
  monkeypatch.setattr(server, "federated", lambda *given: found.append(given[-1].weights) or federated(*given))
  given = {name: float(number) for number, name in enumerate(WEIGHTS, 1)}
  algorithms.ap_fl(linear.task(), friend_steps=0, **{f"lambda_{name}": value for name, value in given.items()})
  assert found[0]._asdict() == {"by_class" if name == "class" else name: value for name, value in given.items()}


def test_the_generator_is_asked_for_unseen_classes_from_their_round_on():
  never, always = (float(image_round(unseen_warmup=share).least) for share in (1.0, 0.0))
  assert always > never + 1e-2  # the teacher has one more class to choose from
  # After half of ten rounds: the sixth is the first.
  assert [float(image_round(rounds, unseen_warmup=0.5).least) for rounds in (4, 5)] == [never, always]


def test_a_late_refresh_moves_film_and_the_code_of_the_semantic_generator():
  before = image()[0].source.params
  differ = lambda a, b: any(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), a, b)))
  moved = lambda after: {name for name in before if differ(after[name], before[name])}
  assert moved(image_round(film_after=1.0).params) == set(before)
  assert moved(image_round(film_after=0.0).params) == {"encode", "film1", "film2"}


# --- the loss of a batch ----------------------------------------------------------------------------------------------


def moved(images, down, right):
  """Images by that many pixels, at most one, their edges repeated."""
  wide = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
  return wide[:, 1 - down : 5 - down, 1 - right : 5 - right]


def entropy(logits, label, classes):
  """The cross-entropy of each row, the softmax over these classes."""
  return np.log(np.exp(logits[:, classes]).sum(1)) - logits[np.arange(len(label)), label]


def test_the_loss_of_a_batch_is_that_of_numpy():
  """Of 20 rows 12 are of seen classes, 4 of mixed ones, 4 of the unseen one. The teacher is an anchored linear model.

  Which way the copy is shifted is the key's affair: the loss has to be that of one of the nine ways.
  """
  rng = np.random.default_rng(3)
  base, head = rng.normal(size=(16, 5)) / 2, rng.normal(size=(5, 3))
  images = rng.uniform(size=(20, *tasks.IMAGE_SHAPE))
  counts, table = np.float32([9, 4, 1, 0]), np.float64(TABLE)
  model = Model(
    init=lambda key: Params(base, head),
    base=lambda base, x: (x.reshape(len(x), -1) @ base, ()),
    head=lambda head, features: features @ head @ TABLE.T,
    semantics=lambda head, features: features @ head,
  )
  task = linear.task()._replace(num_classes=4, image_shape=tasks.IMAGE_SHAPE, embeddings=TABLE, model=model)
  generator = Generator(init=lambda key: (), apply=lambda params, noise, e: params, noise_size=3)
  source = sources.source(task, "image")._replace(generator=generator)

  @jax.jit
  def loss(key, asked):
    rows = generation.draw_rows(TABLE, counts, asked, 20, key)
    value = generation.generator_loss(
      task,
      source,
      jnp.float32(images),
      jax.tree.map(jnp.float32, Params(base, head)),
      rows,
      key,
      weights=generation.Weights(0.0, 0.0, semantic=0.6, variation=1.5),
      statistics=statistics.Statistics((), ()),
      classes=jnp.asarray(counts > 0) | asked,
    )
    return value, rows.label, rows.embedding

  logits = lambda x: x.reshape(20, -1) @ base @ head @ table.T
  meant = images.reshape(20, -1) @ base @ head
  meant /= np.linalg.norm(meant, axis=1, keepdims=True)
  rough = sum(np.abs(np.diff(images, axis=axis)).mean((1, 2, 3)) for axis in (1, 2))
  variation = np.maximum(rough - 0.16, 0).mean()
  ways = {way: moved(images, *way) for way in itertools.product((-1, 0, 1), repeat=2)}
  taken = set()
  for seed, asked in itertools.product(range(6), (False, True)):
    value, label, embedding = jax.tree.map(np.asarray, loss(jax.random.key(seed), jnp.bool_(asked)))
    taught, active = (np.r_[0:12, 16:20], np.r_[0:20]) if asked else (np.r_[0:12], np.r_[0:16])
    seen = np.array([True, True, True, asked])
    rest = 0.6 * ((meant - embedding) ** 2).sum(1)[active].mean() + 1.5 * variation
    of = {way: entropy(logits(x)[taught], label[taught], seen).mean() for way, x in ways.items()}
    found = {way for way in ways if value == pytest.approx(of[0, 0] + of[way] + rest, rel=1e-5)}
    assert found, (seed, asked)
    taken |= found
  assert len(taken) > 2


# --- matched images ---------------------------------------------------------------------------------------------------


def test_the_global_model_draws_matched_images_to_their_class():
  task = make_task(rounds=1)
  client, _, labels = examples()
  held = np.bincount(labels, minlength=task.num_classes)

  @jax.jit
  def trust(weight):
    matched = {"source": "matched", "tier": "s2", "bank_size": 4, "matching_steps": 20}
    algorithm = algorithms.ap_fl(task, friend_steps=0, **matched, matching_learning_rate=0.02, lambda_teacher=weight)
    server = algorithm.init(jax.random.key(0))
    received = Received(
      total=Sent(
        jax.tree.map(jnp.zeros_like, server.params),
        jax.tree.map(jnp.ones_like, server.statistics.layers),
        statistics.sums_by_class(task, server.params, client, products=True, untrained=True),
      ),
      weight=jnp.float32(1),
      kept=Kept(jnp.float32(held)[None], jnp.zeros(1, jnp.int32)),
      ids=jnp.zeros(1, jnp.int32),
      arrived=jnp.ones(1, bool),
      staleness=jnp.zeros(1, jnp.int32),
    )
    return algorithm.aggregate(server, received, jax.random.key(1)).trust

  alone, drawn = (np.asarray(trust(jnp.float32(weight)))[held > 0] for weight in (0.0, 5.0))
  assert (drawn > alone + 0.05).all()
