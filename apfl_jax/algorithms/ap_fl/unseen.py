"""Classes that nobody taught: what a table of classes says of their features, how far it is to be believed, and when a
model answers with them.

Method 2.7 [O] as the pilots of 8.1 corrected it [P]: a ridge map from the classes' embeddings to the mean features of
the seen ones gives prototypes of the others, and images are compared with them by cosine. It needs no generator, only
mean features, which may come from synthetic samples (tiers S0 and S1) or from real examples (S2). The gate by class of
2.7 d said nothing there; a table is judged as a whole, by leaving out three seen classes at a time.

All are functions of arrays, with `seen` traced. Scores of any kind (cosines, logits) are put in units of the mean gap
between the best and the second best seen class, so that shifts of different kinds and tables can be compared.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apfl_jax import training
from apfl_jax.algorithms.ap_fl.statistics import num_features
from apfl_jax.metrics import shared_answers
from apfl_jax.types import Array, Data, Key, Model, Prediction, PyTree, Task

KINDS = ("none", "anchored", "prototypes", "generator_head")
_TRIPLES = 300  # of classes, left out together; all of them up to 13 classes
LEFT_OUT = 1000.0  # what the logits of classes left out are lowered by
_HEAD_STEPS = 100  # of head-only training
_BLOCK = 64  # validation examples by which a client chooses its shift
_NEVER = -1e6  # a shift with which no unseen class is ever answered


class Settings(NamedTuple):
  """Those settings of `ap_fl` that concern unseen classes; they are explained there."""

  kind: str
  gate: Array | float
  keep: Array | float
  penalty: Array | float


class Prototypes(NamedTuple):
  """Where classes lie among features.

  Attributes:
    direction: float32 [C, F], rows of norm 1, from the centre to the class; 0 for a class that lies in the centre.
    centre: float32 [F], the mean of the seen classes' means.
  """

  direction: Array
  centre: Array


class Reading(NamedTuple):
  """How a model reads unseen classes.

  Attributes:
    source: what scores are computed from: `Prototypes`, the parameters of a head, or () for the model's own head.
    unit: float32 [], the mean gap between the best and the second best seen class, in raw scores.
    shift: float32 [], in units: an unseen class is answered where it falls short of the best seen one by less.
    trusted: bool [], whether unseen classes are answered at all.
  """

  source: PyTree
  unit: Array
  shift: Array
  trusted: Array


def prototypes(embeddings: Array, means: Array, seen: Array, penalty: Array | float) -> Prototypes:
  """Prototypes: of seen classes their mean, of the others the ridge map's (method 8.1).

    W = ((E_S - eb)' (E_S - eb) + penalty I)^-1 (E_S - eb)' (M_S - mb);   m_u = mb + (e_u - eb) W

  with the means eb and mb over seen classes. A class whose embedding says nothing of the seen ones (onehot) lies in the
  centre; there it gets the direction 0 in place of rounding noise, so that all such classes tie.

  Args:
    embeddings: float32 [C, D].
    means: float32 [C, F], mean features; rows of unseen classes mean nothing.
    seen: bool [C].
    penalty: above 0.
  """
  known = seen[:, None]
  number = jnp.maximum(jnp.sum(seen), 1)
  centred = lambda x: x - jnp.sum(jnp.where(known, x, 0.0), axis=0) / number
  from_mean = centred(embeddings)
  means = jnp.where(known, means, 0.0)
  centre = jnp.sum(means, axis=0) / number
  inputs, targets = jnp.where(known, from_mean, 0.0), jnp.where(known, means - centre, 0.0)
  gram = inputs.T @ inputs + penalty * jnp.eye(embeddings.shape[1])
  # The ledger reads through these, not through `solve`.
  ridge = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram), inputs.T @ targets)
  offset = jnp.where(known, targets, from_mean @ ridge)
  length = jnp.linalg.norm(offset, axis=-1, keepdims=True)
  usual = jnp.sum(jnp.where(known, length, 0.0)) / number
  there = length > 1e-4 * usual
  return Prototypes(jnp.where(there, offset / jnp.where(there, length, 1.0), 0.0), centre)


def cosine_scores(features: Array, prototypes: Prototypes) -> Array:
  """Cosines [..., C] of features [..., F] with the prototypes, both seen from the centre."""
  away = features - prototypes.centre
  return away / jnp.maximum(jnp.linalg.norm(away, axis=-1, keepdims=True), 1e-12) @ prototypes.direction.T


def gap(scores: Array, mask: Array, seen: Array) -> Array:
  """The mean difference of the best two seen classes, []: the unit of scores; 1 where there are no two.

  Args:
    scores: float32 [M, C].
    mask: bool [M], rows that count.
    seen: bool [C].
  """
  best, second = jnp.moveaxis(jax.lax.top_k(jnp.where(seen, scores, -jnp.inf), 2)[0], -1, 0)
  two = mask & jnp.isfinite(second)
  mean = jnp.sum(jnp.where(two, best - second, 0.0)) / jnp.maximum(jnp.sum(two), 1)
  return jnp.where(mean > 0, mean, 1.0)


def stacking(scores: Array, right: Array, seen: Array, keep: Array | float) -> Array:
  """Calibrated stacking (Chao et al. 2016 [M]): the largest shift that keeps enough examples of seen classes right.

  An example stays right as long as the best seen class leads the best unseen one by more than the shift. The answer
  lies midway between the leads of the last example that is kept and the first one that is not; where all are kept, one
  unit below the smallest lead. It needs no example of unseen classes. Differs from method 8.1: `keep` is a share of
  what is right without unseen answers, not of what is right at shift 0 [O].

  Args:
    scores: float32 [M, C], in units.
    right: bool [M], the examples that are right when only seen classes are answered; others mean nothing.
    seen: bool [C].
    keep: the share of them to keep, in (0, 1].

  Returns:
    float32 []; so low that nothing unseen is answered where no example is right, 0 where nothing is unseen.
  """
  best = lambda classes: jnp.max(jnp.where(classes, scores, -jnp.inf), axis=-1)
  lead = jnp.sort(jnp.where(right, best(seen) - best(~seen), -jnp.inf), descending=True)
  number = jnp.sum(right)
  # A product like .8 * 5 may come out above 4.
  kept = jnp.clip(jnp.ceil(keep * number - 1e-4).astype(jnp.int32), 1, jnp.maximum(number, 1))
  last, following = lead[kept - 1], lead[jnp.minimum(kept, len(lead) - 1)]
  shift = jnp.where(kept < number, (last + following) / 2, last - 1.0)
  return jnp.where(jnp.all(seen), 0.0, jnp.where(number > 0, shift, _NEVER))


def table_accuracy(embeddings: Array, examples: Array, seen: Array, penalty: Array | float) -> Array:
  """How well the table tells of seen classes what it is asked of unseen ones, [] in [0, 1].

  Three seen classes are left out, the map is fitted to the means of the others, and examples of the three are told
  apart by their prototypes alone, ties shared out; the mean over all triples (of more than 13 classes, over 300). A
  third is chance, and the answer where there is no triple.

  Args:
    embeddings: float32 [C, D].
    examples: float32 [C, n, F], features of each class; rows of unseen classes mean nothing.
    seen: bool [C].
    penalty: see `prototypes`.
  """
  num_classes = len(embeddings)
  every = list(itertools.combinations(range(num_classes), 3))
  some = np.random.default_rng(0).permutation(len(every))[:_TRIPLES]
  triples = jnp.asarray(np.array(every, np.int32).reshape(-1, 3)[np.sort(some)])
  means = jnp.mean(examples, axis=1)

  def one(triple):
    left = seen.at[triple].set(False)
    found = prototypes(embeddings, means, left, penalty)
    scores = cosine_scores(examples[triple], found._replace(direction=found.direction[triple]))  # [3, n, 3]
    answers = shared_answers(scores, jnp.ones(3, bool))
    return jnp.mean(jnp.trace(answers, axis1=0, axis2=2)) / 3

  known = jnp.all(seen[triples], axis=1)
  right = jnp.sum(jnp.where(known, jax.vmap(one)(triples), 0.0))
  return jnp.where(jnp.any(known), right / jnp.maximum(jnp.sum(known), 1), 1.0 / 3.0)


def table_trust(accuracy: Array) -> Array:
  """Trust in [0, 1]: how far an accuracy among three is above chance (method 8.1)."""
  return jnp.maximum(0.0, (accuracy - 1.0 / 3.0) / (2.0 / 3.0))


def read(raw: Array, seen: Array, source: PyTree, accuracy: Array, settings: Settings) -> Reading:
  """Unit and shift from examples of seen classes.

  Args:
    raw: float32 [C, n, C], the scores of n examples of each class; rows of unseen classes mean nothing.
    seen: bool [C].
    source: see `Reading`.
    accuracy: [], of the table, see `table_accuracy`.
    settings: the gate and the share to keep.
  """
  label = jnp.repeat(jnp.arange(len(seen)), raw.shape[1])
  raw = raw.reshape(-1, len(seen))
  mask = seen[label]
  unit = gap(raw, mask, seen)
  right = mask & (jnp.argmax(jnp.where(seen, raw, -jnp.inf), axis=-1) == label)
  shift = stacking(raw / unit, right, seen, settings.keep)
  return Reading(source, unit, shift, accuracy >= settings.gate)


def head_on_samples(model: Model, head: PyTree, features: Array, steps: int) -> PyTree:
  """The head after Adam steps on features of all classes, seen and unseen; the base is not touched (method 2.7 b).

  Args:
    model: the classifier.
    head: parameters to start from.
    features: float32 [C, n, F], synthetic.
    steps: of Adam, rate .01, all features a step.
  """
  optimizer = optax.adam(0.01)

  def loss(head):
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(model.head(head, features)), axis1=0, axis2=2))

  def step(_, carry):
    head, state = carry
    updates, state = optimizer.update(jax.grad(loss)(head), state)
    return optax.apply_updates(head, updates), state

  return jax.lax.fori_loop(0, steps, step, (head, optimizer.init(head)))[0]


def answer(logits: Array, scores: Array, seen: Array, shift: Array, trusted: Array) -> Array:
  """Logits [B, C] in which unseen classes stand where their scores put them.

  Seen classes keep their logits: which of them is answered does not change. Where the best unseen score falls short of
  the best seen one by less than the shift, that unseen class is the answer. Not trusted, all are lowered far below;
  their order stays, for the restricted score. While nothing is seen all keep their logits.

  Args:
    logits: float32 [B, C], the model's own.
    scores: float32 [B, C], in units.
    seen: bool [C].
    shift: float32 [].
    trusted: bool [].
  """
  anything = jnp.any(seen)
  best = lambda x: jnp.max(jnp.where(seen | ~anything, x, -jnp.inf), axis=-1, keepdims=True)
  placed = best(logits) + scores - best(scores) + shift
  return jnp.where(seen | ~anything, logits, jnp.where(trusted, placed, placed - LEFT_OUT))


# --- in AP-FL ---------------------------------------------------------------------------------------------------------


def fit(task: Task, settings: Settings, head: PyTree, features: Array, means: Array, seen: Array) -> Reading:
  """What the server learns of unseen classes from its global model, without any example of them.

  Args:
    task: the task; kinds 'anchored' and 'generator_head' need an anchored head.
    settings: see `Settings`.
    head: the global model's.
    features: float32 [C, n, F], under its base: of synthetic samples, or drawn around real means. Rows of unseen
      classes are read by the kind 'generator_head' alone.
    means: float32 [C, F], mean features of seen classes.
    seen: bool [C].
  """
  accuracy = table_accuracy(task.embeddings, features, seen, settings.penalty)
  if settings.kind == "prototypes":
    source: PyTree = prototypes(task.embeddings, means, seen, settings.penalty)
    raw = cosine_scores(features, source)
  elif settings.kind == "generator_head":
    # The shift is chosen on samples that the head was not trained on.
    source = head_on_samples(task.model, head, features[:, ::2], _HEAD_STEPS)
    raw = task.model.head(source, features[:, 1::2])
  else:
    source, raw = (), task.model.head(head, features)
  return read(raw, seen, source, accuracy, settings)


def around(mean: Array, square: Array, count: int, key: Key) -> Array:
  """Features [C, count, F] drawn around real means: normal with the variance of each feature, not below 0 (2.7 c).

  Args:
    mean: float32 [C, F], by class.
    square: float32 [C, F], second moments.
    count: of each class.
    key: consumed.
  """
  deviation = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
  drawn = jax.random.normal(key, (len(mean), count, mean.shape[1]))
  return jnp.maximum(mean[:, None] + deviation[:, None] * drawn, 0.0)


def nothing_read(task: Task, settings: Settings, head: PyTree) -> Reading:
  """A reading of the right shapes that answers with no unseen class."""
  blank = jnp.zeros((task.num_classes, 2, num_features(task)))
  nobody = jnp.zeros(task.num_classes, bool)
  shapes = jax.eval_shape(lambda head: fit(task, settings, head, blank, blank[:, 0], nobody), head)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(unit=jnp.ones(()))


def placed(model: Model, reading: Reading, prediction: Prediction, seen: Array) -> Prediction:
  """A model's prediction with unseen classes where the reading puts them, see `answer`."""
  scores = _raw(model, reading, prediction) / reading.unit
  return prediction._replace(logits=answer(prediction.logits, scores, seen, reading.shift, reading.trusted))


def for_client(
  model: Model, reading: Reading, predict: Callable[[Array], Prediction], data: Data, classes: Array
) -> Reading:
  """The reading of a client's personal model: no validation example of its own may be lost to an unseen class.

  The server's shift would cost the client up to a fifth of its own accuracy for classes that it may never meet. So the
  shift is lowered until none of the first 64 validation examples that the model has right is lost, and by one unit
  more; without validation examples no unseen class is answered.

  Args:
    model: the classifier.
    reading: the server's.
    predict: images -> the personal model's prediction.
    data: the client's.
    classes: bool [C], seen ones and the client's own.
  """
  batch = training.gather(data.store, data.validation, jnp.arange(_BLOCK), len(classes))
  prediction = predict(batch.images)
  scores = _raw(model, reading, prediction) / reading.unit
  answered = jnp.argmax(jnp.where(classes, prediction.logits, -jnp.inf), axis=-1)
  right = (batch.mask > 0) & (answered == jnp.argmax(batch.targets, axis=-1))
  return reading._replace(shift=jnp.minimum(reading.shift, stacking(scores, right, classes, 1.0)))


def _raw(model: Model, reading: Reading, prediction: Prediction) -> Array:
  if isinstance(reading.source, Prototypes):
    return cosine_scores(prediction.features, reading.source)
  return model.head(reading.source, prediction.features) if reading.source else prediction.logits
