"""Images of each class, moved until they are alike in sums over clients: the source `matched`, tier s2.

Distribution matching (Zhao and Bilen 2023 [M]) moves images until their mean features under networks that nobody
trained are those of real ones. The server has no real ones, and needs none [O]: for networks that clients can draw by
themselves, sums over clients' examples say the same. Second moments are matched too, for means alone leave no spread;
and the images start from a normal distribution of their lowest cosine coefficients around the mean image, for from
class means with smooth noise they do not get as far (8.4 [P]). The teacher's cross-entropy keeps those recognisable
that moments alone would pull away from their class.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from apfl_jax.algorithms.ap_fl import projections
from apfl_jax.algorithms.ap_fl.statistics import ByClass, Moments, distance
from apfl_jax.types import Array, Key, Task


class Settings(NamedTuple):
  """See `ap_fl`.

  Attributes:
    size: images of a class.
    steps: of Adam.
    learning_rate: its rate, falling to 0 along a cosine.
    teacher: weight of the teacher's cross-entropy beside the distance of moments.
  """

  size: int
  steps: int
  learning_rate: Array | float
  teacher: Array | float


def match(
  task: Task, sums: ByClass, teacher_loss: Callable[[Array, Array], Array], settings: Settings, key: Key
) -> Array:
  """Images float32 [C, size, height, width, channels] in [0, 1]; of classes without examples they say nothing.

  Args:
    task: the task.
    sums: of real examples, with those that images are matched to.
    teacher_loss: (images [B, height, width, channels], label int32 [B]) -> float32 [B], the teacher's cross-entropy.
    settings: how many images, and of the optimiser.
    key: consumed.
  """
  real, weights = sums.estimated, (sums.counts > 0).astype(jnp.float32)
  assert isinstance(real.untrained, Moments)
  wanted, networks = real.untrained, projections.networks(task)
  label = task.spread(jnp.repeat(jnp.arange(task.num_classes), settings.size))
  share = jnp.repeat(weights, settings.size) / jnp.maximum(settings.size * jnp.sum(weights), 1.0)
  images = start(real.images.mean, sums.covariances, settings.size, key)
  adam = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, max(settings.steps, 1)))

  def step(i, carry):
    images, state = carry
    # One network after the other: all at once are ten times the work and no better [P].
    base = jax.tree.map(lambda x: x[i % projections.NETWORKS], networks.base)
    there = jax.tree.map(lambda x: x[:, i % projections.NETWORKS], wanted)

    def loss(images):
      flat = task.spread(images.reshape(-1, *task.image_shape))
      features, _ = task.model.frozen.base(base, flat)
      found = features.reshape(*images.shape[:2], -1)
      apart = distance((Moments(jnp.mean(found, axis=1), jnp.mean(found**2, axis=1)),), (there,), weights)
      return apart + settings.teacher * jnp.sum(jnp.where(share > 0, share * teacher_loss(flat, label), 0.0))

    updates, state = adam.update(jax.grad(loss)(images), state)
    return jnp.clip(optax.apply_updates(images, updates), 0.0, 1.0), state

  images, _ = jax.lax.fori_loop(0, settings.steps, step, (images, adam.init(images)))
  return images


def start(mean: Array, covariances: Array, size: int, key: Key) -> Array:
  """Images float32 [C, size, height, width, channels] in [0, 1]: mean images plus normal coefficients.

  Args:
    mean: float32 [C, height, width, channels], of real images.
    covariances: float32 [C, K, K], of their coefficients.
    size: images of a class.
    key: consumed.
  """
  count = covariances.shape[1]
  noise = jnp.einsum("ckl,cnl->cnk", jax.vmap(root)(covariances), jax.random.normal(key, (len(mean), size, count)))
  moved = projections.smooth(noise.reshape(-1, count), mean.shape[1:])
  return jnp.clip(mean[:, None] + moved.reshape(len(mean), size, *mean.shape[1:]), 0.0, 1.0)


def root(covariance: Array) -> Array:
  """Lower triangular L, float32 [K, K], with L L' the covariance [K, K]: Cholesky's, also where that is singular.

  Of few examples it is. A column whose pivot is rounding is 0. In plain array operations: XLA's batches of LAPACK calls
  wait for each other's threads where several CPU devices share them, for good.
  """
  least = 1e-5 * jnp.max(jnp.diagonal(covariance))
  place = jnp.arange(len(covariance))

  def column(k: Array, found: Array) -> Array:
    rest = covariance[:, k] - jnp.dot(found, found[k], precision=projections.EXACT)
    scaled = jnp.where(rest[k] > least, rest / jnp.sqrt(jnp.maximum(rest[k], 1e-12)), 0.0)
    return found.at[:, k].set(jnp.where(place >= k, scaled, 0.0))

  return jax.lax.fori_loop(0, len(covariance), column, jnp.zeros_like(covariance))
