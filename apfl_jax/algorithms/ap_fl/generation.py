"""The server's data-free training of the semantic generator, supervised by the global model alone.

Losses and label sampling: method 2.6 [O] with the recipe of pilot 8.4 [P] (smooth generator, shifted copies, total
variation). The teacher is frozen; no example is read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax import random
from apfl_jax.algorithms.ap_fl.statistics import Moments, distance, moments
from apfl_jax.training import cross_entropy, max_shift, shift
from apfl_jax.types import Array, Generator, Key, Params, PyTree, Task


class Weights(NamedTuple):
  """Of the generator's losses, float32 [] each."""

  statistics: Array | float
  diversity: Array | float
  semantic: Array | float
  variation: Array | float


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
    counts: float32 [C], training examples a class among clients that ever arrived; not all 0.
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
  generator: Generator,
  params: PyTree,
  teacher: Params,
  rows: Rows,
  key: Key,
  *,
  weights: Weights,
  statistics: tuple[Moments, ...],
  classes: Array,
) -> Array:
  """L = L_ce + weights . (L_st, L_div, L_sem, L_tv) for one batch, [].

  Args:
    task: the task.
    generator: the generator's functions.
    params: the generator's parameters.
    teacher: the global model, frozen.
    rows: what is asked for.
    key: consumed.
    weights: of the losses.
    statistics: of real pre-activations, from clients; () leaves L_st out.
    classes: bool [C], the classes of the teacher's softmax: seen ones, and unseen ones while they are asked for.
  """
  noise_key, shift_key = jax.random.split(key)
  size = rows.label.shape[0]
  noise = task.spread(jax.random.normal(noise_key, (size, generator.noise_size)))
  images = generator.apply(params, noise, task.spread(rows.embedding))
  most = max_shift(images.shape[1])
  # One offset for the whole batch: a slice, whose gradient is cheap, where an offset a row is a scatter.
  offset = jnp.broadcast_to(jax.random.randint(shift_key, (1, 2), -most, most + 1), (size, 2))
  features, taps = task.model.frozen.base(teacher.base, jnp.concatenate([images, shift(images, offset)]))
  logits = task.model.head(teacher.head, features)
  targets = jnp.tile(jax.nn.one_hot(rows.label, task.num_classes), (2, 1))
  labelled = jnp.tile(rows.labelled, 2)
  each = jnp.where(labelled > 0, cross_entropy(logits, targets, classes), 0.0)
  loss = 2.0 * jnp.sum(each) / jnp.sum(labelled)
  features, taps = features[:size], jax.tree.map(lambda x: x[:size], taps)
  if statistics:
    loss += weights.statistics * distance(moments(taps, rows.seen), statistics)

  # Mode seeking (Mao et al. 2019) on the same-label pairs, with means in place of norms so that size drops out.
  pairs, _, _ = _parts(size)
  first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
  moved = jnp.mean(jnp.abs(images[first] - images[second]), axis=(1, 2, 3))
  spread = jnp.mean(jnp.abs(noise[first] - noise[second]), axis=1)
  loss += weights.diversity * jnp.mean(1.0 / (moved / spread + 0.01))

  if task.model.semantics is not None:
    meant = task.model.semantics(teacher.head, features)
    meant = meant / jnp.maximum(jnp.linalg.norm(meant, axis=-1, keepdims=True), 1e-6)
    off = jnp.sum((meant - rows.embedding) ** 2, axis=-1)
    loss += weights.semantic * jnp.sum(jnp.where(rows.active > 0, off, 0.0)) / jnp.sum(rows.active)

  # Total variation beyond what natural images have (8.4: hinge at .16).
  down = jnp.mean(jnp.abs(images[:, 1:] - images[:, :-1]), axis=(1, 2, 3))
  right = jnp.mean(jnp.abs(images[:, :, 1:] - images[:, :, :-1]), axis=(1, 2, 3))
  loss += weights.variation * jnp.mean(jax.nn.relu(down + right - 0.16))
  return loss


def sample(generator: Generator, params: PyTree, embeddings: Array, label: Array, key: Key) -> Array:
  """Images float32 [B, height, width, channels] in [0, 1] for int32 [B] labels. The key is consumed."""
  noise = jax.random.normal(key, (label.shape[0], generator.noise_size))
  return generator.apply(params, noise, embeddings[label])
