"""What a run's generator is worth, and what it gives away: `--judge=N`, for reports alone.

A judge is a classifier trained on all training images of the data set, once for each data set and model, and kept in
the cache folder. It says of N samples a class whether they are what was asked for; fresh students are trained on the
samples only and tested on real images (method 8.4); distances to real images tell modes and memories (2.11, 6.7). No
method sees any of it. Classes are those that the teacher, the global model, recognises: of others its samples cannot be
expected to be.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from apfl_jax import algorithms, data, metrics, nn, random, simulation, training
from apfl_jax.files import cache_dir, replacing
from apfl_jax.types import Array, Data, Key, LocalSGD, Model, Params, Prediction, PyTree, Span, Store, Task

_JUDGE_STEPS, _STUDENT_STEPS = 3000, 1000
_STUDENTS = 3  # what one student learns hangs on its seed
_RECOGNISED = 0.5  # least recall of the teacher
_RATE, _BATCH = 0.05, 64
_SAMPLES, _JUDGE, _STUDENT, _MATCHED = range(4)  # what keys are for


def fit(model: Model, images: np.ndarray, labels: np.ndarray, num_classes: int, steps: int, key: Key) -> Params:
  """A classifier trained in the plain way: SGD with a rate that falls along a cosine, examples shifted at random.

  Args:
    model: the classifier.
    images: uint8 [M, height, width, channels].
    labels: int [M].
    num_classes: C.
    steps: of 64 examples.
    key: consumed.
  """
  store = Store(jnp.asarray(images), jnp.asarray(labels, jnp.int32), jnp.arange(len(labels), dtype=jnp.int32))
  return _fit(model, num_classes)(store, jnp.int32(steps), key)


def _fit(model: Model, num_classes: int) -> Callable[[Store, Array, Key], Params]:
  @jax.jit
  def train(store: Store, steps: Array, key: Key) -> Params:
    init_key, step_key = jax.random.split(key)
    sgd = LocalSGD(jnp.float32(_RATE), _BATCH, 1, 1, 0, "examples", "shift")
    shape: Any = store.images.shape[1:]
    task = Task(1, num_classes, shape, jnp.zeros((num_classes, 1)), model, sgd, jnp.int32(1))
    span = Span(jnp.int32(0), jnp.int32(len(store.labels)))
    loss = training.classification_loss(task)
    return training.local_sgd(task, loss, model.init(init_key), Data(store, span, span), steps, step_key, cosine=True)

  return train


def judge(dataset: data.Dataset, model_name: str) -> tuple[Model, Params]:
  """The data set's judge, from the cache folder or trained now; examples of negative label are left out."""
  num_classes = len(dataset.class_names)
  model = nn.classifier(model_name, dataset.images.shape[1:], num_classes)
  there = np.flatnonzero(dataset.labels >= 0)
  some = there[:: max(1, len(there) // 64)]
  facts = f"{dataset.name} {model_name} {num_classes} {dataset.images.shape} {_JUDGE_STEPS} {_RATE} {_BATCH}"
  mark = hashlib.sha256(
    facts.encode() + dataset.labels.tobytes() + np.ascontiguousarray(dataset.images[some]).tobytes()
  )
  path = cache_dir() / "judges" / f"{mark.hexdigest()[:24]}.npz"
  key = random.key(0, random.Purpose.JUDGE, _JUDGE)
  leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, key))
  if path.is_file():
    with np.load(path) as file:
      found = [file[f"leaf_{i}"] for i in range(len(leaves))]
    return model, jax.tree.unflatten(structure, found)
  params = fit(model, dataset.images[there], dataset.labels[there], num_classes, _JUDGE_STEPS, key)
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as temporary, open(temporary, "wb") as file:
    np.savez(
      file, allow_pickle=False, **{f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(params))}
    )
  return model, params


def measure(job: Any, result: simulation.Result, seen: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """What summary.json and the report say of a run's samples.

  Args:
    job: the run's `job.Job`.
    result: what it ended with.
    seen: bool [C], classes that somebody taught.

  Returns:
    ({"samples": section or None, "privacy": section}, arrays by name)
  """
  config, dataset, entry = job.config, job.dataset, algorithms.METHODS[job.config.algorithm]
  num_classes = len(dataset.class_names)
  rng = np.random.default_rng([config.seed, int(random.Purpose.JUDGE), _MATCHED])
  members, others = _apart(job, result, rng)
  privacy = {
    "examples": len(members[0]),
    "closer": None,
    "distance_auc": None,
    "loss_auc": _loss_auc(job, result, members, others),
  }
  made = samples(job, result, config.judge, random.Purpose.JUDGE, _SAMPLES)
  if made is None:
    return {"samples": None, "privacy": privacy}, {}

  images, labels = made.reshape(-1, *made.shape[2:]), np.repeat(np.arange(num_classes), config.judge)
  tests = np.flatnonzero(dataset.test_labels >= 0)
  test_images, test_labels = dataset.test_images[tests], dataset.test_labels[tests]
  every = np.ones(num_classes, bool)
  teacher = metrics.recall(result.pooled_confusion(seen)) if result.pooled_confusion else np.full(num_classes, np.nan)
  known = seen & (teacher >= _RECOGNISED) if result.pooled_confusion else seen
  if known.any():  # restricted to these the teacher answers as its students do
    teacher = metrics.recall(result.pooled_confusion(known)) if result.pooled_confusion else teacher
  number_of_students = _STUDENTS if known.sum() > 1 else 0
  silent = not config.progress or jax.process_index() > 0
  bar = tqdm(total=number_of_students + 2, desc="judging samples", unit="part", disable=silent)
  bar.set_postfix_str("by the judge, which is trained first where it is not kept")
  model, params = judge(dataset, config.model)
  said = _confusion(model, params, images, labels, every)
  agreement = metrics.recall(said)
  of_real = _confusion(model, params, test_images, test_labels, every)

  chosen = np.flatnonzero(known[labels])
  among = np.full(num_classes, np.nan)
  if known.any():
    among = metrics.recall(_confusion(model, params, images[chosen], labels[chosen], known))
  bar.update()
  bar.set_postfix_str("by what fresh networks learn")
  students = []
  fresh = nn.classifier(config.model, images.shape[1:], num_classes)
  train = _fit(fresh, num_classes)
  for number in range(number_of_students):
    store = Store(jnp.asarray(images[chosen]), jnp.asarray(labels[chosen], jnp.int32), jnp.arange(len(chosen)))
    learnt = train(store, jnp.int32(_STUDENT_STEPS), random.key(config.seed, random.Purpose.JUDGE, _STUDENT, number))
    students.append(np.mean(metrics.recall(_confusion(fresh, learnt, test_images, test_labels, known))[known]))
    bar.update()

  bar.set_postfix_str("by the nearest images")
  near = metrics.samples.nearest(images, dataset.images[dataset.labels >= 0])
  seen_samples = images[seen[labels]]
  if len(members[0]) and len(seen_samples):
    distance = lambda examples: metrics.samples.nearest(seen_samples, examples).distance
    privacy["closer"] = metrics.privacy.closer(distance(members[0]), distance(others[0]))
    score = lambda examples: -metrics.samples.nearest(examples, seen_samples).distance
    privacy["distance_auc"] = metrics.privacy.auc(score(members[0]), score(others[0]))
  bar.set_postfix_str("", refresh=False)
  bar.update()
  bar.close()
  trust = None if entry.trust is None else np.asarray(entry.trust(result.state.server), np.float64)
  number_of_modes = metrics.samples.modes(near.place, labels, num_classes)
  of_seen = np.where(seen, agreement, np.nan)
  section = {
    "count": config.judge,
    "judge_accuracy": float(metrics.accuracy(of_real)),
    "judge_recall": metrics.fairness.classes(metrics.recall(of_real)),
    "recognised": np.flatnonzero(known).tolist(),
    "agreement": metrics.fairness.classes(agreement),
    "agreement_recognised": metrics.fairness.classes(np.where(known, agreement, np.nan)),
    "agreement_among_recognised": metrics.fairness.classes(among),
    "teacher": metrics.fairness.classes(np.where(known, teacher, np.nan))["mean"],
    "tstr": {
      "mean": float(np.mean(students)) if students else None,
      "std": float(np.std(students, ddof=1)) if len(students) > 1 else None,
    },
    "modes": {"each": number_of_modes.tolist(), "mean": float(number_of_modes[seen].mean()) if seen.any() else None},
    "trust": None if trust is None else {"each": trust.tolist(), **metrics.samples.calibration(trust, of_seen)},
  }
  arrays = {"agreement": agreement}
  if trust is not None:
    arrays["trust"] = trust
  return {"samples": section, "privacy": privacy}, arrays


def samples(
  job: Any, result: simulation.Result, count: int, purpose: random.Purpose, *numbers: int
) -> np.ndarray | None:
  """uint8 [C, count, ...]: what a run's generator draws, as images are stored; None where it has none."""
  sample: Any = algorithms.METHODS[job.config.algorithm].samples
  if sample is None:
    return None

  @jax.jit
  def draw(settings: PyTree, server: PyTree, seed: Array) -> Array | None:
    return sample(job.task(settings), server, random.key(seed, purpose, *numbers), count, **job.config.settings)

  images = draw(job.inputs.settings, result.state.server, job.inputs.seed)
  return None if images is None else np.round(np.asarray(images) * 255).astype(np.uint8)


def _apart(
  job: Any, result: simulation.Result, rng: np.random.Generator
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """(images, labels) of training examples that some client taught from, and of as many test examples of each class."""
  store, span = job.federation.store, job.federation.train
  labels, index = np.asarray(store.labels), np.asarray(store.index)
  taught = (np.asarray(result.state.times) > 0) | algorithms.METHODS[job.config.algorithm].pools
  runs = zip(np.asarray(span.start)[taught], np.asarray(span.size)[taught], strict=True)
  used = np.unique(np.concatenate([np.zeros(0, np.int64), *(index[start : start + size] for start, size in runs)]))
  first, second = metrics.privacy.matched(labels[used.astype(int)], job.dataset.test_labels, rng)
  members = used.astype(int)[first]
  images = np.asarray(store.images)[members]
  return (images, labels[members]), (job.dataset.test_images[second], job.dataset.test_labels[second])


def _loss_auc(job: Any, result: simulation.Result, members: Any, others: Any) -> float | None:
  """How well the global model's loss tells the examples that it was trained with."""
  if result.pooled_confusion is None or not len(members[0]):
    return None

  @jax.jit
  def losses(settings: PyTree, server: PyTree, images: Array, labels: Array) -> Array:
    algorithm, _ = job.build(settings)
    logits = algorithm.predict(algorithm.global_model(server), images / 255.0).logits
    return training.cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[1]))

  def score(examples: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    of = partial(losses, job.inputs.settings, result.state.server)
    return -np.concatenate([np.asarray(of(*part)) for part in _blocks(*examples)])[: len(examples[0])]

  return metrics.privacy.auc(score(members), score(others))


def _blocks(*arrays: np.ndarray, size: int = 256) -> list[tuple[np.ndarray, ...]]:
  """Runs of one length, the last one filled up with copies of the first row."""
  count = -(-len(arrays[0]) // size)
  rows = np.resize(np.arange(len(arrays[0])), count * size)
  rows[len(arrays[0]) :] = 0
  return [tuple(x[part] for x in arrays) for part in rows.reshape(count, size)]


def _confusion(model: Model, params: Params, images: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """int64 [C, C]: answers with one of bool [C] `classes`."""

  @jax.jit
  def answers(params: Params, images: Array) -> Array:
    prediction: Prediction = training.predict(model, params, images / 255.0)
    return jnp.argmax(jnp.where(classes, prediction.logits, -jnp.inf), axis=1)

  said = np.concatenate([np.asarray(answers(params, part)) for (part,) in _blocks(images)])[: len(images)]
  counts = np.zeros((len(classes), len(classes)), np.int64)
  np.add.at(counts, (labels, said), 1)
  return counts
