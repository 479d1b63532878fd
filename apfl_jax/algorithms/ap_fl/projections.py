"""What images are compared in without a trained model: features of untrained networks, lowest cosine coefficients."""

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax.types import Array, Params, Task

NETWORKS = 10  # [P]
_DRAWN = 2023  # the key that all draw them from
_SIDE = 8  # coefficients each way [P]
EXACT = jax.lax.Precision.HIGHEST  # a covariance is a small difference of large products


def networks(task: Task) -> Params:
  """Untrained networks, the same for the server and all clients, so that none is sent; leaves [R, ...]."""
  return jax.vmap(task.model.init)(jax.random.split(jax.random.key(_DRAWN), NETWORKS))


def features(task: Task, drawn: Params, images: Array) -> Array:
  """float32 [B, R, F] of images [B, height, width, channels]."""
  each = jax.lax.map(lambda base: task.model.base(base, images)[0], drawn.base)
  return jnp.moveaxis(each, 0, 1)


def cosines(length: int) -> np.ndarray:
  """float32 [k, length]: the lowest rows of the orthonormal discrete cosine transform, k at most 8."""
  row, place = np.arange(min(_SIDE, length))[:, None], np.arange(length)
  rows = np.sqrt(2 / length) * np.cos(np.pi * (place + 0.5) * row / length)
  return np.where(row == 0, rows / np.sqrt(2), rows).astype(np.float32)


def coefficients(images: Array) -> Array:
  """float32 [B, K] of images [B, height, width, channels]: their lowest cosine coefficients, channel by channel."""
  rows, columns = cosines(images.shape[1]), cosines(images.shape[2])
  low = jnp.einsum("rh,bhwc,sw->brsc", rows, images, columns, precision=EXACT)
  return low.reshape(len(images), -1)


def products(one_hot: Array, images: Array) -> Array:
  """Sums float32 [C, K, K] over images of each class of the products of their coefficients; one_hot float32 [B, C]."""
  low = coefficients(images)
  return jnp.einsum("bc,bk,bl->ckl", one_hot, low, low, precision=EXACT)


def smooth(values: Array, shape: tuple[int, ...]) -> Array:
  """Images [B, *shape] of coefficients [B, K], the others being 0."""
  rows, columns = cosines(shape[0]), cosines(shape[1])
  low = values.reshape(-1, len(rows), len(columns), shape[2])
  return jnp.einsum("rh,brsc,sw->bhwc", rows, low, columns, precision=EXACT)
