"""Class embeddings: geometry in closed form, and the attribute tables against their sources."""

import numpy as np
import pytest

from apfl_jax import data, semantics
from apfl_jax.errors import InputError

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SETS = {
  "digits": _DIGITS,
  "mnist": tuple("0123456789"),
  "fashion_mnist": _FASHION,
  "cifar10": _CIFAR,
  "fast": ("top left", "top right", "bottom left", "bottom right"),
}


def _table(kind, names, dataset="digits", seed=0, **options):
  return semantics.embeddings(kind, names, dataset, rng=np.random.default_rng(seed), **options)


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_onehot_classes_are_equally_far_apart(num_classes):
  table = _table("onehot", tuple(map(str, range(num_classes))))
  expected = np.full((num_classes, num_classes), -1 / (num_classes - 1))
  np.fill_diagonal(expected, 1)
  np.testing.assert_allclose(table @ table.T, expected, atol=1e-5)
  assert table.dtype == np.float32


def test_random_is_of_its_seed():
  first = _table("random", _DIGITS)
  assert first.shape == (10, 64)
  np.testing.assert_array_equal(first, _table("random", _DIGITS))
  assert not np.array_equal(first, _table("random", _DIGITS, seed=1))


@pytest.mark.parametrize("dataset", _SETS)
def test_attributes_are_distinct_unit_rows_in_the_order_of_the_names(dataset):
  names = _SETS[dataset]
  table = _table("attributes", names, dataset)
  np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1, atol=1e-6)
  assert len(np.unique(table.round(4), axis=0)) == len(names)
  order = np.random.default_rng(0).permutation(len(names))
  shuffled = _table("attributes", tuple(names[i] for i in order), dataset)
  np.testing.assert_allclose(shuffled, table[order], atol=1e-6)
  assert set(semantics.ATTRIBUTES[dataset]) == set(names)


def test_tables_of_the_built_in_sets_fit_their_class_names():
  for name in data.BUILT_IN:
    dataset = data.load(name)
    assert len(_table("attributes", dataset.class_names, name)) == len(dataset.class_names)


def test_digit_segments():
  segments = ["abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg"]
  table = semantics.attributes(_DIGITS, "digits")
  np.testing.assert_array_equal(table[:, :7], [[letter in lit for letter in "abcdefg"] for lit in segments])
  np.testing.assert_array_equal(table[:, 7], [0.5, 0, 0, 0, 0.25, 0, 0.5, 0, 1, 0.5])
  np.testing.assert_array_equal(table[:, 8], [1, 0, 1, 1, 0, 1, 1, 0, 1, 1])
  np.testing.assert_array_equal(table[:, 9], [0, 1, 1, 0, 1, 0, 0.5, 1, 0, 0.5])
  np.testing.assert_array_equal(semantics.attributes(_SETS["mnist"], "mnist"), table)


def test_attributes_say_what_is_alike():
  cosine = {}
  for dataset in ("fashion_mnist", "cifar10"):
    table = _table("attributes", _SETS[dataset], dataset)
    names = _SETS[dataset]
    cosine.update({(a, b): table[i] @ table[j] for i, a in enumerate(names) for j, b in enumerate(names)})
  for near, far in [
    (("automobile", "truck"), ("automobile", "cat")),
    (("cat", "dog"), ("cat", "ship")),
    (("deer", "horse"), ("deer", "airplane")),
    (("Sneaker", "Sandal"), ("Sneaker", "Coat")),
    (("Pullover", "Coat"), ("Pullover", "Bag")),
  ]:
    assert cosine[near] > 0.4 > 0 > cosine[far]


def test_fast_is_spanned_by_any_three_classes():
  table = _table("attributes", _SETS["fast"], "fast")
  np.testing.assert_allclose(table[0], -table[3], atol=1e-6)
  np.testing.assert_allclose(table[1], -table[2], atol=1e-6)


def test_reduction_changes_no_angle_while_the_classes_fit():
  table = np.random.default_rng(0).standard_normal((10, 384)) + 3
  reduced = semantics.normalise(table)
  assert reduced.shape == (10, 9)
  centred = table - table.mean(0)
  centred /= np.linalg.norm(centred, axis=1, keepdims=True)
  np.testing.assert_allclose(reduced @ reduced.T, centred @ centred.T, atol=1e-5)


def test_reduction_keeps_the_directions_of_most_variance():
  rng = np.random.default_rng(0)
  plane = rng.standard_normal((100, 64)) @ np.linalg.qr(rng.standard_normal((300, 64)))[0].T
  noisy = plane + 1e-6 * rng.standard_normal((100, 300))
  centred = plane - plane.mean(0)
  centred /= np.linalg.norm(centred, axis=1, keepdims=True)
  reduced = semantics.normalise(noisy)
  assert reduced.shape == (100, 64)
  np.testing.assert_allclose(reduced @ reduced.T, centred @ centred.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["attributes", "minilm", "attributes+minilm"])
def test_influence_leads_from_onehot_to_the_kind_alone(kind):
  names, table = _SETS["cifar10"], lambda *options, **more: _table(*options, "cifar10", **more)
  alone, onehot = table(kind, names), table("onehot", names)
  np.testing.assert_array_equal(table(kind, names, influence=1.0), alone)
  np.testing.assert_array_equal(table(kind, names, influence=0.0), onehot)
  for k in (0.2, 0.5, 0.9):
    mixed = table(kind, names, influence=k)
    expected = (k**2 * alone @ alone.T + (1 - k) ** 2 * onehot @ onehot.T) / (k**2 + (1 - k) ** 2)
    np.testing.assert_allclose(mixed @ mixed.T, expected, atol=1e-6)
    assert mixed.dtype == np.float32


def test_cosines_of_an_ensemble_are_the_mean_of_its_parts():
  parts = [_table(kind, _FASHION, "fashion_mnist") for kind in ("attributes", "minilm", "hierarchy")]
  ensemble = _table("attributes + minilm+hierarchy", _FASHION, "fashion_mnist")
  np.testing.assert_allclose(ensemble @ ensemble.T, np.mean([part @ part.T for part in parts], axis=0), atol=1e-6)


def test_whitening_takes_half_of_what_directions_differ_by():
  table = np.random.default_rng(0).standard_normal((9, 5)) * [8, 4, 2, 1, 0.1] + 3
  whitened = semantics.normalise(table, whitening=True)
  # The oracle: the inverse square root of the shrunk covariance, applied to the columns.
  centred = table - table.mean(0)
  covariance = centred.T @ centred
  value, vector = np.linalg.eigh((covariance + np.trace(covariance) / 5 * np.eye(5)) / 2)
  expected = centred @ vector / np.sqrt(value) @ vector.T
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  np.testing.assert_allclose(whitened, expected, atol=1e-6)


def test_whitening_leaves_onehot_and_any_scale_as_they_are():
  whitened = _table("onehot", _DIGITS, whitening=True)
  np.testing.assert_allclose(whitened, _table("onehot", _DIGITS), atol=1e-6)
  table = np.random.default_rng(0).standard_normal((30, 100))
  small, large = (semantics.normalise(scale * table, whitening=True) for scale in (1e-3, 1e3))
  np.testing.assert_allclose(small, large, atol=1e-6)


@pytest.mark.parametrize(
  "call, said",
  [
    (lambda: _table("attributes", ("a", "b"), "cifar100"), "there is one for digits, mnist"),
    (lambda: _table("attributes", ("a", "b"), "cifar100"), "take onehot"),
    (lambda: _table("attributes", ("zero", "ten")), "no class 'ten'"),
    (lambda: _table("words", _DIGITS), "accepted are onehot, random, attributes, hierarchy, minilm, bert, clip"),
    (lambda: _table("attributes+words", _DIGITS), "'words'"),
    (lambda: _table("attributes+", _DIGITS), "got ''"),
    (lambda: _table("minilm+minilm", _DIGITS), "at most once"),
    (lambda: _table("hierarchy", ("a", "b"), "emnist"), "there is one for digits, mnist"),
    (lambda: _table("hierarchy", ("zero", "ten")), "no class 'ten'"),
    (lambda: _table("minilm", ("zero", "ten")), "no class 'ten'"),
    (lambda: _table("clip", _DIGITS, "svhn"), "embed_classes --dataset=svhn --kind=clip"),
    (lambda: _table("nowhere.npz", _DIGITS), "nowhere.npz does not exist"),
    (lambda: _table("onehot", ("alone",)), "at least 2"),
    (lambda: semantics.normalise(np.array([[1.0, np.nan], [0, 0]])), "finite"),
    (lambda: semantics.normalise(np.array([[0.0], [1], [2]])), "class 1 is the mean"),
  ],
)
def test_errors_are_one_clear_line(call, said):
  with pytest.raises(InputError) as error:
    call()
  assert said in str(error.value)
  assert "\n" not in str(error.value)
