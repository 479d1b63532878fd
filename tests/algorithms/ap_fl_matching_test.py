"""AP-FL's images matched to sums over clients: what is sent, where they start, what moves them, and when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from apfl_jax import algorithms, nn, population, simulation, training
from apfl_jax.algorithms.ap_fl import matching, projections, sources, statistics
from apfl_jax.types import LocalSGD, Task
from tests import tasks
from tests.algorithms.ap_fl_server_test import SHAPE, C, Rounds, examples, make_task


def real_sums(task, images, labels):
  """What clients with these examples say, by NumPy: mean products of coefficients, features' moments."""
  of_networks = jax.jit(lambda drawn, images: projections.features(task, drawn, images))
  features = np.asarray(of_networks(jax.jit(lambda: projections.networks(task))(), jnp.asarray(images)))
  low = np.stack([scipy.fft.dctn(image[..., 0], norm="ortho")[:8, :8].ravel() for image in images])
  by_class = lambda x: np.stack([x[labels == c].mean(0) if (labels == c).any() else 0 * x[0] for c in range(C)])
  products = np.einsum("bk,bl->bkl", low, low)
  return by_class(products), by_class(features), by_class(features**2)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 12, 3), (5, 9, 1)])
def test_coefficients_are_the_lowest_of_the_cosine_transform_and_smooth_is_their_inverse(shape):
  images = np.random.default_rng(0).uniform(size=(3, *shape)).astype(np.float32)
  rows, columns = (min(8, length) for length in shape[:2])
  whole = scipy.fft.dctn(images, axes=(1, 2), norm="ortho")
  low = np.asarray(projections.coefficients(jnp.asarray(images)))
  np.testing.assert_allclose(low, whole[:, :rows, :columns].reshape(3, -1), atol=1e-5)
  whole[:, rows:] = whole[:, :, columns:] = 0
  expected = scipy.fft.idctn(whole, axes=(1, 2), norm="ortho")
  np.testing.assert_allclose(projections.smooth(jnp.asarray(low), shape), expected, atol=1e-5)


def test_clients_send_sums_of_products_and_of_features_under_untrained_networks():
  task = make_task()
  client, images, labels = examples()
  params = jax.jit(task.model.init)(jax.random.key(0))
  sums = jax.jit(lambda data: statistics.sums_by_class(task, params, data, products=True, untrained=True))(client)
  products, features, squares = real_sums(task, images, labels)
  mean = jax.tree.map(lambda x: x / jnp.maximum(sums.counts, 1.0).reshape(-1, *[1] * (x.ndim - 1)), sums)
  np.testing.assert_allclose(mean.products, products, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(mean.untrained.mean, features, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(mean.untrained.square, squares, rtol=1e-3, atol=1e-4)
  assert len({np.asarray(row).tobytes() for row in mean.untrained.mean[0]}) == features.shape[1]  # networks differ
  plain = jax.jit(lambda data: statistics.sums_by_class(task, params, data))(client)
  assert plain.products == () == plain.untrained  # nothing more than is asked for


def test_images_start_with_the_mean_image_and_the_covariance_of_the_coefficients():
  rng = np.random.default_rng(0)
  shape, count = (16, 16, 1), 6000
  mixing = rng.normal(size=(2, 64, 3)) / 60
  middle = rng.uniform(0.4, 0.6, (2, *shape)).astype(np.float32)  # with detail that coefficients do not hold
  covariance = np.einsum("ckr,clr->ckl", mixing, mixing)  # of rank 3: singular
  given = jnp.asarray(middle), jnp.asarray(covariance, jnp.float32)
  images = np.asarray(jax.jit(lambda key: matching.start(*given, count, key))(jax.random.key(0)))
  assert images.shape == (2, count, *shape) and images.min() > 0 and images.max() < 1
  np.testing.assert_allclose(images.mean(1), middle, atol=3e-3)
  for c in range(2):
    found = scipy.fft.dctn(images[c, ..., 0], axes=(1, 2), norm="ortho")[:, :8, :8].reshape(count, -1)
    np.testing.assert_allclose(np.cov(found.T, ddof=0), covariance[c], atol=0.08 * covariance[c].max())


@pytest.mark.parametrize("rank", [0, 1, 3, 64])
def test_the_root_of_a_covariance_is_one_also_where_that_is_singular(rank):
  mixing = np.random.default_rng(rank).normal(size=(64, rank))
  covariance = mixing @ mixing.T
  found = np.asarray(jax.jit(matching.root)(jnp.asarray(covariance, jnp.float32)), np.float64)
  np.testing.assert_array_equal(found, np.tril(found))
  np.testing.assert_allclose(found @ found.T, covariance, atol=2e-4 * max(rank, 1))


def test_matching_brings_class_moments_of_features_to_those_of_real_examples():
  task = make_task()
  client, images, labels = examples()
  known = np.bincount(labels, minlength=C) > 0
  assert not known.all()
  _, mean, square = real_sums(task, images, labels)

  @jax.jit
  def made(key):
    """Images as they start and matched, and the moments of their features."""
    params = task.model.init(key)
    sums = jax.tree.map(
      lambda x: 1e4 * x, statistics.sums_by_class(task, params, client, products=True, untrained=True)
    )  # of many
    found = []
    for steps in (0, 60):
      images = matching.match(
        task, sums, lambda images, label: 0.0 * label, matching.Settings(16, steps, 0.01, 0.0), key
      )
      features = projections.features(task, projections.networks(task), images.reshape(-1, *SHAPE))
      features = features.reshape(C, 16, *features.shape[1:])
      found.append((images, jnp.mean(features, 1), jnp.var(features, 1)))
    return found

  (_, *before), (images, *after) = jax.tree.map(np.asarray, made(jax.random.key(0)))
  for start, end, real in zip(before, after, (mean, square - mean**2), strict=True):
    gap = lambda found, real=real: ((found - real) ** 2).mean((1, 2))[known]
    assert (gap(end) < 0.5 * gap(start)).all()
  assert images.min() >= 0 and images.max() <= 1


def test_the_teacher_makes_images_recognisable():
  task = make_task()
  client, _, labels = examples()
  known = np.bincount(labels, minlength=C) > 0

  @jax.jit
  def loss(weight, key):
    """The teacher's mean cross-entropy on matched images of each class."""
    teacher = task.model.init(jax.random.key(3))

    def of(images, label):
      logits = training.predict(task.model, teacher, images).logits
      return training.cross_entropy(logits, jax.nn.one_hot(label, C))

    sums = statistics.sums_by_class(task, teacher, client, products=True, untrained=True)
    images = matching.match(task, sums, of, matching.Settings(8, 40, 0.01, weight), key)
    return jnp.mean(of(images.reshape(-1, *SHAPE), jnp.repeat(jnp.arange(C), 8)).reshape(C, 8), axis=1)

  alone, taught = (np.asarray(loss(jnp.float32(weight), jax.random.key(0))) for weight in (0.0, 2.0))
  assert (taught[known] < 0.9 * alone[known]).all()
  np.testing.assert_allclose(taught[~known], alone[~known], rtol=1e-5)


MATCHED = {"source": "matched", "tier": "s2", "bank_size": 4, "matching_steps": 2, "unseen": "prototypes"}


def test_images_are_matched_once_in_the_last_round_and_downloaded_as_bytes():
  rounds = Rounds(2, **MATCHED)
  first = rounds.step([5, 5, 0, 0])
  assert not first.source.made and not np.asarray(first.trust).any()
  made = rounds.step([5, 5, 0, 0])
  assert (np.asarray(made.trust) > 0).tolist() == [True, True, False, False]
  shipped = rounds.algorithm.download(made).shared.source
  assert isinstance(shipped, sources.Bank) and shipped.values.dtype == jnp.uint8
  assert shipped.values.shape == (C, 4, *SHAPE)
  values = np.asarray(shipped.values).copy()
  rounds.round = 5  # a further upload of the last round, as on a clock
  np.testing.assert_array_equal(rounds.step([5, 5, 0, 0], 0.1).source.bank.values, values)


def test_before_there_are_images_other_things_are_known_and_nothing_is_trusted():
  rounds = Rounds(2, **MATCHED)
  blank = tasks.on_host(rounds.server.reading)
  server = rounds.step([5, 5, 5, 0])
  assert not server.source.made and not np.asarray(server.trust).any()
  changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), server.reading, blank)
  assert any(jax.tree.leaves(changed))


@pytest.mark.slow  # to compile; what is sent, what is made of it and when are looked at above
def test_in_rounds_the_server_knows_what_clients_hold_and_its_images_are_of_their_class():
  inputs = tasks.inputs("ap_fl")

  def build(given):
    model = nn.classifier("mlp", tasks.IMAGE_SHAPE, C, embeddings=given["embeddings"])
    sgd = LocalSGD(given["learning_rate"], tasks.BATCH_SIZE, 1, tasks.STEPS, 4, "examples", "none")
    task = Task(tasks.NUM_CLIENTS, C, tasks.IMAGE_SHAPE, given["embeddings"], model, sgd, given["rounds"])
    settings = {"source": "matched", "tier": "s2", "bank_size": 8, "matching_steps": 5, "friend_steps": 2}
    return algorithms.ap_fl(task, **settings), population.everyone()

  size = tasks.NUM_CLIENTS
  simulator = simulation.simulator(build, inputs, C, population_size=size, cohort_size=size)
  state, _ = simulator.advance(simulator.init(inputs), inputs, np.int32(1))
  store, span = inputs.federation.store, inputs.federation.train
  spans = zip(np.asarray(span.start), np.asarray(span.size), strict=True)
  rows = np.concatenate([np.asarray(store.index)[start : start + size] for start, size in spans])
  images, labels = np.asarray(store.images)[rows, ..., 0] / 255.0, np.asarray(store.labels)[rows]
  low = scipy.fft.dctn(images, axes=(1, 2), norm="ortho").reshape(len(images), -1)
  expected = np.stack([low[labels == c].T @ low[labels == c] for c in range(C)])
  np.testing.assert_allclose(state.server.statistics.classes.products, expected, rtol=1e-3, atol=0.1)
  state, _ = simulator.advance(state, inputs, np.int32(tasks.ROUNDS - 1))
  assert (np.asarray(state.server.trust) > 0.8).all()
