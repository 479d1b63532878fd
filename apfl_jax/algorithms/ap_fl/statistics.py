"""What leaves a client beside its model, by privacy tier (method 2.5, 6.7 [O]), and how samples are compared with it.

  s0  nothing: the server knows models alone. Labels are not hidden by that, see `held_classes`
  s1  label histograms and the channel moments of pre-activations (as networks with BatchNorm give away [M]); if asked
      for, also the mean and the second moment of images, all classes together (`image_moments`)
  s2  also sums of features and of images, and of their squares, class by class; for the sources `image` and `matched`
      also sums of products of images' lowest cosine coefficients, for `matched` also of features under networks that
      nobody trained

Sums and not means are sent, so that a mean over clients is that over their examples.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import training
from apfl_jax.algorithms.ap_fl import projections
from apfl_jax.types import Array, Data, Key, Params, PyTree, Task

TIERS = ("s0", "s1", "s2")
_MEMORY = 0.9  # what sums by class keep over a round's aggregations: the model that features come from changes
_PRIOR = 10.0  # k of `ByClass.estimated`: in sums that fade by a tenth a round, one example that is always there
_BLOCK = 64  # examples at a time
_RISEN = 0.1  # of the largest change of any weight: less is rounding


class Moments(NamedTuple):
  """Of one layer, of features or of images; all classes together, or [C, ...] by class.

  Attributes:
    mean: float32 [channels], or what is measured.
    square: float32, likewise, the second moment.
  """

  mean: Array
  square: Array


class ByClass(NamedTuple):
  """Sums over examples, class by class.

  Attributes:
    counts: float32 [C].
    layers: Moments [C, channels] of each layer's pre-activations.
    features: Moments [C, F].
    images: Moments [C, height, width, channels].
    products: float32 [C, K, K], of the lowest cosine coefficients of an image with each other; () where none are sent.
    untrained: Moments [C, R, F] of features under R untrained networks; likewise.
  """

  counts: Array
  layers: tuple[Moments, ...]
  features: Moments
  images: Moments
  products: Array | tuple[()] = ()
  untrained: Moments | tuple[()] = ()

  @property
  def estimated(self) -> "ByClass":
    """Moments of an example, class by class, 0 where there are no examples; `counts` is then 1 or 0, products are out.

    A variance of few examples is small by chance, of a single one 0, and what is compared in units of it would be all
    that counts. So each is shrunk towards the mean over all examples: (n_c v_c + k v) / (n_c + k) [O].
    """

    def of(moments: Moments) -> Moments:
      mean = self._each(moments.mean)
      variance = self._shrunk(self._each(moments.square) - mean**2)
      return Moments(mean, jnp.where(self._along(variance) > 0, mean**2 + variance, 0.0))

    untrained = of(self.untrained) if isinstance(self.untrained, Moments) else ()
    layers = tuple(map(of, self.layers))
    return ByClass(self._each(self.counts), layers, of(self.features), of(self.images), untrained=untrained)

  @property
  def covariances(self) -> Array:
    """float32 [C, K, K], of the lowest cosine coefficients of a class's images, shrunk likewise."""
    assert not isinstance(self.products, tuple)
    low = projections.coefficients(self._each(self.images.mean))
    return self._shrunk(self._each(self.products) - low[:, :, None] * low[:, None, :])

  def _along(self, x: Array) -> Array:
    """The counts, with as many axes as x [C, ...]."""
    return self.counts.reshape(-1, *[1] * (x.ndim - 1))

  def _each(self, x: Array) -> Array:
    """A mean over examples, of a sum."""
    return x / jnp.maximum(self._along(x), 1e-12)

  def _shrunk(self, variance: Array) -> Array:
    n = self._along(variance)
    all_classes = jnp.sum(n * variance, axis=0) / jnp.maximum(jnp.sum(self.counts), 1e-12)
    return jnp.where(n > 0, (n * variance + _PRIOR * all_classes) / (n + _PRIOR), 0.0)


class Statistics(NamedTuple):
  """What the server knows of real data.

  Attributes:
    layers: Moments of each layer, a mean over the last cohort, or where its uploads are aggregated one by one a fading
      one over about as many; () below tier s1.
    classes: ByClass, fading sums over cohorts; () below tier s2.
    weight: float32 [], what `layers` is the mean over, fading likewise; () below tier s1.
  """

  layers: tuple[Moments, ...]
  classes: ByClass | tuple[()]
  weight: Array | tuple[()] = ()


def moments(taps: tuple[Array, ...], mask: Array) -> tuple[Moments, ...]:
  """Moments of each pre-activation [B, ..., channels] over rows and places; `mask` float32 [B], 1 counts a row."""

  def of(tap):
    rows = tap.reshape(tap.shape[0], -1, tap.shape[-1])  # [B, places, channels]
    kept = jnp.where(mask[:, None, None] > 0, rows, 0.0)
    average = lambda x: jnp.sum(x, axis=(0, 1)) / jnp.maximum(jnp.sum(mask) * rows.shape[1], 1.0)
    return Moments(average(kept), average(kept**2))

  return tuple(of(tap) for tap in taps)


def class_sums(one_hot: Array, values: Array) -> Moments:
  """Sums [C, ...] of values [B, ...] and of their squares; `one_hot` float32 [B, C], a row of zeros counts nowhere."""
  return Moments(jnp.tensordot(one_hot.T, values, 1), jnp.tensordot(one_hot.T, values**2, 1))


def layer_sums(one_hot: Array, taps: tuple[Array, ...]) -> tuple[Moments, ...]:
  """As `class_sums`, Moments [C, channels] of each pre-activation [B, ..., channels], a mean over places."""

  def of(tap):
    rows = tap.reshape(tap.shape[0], -1, tap.shape[-1])
    mean, square = jnp.mean(rows, axis=1), jnp.mean(rows**2, axis=1)
    return Moments(*(jnp.tensordot(one_hot.T, x, 1) for x in (mean, square)))

  return tuple(of(tap) for tap in taps)


def sums_by_class(
  task: Task, params: Params, data: Data, *, products: bool = False, untrained: bool = False
) -> ByClass:
  """Of a client's training examples, without augmentation; with `products` and `untrained`, see `ByClass`, if asked."""
  drawn = projections.networks(task) if untrained else None

  def of(batch: training.Batch) -> ByClass:
    one_hot = jnp.where(batch.mask[:, None] > 0, batch.targets, 0.0)
    return _sums(task, params, drawn, one_hot, batch.images, products)

  def add(i: Array, total: ByClass) -> ByClass:
    batch = training.gather(data.store, data.train, i * _BLOCK + jnp.arange(_BLOCK), task.num_classes)
    return jax.tree.map(jnp.add, total, of(batch))

  nothing = no_sums(task, products=products, untrained=untrained)
  return jax.lax.fori_loop(0, (data.train.size + _BLOCK - 1) // _BLOCK, add, nothing)


def no_sums(task: Task, *, products: bool = False, untrained: bool = False) -> ByClass:
  """Of no examples."""

  def of(key: Key, images: Array) -> ByClass:
    drawn = projections.networks(task) if untrained else None
    return _sums(task, task.model.init(key), drawn, jnp.zeros((1, task.num_classes)), images, products)

  return _zeros(of, task)


def _sums(task: Task, params: Params, drawn: Params | None, one_hot: Array, images: Array, products: bool) -> ByClass:
  features, taps = task.model.base(params.base, images)
  return ByClass(
    counts=jnp.sum(one_hot, axis=0),
    layers=layer_sums(one_hot, taps),
    features=class_sums(one_hot, features),
    images=class_sums(one_hot, images),
    products=projections.products(one_hot, images) if products else (),
    untrained=() if drawn is None else class_sums(one_hot, projections.features(task, drawn, images)),
  )


def no_moments(
  task: Task, layers_of: Callable[[Array, Array, tuple[Array, ...]], tuple[Array, ...]]
) -> tuple[Moments, ...]:
  """Of no batch; `layers_of`: (images, features, taps) -> what moments are of."""

  def of(key: Key, images: Array) -> tuple[Moments, ...]:
    return moments(layers_of(images, *task.model.base(task.model.init(key).base, images)), jnp.ones(1))

  return _zeros(of, task)


def _zeros(of: Callable[[Key, Array], PyTree], task: Task) -> PyTree:
  blank = jax.ShapeDtypeStruct((1, *task.image_shape), jnp.float32)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of, jax.random.key(0), blank))


def merge(old: ByClass, new: ByClass, aggregations: int = 1) -> ByClass:
  """Fading sums: a class that was heard of in all aggregations of a round fades by a tenth, else by less or not."""
  heard, share = new.counts > 0, _MEMORY ** (1 / aggregations)

  def each(a: Array, b: Array) -> Array:
    return jnp.where(heard.reshape(-1, *[1] * (a.ndim - 1)), share * a + b, a)

  return jax.tree.map(each, old, new)


def fading(
  old: tuple[Moments, ...], weight: Array, total: tuple[Moments, ...], added: Array, aggregations: int
) -> tuple[tuple[Moments, ...], Array]:
  """A mean of which each aggregation keeps a share 1 - 1 / aggregations; of one a round that is its own mean.

  Args:
    old: the mean so far.
    weight: float32 [], what it is over.
    total: the weighted sum to be taken in.
    added: float32 [], its weight.
    aggregations: how many make a round.

  Returns:
    (the new mean, what it is over)
  """
  if aggregations == 1:
    return jax.tree.map(lambda t: t / added, total), added
  kept = (1 - 1 / aggregations) * weight
  return jax.tree.map(lambda m, t: (kept * m + t) / (kept + added), old, total), kept + added


def distance(found: tuple[Moments, ...], wanted: tuple[Moments, ...], weights: Array | None = None) -> Array:
  """L_st of method 2.6 [O], a scale-free form of DeepInversion (Yin et al. 2020); [] >= 0, 0 where equal.

  sum_l mean_k (m - m')^2 / mean_k v'  +  0.1 mean_k log((v + 1e-4) / (v' + 1e-4))^2

  Args:
    found: moments, a layer each.
    wanted: the same of real data.
    weights: float32 [C] for moments by class [C, ...]: the result is a mean over classes, by these; 0 leaves one out.
  """
  total = jnp.zeros(())
  for a, b in zip(found, wanted, strict=True):
    total += _gap(a, b) if weights is None else jnp.sum(jnp.where(weights > 0, weights * jax.vmap(_gap)(a, b), 0.0))
  return total if weights is None else total / jnp.maximum(jnp.sum(weights), 1e-12)


def _gap(a: Moments, b: Moments) -> Array:
  variance, target = jnp.maximum(a.square - a.mean**2, 0.0), jnp.maximum(b.square - b.mean**2, 0.0)
  means = jnp.mean((a.mean - b.mean) ** 2) / jnp.maximum(jnp.mean(target), 1e-6)
  return means + 0.1 * jnp.mean(jnp.log((variance + 1e-4) / (target + 1e-4)) ** 2)


def held_classes(task: Task, delta: Params) -> Array:
  """bool [C]: which classes a client holds, read off its model's change alone, as a server of tier s0 can.

  A step of SGD moves row c of a free head by eta sum_b (y_bc - p_bc) f_b, and f >= 0: the row of a class without
  examples only falls (iDLG, Zhao et al. 2020 [M], says so of one example). Not so where labels are smoothed over all
  classes (`--augment=full` without a mask of the softmax), nor in heads made of embeddings, which move together. What
  the client holds little of, or had learned already, may go unnoticed in one round, hardly in all.
  """
  assert task.model.semantics is None
  rows = task.model.head(delta.head, jnp.eye(training.feature_size(task)))  # one feature after the other: [F, C]
  return jnp.max(rows, axis=0) > _RISEN * jnp.max(jnp.abs(rows))
