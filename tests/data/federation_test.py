"""The federation of a partition, against what can be counted client by client."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from apfl_jax import data
from apfl_jax.data.federation import PARTS
from apfl_jax.errors import InputError


def _dataset(num_examples, num_classes=5, num_test=50, seed=0):
  """Images whose only pixel numbers the example, so that a row of the store tells where it came from."""
  rng = np.random.default_rng(seed)
  number = np.arange(num_examples + num_test)
  images = np.stack([number // 256, number % 256], -1).astype(np.uint8)[:, None, None]
  labels = rng.integers(num_classes, size=len(number)).astype(np.int32)
  split = num_examples
  names = tuple(map(str, range(num_classes)))
  return data.Dataset("made", images[:split], labels[:split], images[split:], labels[split:], names)


def _runs(federation, client):
  """The client's example numbers, part by part."""
  spans = (getattr(federation, part) for part in PARTS)
  return [federation.store.index[s.start[client] : s.start[client] + s.size[client]] for s in spans]


def _expected_sizes(size):
  test = min(max(int(0.25 * size + 0.5), 1), max(size - 1, 0))
  validation = min(int(0.15 * size + 0.5), max(size - test - 1, 0))
  return size - test - validation, validation, test


@pytest.mark.parametrize("num_clients", [1, 7, 100])
def test_every_client_keeps_its_examples_in_three_contiguous_parts(num_clients):
  dataset = _dataset(600)
  rng = np.random.default_rng(0)
  partition = data.partition.dirichlet(dataset.labels, num_clients, rng=rng, alpha=0.3)
  federation, pooled = data.build(dataset, partition, rng=rng)
  np.testing.assert_array_equal(federation.id, np.arange(num_clients))
  owned = np.split(partition.index, np.cumsum(partition.sizes)[:-1])
  position = 0
  for client in range(num_clients):
    runs = _runs(federation, client)
    for part in PARTS:
      assert getattr(federation, part).start[client] == position
      position += getattr(federation, part).size[client]
    np.testing.assert_array_equal(np.sort(np.concatenate(runs)), np.sort(owned[client]))
    assert tuple(map(len, runs)) == _expected_sizes(len(owned[client]))
  assert (pooled.start, pooled.size) == (position, 50)
  assert len(federation.store.index) == 650


def test_store_types_and_test_images():
  dataset = _dataset(300)
  rng = np.random.default_rng(0)
  partition = data.partition.iid(dataset.labels, 10, rng=rng)
  federation, pooled = data.build(dataset, partition, rng=rng)
  store = federation.store
  assert (store.images.dtype, store.labels.dtype, store.index.dtype) == (np.uint8, np.int32, np.int32)
  for leaf in (*federation.train, *federation.validation, *federation.test, federation.id, *pooled):
    assert isinstance(leaf, np.ndarray)
    assert leaf.dtype == np.int32
  assert pooled.start.shape == pooled.size.shape == ()
  number = store.images[..., 0].astype(int) * 256 + store.images[..., 1]
  np.testing.assert_array_equal(number.ravel(), np.arange(350))
  np.testing.assert_array_equal(np.sort(store.index[pooled.start :]), np.arange(300, 350))
  np.testing.assert_array_equal(store.labels, np.concatenate([dataset.labels, dataset.test_labels]))


def test_lengths_do_not_depend_on_the_seed():
  dataset = _dataset(500)

  def length(seed):
    rng = np.random.default_rng(seed)
    partition = data.partition.dirichlet(dataset.labels, 9, rng=rng, alpha=0.1)
    return data.build(dataset, partition, rng=rng, pooled_examples=20)[0].store.index

  assert length(0).shape == length(1).shape
  np.testing.assert_array_equal(length(2), length(2))
  assert not np.array_equal(length(0), length(1))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(2, 300), st.integers(1, 6), st.integers(0, 1000))
def test_parts_follow_the_label_law(size, num_classes, seed):
  dataset = _dataset(size, num_classes, seed=seed)
  partition = data.Partition(np.arange(size), np.array([size]))
  federation, _ = data.build(dataset, partition, rng=np.random.default_rng(seed))
  train, validation, test = (data.histogram(federation, num_classes, part)[0] for part in PARTS)
  number = train + validation + test
  # At even distances along the classes: within one of the exact share; validation is drawn from what is left.
  assert (np.abs(test - number * test.sum() / size) < 1).all()
  rest = number - test
  assert (np.abs(validation - rest * validation.sum() / max(rest.sum(), 1)) < 1).all()


def test_no_class_is_favoured_by_its_place():
  labels = np.tile(np.arange(5, dtype=np.int32), 800)  # 200 clients of 20, four of each class
  dataset = _dataset(len(labels))._replace(labels=labels)
  partition = data.Partition(np.arange(len(labels)), np.full(200, 20))
  shares = []
  for seed in range(20):
    federation, _ = data.build(dataset, partition, rng=np.random.default_rng(seed))
    # 5 of 20 over classes of 4: a class cannot always get 1.25, on average it must.
    shares.append([data.histogram(federation, 5, part).sum(0) / 800 for part in PARTS])
  np.testing.assert_allclose(np.mean(shares, 0), np.repeat([[0.6], [0.15], [0.25]], 5, 1), atol=0.01)


def test_runs_are_shuffled():
  dataset = _dataset(2000, num_classes=2)
  partition = data.Partition(np.arange(2000), np.array([2000]))
  federation, pooled = data.build(dataset, partition, rng=np.random.default_rng(0))
  for run in (_runs(federation, 0)[0], federation.store.index[pooled.start :]):
    assert abs(np.corrcoef(run, np.arange(len(run)))[0, 1]) < 0.3  # neither by number
    labels = federation.store.labels[run]
    assert abs(np.corrcoef(labels, np.arange(len(run)))[0, 1]) < 0.3  # nor by class


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(100, 150), st.integers(1, 60), st.integers(1, 8), st.integers(0, 1000))
def test_no_client_trains_on_the_test_example_of_any(num_examples, number, num_clients, seed):
  dataset = _dataset(num_examples)
  rng = np.random.default_rng(seed)
  partition = data.partition.iid(dataset.labels, num_clients, rng=rng, examples_per_client=number)
  federation, _ = data.build(dataset, partition, rng=rng)
  parts: list[set[int]] = [set(), set(), set()]
  for client, owned in enumerate(np.split(partition.index, num_clients)):
    runs = _runs(federation, client)
    assert tuple(map(len, runs)) == _expected_sizes(number)
    held = np.concatenate(runs)
    np.testing.assert_array_equal(np.sort(dataset.labels[held]), np.sort(dataset.labels[owned]))
    if len(set(partition.index)) == len(partition.index):
      np.testing.assert_array_equal(np.sort(held), np.sort(owned))
    for part, run in zip(parts, runs, strict=True):
      part |= set(run.tolist())
  train, validation, test = parts
  assert not (train & validation or train & test or validation & test)


def test_a_class_too_small_for_parts_of_its_own_is_refused():
  dataset = _dataset(40)
  lonely = dataset._replace(labels=np.where(np.arange(40) == 0, 4, dataset.labels % 4).astype(np.int32))
  partition = data.Partition(np.tile(np.arange(40), 5), np.full(5, 40))
  with pytest.raises(InputError, match="class 4 has too few examples"):
    data.build(lonely, partition, rng=np.random.default_rng(0))


def test_small_and_empty_clients():
  dataset = _dataset(6)
  partition = data.Partition(np.arange(6), np.array([0, 1, 2, 3, 0]))
  federation, _ = data.build(dataset, partition, rng=np.random.default_rng(0))
  np.testing.assert_array_equal(federation.train.size, [0, 1, 1, 2, 0])
  np.testing.assert_array_equal(federation.validation.size, 0)
  np.testing.assert_array_equal(federation.test.size, [0, 0, 1, 1, 0])


def test_other_fractions():
  dataset = _dataset(100)
  partition = data.Partition(np.arange(100), np.array([40, 60]))
  federation, _ = data.build(dataset, partition, rng=np.random.default_rng(0), fractions=(0.8, 0.2, 0.0))
  np.testing.assert_array_equal(federation.test.size, 0)
  np.testing.assert_array_equal(federation.validation.size, [8, 12])


@pytest.mark.parametrize("size", [1, 7, 30, 45, 1000])
def test_pooled_examples_are_balanced_as_far_as_they_go(size):
  dataset = _dataset(10)
  test_labels = np.repeat(np.arange(4, dtype=np.int32), [3, 20, 10, 12])
  dataset = dataset._replace(test_labels=test_labels, test_images=dataset.test_images[:45])
  partition = data.Partition(np.arange(10), np.array([10]))
  federation, pooled = data.build(dataset, partition, rng=np.random.default_rng(0), pooled_examples=size)
  chosen = federation.store.index[pooled.start :]
  assert len(set(chosen)) == len(chosen) == pooled.size == min(size, 45)
  number = np.bincount(federation.store.labels[chosen], minlength=4)
  # Fair: a class has less than another by two or more only if it is used up.
  short = number < number.max() - 1
  np.testing.assert_array_equal(number[short], np.array([3, 20, 10, 12])[short])


def test_histogram_counts_client_by_client():
  dataset = _dataset(400)
  rng = np.random.default_rng(0)
  partition = data.partition.dirichlet(dataset.labels, 20, rng=rng, alpha=0.1)
  federation, _ = data.build(dataset, partition, rng=rng)
  for i, part in enumerate(PARTS):
    result = data.histogram(federation, 5, part)
    assert result.dtype == np.int32
    expected = [np.bincount(dataset.labels[_runs(federation, client)[i]], minlength=5) for client in range(20)]
    np.testing.assert_array_equal(result, expected)
  with pytest.raises(InputError, match="accepted are train, validation, test"):
    data.histogram(federation, 5, "all")


@pytest.mark.parametrize("fractions", [(0.6, 0.4), (0.5, 0.5, 0.5), (0.0, 0.5, 0.5), (1.2, -0.4, 0.2)])
def test_fractions_must_add_up(fractions):
  dataset = _dataset(10)
  partition = data.Partition(np.arange(10), np.array([10]))
  with pytest.raises(InputError, match="fractions: got"):
    data.build(dataset, partition, rng=np.random.default_rng(0), fractions=fractions)
