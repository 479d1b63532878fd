"""Unseen classes: each part against NumPy, and the traps of method 8.1."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import algorithms, nn, population, semantics, simulation, training
from apfl_jax.algorithms.ap_fl import unseen
from apfl_jax.errors import InputError
from apfl_jax.metrics import ledger, shared_answers
from apfl_jax.types import Data, LocalSGD, Task
from tests import linear, tasks

CLASSES, SIZE, FEATURES = 7, 4, 6
SEEN = np.array([True, False, True, True, False, True, True])
PENALTY = 0.3
RNG = np.random.default_rng(0)
TABLE = semantics.normalise(RNG.normal(size=(CLASSES, SIZE)))
MEANS = RNG.normal(size=(CLASSES, FEATURES)).astype(np.float32)

SETTINGS = unseen.Settings("prototypes", p_value=0.05, keep=0.8, penalty=PENALTY)

fit = jax.jit(unseen.prototypes)
table_test = jax.jit(unseen.table_test)
read = jax.jit(lambda raw, seen, source, p_value: unseen.read(raw, seen, source, p_value, SETTINGS))
stacking = jax.jit(unseen.stacking)


def by_hand(table, means, seen):
  """The formula of method 8.1 row by row, with the whole offsets: of seen classes to their means."""
  table, means = np.asarray(table, float), np.asarray(means, float)
  eb, mb = table[seen].mean(0), means[seen].mean(0)
  x, y = table[seen] - eb, means[seen] - mb
  ridge = np.linalg.inv(x.T @ x + PENALTY * np.eye(table.shape[1])) @ x.T @ y
  return np.where(seen[:, None], means - mb, (table - eb) @ ridge), mb


def cosines(features, offset, centre):
  away = features - centre
  norms = np.linalg.norm(away, axis=-1, keepdims=True) * np.linalg.norm(offset, axis=-1)
  return away @ offset.T / norms


@pytest.mark.parametrize("seen", [SEEN, ~SEEN | (np.arange(CLASSES) < 3), np.ones(CLASSES, bool)])
def test_prototypes_and_cosines_are_the_formula(seen):
  found = fit(TABLE, np.where(seen[:, None], MEANS, np.nan), seen, PENALTY)  # what is unseen is not read
  offset, centre = by_hand(TABLE, MEANS, seen)
  np.testing.assert_allclose(found.centre, centre, atol=1e-5)
  np.testing.assert_allclose(found.direction, offset / np.linalg.norm(offset, axis=1, keepdims=True), atol=1e-4)
  features = RNG.normal(size=(3, 5, FEATURES)).astype(np.float32)
  np.testing.assert_allclose(unseen.cosine_scores(features, found), cosines(features, offset, centre), atol=1e-4)


def test_the_ledger_reads_through_it():
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  everything = jnp.ones(CLASSES, bool)
  # The map, with the matrix that it inverts, and the offsets.
  at_least = 2 * CLASSES * SIZE * (SIZE + 2 * FEATURES)
  found = ledger.flops(
    lambda table, means: unseen.prototypes(table, means, everything, PENALTY),
    shape(CLASSES, SIZE),
    shape(CLASSES, FEATURES),
  )
  assert at_least <= found <= 1.2 * at_least
  # Cosines of both, once for all permutations.
  at_least = 2 * CLASSES**2 * (SIZE + FEATURES)
  found = ledger.flops(
    lambda table, places: unseen.table_test(table, places, everything), shape(CLASSES, SIZE), shape(CLASSES, FEATURES)
  )
  assert at_least <= found <= 1.2 * at_least


def test_a_linear_world_is_read_off_its_table():
  """Features are a linear function of embeddings that the seen classes span: unseen means are found."""
  table = semantics.normalise(np.random.default_rng(3).normal(size=(12, 4)))
  means = table @ np.random.default_rng(4).normal(size=(4, FEATURES)) + 3.0
  seen = np.arange(12) < 9
  found = fit(table, means, seen, 1e-4)
  scores = unseen.cosine_scores(jnp.asarray(means, jnp.float32), found)
  np.testing.assert_allclose(np.diagonal(scores), 1.0, atol=1e-3)


@pytest.mark.parametrize("number", [1, 2])
def test_with_hardly_anything_seen_it_stays_finite(number):
  seen = np.arange(CLASSES) < number
  examples = jnp.asarray(RNG.normal(size=(CLASSES, 3, FEATURES)), jnp.float32)
  found = fit(TABLE, MEANS, seen, PENALTY)
  scores = unseen.cosine_scores(examples, found)
  reading = read(scores, seen, found, 0.0)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(reading))
  assert float(table_test(TABLE, MEANS, seen)) == 1.0


def test_at_the_usual_level_no_three_classes_can_pass():
  every = [float(table_test(MEANS, MEANS, np.arange(CLASSES) < number)) for number in (3, 4, CLASSES)]
  assert every[0] == pytest.approx(1 / 6, abs=0.03) and every[1] == pytest.approx(1 / 24, abs=0.02)
  assert every[2] < 0.01


# --- when to answer ---------------------------------------------------------------------------------------------------


def accuracy_at(shift, scores, labels, seen):
  """The share of all examples that are right when seen scores are lowered by the shift."""
  lowered = scores - shift * seen
  return np.mean(np.argmax(lowered, axis=1) == labels)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [0.5, 0.8, 1.0])
def test_the_shift_is_the_largest_that_keeps_enough(seed, keep):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(41, CLASSES)).astype(np.float32)
  labels = rng.choice(np.flatnonzero(SEEN), 41)
  scores[np.arange(41), labels] += 1.5
  right = np.argmax(np.where(SEEN, scores, -np.inf), axis=1) == labels
  shift = float(stacking(scores, right, SEEN, keep))
  needed = keep * right.mean()
  assert accuracy_at(shift, scores, labels, SEEN) >= needed - 1e-9
  best = max(s for s in np.linspace(-6, 6, 4001) if accuracy_at(s, scores, labels, SEEN) >= needed - 1e-9)
  if keep == 1.0:
    assert shift == pytest.approx(best - 1.0, abs=0.01)  # a unit below the smallest lead
  else:
    leads = np.sort(np.where(SEEN, scores, -np.inf).max(1) - np.where(SEEN, -np.inf, scores).max(1))
    assert leads[np.searchsorted(leads, best - 0.01)] >= shift - 1e-6 and shift <= best + 1e-6
    assert accuracy_at(best + 0.01, scores, labels, SEEN) < needed


def test_without_examples_nothing_is_answered_and_without_unseen_classes_nothing_is_shifted():
  scores = jnp.ones((4, CLASSES))
  nobody = jnp.zeros(4, bool)
  assert float(stacking(scores, nobody, jnp.asarray(SEEN), 0.8)) < -1e5
  assert float(stacking(scores, ~nobody, jnp.ones(CLASSES, bool), 0.8)) == 0.0


def test_the_unit_is_the_mean_lead_among_seen_classes():
  scores = RNG.normal(size=(20, CLASSES))
  mask = np.arange(20) < 13
  ordered = np.sort(scores[:13][:, SEEN], axis=1)
  want = (ordered[:, -1] - ordered[:, -2]).mean()
  assert float(unseen.gap(jnp.asarray(scores), jnp.asarray(mask), jnp.asarray(SEEN))) == pytest.approx(want, rel=1e-5)


def test_answers_are_those_of_lowered_seen_scores_and_seen_classes_keep_their_order():
  logits, scores = (RNG.normal(size=(200, CLASSES)).astype(np.float32) for _ in range(2))
  got = np.asarray(unseen.answer(logits, scores, SEEN, 0.7, jnp.bool_(True)))
  lowered = scores - 0.7 * SEEN
  is_unseen = ~SEEN[np.argmax(lowered, axis=1)]
  want = np.where(
    is_unseen,
    np.argmax(np.where(SEEN, -np.inf, scores), axis=1),
    np.argmax(np.where(SEEN, logits, -np.inf), axis=1),
  )
  assert 0.2 < is_unseen.mean() < 0.9
  np.testing.assert_array_equal(np.argmax(got, axis=1), want)
  closed = np.asarray(unseen.answer(logits, scores, SEEN, 0.7, jnp.bool_(False)))
  assert SEEN[np.argmax(closed, axis=1)].all()
  np.testing.assert_array_equal(closed[:, SEEN], logits[:, SEEN])
  order = lambda x: np.argsort(np.where(SEEN, np.inf, x), axis=1)
  np.testing.assert_array_equal(order(got), order(scores))


def test_while_nothing_is_seen_all_logits_stay():
  logits, scores = (RNG.normal(size=(9, CLASSES)).astype(np.float32) for _ in range(2))
  for trusted in (True, False):
    got = unseen.answer(logits, scores, np.zeros(CLASSES, bool), jnp.float32(-1e6), jnp.bool_(trusted))
    np.testing.assert_array_equal(got, logits)


def test_logits_of_an_anchored_head_are_only_shifted():
  """Scores that are the logits themselves: plain calibrated stacking."""
  logits = jnp.asarray(RNG.normal(size=(9, CLASSES)), jnp.float32)
  got = unseen.answer(logits, logits, jnp.asarray(SEEN), jnp.float32(2.0), jnp.bool_(True))
  np.testing.assert_allclose(got, logits + 2.0 * ~SEEN, atol=1e-5)


def test_a_head_on_samples_learns_them_and_leaves_the_base():
  model = nn.classifier("mlp", (4, 4, 1), CLASSES, head="anchored", embeddings=jnp.asarray(TABLE))
  params = jax.jit(model.init)(jax.random.key(0))
  centres = 3 * np.eye(CLASSES, 200, dtype=np.float32)[:, None]
  features = jnp.asarray(np.abs(np.random.default_rng(1).normal(size=(CLASSES, 8, 200)) * 0.3 + centres), jnp.float32)
  head = jax.jit(lambda head: unseen.head_on_samples(model, head, features, 200))(params.head)
  right = lambda head: (np.argmax(model.head(head, features), axis=-1) == np.arange(CLASSES)[:, None]).mean()
  assert right(params.head) < 0.6 and right(head) > 0.95


# --- the table --------------------------------------------------------------------------------------------------------


def pairs(rows, seen):
  """Cosines of all pairs of seen classes, seen from their mean."""
  rows = np.asarray(rows, float)[seen] - np.asarray(rows, float)[seen].mean(0)
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  return rows @ rows.T


def p_by_hand(table, places, seen):
  """The share of all permutations of seen classes whose correlation is as large."""
  first, second = pairs(table, seen), pairs(places, seen)
  upper = np.triu_indices(len(first), 1)
  orders = [list(order) for order in itertools.permutations(range(len(first)))]
  found = [np.corrcoef(first[np.ix_(order, order)][upper], second[upper])[0, 1] for order in orders]
  return np.mean(np.array(found) >= found[0] - 1e-6)


def world(kind, seed=0, num_classes=9, noise=0.3):
  """(table, examples [C, 20, F]): features follow the attributes; the table is those, or says nothing."""
  rng = np.random.default_rng(seed)
  attributes = (rng.random((num_classes, 6)) < 0.5).astype(float)
  attributes[attributes.sum(1) == 0, 0] = 1
  means = attributes @ rng.normal(size=(6, 16))
  examples = means[:, None] + noise * rng.normal(size=(num_classes, 20, 16))
  tables = {
    "attributes": attributes + 1e-3 * rng.normal(size=attributes.shape),
    "onehot": np.eye(num_classes),
    "random": rng.normal(size=(num_classes, 64)),
  }
  table = semantics.normalise(tables[kind], max_size=64)
  # Columns of zeros change nothing: one compilation serves all.
  return np.pad(table, ((0, 0), (0, 64 - table.shape[1]))), examples.astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["attributes", "random"])
def test_a_table_is_judged_by_permutations_of_seen_classes(kind, seed):
  table, examples = world(kind, seed)
  seen = np.isin(np.arange(9), [0, 2, 3, 5, 7, 8])
  places = np.where(seen[:, None], examples.mean(1), np.nan)  # what is unseen is not read
  assert float(table_test(table, places, seen)) == pytest.approx(p_by_hand(table, places, seen), rel=0.15, abs=0.01)


def test_a_table_that_says_something_is_trusted_and_controls_are_not():
  p_value = lambda kind, seed: float(table_test(world(kind, seed)[0], world(kind, seed)[1].mean(1), np.arange(9) < 8))
  assert max(p_value("attributes", seed) for seed in range(3)) < 0.01
  assert all(p_value("onehot", seed) == 1.0 for seed in range(3))
  of_random = np.array([p_value("random", seed) for seed in range(60)])
  assert np.mean(of_random <= 0.05) <= 0.15 and 0.35 < of_random.mean() < 0.65


def test_a_table_is_judged_by_real_means_or_by_what_real_examples_taught_the_head():
  means = jnp.asarray(RNG.normal(size=(CLASSES, 200)), jnp.float32)
  for head in nn.HEADS:
    model = nn.classifier("mlp", (4, 4, 1), CLASSES, head=head, embeddings=jnp.asarray(TABLE))
    params = model.init(jax.random.key(0))
    np.testing.assert_array_equal(unseen.judged_by(model, params.head, means, real=True), means)
    found = unseen.judged_by(model, params.head, means, real=False)
    if head == "free":
      [kernel] = [x for x in jax.tree.leaves(params.head) if x.ndim == 2]
      np.testing.assert_allclose(found, kernel.T, atol=1e-6)
    else:  # its weights are the table's
      np.testing.assert_array_equal(found, means)


def test_one_hot_prototypes_of_unseen_classes_all_tie():
  """The trap: they are equal but for rounding, so that an argmax would be a coin that falls on its edge."""
  table, examples = world("onehot")
  seen = jnp.arange(9) < 6
  found = fit(table, examples.mean(1), seen, PENALTY)
  np.testing.assert_array_equal(found.direction[6:], 0)
  scores = unseen.cosine_scores(examples.reshape(-1, 16), found)
  np.testing.assert_allclose(shared_answers(scores, ~seen)[:, 6:], 1 / 3, atol=1e-6)


# --- in AP-FL ---------------------------------------------------------------------------------------------------------


def test_features_drawn_around_means_have_their_moments_and_are_not_negative():
  mean = np.array([[3.0, 0.0, 5.0], [4.0, 6.0, 2.0]])
  square = mean**2 + np.array([[0.5, 0.0, 1.0], [0.2, 2.0, 0.1]]) ** 2
  around = jax.jit(unseen.around, static_argnums=2)
  drawn = np.asarray(around(mean, square, 4000, jax.random.key(0)))
  np.testing.assert_allclose(drawn.mean(1), mean, atol=0.1)
  np.testing.assert_allclose((drawn**2).mean(1), square, rtol=0.05, atol=0.01)
  assert np.asarray(around(np.zeros((1, 2)), np.ones((1, 2)), 50, jax.random.key(1))).min() == 0.0


@pytest.mark.parametrize("kind", ["anchored", "generator_head"])
def test_unseen_classes_are_read_by_the_logits_of_the_head_or_of_one_trained_on_samples(kind):
  """The head is linear and right of seen classes alone, where it says little of the others."""
  rng = np.random.default_rng(5)
  features = np.float32(2 * MEANS[:, None] + 0.3 * rng.normal(size=(CLASSES, 24, FEATURES)))
  head = np.float32(MEANS.T / 2 + 0.1 * rng.normal(size=(FEATURES, CLASSES)))
  head[:, ~SEEN] = 0.1 * rng.normal(size=(FEATURES, (~SEEN).sum()))
  model = linear.MODEL._replace(semantics=lambda head, features: features)
  task = linear.task()._replace(num_classes=CLASSES, embeddings=jnp.asarray(TABLE), model=model)
  settings = SETTINGS._replace(kind=kind, p_value=1.0)
  found = jax.jit(lambda *x: unseen.fit(task, settings, *x, jnp.asarray(SEEN), real=False))(
    head, features, features.mean(1)
  )
  label = np.arange(CLASSES)[:, None]
  if kind == "anchored":
    assert found.source == ()
    judged = features @ head
  else:
    # The shift is that of examples which did not train the head; it knows unseen classes now, which it did not.
    judged = features[:, 1::2] @ np.asarray(found.source)
    right = lambda logits: (logits.argmax(-1) == label)[~SEEN].mean()
    assert right(features[:, 1::2] @ head) < 0.5 and right(judged) > 0.9
  logits = judged[SEEN].reshape(-1, CLASSES)
  ordered = np.sort(logits[:, SEEN], axis=1)
  unit = (ordered[:, -1] - ordered[:, -2]).mean()
  np.testing.assert_allclose(found.unit, unit, rtol=1e-4)
  correct = np.flatnonzero(SEEN)[logits[:, SEEN].argmax(1)] == np.repeat(np.flatnonzero(SEEN), judged.shape[1])
  lead = np.sort((logits[:, SEEN].max(1) - logits[:, ~SEEN].max(1))[correct] / unit)[::-1]
  kept = int(np.ceil(0.8 * len(lead)))
  np.testing.assert_allclose(found.shift, lead[kept - 1 : kept + 1].mean(), rtol=1e-3)
  assert bool(found.trusted)


LOST = 3  # the class of `fast` that nobody holds


def lost_inputs():
  """Everybody has examples of other classes in place of those of the lost one."""
  inputs = tasks.inputs("ap_fl")
  store, start = inputs.federation.store, int(inputs.pooled.start)
  index, labels = np.asarray(store.index).copy(), np.asarray(store.labels)
  lost = np.flatnonzero(labels[index[:start]] == LOST)
  index[lost] = np.resize(index[:start][labels[index[:start]] != LOST], len(lost))
  federation = inputs.federation._replace(store=store._replace(index=jnp.asarray(index)))
  return inputs._replace(federation=federation, settings=inputs.settings | {"embeddings": FAST})


FAST = jnp.asarray(semantics.normalise([[0, 0], [0, 1], [1, 0], [1, 1]]))  # where the light is


@functools.cache
def lossy(kind):
  """The simulator of a kind of answers on `fast`, on real means, without a generator; the largest p-value is traced."""

  def build(traced):
    model = nn.classifier("mlp", tasks.IMAGE_SHAPE, tasks.NUM_CLASSES, head="anchored", embeddings=traced["embeddings"])
    sgd = LocalSGD(traced["learning_rate"], tasks.BATCH_SIZE, 1, tasks.STEPS, 20, "examples", "none")
    task = Task(
      tasks.NUM_CLIENTS, tasks.NUM_CLASSES, tasks.IMAGE_SHAPE, traced["embeddings"], model, sgd, traced["rounds"]
    )
    settings = {"unseen": kind, "unseen_p_value": traced["largest"], "tier": "s2", "source": "none"}
    # What is the quickest to compile; personal models differ from the global one.
    quick = {"friend": "global", "friend_steps": 0, "interpolation": "fixed"}
    return algorithms.ap_fl(task, **settings, **quick), population.everyone()

  return simulation.simulator(
    build,
    gated(1.0),
    tasks.NUM_CLASSES,
    population_size=tasks.NUM_CLIENTS,
    cohort_size=tasks.NUM_CLIENTS,
    chunk=5,
  )


def gated(largest):
  return tasks.with_settings(lost_inputs(), largest=largest)


def outcome(kind, largest):
  """(server, pooled confusion of the global model, personal scores) on `fast` without one class."""
  simulator, inputs = lossy(kind), gated(largest)
  state, _ = simulator.advance(simulator.init(inputs), inputs, np.int32(5))
  pooled = np.asarray(simulator.score_pooled(state, inputs, np.ones(tasks.NUM_CLASSES, bool)))
  return state.server, pooled, tasks.personal(simulator, state, inputs)


@pytest.mark.slow  # to compile; closed answers of any logits are those of seen classes above
def test_a_table_that_is_not_trusted_changes_no_bit():
  plain, *answers = outcome("none", 1.0)
  closed = outcome("prototypes", 0.05)
  tasks.assert_same(closed[0].params, plain.params)
  tasks.assert_same(closed[1:], tuple(answers))


def test_models_answer_with_a_lost_class_only_if_the_table_is_trusted():
  # Three seen classes are too few to judge a table by: it is not trusted unless everything is.
  plain, pooled, personal = outcome("prototypes", 0.05)
  assert not plain.reading.trusted and pooled[:, LOST].sum() == 0
  server, found, mine = outcome("prototypes", 1.0)
  tasks.assert_same(server.params, plain.params)
  assert bool(server.reading.trusted)
  recall = np.diag(found) / found.sum(1)
  assert recall[LOST] > 0.5
  assert recall[:LOST].mean() > 0.7 * (np.diag(pooled) / pooled.sum(1))[:LOST].mean()
  # Own accuracy is not paid for it.
  own = lambda scores: np.trace(np.asarray(scores.own), axis1=1, axis2=2)
  assert own(mine).sum() >= 0.98 * own(personal).sum()


def test_a_client_loses_no_validation_example_to_an_unseen_class():
  inputs = lost_inputs()
  model = nn.classifier("mlp", tasks.IMAGE_SHAPE, tasks.NUM_CLASSES, head="anchored", embeddings=FAST)
  params = jax.jit(model.init)(jax.random.key(0))
  federation = inputs.federation
  data = Data(federation.store, *(type(s)(s.start[0], s.size[0]) for s in (federation.train, federation.validation)))
  classes = jnp.arange(tasks.NUM_CLASSES) != LOST
  generous = unseen.Reading((), jnp.float32(1), jnp.float32(50), jnp.bool_(True))
  predict = lambda images: training.predict(model, params, images)
  for_client = jax.jit(lambda data: unseen.for_client(model, generous, predict, data, classes))
  careful = for_client(data)
  span, store = data.validation, jax.tree.map(np.asarray, data.store)
  rows = store.index[int(span.start) : int(span.start) + int(span.size)]
  labels = store.labels[rows]
  prediction = jax.jit(predict)(store.images[rows] / np.float32(255))
  right = np.where(classes, prediction.logits, -np.inf).argmax(1) == labels
  placed = jax.jit(lambda reading: unseen.placed(model, reading, prediction, classes).logits)
  after = lambda reading: np.asarray(placed(reading)).argmax(1) == labels
  assert right.any() and not after(generous).any()
  np.testing.assert_array_equal(after(careful), right)
  nobody = data._replace(validation=data.validation._replace(size=jnp.int32(0)))
  assert float(for_client(nobody).shift) < -1e5


@pytest.mark.parametrize(
  "settings, word",
  [
    ({"unseen": "prototypes", "source": "noise"}, "--ap_fl_tier=s2"),
    ({"unseen": "generator_head", "tier": "s2"}, "--ap_fl_tier=s1"),
    ({"tier": "s0"}, "ap_fl_tier: .*--head=free"),
    ({"tier": "s0", "head": "free", "mask_softmax": False, "augment": "full"}, "ap_fl_tier: .*--ap_fl_mask_softmax"),
    ({"unseen": "anchored", "head": "free"}, "--head=anchored or cosine"),
    ({"unseen": "prototypes", "interpolation": "output"}, "--ap_fl_interpolation=grid, grad, size, layer, fixed"),
  ],
)
def test_what_cannot_be_known_is_refused(settings, word):
  settings = dict(settings)
  head, augment = settings.pop("head", "anchored"), settings.pop("augment", "none")
  model = nn.classifier("mlp", tasks.IMAGE_SHAPE, tasks.NUM_CLASSES, head=head, embeddings=FAST)
  sgd = LocalSGD(jnp.float32(0.1), 4, 1, 2, 4, "examples", augment)
  task = Task(3, tasks.NUM_CLASSES, tasks.IMAGE_SHAPE, FAST, model, sgd, jnp.int32(3))
  with pytest.raises(InputError, match=word):
    algorithms.ap_fl(task, friend_steps=0, **settings)
