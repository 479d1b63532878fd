"""Partitions: what holds for all of them, by hypothesis, and the Dirichlet's closed-form moments."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from apfl_jax.data import partition as lib
from apfl_jax.errors import InputError

_METHODS = {
  "iid": lib.iid,
  "dirichlet": lib.dirichlet,
  "pathological": lib.pathological,
}


def _owner(partition, num_examples):
  """Each example's client, after checking that it has exactly one."""
  np.testing.assert_array_equal(np.sort(partition.index), np.arange(num_examples))
  owner = np.empty(num_examples, int)
  owner[partition.index] = np.repeat(np.arange(len(partition.sizes)), partition.sizes)
  return owner


def _counts(partition, labels, num_classes):
  """int [N, C], client by client."""
  runs = np.split(labels[partition.index], np.cumsum(partition.sizes)[:-1])
  return np.stack([np.bincount(run, minlength=num_classes) for run in runs])


@st.composite
def _problems(draw):
  """Labels in which all of C classes occur, N clients, the monopolistic classes and a mask of their holders."""
  num_classes = draw(st.integers(2, 6))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  skew = rng.dirichlet(np.full(num_classes, draw(st.sampled_from([0.3, 5.0]))))
  labels = np.concatenate([np.arange(num_classes), rng.choice(num_classes, draw(st.integers(10, 200)), p=skew)])
  num_clients = draw(st.integers(1, 24))
  monopoly = lib.choose_monopolistic(rng, num_classes, draw(st.integers(0, num_classes - 1)))
  holders = rng.random(num_clients) < draw(st.sampled_from([0.1, 0.5]))
  holders[rng.integers(num_clients)] = True
  return rng.permutation(labels), num_clients, monopoly, holders, rng


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(_problems(), st.sampled_from(["iid", 1e-6, 0.1, 100.0]), st.integers(0, 12))
def test_disjoint_complete_allowed_and_not_too_small(problem, law, min_size):
  labels, num_clients, monopoly, holders, rng = problem
  allowed = lib.monopolistic(labels.max() + 1, holders, monopoly)
  # Hall's condition for two kinds of clients: everybody from everything, and the others from the free classes.
  free = (~np.isin(labels, monopoly)).sum()
  possible = num_clients * min_size <= len(labels) and (~holders).sum() * min_size <= free
  settings = {"rng": rng, "allowed": allowed, "min_size": min_size}
  try:
    if law == "iid":
      partition = lib.iid(labels, num_clients, **settings)
    else:
      partition = lib.dirichlet(labels, num_clients, alpha=law, **settings)
  except InputError:
    assert not possible
    return
  assert possible
  assert partition.sizes.shape == (num_clients,)
  assert partition.sizes.min() >= min_size
  assert allowed[labels, _owner(partition, len(labels))].all()


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(_problems(), st.integers(1, 4))
def test_pathological_holds_at_most_k_allowed_classes(problem, k):
  labels, num_clients, monopoly, holders, rng = problem
  num_classes = labels.max() + 1
  allowed = lib.monopolistic(num_classes, holders, monopoly)
  common = {"rng": rng, "classes_per_client": k, "allowed": allowed, "min_size": 0}
  if k > allowed.sum(0).min() or num_clients * k < num_classes:
    with pytest.raises(InputError, match="classes_per_client"):
      lib.pathological(labels, num_clients, **common)
    return
  # The holders need room for the monopolistic classes, the others for nothing in particular.
  if holders.sum() * k < len(monopoly):
    with pytest.raises(InputError, match="nobody who may hold"):
      lib.pathological(labels, num_clients, **common)
    return
  partition = lib.pathological(labels, num_clients, **common)
  assert allowed[labels, _owner(partition, len(labels))].all()
  assert (np.count_nonzero(_counts(partition, labels, num_classes), axis=1) <= k).all()


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(_problems(), st.sampled_from(list(_METHODS)), st.integers(1, 30))
def test_drawn_clients_have_exactly_their_number(problem, method, number):
  labels, num_clients, monopoly, holders, rng = problem
  num_classes = labels.max() + 1
  allowed = lib.monopolistic(num_classes, holders, monopoly)
  k = min(allowed.sum(0).min(), 2)
  extra = {"iid": {}, "dirichlet": {"alpha": 0.2}, "pathological": {"classes_per_client": k}}[method]
  hypothesis.assume(method != "pathological" or (holders.sum() * k >= len(monopoly) and num_clients * k >= num_classes))
  partition = _METHODS[method](labels, num_clients, rng=rng, allowed=allowed, examples_per_client=number, **extra)
  np.testing.assert_array_equal(partition.sizes, number)
  owner = np.repeat(np.arange(num_clients), number)
  assert allowed[labels[partition.index], owner].all()
  # Without replacement while the data last: no example is used twice before the others of its kind are used once.
  used = np.bincount(partition.index, minlength=len(labels))
  alike = np.isin(labels, monopoly) if method == "iid" else labels
  for kind in np.unique(alike):
    assert np.ptp(used[alike == kind]) <= 1


@pytest.mark.parametrize("examples_per_client", [0, 9])
@pytest.mark.parametrize("clusters", [1, 3, 5, 14])
def test_clusters_share_classes_and_hold_all_of_them(clusters, examples_per_client):
  labels = np.repeat(np.arange(10), 60)
  rng = np.random.default_rng(3)
  made = lib.clustered(labels, 28, rng=rng, clusters=clusters, examples_per_client=examples_per_client)
  held = _counts(made, labels, 10) > 0
  assert held.any(0).all()
  cluster = np.arange(28) % clusters
  sets = [held[cluster == c].any(0) for c in range(clusters)]
  assert [s.sum() for s in sets] == [len(range(c, max(clusters, 10), clusters)) for c in range(clusters)]
  if clusters <= 10:
    np.testing.assert_array_equal(sum(s.astype(int) for s in sets), 1)
  if not examples_per_client:
    assert all(np.ptp(made.sizes[cluster == c]) <= sets[c].sum() for c in range(clusters))  # evenly within a cluster


def test_pathological_is_balanced_and_has_exactly_two_classes():
  labels = np.repeat(np.arange(10), 600)
  counts = _counts(lib.pathological(labels, 100, rng=np.random.default_rng(0), classes_per_client=2), labels, 10)
  np.testing.assert_array_equal(np.count_nonzero(counts, axis=1), 2)
  np.testing.assert_array_equal(np.count_nonzero(counts, axis=0), 20)
  assert set(counts[counts > 0]) == {30}
  drawn = lib.pathological(labels, 100, rng=np.random.default_rng(0), classes_per_client=2, examples_per_client=7)
  assert set(np.sort(_counts(drawn, labels, 10), axis=1)[:, -2:].ravel()) == {3, 4}


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("number", [0, 20])
def test_same_generator_same_partition(method, number):
  labels = np.random.default_rng(1).integers(5, size=400)
  extra = {"iid": {}, "dirichlet": {"alpha": 0.5}, "pathological": {"classes_per_client": 2}}[method]

  def make(seed):
    return _METHODS[method](labels, 10, rng=np.random.default_rng(seed), examples_per_client=number, **extra)

  np.testing.assert_array_equal(make(3).index, make(3).index)
  assert not np.array_equal(make(3).index, make(4).index)


def test_iid_is_even_and_free_of_label_skew():
  labels = np.repeat(np.arange(4), 5000)
  partition = lib.iid(labels, 2000, rng=np.random.default_rng(0))
  np.testing.assert_array_equal(partition.sizes, 10)
  counts = _counts(partition, labels, 4)
  # Hypergeometric: 10 of 20,000 with 5,000 of the class. The variance of a sample variance of 2,000 is about 3 %.
  np.testing.assert_allclose(counts.var(0), 10 * 0.25 * 0.75 * (20000 - 10) / (20000 - 1), rtol=0.15)


def test_dirichlet_shares_of_a_class_have_the_closed_form_moments():
  num_clients, alpha, draws = 5, 0.5, 2000
  labels = np.zeros(1000, int)
  rng = np.random.default_rng(0)
  sizes = [lib.dirichlet(labels, num_clients, rng=rng, alpha=alpha, min_size=0).sizes for _ in range(draws)]
  shares = np.array(sizes) / len(labels)
  mean = 1 / num_clients
  variance = mean * (1 - mean) / (num_clients * alpha + 1)
  np.testing.assert_allclose(shares.mean(0), mean, atol=4 * np.sqrt(variance / draws))
  np.testing.assert_allclose(shares.var(0), variance, rtol=0.15)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 10.0])
@pytest.mark.parametrize("masked", [False, True])
def test_drawn_labels_are_dirichlet_multinomial(alpha, masked):
  num_clients, number = 20000, 20
  frequency = np.array([100, 200, 300, 400])
  labels = np.repeat(np.arange(4), frequency)
  allowed = np.ones((4, num_clients), bool)
  allowed[3] = not masked
  allowed[3, 0] = True  # the class needs a holder
  partition = lib.dirichlet(
    labels, num_clients, rng=np.random.default_rng(0), alpha=alpha, allowed=allowed, examples_per_client=number
  )
  counts = _counts(partition, labels, 4)[1:]
  concentration = alpha * 4 * frequency / 1000 * [1, 1, 1, not masked]
  total = concentration.sum()
  mean = concentration / total
  variance = number * mean * (1 - mean) * (number + total) / (1 + total)
  np.testing.assert_allclose(counts.mean(0), number * mean, atol=5 * np.sqrt(variance.max() / num_clients))
  np.testing.assert_allclose(counts.var(0), variance, rtol=0.1)


def test_a_client_above_the_mean_gets_no_further_class():
  labels = np.repeat(np.arange(3), 100)
  rng = np.random.default_rng(0)
  for _ in range(50):
    counts = _counts(lib.dirichlet(labels, 5, rng=rng, alpha=0.1, min_size=0), labels, 3)
    before = np.cumsum(counts, axis=1) - counts
    assert not counts[before > len(labels) / 5].any()


def test_ten_thousand_clients_with_a_small_alpha():
  labels = np.random.default_rng(0).integers(10, size=60000)
  holders = np.arange(10000) % 10 == 0
  allowed = lib.monopolistic(10, holders, np.array([2, 7]))
  for min_size in (1, 5):  # 5 leaves 48,000 free examples for the 45,000 that the others need
    partition = lib.dirichlet(
      labels, 10000, rng=np.random.default_rng(1), alpha=0.1, min_size=min_size, allowed=allowed
    )
    assert partition.sizes.min() >= min_size
    assert allowed[labels, _owner(partition, len(labels))].all()


def test_repair_keeps_the_skew():
  labels = np.repeat(np.arange(10), 6000)
  partition = lib.dirichlet(labels, 10000, rng=np.random.default_rng(0), alpha=0.1, min_size=4)
  classes = np.count_nonzero(_counts(partition, labels, 10), axis=1)
  assert classes.mean() < 3  # iid clients of six examples would have 4.7


def test_a_million_clients_draw_from_few_examples():
  labels = np.random.default_rng(0).integers(10, size=6000)
  partition = lib.iid(labels, 1_000_000, rng=np.random.default_rng(0), examples_per_client=3)
  used = np.bincount(partition.index, minlength=len(labels))
  np.testing.assert_array_equal(used, 500)


def test_mask_of_monopolistic_classes():
  allowed = lib.monopolistic(3, np.array([True, False]), np.array([1]))
  np.testing.assert_array_equal(allowed, [[True, True], [True, False], [True, True]])
  chosen = np.stack([lib.choose_monopolistic(np.random.default_rng(seed), 5, 2) for seed in range(2000)])
  assert (np.diff(chosen, axis=1) > 0).all()
  np.testing.assert_allclose(np.bincount(chosen.ravel()) / 2000, 0.4, atol=0.05)


_LABELS = np.repeat(np.arange(4), 10)
_RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
  "call, said",
  [
    (lambda: lib.dirichlet(_LABELS, 4, rng=_RNG, alpha=0.0), "alpha: got 0.0"),
    (lambda: lib.dirichlet(_LABELS, 4, rng=_RNG, alpha=float("nan")), "alpha: got nan"),
    (lambda: lib.iid(_LABELS, 0, rng=_RNG), "num_clients: got 0"),
    (lambda: lib.iid(_LABELS, 21, rng=_RNG), "21 clients of at least 2 examples need 42, there are 40"),
    (lambda: lib.iid(_LABELS, 4, rng=_RNG, min_size=-1), "min_size"),
    (lambda: lib.iid(_LABELS[:0], 4, rng=_RNG), "no examples"),
    (lambda: lib.clustered(_LABELS, 4, rng=_RNG, clusters=5), "clusters: got 5"),
    (lambda: lib.pathological(_LABELS, 4, rng=_RNG, classes_per_client=0), "classes_per_client: got 0"),
    (lambda: lib.pathological(_LABELS, 4, rng=_RNG, classes_per_client=5), "accepted are 1 to 4"),
    (lambda: lib.pathological(_LABELS, 3, rng=_RNG, classes_per_client=1), "cannot hold all 4 classes"),
    (lambda: lib.iid(_LABELS, 4, rng=_RNG, allowed=np.ones((3, 4), bool)), "allowed: got shape"),
    (lambda: lib.iid(_LABELS, 2, rng=_RNG, allowed=np.eye(4, 2, dtype=bool)), "class 2 has examples but no client"),
    (lambda: lib.iid(_LABELS, 2, rng=_RNG, allowed=np.eye(2)[[0] * 4] > 0), "client 1 may hold no class"),
    (lambda: lib.monopolistic(4, np.zeros(3, bool), np.array([1])), "at least one holder"),
    (lambda: lib.monopolistic(4, np.ones(3, bool), np.array([4])), "accepted are 0 to 3"),
    (lambda: lib.choose_monopolistic(_RNG, 4, 4), "accepted are 0 to 3"),
    (
      lambda: lib.dirichlet(
        _LABELS, 4, rng=_RNG, alpha=1.0, min_size=8, allowed=lib.monopolistic(4, np.arange(4) == 0, np.arange(3))
      ),
      "of 4 clients cannot get 8 examples",
    ),
  ],
)
def test_errors_are_one_clear_line(call, said):
  with pytest.raises(InputError) as error:
    call()
  assert said in str(error.value)
  assert "\n" not in str(error.value)
