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
  want = {
    "mean": centre,
    "weighted_mean": sum(a * n for a, n, *_ in tested) / sum(n for _, n, *_ in tested) if tested else None,
    "std": math.sqrt(sum((a - centre) ** 2 for a, *_ in tested) / len(tested)) if tested else None,
    "worst_decile": mean(sorted(a for a, *_ in tested)[: math.ceil(len(tested) / 10)]),
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
