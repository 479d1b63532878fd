"""Classes that nobody taught: what a table of classes says of their features, how far it is to be believed, and when a
model answers with them.

Method 2.7 [O] as the pilots of 8.1 corrected it [P]: a ridge map from the classes' embeddings to the mean features of
the seen ones gives prototypes of the others, and images are compared with them by cosine. It needs no generator, only
mean features, which may come from synthetic samples (tiers S0 and S1) or from real examples (S2). The gate by class of
2.7 d said nothing there; a table is judged as a whole: does it find those seen classes alike that the model does?

All are functions of arrays, with `seen` traced. Scores of any kind (cosines, logits) are put in units of the mean gap
between the best and the second best seen class, so that shifts of different kinds and tables can be compared.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apfl_jax import training
from apfl_jax.types import Array, Data, Key, Model, Prediction, PyTree, Task

KINDS = ("none", "anchored", "prototypes", "generator_head")
_PERMUTATIONS = 999  # of the table, by which it is judged
_AT_ONCE = 111  # of them: each is [C, C]
LEFT_OUT = 1000.0  # what the logits of classes left out are lowered by
_HEAD_STEPS = 100  # of head-only training
_BLOCK = 64  # validation examples by which a client chooses its shift
_NEVER = -1e6  # a shift with which no unseen class is ever answered


class Settings(NamedTuple):
  """Those settings of `ap_fl` that concern unseen classes; they are explained there."""

  kind: str
  p_value: Array | float
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


def judged_by(model: Model, head: PyTree, means: Array, *, real: bool) -> Array:
  """What a table is compared with: where the model puts classes.

  Real mean features tell most [O]; means of a generator's samples are its own doing, so that without real ones the
  weights of a free head, which real examples taught, stand in for them. Those of an anchored or cosine head are the
  table's own, so that there it is the samples after all.

  Args:
    model: the classifier.
    head: its head's parameters.
    means: float32 [C, F], mean features of seen classes.
    real: whether these are of real examples.

  Returns:
    float32 [C, F].
  """
  if real or model.semantics is not None:
    return means
  weights: Array = jax.jacobian(lambda feature: model.head(head, feature[None])[0])(jnp.zeros(means.shape[1]))
  return weights


def table_test(embeddings: Array, places: Array, seen: Array) -> Array:
  """Whether the table says of seen classes what the model knows of them: the p-value of a Mantel test, [] in (0, 1].

  The correlation over pairs of seen classes of the cosines of their embeddings with those of their places, both centred
  over seen classes, against 999 tables in which the seen classes have changed places (Mantel 1967 [M]). A table that
  says nothing gets p or less in at most a share p of all cases; one in which all pairs are alike (onehot) has 1. At .05
  none of three classes can pass and of four hardly one. Places under an anchored or cosine head were trained towards
  the table, which makes p too small there.

  Args:
    embeddings: float32 [C, D].
    places: float32 [C, F], see `judged_by`; rows of unseen classes mean nothing.
    seen: bool [C].
  """
  num_classes = len(embeddings)
  pairs = seen[:, None] & seen & ~jnp.eye(num_classes, dtype=bool)

  def cosines(rows: Array) -> Array:
    """[C, C] over pairs, of mean 0 and norm 1; 0 where all are alike."""
    rows = jnp.where(seen[:, None], rows, 0.0)
    rows = rows - jnp.where(seen[:, None], jnp.sum(rows, axis=0) / jnp.maximum(jnp.sum(seen), 1), 0.0)
    rows = rows * jax.lax.rsqrt(jnp.sum(rows**2, axis=1, keepdims=True) + 1e-12)
    found = jnp.where(pairs, rows @ rows.T, 0.0)
    found = jnp.where(pairs, found - jnp.sum(found) / jnp.maximum(jnp.sum(pairs), 1), 0.0)
    norm = jnp.linalg.norm(found)
    return jnp.where(norm > 1e-4, found / jnp.where(norm > 1e-4, norm, 1.0), 0.0)

  table, model = cosines(embeddings), cosines(places)
  ranks = np.random.default_rng(0).random((_PERMUTATIONS, num_classes), np.float32)
  slots = jnp.argsort(~seen)  # seen classes first

  def one(rank: Array) -> Array:
    order = jnp.zeros(num_classes, int).at[slots].set(slots[jnp.argsort(jnp.where(seen[slots], rank, jnp.inf))])
    return jnp.sum(table[order][:, order] * model)

  others = jax.lax.map(one, jnp.asarray(ranks), batch_size=_AT_ONCE)
  as_good = jnp.sum(others >= jnp.sum(table * model) - 1e-5)
  return (1.0 + as_good) / (1.0 + _PERMUTATIONS)


def read(raw: Array, seen: Array, source: PyTree, p_value: Array, settings: Settings) -> Reading:
  """Unit and shift from examples of seen classes.

  Args:
    raw: float32 [C, n, C], the scores of n examples of each class; rows of unseen classes mean nothing.
    seen: bool [C].
    source: see `Reading`.
    p_value: [], the table's, see `table_test`.
    settings: the largest p-value and the share to keep.
  """
  label = jnp.repeat(jnp.arange(len(seen)), raw.shape[1])
  raw = raw.reshape(-1, len(seen))
  mask = seen[label]
  unit = gap(raw, mask, seen)
  right = mask & (jnp.argmax(jnp.where(seen, raw, -jnp.inf), axis=-1) == label)
  shift = stacking(raw / unit, right, seen, settings.keep)
  return Reading(source, unit, shift, p_value <= settings.p_value)


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


def fit(
  task: Task, settings: Settings, head: PyTree, features: Array, means: Array, seen: Array, *, real: bool
) -> Reading:
  """What the server learns of unseen classes from its global model, without any example of them.

  Args:
    task: the task; kinds 'anchored' and 'generator_head' need an anchored head.
    settings: see `Settings`.
    head: the global model's.
    features: float32 [C, n, F], under its base: of synthetic samples, or drawn around real means. Rows of unseen
      classes are read by the kind 'generator_head' alone.
    means: float32 [C, F], mean features of seen classes.
    seen: bool [C].
    real: whether means are of real examples.
  """
  p_value = table_test(task.embeddings, judged_by(task.model, head, means, real=real), seen)
  if settings.kind == "prototypes":
    source: PyTree = prototypes(task.embeddings, means, seen, settings.penalty)
    raw = cosine_scores(features, source)
  elif settings.kind == "generator_head":
    # The shift is chosen on samples that the head was not trained on.
    source = head_on_samples(task.model, head, features[:, ::2], _HEAD_STEPS)
    raw = task.model.head(source, features[:, 1::2])
  else:
    source, raw = (), task.model.head(head, features)
  return read(raw, seen, source, p_value, settings)


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
  blank = jnp.zeros((task.num_classes, 2, training.feature_size(task)))
  nobody = jnp.zeros(task.num_classes, bool)
  shapes = jax.eval_shape(lambda head: fit(task, settings, head, blank, blank[:, 0], nobody, real=True), head)
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
