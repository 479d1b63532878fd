"""Class trees: cosines in closed form, and what the trees say is alike."""

import itertools

import numpy as np
import pytest

from apfl_jax import data, semantics
from apfl_jax.semantics import HIERARCHIES


@pytest.mark.parametrize("dataset", HIERARCHIES)
def test_cosines_are_shared_nodes_over_the_root_of_both_depths(dataset):
  tree = HIERARCHIES[dataset]
  table = semantics.hierarchy(tuple(tree), dataset)
  for (i, a), (j, b) in itertools.islice(itertools.combinations_with_replacement(enumerate(tree), 2), 0, None, 7):
    shared = len(set(tree[a]) & set(tree[b]))
    assert table[i] @ table[j] == pytest.approx(shared / np.sqrt(len(tree[a]) * len(tree[b])))
  np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1)


def test_a_tree_in_numbers():
  table = semantics.hierarchy(("cat", "dog", "horse", "frog", "ship"), "cifar10")
  # cat: animal, mammal, carnivore, itself; frog: animal, itself; ship: vehicle, craft, itself.
  np.testing.assert_allclose(table[0] @ table.T, [1, 3 / 4, 2 / 4, 1 / np.sqrt(8), 0])


@pytest.mark.parametrize("dataset", ["fashion_mnist", "cifar10", "cifar100"])
def test_embeddings_keep_every_angle_of_the_centred_tree(dataset):
  names = tuple(name for name in HIERARCHIES[dataset] if name not in ("maple", "oak", "palm", "pine", "willow"))
  table = semantics.embeddings("hierarchy", names, dataset, rng=np.random.default_rng(0))
  centred = semantics.hierarchy(names, dataset)
  centred -= centred.mean(0)
  centred /= np.linalg.norm(centred, axis=1, keepdims=True)
  np.testing.assert_allclose(table @ table.T, centred @ centred.T, atol=1e-5)
  assert len(names) == {"cifar100": 100}.get(dataset, 10)


def test_cifar100_has_twenty_superclasses_of_five():
  tree = HIERARCHIES["cifar100"]
  groups = {}
  for name, nodes in tree.items():
    groups.setdefault(nodes[-2], []).append(name)
  groups["plant/trees"] = [name for name in groups["plant/trees"] if name.endswith("_tree")]
  assert len(groups) == 20 and {len(names) for names in groups.values()} == {5}


def test_trees_of_the_built_in_sets_fit_their_class_names():
  for name in data.BUILT_IN:
    assert set(data.load(name).class_names) == set(HIERARCHIES[name])
  assert list(map(str, range(10))) == list(HIERARCHIES["mnist"])
  digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
  tables = semantics.hierarchy(digits, "digits"), semantics.hierarchy(tuple("0123456789"), "mnist")
  np.testing.assert_array_equal(tables[0] @ tables[0].T, tables[1] @ tables[1].T)
