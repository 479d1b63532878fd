"""Summaries over clients and classes against plain loops and sums done by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apfl_jax import metrics

CLIENTS = st.lists(
  st.tuples(st.one_of(st.just(math.nan), st.floats(0, 1)), st.integers(1, 50), st.booleans(), st.booleans()),
  max_size=35,
)


def mean(values):
  values = list(values)
  return sum(values) / len(values) if values else None


@given(CLIENTS)
@settings(max_examples=60, deadline=None)
def test_agrees_with_loops(clients):
  columns = [np.array(column) for column in zip(*clients, strict=True)] if clients else [np.zeros(0)] * 4
  got = metrics.summarise(*columns)
  tested = [client for client in clients if not math.isnan(client[0])]
  centre = mean(a for a, *_ in tested)
  each = [a for a, *_ in tested]
  differences, squares = sum(abs(a - b) for a in each for b in each), sum(a * a for a in each)
  groups = {
    "dropped_gap": ([a for a, _, d, _ in tested if d], [a for a, _, d, _ in tested if not d]),
    "monopolist_gap": ([a for a, *_, m in tested if m], [a for a, *_, m in tested if not m]),
  }
  want = {
    "mean": centre,
    "weighted_mean": sum(a * n for a, n, *_ in tested) / sum(n for _, n, *_ in tested) if tested else None,
    "std": math.sqrt(sum((a - centre) ** 2 for a, *_ in tested) / len(tested)) if tested else None,
    "worst_decile": mean(sorted(a for a, *_ in tested)[: math.ceil(len(tested) / 10)]),
    "gini": (differences / (2 * len(each) * sum(each)) if sum(each) else 0.0) if each else None,
    "jain": (sum(each) ** 2 / (len(each) * squares) if squares else 1.0) if each else None,
    **{name: mean(a) - mean(b) if a and b else None for name, (a, b) in groups.items()},
    "dropped": mean(a for a, _, dropped, _ in tested if dropped),
    "present": mean(a for a, _, dropped, _ in tested if not dropped),
    "monopolists": mean(a for a, *_, monopolist in tested if monopolist),
  }
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name] == (None if value is None else pytest.approx(value, abs=1e-7)), name
    assert got[name] is None or type(got[name]) is float  # plain, so that json writes it


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_worst_decile_rounds_up(clients, worst):
  accuracy = np.linspace(0.1, 0.9, clients)[::-1]
  nobody = np.zeros(clients, bool)
  got = metrics.summarise(accuracy, np.ones(clients), nobody, nobody)
  assert got["worst_decile"] == pytest.approx(np.linspace(0.1, 0.9, clients)[:worst].mean())
  assert got["dropped"] is None
  assert got["monopolists"] is None


def test_one_client_with_everything_is_as_uneven_as_can_be():
  assert metrics.fairness.gini([0, 0, 0, 1]) == pytest.approx(3 / 4)
  assert metrics.fairness.jain([0, 0, 0, 1]) == pytest.approx(1 / 4)
  assert metrics.fairness.gini([0.3] * 5) == pytest.approx(0) and metrics.fairness.jain([0.3] * 5) == pytest.approx(1)


def test_classes_are_told_over_models_and_without_those_that_have_no_examples():
  recalls = [[0.5, math.nan, 1.0], [0.7, math.nan, math.nan]]
  got = metrics.fairness.classes(recalls)
  assert got.pop("each") == [pytest.approx(0.6), None, 1.0]
  assert got == pytest.approx({"mean": 0.8, "std": 0.2, "least": 0.6})
  assert metrics.fairness.classes([math.nan]) == {"each": [None], "mean": None, "std": None, "least": None}


def test_reweighted_is_the_accuracy_on_a_test_set_of_the_clients_mix():
  rng = np.random.default_rng(0)
  right = rng.random((3, 4, 10)) < 0.6  # client, class, example
  counts = np.array([[8, 1, 0, 1], [0, 0, 0, 5], [2, 2, 2, 2]])
  want = []
  for client in range(3):
    copies = [
      right[client, c].tolist() * counts[client, c] for c in range(4)
    ]  # each class as often as the client has it
    want.append(np.mean(sum(copies, [])))
  got = metrics.fairness.reweighted(right.mean(2), counts)
  np.testing.assert_allclose(got, want)
  unknown = metrics.fairness.reweighted([[0.5, math.nan], [math.nan, 1.0]], [[1, 9], [0, 0]])
  np.testing.assert_array_equal(unknown, [0.5, math.nan])


def test_harm_counts_clients_that_lose_more_than_a_point():
  got = metrics.fairness.harm([0.5, 0.89, 0.7, 0.95, math.nan], [0.52, 0.9, 0.7, 0.9, 0.1])
  assert got == pytest.approx({"harmed": 0.25, "helped": 0.25, "mean": 0.02 / 4, "worst": -0.02})
  assert set(metrics.fairness.harm([math.nan], [1.0]).values()) == {None}


def test_unseen_counts_every_class_once():
  # Class 2 and 3 are unseen and of different sizes; recalls are 1/4 and 1/2, seen ones 1 and 3/5.
  confusion = np.array([[10, 0, 0, 0], [4, 6, 0, 0], [3, 0, 1, 0], [0, 4, 2, 6]])
  restricted = np.array([[0, 0, 10, 0], [0, 0, 0, 10], [0, 0, 3, 1], [0, 0, 6, 6]])
  got = metrics.unseen(confusion, restricted, [3, 2])
  u, s = (0.25 + 0.5) / 2, (1 + 0.6) / 2
  assert got.pop("classes") == [2, 3]
  assert got == pytest.approx(
    {"accuracy": u, "seen_accuracy": s, "harmonic_mean": 2 / (1 / u + 1 / s), "restricted_accuracy": (0.75 + 0.5) / 2}
  )


def test_unseen_takes_split_ties():
  got = metrics.unseen(np.diag([1, 0, 0]), np.array([[0, 0, 0], [0, 2.5, 2.5], [0, 2, 2]]), np.array([1, 2]))
  assert got["restricted_accuracy"] == pytest.approx(0.5)


def test_unseen_without_unseen_classes_or_examples_is_none():
  nothing = metrics.unseen(np.eye(3), np.zeros((3, 3)), [])
  assert nothing.pop("classes") == []
  assert set(nothing.values()) == {None}
  untested = metrics.unseen(np.diag([2, 3, 0]), np.zeros((3, 3)), [2])
  assert untested["seen_accuracy"] == 1.0
  assert untested["accuracy"] is untested["harmonic_mean"] is untested["restricted_accuracy"] is None


def test_harmonic_mean_of_two_zeros_is_zero():
  assert metrics.unseen(np.array([[0, 1], [1, 0]]), np.eye(2), [1])["harmonic_mean"] == 0.0
