"""AP-FL's server: sources of samples, what each tier tells, each loss, the schedule, the memory of lost classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.special

from apfl_jax import algorithms, data, nn, semantics, training
from apfl_jax.algorithms.ap_fl import generation, matching, projections, server, sources, statistics
from apfl_jax.algorithms.ap_fl.state import Kept, Sent
from apfl_jax.errors import InputError
from apfl_jax.metrics import ledger
from apfl_jax.types import Data, Generator, LocalSGD, Received, Span, Store, Task, Visit
from tests import tasks

C, SHAPE = tasks.NUM_CLASSES, tasks.IMAGE_SHAPE
_RNG = np.random.default_rng(0)
_EMBEDDINGS = jnp.asarray(semantics.embeddings("onehot", tuple("abcd"), "fast", rng=_RNG))


@functools.cache
def make_task(head="free", rounds=10, augment="none") -> Task:
  """The same one for all tests that ask for the same, so that its model is compiled once."""
  model = nn.classifier("mlp", SHAPE, C, head=head, embeddings=_EMBEDDINGS)
  sgd = LocalSGD(jnp.float32(0.1), 16, 1, 5, 10, "examples", augment)
  return Task(20, C, SHAPE, _EMBEDDINGS, model, sgd, jnp.int32(rounds))


def examples() -> tuple[Data, np.ndarray, np.ndarray]:
  """A client with 60 examples of three of the classes, one of them twice in its index; its images and labels."""
  dataset = data.load("fast")
  index = np.flatnonzero(dataset.labels != 2)[:60].astype(np.int32)
  index[5] = index[3]
  store = Store(jnp.asarray(dataset.images), jnp.asarray(dataset.labels, jnp.int32), jnp.asarray(index))
  span = Span(jnp.int32(0), jnp.int32(60))
  return Data(store, span, span), dataset.images[index] / np.float32(255), dataset.labels[index]


# --- sources ----------------------------------------------------------------------------------------------------------


def known(task: Task, images=None, labels=None) -> statistics.Statistics:
  """What a server of tier s2 knows of some examples."""
  sums = statistics.no_sums(task, products=True)
  if images is not None:
    sums = with_images(sums, jnp.asarray(images), jnp.asarray(labels))
  return statistics.Statistics((), often(sums))


@jax.jit
def with_images(sums: statistics.ByClass, images, labels) -> statistics.ByClass:
  """The sums with those of these images in their place."""
  hot = jnp.eye(C)[labels]
  return sums._replace(
    counts=jnp.sum(hot, axis=0), images=statistics.class_sums(hot, images), products=projections.products(hot, images)
  )


@jax.jit
def often(sums: statistics.ByClass) -> statistics.ByClass:
  """Of so many examples that variances are what they are."""
  return jax.tree.map(lambda x: 1e4 * x, sums)


@pytest.mark.parametrize("name", sources.SOURCES)
def test_products_are_sent_only_to_sources_that_read_them(name):
  source = sources.source(make_task(), name, matching.Settings(4, 1, 0.1, 1.0))
  assert source.products == (name in ("image", "matched"))


@pytest.mark.parametrize("name", [name for name in sources.SOURCES if name != "untrained"])  # as image
def test_every_source_draws_for_labels_what_it_says(name):
  task = make_task()
  source = sources.source(task, name, matching.Settings(4, 1, 0.1, 1.0))
  params = jax.jit(task.model.init)(jax.random.key(2))
  images = jnp.asarray(examples()[1][:3])
  facts = known(task, *examples()[1:])

  @jax.jit
  def draw(key):
    samples = source.sample(source.ship(source.init(key), facts), jnp.arange(C), key)
    features = task.model.base(params.base, samples)[0] if source.images else samples
    expected = training.predict(task.model, params, images).logits, task.model.head(params.head, features)
    return samples, source.logits(task.model, params, images, samples), expected

  samples, got, expected = draw(jax.random.key(1))
  assert samples.shape == ((C, *SHAPE) if source.images else (C, 200))
  assert float(samples.min()) >= 0 and (not source.images or float(samples.max()) <= 1)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert source.learns == (name in ("image", "feature"))


def test_class_means_have_the_mean_and_the_deviation_of_the_class():
  task = make_task()
  images, labels = examples()[1:]
  images = 0.3 + 0.2 * images  # far from 0 and 1, so that nothing is cut off
  source = sources.source(task, "class_means")
  label = jnp.repeat(jnp.arange(C), 4000)
  facts = known(task, images, labels)
  samples = jax.jit(lambda key: source.sample(source.ship((), facts), label, key))(jax.random.key(0))
  samples = np.asarray(samples).reshape(C, 4000, *SHAPE)
  for c in (0, 1, 3):
    np.testing.assert_allclose(samples[c].mean(0), images[labels == c].mean(0), atol=0.02)
    np.testing.assert_allclose(samples[c].std(0), images[labels == c].std(0), atol=0.02)


def test_smooth_noise_has_variance_one_and_neighbours_alike():
  noise = np.asarray(jax.jit(lambda key: sources.smooth_noise((2000, 28, 28, 1), key))(jax.random.key(0)))[..., 0]
  np.testing.assert_allclose(noise.var(axis=0), 1, atol=0.15)
  assert (noise[:, 10, 10] * noise[:, 10, 11]).mean() > 0.7
  assert abs((noise[:, 4, 4] * noise[:, 20, 20]).mean()) < 0.1


@pytest.mark.parametrize("name", ["noise", "feature"])
def test_a_bank_holds_the_source_s_samples_to_a_byte(name):
  task = make_task()
  source = sources.source(task, name)

  @jax.jit
  def fill(key):
    weights = source.init(key)
    return sources.fill(source, weights, C, 8, key), source.sample(weights, jnp.repeat(jnp.arange(C), 8), key)

  bank, drawn = fill(jax.random.key(1))
  drawn = np.asarray(drawn).reshape(bank.values.shape)
  assert bank.values.dtype == jnp.uint8
  label = jnp.tile(jnp.arange(C), 50)
  got = np.asarray(sources.banked(source).sample(bank, label, jax.random.key(2)))
  used = set()
  for c, sample in zip(np.asarray(label), got, strict=True):
    off = np.abs(drawn[c] - sample).reshape(8, -1).max(axis=1)
    used.add((int(c), int(off.argmin())))
    assert off.min() <= float(bank.most) / 255 / 2 + 1e-6
  assert len(used) > 4 * 6  # all but a few are drawn


# --- what leaves a client ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [False, True])
def test_clients_send_moments_of_their_images_if_asked_to(asked):
  """Of a client whose examples are all one image they are that image and its square."""
  task, (_, images, _) = make_task(), examples()
  store = examples()[0].store._replace(index=jnp.repeat(examples()[0].store.index[:1], 20))
  span, zero = Span(jnp.int32(0), jnp.int32(20)), jnp.int32(0)
  visit = Visit(zero, zero, zero, zero, jnp.float32(1), zero)

  @jax.jit
  def sent(key):
    algorithm = algorithms.ap_fl(task, **SMALL, image_moments=asked)
    server = algorithm.init(key)
    _, upload = algorithm.local_update(algorithm.download(server), (), Data(store, span, span), visit, key)
    return upload.update.layers, server.statistics.layers

  layers, known_layers = sent(jax.random.key(0))
  assert jax.tree.map(jnp.shape, layers) == jax.tree.map(jnp.shape, known_layers)
  assert len(layers) == (2 if asked else 1)
  if asked:
    np.testing.assert_allclose(layers[0].mean, images[0].ravel(), atol=1e-6)
    np.testing.assert_allclose(layers[0].square, images[0].ravel() ** 2, atol=1e-6)


def test_sums_by_class_are_those_of_numpy():
  task = make_task()
  client, images, labels = examples()
  params = jax.jit(task.model.init)(jax.random.key(0))
  got = jax.jit(lambda data: statistics.sums_by_class(task, params, data))(client)
  features, (tap,) = jax.jit(task.model.base)(params.base, jnp.asarray(images))
  for c in range(C):
    rows = labels == c
    assert float(got.counts[c]) == rows.sum()
    pairs = (got.images, images), (got.features, np.asarray(features)), (got.layers[0], np.asarray(tap))
    for sums, values in pairs:
      np.testing.assert_allclose(sums.mean[c], values[rows].sum(0), rtol=1e-4, atol=1e-3)
      np.testing.assert_allclose(sums.square[c], (values[rows] ** 2).sum(0), rtol=1e-4, atol=1e-3)


def test_variances_of_few_examples_are_drawn_towards_that_of_all():
  """A single example has none, and would be worth endlessly much in what is told in units of it."""
  rng = np.random.default_rng(0)
  labels = np.repeat([0, 1, 3], [300, 12, 1])  # nothing of 2
  images = (rng.uniform(size=(313, *SHAPE)) * (1 + labels[:, None, None, None]) / 4).astype(np.float32)
  low = np.asarray(jax.jit(projections.coefficients)(images))
  sums = with_images(statistics.no_sums(make_task(), products=True, untrained=True), images, labels)
  got, covariances = jax.jit(lambda sums: (sums.estimated, sums.covariances))(sums)
  of = lambda values, c: values[labels == c].reshape((labels == c).sum(), -1).astype(np.float64)
  covariance = lambda values, c: np.cov(of(values, c).T, ddof=0) if (labels == c).sum() > 1 else 0.0
  n = {c: (labels == c).sum() for c in (0, 1, 3)}
  for c in n:
    whole = sum(n[d] * of(images, d).var(0) for d in n) / 313
    expected = (n[c] * of(images, c).var(0) + 10 * whole) / (n[c] + 10)
    mean, square = (np.asarray(x[c], np.float64).ravel() for x in got.images)
    np.testing.assert_allclose(mean, of(images, c).mean(0), atol=1e-5)
    np.testing.assert_allclose(square - mean**2, expected, atol=1e-5)
    whole = sum(n[d] * covariance(low, d) for d in n) / 313
    expected = (n[c] * covariance(low, c) + 10 * whole) / (n[c] + 10)
    np.testing.assert_allclose(covariances[c], expected, atol=1e-3)
  assert all((np.asarray(x[2]) == 0).all() for x in (*got.images, covariances))


def test_sums_fade_only_where_a_class_is_heard_of():
  task = make_task()
  blank = statistics.no_sums(task)
  of = lambda counts, value: jax.tree.map(lambda x: x + value, blank)._replace(counts=jnp.asarray(counts, jnp.float32))
  merged = statistics.merge(of([10, 10, 0, 0], 10.0), of([5, 0, 5, 0], 1.0))
  np.testing.assert_allclose(merged.counts, [14, 10, 5, 0])
  np.testing.assert_allclose(merged.features.mean[:, 0], [10, 10, 10, 10])


@pytest.mark.parametrize("augment", ["none", "full"])
def test_a_server_without_histograms_sees_what_a_client_holds(augment):
  task = make_task(augment=augment)
  client, _, labels = examples()
  held = np.bincount(labels, minlength=C) > 0

  @jax.jit
  def update(key):
    params = task.model.init(key)
    loss = training.classification_loss(task, jnp.asarray(held))  # as AP-FL's clients, where nothing was seen before
    new = training.local_sgd(task, loss, params, client, jnp.int32(5), key)
    return statistics.held_classes(task, jax.tree.map(jnp.subtract, new, params))

  found = np.stack([update(jax.random.key(seed)) for seed in range(8)])
  assert not found[:, ~held].any()
  assert found.any(axis=0)[held].all() and found[:, held].mean() > 0.7


# --- losses -----------------------------------------------------------------------------------------------------------


def test_class_distance_is_the_mean_over_classes_of_their_own():
  task = make_task()
  rng = np.random.default_rng(1)
  real, made = (rng.uniform(size=(40, *SHAPE)).astype(np.float32) for _ in range(2))
  real_labels, labels = rng.integers(0, 3, 40), rng.integers(1, 4, 40)  # 1 and 2 are in both
  hot = lambda label: jnp.eye(C)[label]
  params = jax.jit(task.model.init)(jax.random.key(0))
  taps = jax.jit(lambda x: task.model.base(params.base, x)[1])
  source = sources.source(task, "image")

  @jax.jit
  def distance(taps, made_taps):
    sums = with_images(statistics.no_sums(task, products=True), real, real_labels)
    sums = sums._replace(layers=statistics.layer_sums(hot(real_labels), taps))
    return generation.class_distance(source, often(sums), hot(labels), made, made_taps)

  got = distance(taps(real), taps(made))

  def gap(a, b):
    va, vb = a.var(0), b.var(0)
    first = ((a.mean(0) - b.mean(0)) ** 2).mean() / vb.mean()
    return first + 0.1 * (np.log((va + 1e-4) / (vb + 1e-4)) ** 2).mean()

  pairs = (made, real), (np.asarray(taps(made)[0]), np.asarray(taps(real)[0]))
  expected = np.mean([sum(gap(a[labels == c], b[real_labels == c]) for a, b in pairs) for c in (1, 2)])
  assert float(got) == pytest.approx(expected, rel=1e-3)


def test_covariance_distance_has_the_right_mean_whatever_the_batch():
  """Of few pairs of a class, over many batches, against covariances of all the samples there are."""
  task = make_task()
  rng = np.random.default_rng(2)
  count, batches, pairs = 400, 3000, 9
  labels = np.repeat([0, 1, 3], count)  # 2 has no real example
  spread = 1 + rng.uniform(size=(C, 1, *SHAPE[1:]))  # rows of pixels vary together
  draw = lambda c, tone: np.clip(0.5 + 0.1 * rng.normal(size=(count, SHAPE[0], 1, 1)) * spread[c] * tone, 0, 1)
  real = np.concatenate([draw(c, 1.0) for c in (0, 1, 3)]).astype(np.float32)
  made = np.stack([draw(c, 1.0 + 0.3 * c) for c in range(C)]).astype(np.float32)
  sums = known(task, real, labels).classes
  label = jnp.asarray([0, 0, 0, 1, 1, 1, 2, 2, 3], jnp.int32)  # one pair of 3: it cannot count, nor can 2

  @jax.jit
  def mean(key):
    def one(key):
      first, second = jax.random.randint(key, (2, pairs), 0, count)
      return generation.covariance_distance(sums, label, made[label, first], made[label, second])

    return jnp.mean(jax.lax.map(one, jax.random.split(key, batches)))

  made = jnp.asarray(made)
  low = lambda images: scipy.fft.dctn(np.asarray(images)[..., 0], axes=(1, 2), norm="ortho")[:, :8, :8].reshape(
    count, -1
  )
  expected = []
  for c in (0, 1):
    mine, theirs = np.cov(low(made[c]).T, ddof=0), np.cov(low(real[labels == c]).T, ddof=0)
    expected.append(((mine - theirs) ** 2).sum() / (theirs**2).sum())
  assert float(mean(jax.random.key(0))) == pytest.approx(np.mean(expected), rel=0.1, abs=0.01)
  assert np.mean(expected) > 0.05


def test_the_adversarial_loss_rewards_what_the_teacher_knows_and_the_student_does_not():
  classes = jnp.array([True, True, True, False])
  taught = jnp.array([[30.0, 0, 0, 99], [30.0, 0, 0, 0], [0.0, 30, 0, 0], [30.0, 0, 0, 0]])
  guess = jnp.array([[0.0, 20, 0, 0], [20.0, 0, 0, 0], [0.0, 0, 20, 0], [0.0, 20, 0, 0]])
  label = jnp.zeros(4, jnp.int32)
  counted = jnp.array([True, True, True, False])
  # Row 0 counts; in row 1 the student is right, in row 2 the teacher is wrong, row 3 is not asked about.
  t, q = np.exp([3.0, 0, 0]), np.exp([0.0, 2, 0])
  t, q = t / t.sum(), q / q.sum()
  expected = -100 * (t * np.log(t / q)).sum() / 3
  adversarial = jax.jit(generation.adversarial)
  assert float(adversarial(taught, guess, label, counted, classes)) == pytest.approx(expected, rel=1e-4)
  further = adversarial(taught, guess.at[0, 1].add(5), label, counted, classes)
  assert float(further) < expected < 0


def drawn_loss(task, source, params, teacher, rows, **options):
  nothing = generation.Weights(0.0, 0.0, 0.0, 0.0)
  weights = nothing._replace(**options.pop("weights", {}))
  empty = statistics.Statistics((), ())
  return generation.generator_loss(
    task,
    source,
    params,
    teacher,
    rows,
    jax.random.key(5),
    weights=weights,
    statistics=options.pop("statistics", empty),
    classes=jnp.ones(C, bool),
    **options,
  )


@pytest.mark.parametrize("name", ["image", "feature"])
def test_classes_that_left_are_taught_by_the_model_of_their_time(name):
  task = make_task()
  source = sources.source(task, name)
  generated = jax.jit(source.init)
  params, before = generated(jax.random.key(0)), generated(jax.random.key(1))
  model = jax.jit(task.model.init)
  teacher, old = model(jax.random.key(2)), model(jax.random.key(3))

  @jax.jit
  def rows_and_samples(key):
    rows = generation.draw_rows(task.embeddings, jnp.ones(C), jnp.bool_(False), 40, key)
    noise = jax.random.normal(jax.random.split(jax.random.key(5))[0], (40, source.generator.noise_size))
    return rows, *(source.generator.apply(p, noise, rows.embedding).reshape(40, -1) for p in (params, before))

  rows, made, then = rows_and_samples(jax.random.key(4))

  @jax.jit
  def both(teacher, gone, weight):
    past = generation.Past(gone, old, before)
    plain = drawn_loss(task, source, params, teacher, rows)
    return plain, drawn_loss(task, source, params, teacher, rows, weights={"memory": weight}, past=past)

  loss = lambda teacher, gone, weight=0.0: [float(x) for x in both(teacher, jnp.asarray(gone), jnp.float32(weight))]
  nobody, everybody, one = np.zeros(C, bool), np.ones(C, bool), np.arange(C) == 1
  plain, same = loss(teacher, nobody, 2.0)
  taught_by_old, _ = loss(old, nobody)
  assert same == pytest.approx(plain, rel=1e-5)
  assert loss(teacher, everybody)[1] == pytest.approx(taught_by_old, rel=1e-5)
  assert abs(taught_by_old - plain) > 1e-2
  # L_mem: how far samples moved from those of then, on rows of these classes.
  mine = (np.asarray(rows.label) == 1) & (np.asarray(rows.seen) > 0)
  expected = 2 * np.abs(np.asarray(made) - np.asarray(then))[mine].mean()
  assert loss(teacher, one, 2.0)[1] - loss(teacher, one)[1] == pytest.approx(expected, rel=1e-2)


def test_losses_of_tier_s2_and_of_the_student_are_in_the_total():
  task = make_task()
  images = jax.random.uniform(jax.random.key(1), (20, *SHAPE))
  generator = Generator(init=lambda key: (), apply=lambda params, noise, e: images, noise_size=3)
  source = sources.source(task, "image")._replace(generator=generator)
  _, real, labels = examples()

  @jax.jit
  def losses(by_class, covariance, adversarial):
    """The loss at three weights, and what the terms are."""
    teacher, student = (task.model.init(jax.random.key(s)) for s in (2, 3))
    rows = generation.draw_rows(task.embeddings, jnp.ones(C), jnp.bool_(False), 20, jax.random.key(4))
    real_taps = task.model.base(teacher.base, jnp.asarray(real))[1]
    sums = known(task, real, labels).classes._replace(layers=statistics.layer_sums(jnp.eye(C)[labels], real_taps))
    seen = jnp.eye(C)[rows.label] * rows.seen[:, None]
    features, taps = task.model.base(teacher.base, images)
    guess = training.predict(task.model, student, images).logits
    logits = task.model.head(teacher.head, features)
    weights = {"by_class": by_class, "covariance": covariance, "adversarial": adversarial}
    facts = statistics.Statistics((), sums)
    return (
      drawn_loss(task, source, (), teacher, rows, weights=weights, statistics=facts, student=student),
      generation.class_distance(source, sums, seen, images, taps),
      generation.covariance_distance(sums, rows.label[0:12:2], images[0:12:2], images[1:12:2]),
      generation.adversarial(logits, guess, rows.label, rows.seen > 0, jnp.ones(C, bool)),
    )

  plain, *terms = losses(*np.zeros(3))
  for place, term in enumerate(terms):
    total, *_ = losses(*(2.0 * (np.arange(3) == place)))
    assert abs(float(term)) > 1e-4
    assert float(total - plain) == pytest.approx(2 * float(term), rel=1e-3)


# --- rounds -----------------------------------------------------------------------------------------------------------

SMALL = {
  "generator_steps": 2,
  "generator_final_steps": 3,
  "generator_batch": 20,
  "generator_warmup": 0.0,
  "friend_steps": 2,
  "synthetic_examples": 8,
  "grid_points": 2,
}


@functools.cache
def compiled(rounds, **settings):
  """(task, AP-FL, its server at the start, its aggregation); features, which are the quickest to compile."""
  task = make_task(rounds=rounds)
  algorithm = algorithms.ap_fl(task, **({"source": "feature"} | SMALL | settings))
  return task, algorithm, jax.jit(algorithm.init)(jax.random.key(0)), jax.jit(algorithm.aggregate)


class Rounds:
  """AP-FL between two rounds, its uploads made by hand."""

  def __init__(self, rounds: int = 10, **settings):
    self.task, self.algorithm, self.server, self._aggregate = compiled(rounds, **settings)
    self.round = 0

  def step(self, held, delta=0.0):
    """A round in which two clients arrive, the first with `held` [C] examples, and every weight moves by `delta`."""
    move = jax.tree.map(lambda w: 3.0 * jnp.full_like(w, delta), self.server.params)
    layers = jax.tree.map(lambda x: 3.0 * (x + 1.0), self.server.statistics.layers)
    classes = jax.tree.map(lambda x: x + 1.0, self.server.statistics.classes)
    held = jnp.stack([jnp.asarray(held, jnp.float32), jnp.zeros(C)])
    received = Received(
      total=Sent(move, layers, classes),
      weight=jnp.float32(3.0),
      kept=Kept(held, jnp.full(2, self.round, jnp.int32)),
      ids=jnp.array([self.round, self.round + 1], jnp.int32),
      arrived=jnp.array([True, False]),
      staleness=jnp.zeros(2, jnp.int32),
    )
    self.server = self._aggregate(self.server, received, jax.random.key(self.round))
    self.round += 1
    return self.server


def answers(rounds: Rounds, models: dict) -> dict:
  """Logits [C, 32, C] of models on 32 samples of each class."""
  source = sources.source(rounds.task, "feature")

  @jax.jit
  def logits(weights, models, key):
    features = source.sample(weights, jnp.repeat(jnp.arange(C), 32), key)
    return {name: rounds.task.model.head(params.head, features).reshape(C, 32, C) for name, params in models.items()}

  return tasks.on_host(logits(rounds.server.source.average, models, jax.random.key(9)))


# What does not get in each other's way; FiLM is refreshed from the third round on.
MANY = {
  "n_min": 5,
  "early_stop": True,
  "film_refresh": True,
  "film_after": 0.05,
  "adversary": True,
  "lambda_adversarial": 0.0,
  "generator_steps": 30,
}


def test_the_generator_is_trained_once_at_the_end():
  rounds = Rounds(4, generator_schedule="final")
  assert [int(rounds.step([5, 5, 0, 0]).source.rounds) for _ in range(4)] == [0, 0, 0, 1]
  assert (np.asarray(rounds.server.trust) > 0).tolist() == [True, True, False, False]


def test_a_class_is_seen_from_n_min_examples_on_and_without_a_memory_nothing_more_is_sent():
  rounds = Rounds(40, **MANY)
  assert [int(rounds.step([2, 5, 1, 0]).source.rounds) for _ in range(2)] == [1, 2]
  shared = rounds.algorithm.download(rounds.server).shared
  assert np.asarray(shared.seen).tolist() == [False, True, False, False]
  assert float(shared.trust[0]) == 0 < float(shared.trust[1])
  assert shared.answer == () == rounds.server.memory
  tasks.assert_same(shared.start, rounds.server.params)


@pytest.mark.parametrize(("name", "trust"), [("noise", 1.0), ("none", 0.0)])
def test_controls_are_believed_wholly_and_nothing_is_not(name, trust):
  rounds = Rounds(source=name)
  rounds.step([5, 5, 0, 0])
  np.testing.assert_array_equal(rounds.server.trust, [trust, trust, 0, 0])


def test_the_server_notices_who_left_and_answers_with_what_it_was():
  rounds = Rounds(9, memory="average", memory_patience=2, source="noise")
  rounds.step([5, 5, 5, 0], 0.1)
  then = tasks.on_host(rounds.step([5, 5, 5, 0], 0.1).params)
  tasks.assert_same(rounds.server.memory.params, then)
  for missed in (1, 2, 3):
    current = rounds.step([5, 5, 0, 0], 1.0)
    tasks.assert_same(current.memory.params, then)
    share = 0.5 if missed >= 2 else 0.0
    expected = jax.tree.map(lambda new, old, s=share: (1 - s) * new + s * old, current.params, then)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), current.memory.answer, expected)
  shared = rounds.algorithm.download(rounds.server).shared
  tasks.assert_same(shared.start, rounds.server.memory.answer)
  tasks.assert_same(shared.params, rounds.server.params)  # training goes on where it was
  back = rounds.step([5, 5, 5, 0], 0.1)
  tasks.assert_same(back.memory.answer, back.params)  # it is there again: nothing is remembered
  tasks.assert_same(back.memory.params, back.params)
  # Clients that come by turns are not gone, and are remembered together without ever having been there together.
  for turn in range(3):
    rounds.step([5, 5, 0, 0] if turn % 2 else [0, 0, 5, 5], 0.1)
  assert np.asarray(rounds.server.memory.classes).all()


# One program for two tests: what memories that distil share with others shows before the last round.
DISTIL = {"memory": "distil", "memory_patience": 1, "generator_steps": 20, "adversary": True, "lambda_adversarial": 0.0}


def test_the_student_learns_classes_that_left_from_the_model_that_knew_them():
  """As the generator's rows of them are taught, or L_adv would pay for ever for what the student is never told."""
  rounds = Rounds(5, **DISTIL)
  rounds.step([5, 5, 5, 5])
  lowered = jax.tree.map(lambda w: w, rounds.server.params)
  lowered.head["bias"] = lowered.head["bias"].at[2].add(-5.0)
  student = jax.tree.map(jnp.copy, lowered)
  rounds.server = rounds.server._replace(params=lowered, source=rounds.server.source._replace(student=student))
  after = rounds.step([5, 5, 0, 5]).source.student
  moved = np.asarray(after.head["bias"] - lowered.head["bias"])
  assert moved[2] > 1e-3 and moved.argmax() == 2


def test_the_last_round_distils_what_left_back_into_the_head():
  """The old model knows the class that left, the new one has forgotten it; others keep their answers."""
  rounds = Rounds(5, **DISTIL)
  rounds.step([5, 5, 5, 5])
  old = rounds.server.params
  lowered = jax.tree.map(lambda w: w, old)
  lowered.head["bias"] = old.head["bias"].at[2].add(-5.0)
  rounds.server = rounds.server._replace(params=lowered)
  for _ in range(3):
    rounds.step([5, 5, 0, 5])
  tasks.assert_same(rounds.server.memory.answer, rounds.server.params)
  rounds.step([5, 5, 0, 5])
  answer = rounds.server.memory.answer
  tasks.assert_same(answer.base, rounds.server.params.base)
  models = {"old": old, "now": rounds.server.params, "answer": answer}
  share = {name: scipy.special.softmax(x, axis=-1)[2, :, 2].mean() for name, x in answers(rounds, models).items()}
  assert share["now"] < 0.05 and share["answer"] > 0.3 * share["old"]


def test_early_stop_rests_while_samples_are_recognised_and_goes_on_when_not():
  rounds = Rounds(40, **MANY)
  rounds.step([5, 5, 5, 5])
  sure = rounds.server.source._replace(stale=jnp.int32(5))
  rounds.server = rounds.server._replace(source=sure, trust=jnp.full(C, 0.99, jnp.float32))
  rested = tasks.on_host(rounds.step([5, 5, 5, 5]))
  assert int(rested.source.rounds) == 1 and not np.allclose(rested.trust, 0.99)  # trust is measured anew
  assert int(rounds.step([5, 5, 5, 5]).source.rounds) == 2  # and is low, for this generator is hardly trained


def test_a_refresh_moves_what_says_the_class_and_nothing_else():
  rounds = Rounds(40, **MANY)
  moved = []
  for _ in range(3):
    before = tasks.on_host(rounds.server.source.params)
    after = rounds.step([5, 5, 5, 5]).source.params
    differ = lambda name, a=after, b=before: jax.tree.map(lambda x, y: (x != y).any(), a[name], b[name])
    moved.append({name for name in after if any(jax.tree.leaves(differ(name)))})
  assert moved[0] == moved[1] == set(before)
  assert moved[2] == {"encode"}


def test_the_student_learns_from_samples():
  rounds = Rounds(40, **MANY)
  before = tasks.on_host(rounds.server.source.student)
  rounds.step([5, 5, 5, 5])
  models = {"teacher": rounds.server.params, "before": before, "after": rounds.server.source.student}
  chance = {name: scipy.special.softmax(x / 2, axis=-1) for name, x in answers(rounds, models).items()}
  taught = chance.pop("teacher")
  gap = {name: (taught * np.log(taught / x)).sum(-1).mean() for name, x in chance.items()}
  assert gap["after"] < 0.9 * gap["before"]


def test_a_bank_is_what_clients_download_instead_of_weights():
  task = make_task()
  read = {}
  for ship in server.SHIPPED:
    algorithm = algorithms.ap_fl(task, **SMALL, ship=ship, bank_size=4)
    download = jax.eval_shape(lambda key, a=algorithm: a.download(a.init(key)), jax.random.key(0))
    client, _, _ = examples()
    zero = jnp.int32(0)
    visit = Visit(zero, zero, zero, zero, jnp.float32(1), zero)
    leaves = lambda d, a=algorithm, v=visit, c=client: a.personalize(d, (), c, v, jax.random.key(1))
    read[ship] = ledger.bytes_read(leaves, download, argnum=0)
    source = download.shared.source
    assert ledger.nbytes(source) == (C * 4 * 16 + 4 if ship == "bank" else ledger.nbytes(source))
  weights = jax.eval_shape(sources.source(task, "image").init, jax.random.key(0))
  assert read["generator"] - read["bank"] == ledger.nbytes(weights) - (C * 4 * 16 + 4)


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"source": "class_means"}, ("ap_fl_source", "class_means", "s2")),
    ({"source": "matched"}, ("ap_fl_source", "matched", "s2")),
    ({"source": "matched", "tier": "s2", "ship": "bank"}, ("ap_fl_ship", "matched", "generator")),
    ({"memory": "both", "tier": "s0"}, ("ap_fl_memory", "both", "s1")),
    ({"image_moments": True, "tier": "s0", "source": "image"}, ("ap_fl_image_moments", "s0", "s1")),
    ({"image_moments": True, "source": "feature"}, ("ap_fl_image_moments", "feature", "image")),
  ],
)
def test_settings_that_do_not_go_together_are_named(settings, words):
  with pytest.raises(InputError) as error:
    algorithms.ap_fl(make_task(), **(SMALL | settings))
  assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
