"""From a partition to a `Federation`: each client's training, validation and test examples as runs of one index."""

from typing import Any

import numpy as np

from apfl_jax.data.datasets import Dataset
from apfl_jax.data.partition import Partition
from apfl_jax.errors import InputError
from apfl_jax.types import Federation, Span, Store

PARTS = ("train", "validation", "test")


def build(
  dataset: Dataset,
  partition: Partition,
  *,
  rng: np.random.Generator,
  fractions: tuple[float, float, float] = (0.6, 0.15, 0.25),
  pooled_examples: int = 0,
  index_size: int = 0,
) -> tuple[Federation, Span]:
  """The federation of a partition, and the span of its pooled test examples; NumPy arrays throughout.

  The store is the training images followed by the data set's own test images. The index is, client by client, its
  train, validation and test run, each in random order, and at the very end the pooled test examples.

  The three parts of a client follow the same label law: its examples, ordered by class, are dealt out at even
  distances. Their sizes depend on the client's size alone: the fractions rounded, at least one test and one training
  example from two examples on; a single example is for training. Copies of an example stay in one part, so that no
  test example is trained on; a client with copies is divided by its distinct examples.

  Args:
    dataset: the examples that `partition` numbers.
    partition: who holds them.
    rng: consumed.
    fractions: of train, validation and test (method 2.1 [O]); sum 1.
    pooled_examples: size of the class-balanced sample of the data set's own test split; 0 takes it whole, but for
      examples with a negative label.
    index_size: entries that the index has at least; what is left means nothing.

  Raises:
    InputError: fractions that do not add up, or more than 2**31 - 1 index entries.
  """
  if len(fractions) != 3 or min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-6:
    raise InputError(f"fractions: got {fractions}, needs three shares of at least 0 with sum 1, the first above 0")
  if pooled_examples < 0:
    raise InputError(f"pooled_examples: got {pooled_examples}, needs at least 0")
  pooled = _pooled(dataset.test_labels, pooled_examples, rng) + len(dataset.labels)
  length = max(len(partition.index) + len(pooled), index_size)
  if length > np.iinfo(np.int32).max:
    raise InputError(f"partition: {length} index entries, at most {np.iinfo(np.int32).max} can be numbered")

  index, sizes = _split(partition, dataset.labels, fractions, rng)
  starts = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
  store = Store(
    _joined(dataset.images, dataset.test_images),
    _array(np.concatenate([dataset.labels, dataset.test_labels]), np.int32),
    _array(_padded([index, pooled], index_size), np.int32),
  )
  spans = (Span(_array(starts[:, i], np.int32), _array(sizes[:, i], np.int32)) for i in range(len(PARTS)))
  federation = Federation(store, _array(np.arange(len(sizes)), np.int32), *spans)
  return federation, Span(_array(len(index), np.int32), _array(len(pooled), np.int32))


def histogram(federation: Federation, num_classes: int, part: str = "train") -> np.ndarray:
  """int32 [N, C]: how many examples of each class a client has in `part` (train, validation or test).

  Raises:
    InputError: another part.
  """
  if part not in PARTS:
    raise InputError(f"part: got {part!r}, accepted are {', '.join(PARTS)}")
  span = getattr(federation, part)
  size = np.asarray(span.size, np.int64)
  label = np.asarray(federation.store.labels)[np.asarray(federation.store.index)[_places(span)]]
  cell = np.repeat(np.arange(len(size)) * num_classes, size) + label
  return np.bincount(cell, minlength=len(size) * num_classes).reshape(-1, num_classes).astype(np.int32)


def pooled(federation: Federation) -> Federation:
  """The federation in which every client trains and validates on all clients' examples; tests stay each client's own.

  The two pools, client by client, follow the index, so that spans into it keep their meaning; with padding to twice its
  size, whatever the sizes of the clients' parts.

  Raises:
    InputError: more than 2**31 - 1 index entries.
  """
  store, index = federation.store, np.asarray(federation.store.index)
  if 2 * len(index) > np.iinfo(np.int32).max:
    raise InputError(f"pool: {2 * len(index)} index entries, at most {np.iinfo(np.int32).max} can be numbered")
  train, validation = (index[_places(span)] for span in (federation.train, federation.validation))
  whole = lambda start, pool: Span(*(_array(np.full(len(federation.id), x), np.int32) for x in (start, len(pool))))
  return federation._replace(
    store=store._replace(index=_array(_padded([index, train, validation], 2 * len(index)), np.int32)),
    train=whole(len(index), train),
    validation=whole(len(index) + len(train), validation),
  )


def _padded(parts: list[np.ndarray], size: int) -> np.ndarray:
  """One after the other, then zeros up to a size."""
  return np.concatenate([*parts, np.zeros(max(0, size - sum(map(len, parts))), parts[0].dtype)])


def _places(span: Span) -> np.ndarray:
  """int64: the places in the index that spans [N] cover, client by client."""
  start, size = (np.asarray(field, np.int64) for field in span)
  return np.repeat(start - (np.cumsum(size) - size), size) + np.arange(size.sum())


def _joined(first: np.ndarray, second: np.ndarray) -> Any:
  """Both in one array; without a copy, and memory-mapped if they are, where they already lie one after the other."""
  whole = first.base
  if isinstance(whole, np.memmap) and whole is second.base and len(whole) == len(first) + len(second):
    return whole
  return _array(np.concatenate([first, second]), np.uint8)


def _array(values: Any, dtype: type) -> Any:
  """NumPy where the types say jax.Array: the arrays go to the device later, and some of them never do."""
  return np.asarray(values, dtype, order="C")


def _split(
  partition: Partition, labels: np.ndarray, fractions: tuple[float, float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """The index int64 [L] with each client's parts in turn, and the sizes of the parts int64 [N, 3].

  Two sorts of integers that carry (client, class and random order) and (client, part, random order), nothing by client:
  20 million entries take seconds.
  """
  num_clients, num_examples = len(partition.sizes), len(labels)
  # All examples in a random order, class by class: the place in it is the class, a random priority and the example.
  shuffled = rng.permutation(num_examples)
  order = shuffled[np.argsort(labels[shuffled], kind="stable")]
  place = np.empty(num_examples, np.int64)
  place[order] = np.arange(num_examples)
  key = np.repeat(np.arange(num_clients) * num_examples, partition.sizes) + place[partition.index]
  key.sort()

  client, example = key // num_examples, order[key % num_examples]
  part = _deal_out(client, partition.sizes, fractions, rng)
  if len(np.unique(partition.index)) < len(partition.index):
    example = _draw_apart(labels, order, labels[example], part, fractions, rng)
  slot = client * len(PARTS) + part
  sizes = np.bincount(slot, minlength=num_clients * len(PARTS)).reshape(-1, len(PARTS))

  low = num_examples.bit_length()
  middle = 63 - low - int(num_clients * len(PARTS)).bit_length()
  key = (((slot << middle) | rng.integers(1 << middle, size=len(slot))) << low) | example
  key.sort()
  return key & ((1 << low) - 1), sizes


def _draw_apart(
  labels: np.ndarray,
  order: np.ndarray,
  wanted: np.ndarray,
  part: np.ndarray,
  fractions: tuple[float, float, float],
  rng: np.random.Generator,
) -> np.ndarray:
  """Examples int64 [n] of the `wanted` classes for the parts [n], each example for one part only, whoever has it.

  Where examples repeat, one client's test example may else be another's training example, and the global model would
  have been trained on it. Every example is used as often as any other of its class and part, give or take one.
  """
  part_of = np.empty(len(order), np.int64)
  part_of[order] = _deal_out(np.zeros(len(order), np.int64), np.array([len(order)]), fractions, rng)
  group, pool_group = wanted * len(PARTS) + part, labels * len(PARTS) + part_of
  example = np.empty(len(wanted), np.int64)
  shuffled = rng.permutation(len(order))
  for g in np.unique(group):
    pool, slots = shuffled[pool_group[shuffled] == g], np.flatnonzero(group == g)
    if not len(pool):
      raise InputError(
        f"examples_per_client: class {g // len(PARTS)} has too few examples"
        f" for a {PARTS[g % len(PARTS)]} part of its own"
      )
    example[slots] = np.resize(pool, len(slots))
  return example


def _deal_out(
  client: np.ndarray, units: np.ndarray, fractions: tuple[float, float, float], rng: np.random.Generator
) -> np.ndarray:
  """The part int64 [n] (0 train, 1 validation, 2 test) of each unit, units being sorted by client and class.

  Of a client's m units, those at which `(rank * tests + phase) / m` passes a whole number are for test: exactly
  `tests` of them at even distances. Then the same with the others for validation.
  """
  tests = np.where(fractions[2] > 0, np.clip(np.floor(fractions[2] * units + 0.5), 1, None), 0).astype(np.int64)
  tests = np.minimum(tests, np.maximum(units - 1, 0))
  validations = np.floor(fractions[1] * units + 0.5).astype(np.int64)
  validations = np.minimum(validations, np.maximum(units - tests - 1, 0))
  rank = np.arange(len(client)) - (np.cumsum(units) - units)[client]
  is_test, before = _evenly(rank, tests, units, client, rng)
  is_validation, _ = _evenly(rank - before, validations, units - tests, client, rng)
  return np.where(is_test, 2, np.where(is_validation, 1, 0))


def _evenly(
  rank: np.ndarray, chosen: np.ndarray, total: np.ndarray, client: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Whether each rank is one of the `chosen` [N] of `total` [N], and how many before it are; whole numbers only."""
  phase = rng.integers(np.maximum(total, 1))
  total, chosen, phase = np.maximum(total, 1)[client], chosen[client], phase[client]
  before = (rank * chosen + phase) // total
  return ((rank + 1) * chosen + phase) // total > before, before


def _pooled(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
  """int64 [size]: test examples, equally many of each class as far as the data go; all of them for size 0."""
  shuffled = rng.permutation(np.flatnonzero(labels >= 0))
  if not size:
    return shuffled
  order = shuffled[np.argsort(labels[shuffled], kind="stable")]
  number = np.bincount(labels[shuffled])
  turn = np.arange(len(order)) - (np.cumsum(number) - number)[labels[order]]
  tie = rng.permutation(len(number))[labels[order]]
  return order[np.lexsort((tie, turn))[:size]]
