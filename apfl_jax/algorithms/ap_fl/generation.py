"""The server's data-free training of the semantic generator, supervised by the global model alone.

Losses and label sampling: method 2.6 [O] with the recipe of pilot 8.4 [P] (smooth generator, shifted copies, total
variation). The teacher is frozen; no example is read. A generator of features has the same losses but for total
variation, shifted copies and L_cov, with the features themselves as the layer whose statistics are compared.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax import random
from apfl_jax.algorithms.ap_fl import projections
from apfl_jax.algorithms.ap_fl.sources import Source
from apfl_jax.algorithms.ap_fl.statistics import ByClass, Statistics, class_sums, distance, layer_sums, moments
from apfl_jax.training import cross_entropy, max_shift, shift
from apfl_jax.types import Array, Key, Params, PyTree, Task

_SOFT = 10.0  # temperature of L_adv, as in the code of DFDG [C]


class Weights(NamedTuple):
  """Of the generator's losses, float32 [] each; the last four bite where tier s2, a student or a memory is there."""

  statistics: Array | float
  diversity: Array | float
  semantic: Array | float
  variation: Array | float
  by_class: Array | float = 0.0
  covariance: Array | float = 0.0
  adversarial: Array | float = 0.0
  memory: Array | float = 0.0


class Past(NamedTuple):
  """What is known of classes whose holders left.

  Attributes:
    gone: bool [C].
    teacher: the global model of when they were there.
    generator: the generator's average of that time.
  """

  gone: Array
  teacher: Params
  generator: PyTree


class Rows(NamedTuple):
  """What the rows of a generator batch ask for, `B` rows: seen pairs first, then hallucinated, then unseen.

  Attributes:
    label: int32 [B], the class; of a hallucinated row the first of the two mixed.
    embedding: float32 [B, D], unit rows.
    labelled: float32 [B], 1 where the teacher's cross-entropy applies.
    seen: float32 [B], 1 where the row is of a seen class: layer statistics apply.
    active: float32 [B], 0 for an unseen row while nothing is unseen or unseen rows are off.
  """

  label: Array
  embedding: Array
  labelled: Array
  seen: Array
  active: Array


def _parts(batch_size: int) -> tuple[int, int, int]:
  """(pairs of seen rows, hallucinated rows, unseen rows) of a batch: three, one and one fifths of it."""
  unseen = batch_size // 5
  pairs = (batch_size - 2 * unseen) // 2
  return pairs, batch_size - 2 * pairs - unseen, unseen


def draw_rows(embeddings: Array, counts: Array, unseen_on: Array, batch_size: int, key: Key) -> Rows:
  """Draws class requests (method 2.6.2).

  Seen classes with probability proportional to the square root of their counts, drawn for pairs of rows that share a
  label; a fifth of the rows ask for a hallucinated class, normalise(s e_a + (1 - s) e_b) with a, b seen and
  s ~ U(.2, .8); a fifth for unseen classes, uniformly.

  Args:
    embeddings: float32 [C, D], unit rows.
    counts: float32 [C], training examples a class among clients that ever arrived, 0 for unseen classes; not all 0.
    unseen_on: bool [], whether unseen rows are asked for.
    batch_size: B, at least 10.
    key: consumed.
  """
  pairs, mixed, unseen = _parts(batch_size)
  seen_key, pair_key, share_key, unseen_key = jax.random.split(key, 4)
  frequent = jnp.sqrt(counts)
  any_unseen = jnp.any(counts <= 0)

  label = jnp.repeat(random.categorical(seen_key, frequent, (pairs,)), 2)
  a, b = random.categorical(pair_key, frequent, (2, mixed))
  share = jax.random.uniform(share_key, (mixed, 1), minval=0.2, maxval=0.8)
  between = share * embeddings[a] + (1 - share) * embeddings[b]
  between = between / jnp.maximum(jnp.linalg.norm(between, axis=-1, keepdims=True), 1e-6)
  # With nothing unseen the draw would be over an empty set; the rows are switched off, the draw only stays finite.
  lost = random.categorical(unseen_key, jnp.where(any_unseen, counts <= 0, True).astype(jnp.float32), (unseen,))

  on = (unseen_on & any_unseen).astype(jnp.float32)
  kinds = lambda *values: jnp.repeat(
    jnp.stack([jnp.float32(v) for v in values]), np.array([2 * pairs, mixed, unseen]), total_repeat_length=batch_size
  )
  return Rows(
    label=jnp.concatenate([label, a, lost]),
    embedding=jnp.concatenate([embeddings[label], between, embeddings[lost]]),
    labelled=kinds(1, 0, on),
    seen=kinds(1, 0, 0),
    active=kinds(1, 1, on),
  )


def generator_loss(
  task: Task,
  source: Source,
  params: PyTree,
  teacher: Params,
  rows: Rows,
  key: Key,
  *,
  weights: Weights,
  statistics: Statistics,
  classes: Array,
  student: Params | tuple[()] = (),
  past: Past | tuple[()] = (),
) -> Array:
  """L = L_ce + weights . (L_st, L_div, L_sem, L_tv, L_class, L_cov, L_adv, L_mem) for one batch, [].

  Args:
    task: the task.
    source: whose generator it is.
    params: the generator's parameters.
    teacher: the global model, frozen.
    rows: what is asked for.
    key: consumed.
    weights: of the losses.
    statistics: of real data; those of tiers that are not there leave L_st or L_class and L_cov out.
    classes: bool [C], the classes of the teacher's softmax: seen ones, and unseen ones while they are asked for.
    student: the model that L_adv finds samples against; () leaves it out.
    past: what teaches classes whose holders left; () leaves L_mem out.
  """
  assert source.generator is not None
  noise_key, shift_key = jax.random.split(key)
  size, model = rows.label.shape[0], task.model
  noise = task.spread(jax.random.normal(noise_key, (size, source.generator.noise_size)))
  embedding = task.spread(rows.embedding)
  made = source.generator.apply(params, noise, embedding)
  views = made
  if source.images:
    most = max_shift(made.shape[1])
    # One offset for the whole batch: a slice, whose gradient is cheap, where an offset a row is a scatter.
    offset = jnp.broadcast_to(jax.random.randint(shift_key, (1, 2), -most, most + 1), (size, 2))
    views = jnp.concatenate([made, shift(made, offset)])

  def seen_by(params: Params) -> tuple[Array, tuple[Array, ...], Array]:
    """(features, taps, logits) of the views."""
    features, taps = model.frozen.base(params.base, views) if source.images else (views, (views,))
    return features, taps, model.head(params.head, features)

  features, taps, logits = seen_by(teacher)
  copies = len(views) // size
  present = rows.seen
  if isinstance(past, Past):
    gone = past.gone[rows.label] & (rows.seen > 0)
    logits = jnp.where(jnp.tile(gone, copies)[:, None], seen_by(past.teacher)[2], logits)
    before = source.generator.apply(past.generator, noise, embedding)
    kept = jnp.mean(jnp.abs(made - before).reshape(size, -1), axis=1)
    forgotten = jnp.sum(jnp.where(gone, kept, 0.0)) / jnp.maximum(jnp.sum(gone), 1)
    present = jnp.where(gone, 0.0, present)  # the last cohort's statistics are of present classes

  one_hot = jax.nn.one_hot(rows.label, task.num_classes)
  labelled = jnp.tile(rows.labelled, copies)
  each = jnp.where(labelled > 0, cross_entropy(logits, jnp.tile(one_hot, (copies, 1)), classes), 0.0)
  loss = copies * jnp.sum(each) / jnp.sum(labelled)
  if isinstance(past, Past):
    loss += weights.memory * forgotten
  features, logits, taps = features[:size], logits[:size], jax.tree.map(lambda x: x[:size], taps)
  if statistics.layers:
    loss += weights.statistics * distance(moments(source.layers(made, features, taps), present), statistics.layers)
  pairs, _, _ = _parts(size)
  first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)  # rows that share a label
  if isinstance(statistics.classes, ByClass):
    loss += weights.by_class * class_distance(source, statistics.classes, one_hot * rows.seen[:, None], made, taps)
    if source.products:
      apart = covariance_distance(statistics.classes, rows.label[first], made[first], made[second])
      loss += weights.covariance * apart

  # Mode seeking (Mao et al. 2019) on these pairs, with means in place of norms so that size drops out.
  moved = jnp.mean(jnp.abs(made[first] - made[second]).reshape(pairs, -1), axis=1)
  spread = jnp.mean(jnp.abs(noise[first] - noise[second]), axis=1)
  loss += weights.diversity * jnp.mean(1.0 / (moved / spread + 0.01))

  if model.semantics is not None:
    meant = model.semantics(teacher.head, features)
    meant = meant / jnp.maximum(jnp.linalg.norm(meant, axis=-1, keepdims=True), 1e-6)
    off = jnp.sum((meant - rows.embedding) ** 2, axis=-1)
    loss += weights.semantic * jnp.sum(jnp.where(rows.active > 0, off, 0.0)) / jnp.sum(rows.active)

  if source.images:
    # Total variation beyond what natural images have (8.4: hinge at .16).
    down = jnp.mean(jnp.abs(made[:, 1:] - made[:, :-1]), axis=(1, 2, 3))
    right = jnp.mean(jnp.abs(made[:, :, 1:] - made[:, :, :-1]), axis=(1, 2, 3))
    loss += weights.variation * jnp.mean(jax.nn.relu(down + right - 0.16))
  if isinstance(student, Params):
    guess = model.frozen.base(student.base, made)[0] if source.images else made
    guess = model.head(student.head, guess)
    loss += weights.adversarial * adversarial(logits, guess, rows.label, rows.seen > 0, classes)
  return loss


def class_distance(source: Source, real: ByClass, one_hot: Array, made: Array, taps: tuple[Array, ...]) -> Array:
  """L_class (method 8.4 [P], tier s2), []: `distance` class by class, a mean over classes that are in the batch.

  For images the sum of that of their mean and variance image and that of their layers [O]; for features the features.

  Args:
    source: what `made` is.
    real: sums of real data.
    one_hot: float32 [B, C], zeros for a row that does not count.
    made: samples [B, ...].
    taps: of them.
  """
  counts, wanted = jnp.sum(one_hot, axis=0), real.estimated
  weights = ((counts > 0) & (real.counts > 0)).astype(jnp.float32)
  over = lambda sums: jax.tree.map(lambda x: x / jnp.maximum(counts, 1.0).reshape(-1, *[1] * (x.ndim - 1)), sums)
  found = (over(class_sums(one_hot, made)),)
  if not source.images:
    return distance(found, (wanted.features,), weights)
  layers = distance(over(layer_sums(one_hot, taps)), wanted.layers, weights)
  return distance(found, (wanted.images,), weights) + layers


def covariance_distance(real: ByClass, label: Array, first: Array, second: Array) -> Array:
  """L_cov (tier s2) [O], []: |S - S'|^2 / |S'|^2 between covariances of lowest cosine coefficients.

  A mean over classes, where at least two pairs of a batch ask for one; S' is that of real examples. L_class compares
  variances pixel by pixel, which blots anywhere can have; what varies together is what it misses. A batch has few
  samples of a class for so large a matrix, so S is not estimated. With d and e the differences of two pairs of
  samples over sqrt 2, E (d . e)^2 = |S|^2 and E d' S' d = tr S S', so that the square is without bias; of a batch it
  may be below 0.

  Args:
    real: sums of real data, with products.
    label: int32 [P], the class of a pair.
    first: images [P, height, width, channels].
    second: others of the same classes.
  """
  wanted = real.covariances
  low = projections.coefficients(first - second) / np.sqrt(2)
  one_hot = jax.nn.one_hot(label, len(wanted))
  of_class = lambda each: jnp.sum(one_hot * each[:, None], axis=0)
  pairs, norm = jnp.sum(one_hot, axis=0), jnp.maximum(jnp.sum(wanted**2, axis=(1, 2)), 1e-6)
  exact = partial(jnp.einsum, precision=projections.EXACT)
  other = (label[:, None] == label) & ~jnp.eye(len(label), dtype=bool)
  square = of_class(jnp.sum(jnp.where(other, exact("pk,qk->pq", low, low) ** 2, 0.0), axis=1))
  square /= jnp.maximum(pairs * (pairs - 1), 1.0)
  product = of_class(exact("pk,pkl,pl->p", low, wanted[label], low)) / jnp.maximum(pairs, 1.0)
  counted = (pairs > 1) & (real.counts > 0)
  apart = (square - 2 * product + norm) / norm
  return jnp.sum(jnp.where(counted, apart, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def adversarial(taught: Array, guess: Array, label: Array, counted: Array, classes: Array) -> Array:
  """L_adv = -tau^2 KL(softmax(T / tau) || softmax(Q / tau)), where T is right and Q wrong; a mean over rows, [].

  Args:
    taught: T, the teacher's logits [B, C].
    guess: Q, the student's.
    label: int32 [B].
    counted: bool [B].
    classes: bool [C] of the softmax.
  """
  masked = lambda logits: jnp.where(classes, logits, -jnp.inf)
  where = counted & (jnp.argmax(masked(taught), axis=-1) == label) & (jnp.argmax(masked(guess), axis=-1) != label)
  apart = divergence(guess / _SOFT, taught / _SOFT, classes)
  return -(_SOFT**2) * jnp.sum(jnp.where(where, apart, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def divergence(logits: Array, taught: Array, classes: Array) -> Array:
  """KL(softmax(taught) || softmax(logits)) of each row over the classes, [B]."""
  target = jax.nn.softmax(jnp.where(classes, taught, -jnp.inf))
  return cross_entropy(logits, target, classes) - cross_entropy(taught, target, classes)
