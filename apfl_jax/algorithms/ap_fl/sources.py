"""Where synthetic examples of a class come from: the semantic generator, and what it is measured against.

  image        the semantic generator of images (method 2.6)
  feature      a generator of what the head reads, at a thousandth of the work (method 2.6, 6.2 [O], as FedGen [M])
  class_means  no generator: the mean image of a class plus its deviation times smooth noise (method 8.4 [P]); tier S2
  matched      no generator: images moved until sums of their features are those of clients' (`matching`); tier S2
  untrained    the image generator as it was drawn
  noise        uniform noise in place of images
  none         no synthetic examples at all

`untrained` and `noise` are controls (method 8.3: whatever they bring, no generator has to be trained for). Their
samples are believed wholly, or it would be the trust that is tested and not what comes after it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import nn, training
from apfl_jax.algorithms.ap_fl import matching
from apfl_jax.algorithms.ap_fl.statistics import ByClass, Moments, Statistics
from apfl_jax.types import Array, Generator, Key, Model, Params, PyTree, Task

SOURCES = ("image", "feature", "class_means", "matched", "untrained", "noise", "none")
TeacherLoss = Callable[[Array, Array], Array]  # (samples [B, ...], label int32 [B]) -> cross-entropy float32 [B]


class Source(NamedTuple):
  """A source of synthetic examples as functions of its weights.

  Attributes:
    images: whether samples are images, float32 [B, height, width, channels] in [0, 1]; if not they are features
      float32 [B, F], which the head reads.
    generator: what makes them out of weights, noise and embeddings; None if nothing does.
    learns: whether the server trains it.
    trusted: 'measured', as far as the teacher recognises samples; 'wholly' or 'never'.
    init: (key) -> weights, () if there are none.
    ship: (weights, Statistics) -> what clients download of it.
    sample: (shipped, label int32 [B], key) -> samples.
    match: (Statistics, the teacher's loss, key) -> `Matched`, which the server makes once, in the last round; None if
      it makes none.
    image_moments: whether images are the first layer that L_st compares, pixel by pixel.
    products: whether it needs products of cosine coefficients class by class, see `ByClass`.
  """

  images: bool
  generator: Generator | None
  learns: bool
  trusted: str
  init: Callable[[Key], PyTree]
  ship: Callable[[PyTree, Statistics], PyTree]
  sample: Callable[[PyTree, Array, Key], Array]
  match: Callable[[Statistics, TeacherLoss, Key], PyTree] | None = None
  image_moments: bool = False
  products: bool = False

  def layers(self, images: Array, features: Array, taps: tuple[Array, ...]) -> tuple[Array, ...]:
    """What moments are taken of, [B, ..., channels] each, from images [B, ...] and what a base makes of them."""
    if not self.images:
      return (features,)
    return (images.reshape(len(images), -1), *taps) if self.image_moments else taps

  def features(self, model: Model, base: PyTree, samples: Array) -> Array:
    """Of samples, float32 [B, F], under a base."""
    return model.base(base, samples)[0] if self.images else samples

  def logits(self, model: Model, params: Params, images: Array, samples: Array) -> tuple[Array, Array]:
    """Logits of real images and of samples, float32 [B, C] each; one pass through the base where both are images."""
    if self.images:
      features, _ = model.base(params.base, jnp.concatenate([images, samples]))
      real, made = jnp.split(model.head(params.head, features), [len(images)])
      return real, made
    features, _ = model.base(params.base, images)
    return model.head(params.head, features), model.head(params.head, samples)


def source(task: Task, name: str, settings: matching.Settings | None = None, *, image_moments: bool = False) -> Source:
  """The source of a name, one of `SOURCES`.

  Args:
    task: the task.
    name: the name.
    settings: with which `matched` makes its images.
    image_moments: as of `Source`, for sources of images.
  """
  shape, size = task.image_shape, training.feature_size(task)
  nothing = Source(
    images=False,
    generator=None,
    learns=False,
    trusted="never",
    init=lambda key: (),
    ship=lambda weights, statistics: (),
    sample=lambda shipped, label, key: jnp.zeros((*label.shape, size)),
  )
  if name == "none":
    return nothing
  if name == "noise":
    draw = lambda shipped, label, key: jax.random.uniform(key, (*label.shape, *shape))
    return nothing._replace(images=True, trusted="wholly", sample=draw)
  if name == "class_means":
    return nothing._replace(
      images=True,
      trusted="measured",
      ship=lambda weights, statistics: class_images(statistics),
      sample=around_means,
    )
  if name == "matched":

    def blank(key: Key) -> Matched:
      assert settings is not None
      return Matched(bank(jnp.zeros((task.num_classes, settings.size, *shape))), jnp.bool_(False))

    def match(statistics: Statistics, teacher_loss: TeacherLoss, key: Key) -> Matched:
      assert settings is not None
      return Matched(bank(matching.match(task, _classes(statistics), teacher_loss, settings, key)), jnp.bool_(True))

    ship = lambda weights, statistics: weights.bank
    matched = nothing._replace(images=True, trusted="measured", init=blank, ship=ship, match=match, products=True)
    return banked(matched)
  images = name != "feature"
  meaning = task.embeddings.shape[1]
  generator = nn.generator(shape, meaning) if images else nn.feature_generator(meaning, size, coded=True)

  def sample(weights, label, key):
    noise = jax.random.normal(key, (*label.shape, generator.noise_size))
    return generator.apply(weights, noise, task.embeddings[label])

  learns = name != "untrained"
  ship = lambda weights, statistics: weights
  trusted = "measured" if learns else "wholly"
  return Source(
    images,
    generator,
    learns,
    trusted,
    generator.init,
    ship,
    sample,
    image_moments=image_moments,
    products=images and learns,
  )


def class_images(statistics: Statistics) -> Moments:
  """What `class_means` ships: the mean image of each class and, in place of the second moment, the deviation."""
  mean, square = _classes(statistics).estimated.images
  return Moments(mean, jnp.sqrt(jnp.maximum(square - mean**2, 0.0)))


def _classes(statistics: Statistics) -> ByClass:
  assert isinstance(statistics.classes, ByClass)
  return statistics.classes


def around_means(shipped: Moments, label: Array, key: Key) -> Array:
  """Images float32 [B, height, width, channels]: mean + deviation * noise of variance 1 that is smooth in space."""
  mean, deviation = shipped.mean[label], shipped.square[label]
  return jnp.clip(mean + deviation * smooth_noise(mean.shape, key), 0.0, 1.0)


def smooth_noise(shape: tuple[int, ...], key: Key) -> Array:
  """Normal noise [B, height, width, channels] of variance 1: drawn on the generator's first grid, upsampled."""
  batch, height, width, channels = shape
  times = 1 if min(height, width) < 16 else 2
  rows, columns = height >> times, width >> times

  def fine(x: Array) -> Array:
    for _ in range(times):
      x = nn.upsample(x)
    return x

  # What upsampling leaves of the variance differs from pixel to pixel: the sum of the squares of its weights.
  left = jnp.sum(fine(jnp.eye(rows * columns).reshape(-1, rows, columns, 1)) ** 2, axis=0)
  return fine(jax.random.normal(key, (batch, rows, columns, channels))) / jnp.sqrt(left)


class Bank(NamedTuple):
  """Samples drawn once by the server, to be downloaded instead of weights (method 2.8, 6.2 [O]).

  Attributes:
    values: uint8 [C, M, ...].
    most: float32 [], what 255 stands for.
  """

  values: Array
  most: Array


class Matched(NamedTuple):
  """The weights of the source `matched`.

  Attributes:
    bank: its images.
    made: bool [], False while they are blank.
  """

  bank: Bank
  made: Array


def fill(source: Source, shipped: PyTree, num_classes: int, count: int, key: Key) -> Bank:
  """A bank of `count` samples of each class. The key is consumed."""
  samples = source.sample(shipped, jnp.repeat(jnp.arange(num_classes), count), key)
  return bank(samples.reshape(num_classes, count, *samples.shape[1:]))


def bank(samples: Array) -> Bank:
  """Samples float32 [C, M, ...], 0 or more as those of every source, as bytes."""
  most = jnp.maximum(jnp.max(samples), 1e-6)
  return Bank(jnp.round(samples / most * 255.0).astype(jnp.uint8), most)


def banked(source: Source) -> Source:
  """The source as clients see it that download a `Bank` of it: a sample is one of the bank's."""

  def sample(bank: Bank, label: Array, key: Key) -> Array:
    place = jax.random.randint(key, label.shape, 0, bank.values.shape[1])
    return bank.values[label, place].astype(jnp.float32) * (bank.most / 255.0)

  return source._replace(generator=None, sample=sample)
