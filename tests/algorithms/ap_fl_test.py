"""AP-FL: the sanity equalities of the method, and each of its parts against an oracle of its own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import algorithms, nn, population, semantics, simulation
from apfl_jax.algorithms.ap_fl import generation, sources, statistics
from apfl_jax.types import Generator, LocalSGD, Task
from tests import tasks

ROUNDS = 3


@functools.cache
def simulator(name, **settings):
  """A method's simulator on `fast`, nobody dropping; AP-FL's coefficients come with the inputs."""

  def build(traced):
    model = nn.classifier("mlp", tasks.IMAGE_SHAPE, tasks.NUM_CLASSES, embeddings=traced["embeddings"])
    sgd = LocalSGD(traced["learning_rate"], tasks.BATCH_SIZE, 1, tasks.STEPS, 12, "examples", "shift")
    task = Task(
      tasks.NUM_CLIENTS, tasks.NUM_CLASSES, tasks.IMAGE_SHAPE, traced["embeddings"], model, sgd, traced["rounds"]
    )
    given = {"lambda_base": traced["share"], "lambda_head": traced["share"]} if name == "ap_fl" else {}
    return algorithms.METHODS[name].make(task, **settings, **given), population.everyone()

  return simulation.simulator(
    build,
    at(0.0),
    tasks.NUM_CLASSES,
    population_size=tasks.NUM_CLIENTS,
    cohort_size=tasks.NUM_CLIENTS,
    chunk=ROUNDS,
  )


def at(share):
  return tasks.with_settings(tasks.inputs("fedavg"), share=share)


# --- the equalities of method 5, row S -----------------------------------------------------------------------------


def test_without_synthetic_data_it_is_fedavg_with_fine_tuning_at_lambda_one_and_the_global_model_at_zero():
  quiet = {"source": "none", "generator_steps": 0, "mask_softmax": False, "tier": "s0"}
  own = simulator("ap_fl", beta=0.0, friend_steps=0, friend_start="global", interpolation="fixed", **quiet)
  state, _ = own.advance(own.init(at(1.0)), at(1.0), np.int32(ROUNDS))
  tuned = simulator("fedavg_ft")
  expected, _ = tuned.advance(tuned.init(at(0.0)), at(0.0), np.int32(ROUNDS))
  tasks.assert_same(state.server.params, expected.server)
  personal = tasks.personal(own, state, at(1.0))
  tasks.assert_same(personal._replace(described={}), tasks.personal(tuned, expected, at(0.0)))
  rows, ok = np.arange(tasks.NUM_CLIENTS, dtype=np.int32), np.ones(tasks.NUM_CLIENTS, bool)
  shared = own.score_global(state, at(0.0), rows, ok)
  tasks.assert_same(tasks.personal(own, state, at(0.0)).own, shared.own)


# --- rounds -----------------------------------------------------------------------------------------------------------


@functools.cache
def rounds_alone():
  """The simulator without a generator; uploads get lost at `drop_rates`."""

  def build(traced):
    method = algorithms.ap_fl(_task(traced, head="free"), source="none", friend_steps=2)
    return method, population.make(("cold", "bernoulli"), tasks.NUM_CLIENTS, traced["drop_rates"])

  return simulation.simulator(
    build,
    tasks.inputs("ap_fl"),
    tasks.NUM_CLASSES,
    population_size=tasks.NUM_CLIENTS,
    cohort_size=tasks.COHORT_SIZE,
  )


def test_classes_that_nobody_holds_are_left_alone_by_the_masked_softmax_and_are_not_answered():
  inputs = tasks.inputs("ap_fl")
  labels = np.asarray(inputs.federation.store.labels)
  absent = tasks.NUM_CLASSES - 1
  held = jnp.asarray(np.where(labels == absent, 0, labels))
  inputs = inputs._replace(federation=inputs.federation._replace(store=inputs.federation.store._replace(labels=held)))
  simulator, settings = rounds_alone(), inputs
  start = tasks.on_host(simulator.init(settings).server.params.head)
  state, _ = simulator.advance(simulator.init(settings), settings, np.int32(3))
  moved = jax.tree.map(
    lambda a, b: np.abs(np.asarray(a) - b).max(axis=tuple(range(a.ndim - 1))), state.server.params.head, start
  )
  for change in jax.tree.leaves(moved):
    assert change[absent] == 0
    assert (change[:absent] > 0).all()
  everything = np.ones(tasks.NUM_CLASSES, bool)
  assert np.asarray(simulator.score_pooled(state, settings, everything))[:, absent].sum() == 0
  # Told that it is one of two classes, it may answer with the absent one: the order among logits is kept.
  assert np.asarray(simulator.score_pooled(state, settings, np.arange(4) == absent))[:, absent].sum() > 0


def test_each_client_is_counted_once_from_its_first_upload_that_arrives():
  inputs = tasks.with_settings(tasks.inputs("ap_fl"), drop_rates=(0.0, 0.5))
  simulator = rounds_alone()
  federation = jax.tree.map(np.asarray, inputs.federation)
  arrived = set()
  for state, metrics in tasks.each_round(simulator, inputs, 4):
    arrived |= set(metrics.ids[metrics.status == 2].tolist())
    expected = np.zeros(tasks.NUM_CLASSES)
    for client in arrived:
      span = slice(federation.train.start[client], federation.train.start[client] + federation.train.size[client])
      expected += np.bincount(federation.store.labels[federation.store.index[span]], minlength=tasks.NUM_CLASSES)
    np.testing.assert_array_equal(state.server.counts, expected)
    assert set(np.flatnonzero(state.server.counted)) == arrived
  assert 0 < len(arrived) < 4 * tasks.COHORT_SIZE


@pytest.mark.slow
def test_the_generator_learns_what_the_teacher_takes_for_each_class():
  inputs = tasks.inputs("ap_fl")

  def build(traced):
    task = _task(traced, head="anchored")
    small = {"generator_steps": 100, "generator_batch": 40, "generator_warmup": 0.2, "friend_steps": 2}
    return algorithms.ap_fl(task, **small), population.everyone()

  simulator = simulation.simulator(
    build, inputs, tasks.NUM_CLASSES, population_size=tasks.NUM_CLIENTS, cohort_size=tasks.NUM_CLIENTS
  )
  state = simulator.init(inputs)
  untrained = _agreement(inputs, state.server)
  warming, _ = simulator.advance(state, inputs, np.int32(2))
  warm = tasks.on_host(warming.server.source)
  tasks.assert_same(warm, tasks.on_host(simulator.init(inputs).server.source))  # not before its warm-up is over
  state, _ = simulator.advance(warming, inputs, np.int32(4))
  assert untrained < 0.6
  assert _agreement(inputs, state.server) > 0.9
  assert (np.asarray(state.server.trust) > 0.8).all()


def _agreement(inputs, server) -> float:
  """Share of generated samples that the global model takes for the class asked for."""
  task = _task(inputs.settings, head="anchored")
  images = algorithms.METHODS["ap_fl"].samples(task, server, jax.random.key(0), 32)
  features, _ = task.model.base(server.params.base, images.reshape(-1, *tasks.IMAGE_SHAPE))
  answer = np.argmax(task.model.head(server.params.head, features), axis=-1).reshape(tasks.NUM_CLASSES, -1)
  return float((answer == np.arange(tasks.NUM_CLASSES)[:, None]).mean())


def _task(traced, *, head) -> Task:
  model = nn.classifier("mlp", tasks.IMAGE_SHAPE, tasks.NUM_CLASSES, head=head, embeddings=traced["embeddings"])
  sgd = LocalSGD(traced["learning_rate"], tasks.BATCH_SIZE, 1, tasks.STEPS, 4, "examples", "none")
  return Task(
    tasks.NUM_CLIENTS, tasks.NUM_CLASSES, tasks.IMAGE_SHAPE, traced["embeddings"], model, sgd, traced["rounds"]
  )


# --- the generator's requests and losses ------------------------------------------------------------------------------

TABLE = jnp.asarray(semantics.normalise(np.random.default_rng(0).normal(size=(5, 6))))
COUNTS = jnp.array([400.0, 0.0, 100.0, 25.0, 0.0])


@functools.partial(jax.jit, static_argnames="size")
def drawn(counts, on, size, key):
  return generation.draw_rows(TABLE, counts, on, size, key)


def test_requests_follow_the_square_root_of_the_counts():
  rows = [drawn(COUNTS, True, 1000, jax.random.key(seed)) for seed in range(20)]
  seen = np.concatenate([r.label[np.asarray(r.seen) > 0] for r in rows])
  share = np.bincount(seen, minlength=5) / len(seen)
  np.testing.assert_allclose(share, [20 / 35, 0, 10 / 35, 5 / 35, 0], atol=0.02)
  unseen = np.concatenate([r.label[-200:] for r in rows])
  np.testing.assert_allclose(np.bincount(unseen, minlength=5) / len(unseen), [0, 0.5, 0, 0, 0.5], atol=0.03)
  for size in (10, 11, 24):  # whatever the size, the first rows are pairs and each row is of one kind
    odd = drawn(COUNTS, True, size, jax.random.key(size))
    pairs = int(odd.seen.sum()) // 2
    assert len(odd.label) == size and int(odd.seen.sum()) == 2 * pairs == int((size - 2 * (size // 5)) // 2) * 2
    np.testing.assert_array_equal(odd.label[: 2 * pairs : 2], odd.label[1 : 2 * pairs : 2])
  one = rows[0]
  np.testing.assert_array_equal(one.label[:600:2], one.label[1:600:2])  # pairs share a label
  np.testing.assert_allclose(np.linalg.norm(one.embedding, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(one.embedding[:600], TABLE[one.label[:600]], atol=1e-6)
  # Hallucinated rows lie between two seen classes: in the plane of some pair of them.
  seen_rows = np.asarray(TABLE)[[0, 2, 3]]
  for mixed in np.asarray(one.embedding[600:620]):
    residuals = [
      np.linalg.norm(mixed - pair.T @ np.linalg.lstsq(pair.T, mixed, rcond=None)[0])
      for pair in (seen_rows[list(p)] for p in itertools.combinations_with_replacement(range(3), 2))
    ]
    assert min(residuals) < 1e-4


def test_unseen_rows_are_off_before_their_time_and_where_nothing_is_unseen():
  draw = lambda counts, on: drawn(counts, on, 50, jax.random.key(0))
  assert float(draw(COUNTS, True).active.sum()) == 50
  assert float(draw(COUNTS, False).active.sum()) == 40
  assert float(draw(jnp.ones(5), True).active.sum()) == 40
  assert float(draw(COUNTS, False).labelled.sum()) == 30


def test_moments_are_those_of_numpy_over_unmasked_rows():
  rng = np.random.default_rng(0)
  taps = (rng.normal(size=(6, 3, 3, 4)).astype(np.float32), rng.normal(size=(6, 5)).astype(np.float32))
  mask = np.array([1, 1, 0, 1, 0, 0], np.float32)
  for tap, got in zip(taps, statistics.moments(taps, mask), strict=True):
    kept = tap[mask > 0].reshape(-1, tap.shape[-1])
    np.testing.assert_allclose(got.mean, kept.mean(0), atol=1e-5)
    np.testing.assert_allclose(got.square, (kept**2).mean(0), atol=1e-5)


def test_distance_of_statistics_is_its_formula():
  rng = np.random.default_rng(1)
  a, b = rng.normal(size=(2, 50, 3)).astype(np.float32) * [[[1.0, 2, 3]], [[2.0, 1, 1]]]
  of = lambda x: (statistics.Moments(jnp.asarray(x.mean(0)), jnp.asarray((x**2).mean(0))),)
  va, vb = a.var(0), b.var(0)
  expected = ((a.mean(0) - b.mean(0)) ** 2).mean() / vb.mean()
  expected += 0.1 * (np.log((va + 1e-4) / (vb + 1e-4)) ** 2).mean()
  assert float(statistics.distance(of(a), of(b))) == pytest.approx(expected, rel=1e-4)
  assert float(statistics.distance(of(a), of(a))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("image_moments", [False, True])
def test_each_loss_is_in_the_total_with_its_weight_and_sign(image_moments):
  """The loss as a function of one weight is linear, with the term's own value as slope, and each is worth lowering."""
  task = _task(tasks.inputs("ap_fl").settings, head="anchored")
  noise_size = 3
  images = jnp.clip(jax.random.uniform(jax.random.key(1), (20, *tasks.IMAGE_SHAPE)), 0, 1)
  generator = Generator(init=lambda key: (), apply=lambda params, noise, e: images, noise_size=noise_size)
  source = sources.source(task, "image", image_moments=image_moments)._replace(generator=generator)
  key = jax.random.key(3)

  @jax.jit
  def facts():
    teacher = task.model.init(jax.random.key(0))
    rows = generation.draw_rows(task.embeddings, jnp.array([9.0, 4, 1, 0]), jnp.bool_(True), 20, jax.random.key(2))
    wanted = statistics.moments(task.model.base(teacher.base, images * 0.5)[1], jnp.ones(20))
    features, taps = task.model.base(teacher.base, images)
    away = statistics.distance(statistics.moments(taps, rows.seen), wanted)
    if image_moments:
      wanted = (*statistics.moments((images.reshape(20, -1) * 0.25,), jnp.ones(20)), *wanted)
    return teacher, rows, wanted, task.model.semantics(teacher.head, features), away

  teacher, rows, wanted, meant, away = facts()

  @jax.jit
  def total(weights):
    return generation.generator_loss(
      task,
      source,
      (),
      teacher,
      rows,
      key,
      weights=weights,
      statistics=statistics.Statistics(wanted, ()),
      classes=jnp.ones(4, bool),
    )

  none = generation.Weights(*[0.0] * len(generation.Weights._fields))
  loss = lambda **weights: float(total(none._replace(**weights)))
  flat = np.asarray(images)
  if image_moments:  # compared as a first layer whose channels are pixels
    made, real = flat.reshape(20, -1)[np.asarray(rows.seen) > 0], flat.reshape(20, -1) * 0.25
    away += ((made.mean(0) - real.mean(0)) ** 2).mean() / real.var(0).mean()
    away += 0.1 * (np.log((made.var(0) + 1e-4) / (real.var(0) + 1e-4)) ** 2).mean()
  noise = np.asarray(jax.random.normal(jax.random.split(key)[0], (20, noise_size)))
  meant = np.asarray(meant) / np.linalg.norm(meant, axis=1, keepdims=True)
  rough = np.abs(np.diff(flat, axis=1)).mean((1, 2, 3)) + np.abs(np.diff(flat, axis=2)).mean((1, 2, 3))
  moved = np.abs(flat[0:12:2] - flat[1:12:2]).mean((1, 2, 3)) / np.abs(noise[0:12:2] - noise[1:12:2]).mean(1)
  expected = {
    "variation": np.maximum(rough - 0.16, 0).mean(),
    "diversity": (1 / (moved + 0.01)).mean(),
    "semantic": ((meant - np.asarray(rows.embedding)) ** 2).sum(1).mean(),
    "statistics": float(away),
  }
  for term, value in expected.items():
    assert value > 0
    assert loss(**{term: 2.0}) - loss() == pytest.approx(2 * value, rel=1e-3), term
