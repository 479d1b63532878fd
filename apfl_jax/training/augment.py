"""Augmentation of local training, the same for every method.

It costs the global model nothing in the pilots and makes what a generator inverts from it far more class-like
(method 8.4 [P]).
"""

import jax
import jax.numpy as jnp

from apfl_jax.training.batches import Batch
from apfl_jax.types import Array, Key

AUGMENTATIONS = ("none", "shift", "full")
_SMOOTHING = 0.1


def max_shift(side: int) -> int:
  """Pixels that an image of this side is moved by at most: a fourteenth, at least one (2 for 28 and 32)."""
  return max(1, round(side / 14))


def shift(images: Array, offset: Array) -> Array:
  """Moves images [B, height, width, channels] by int32 [B, 2] (down, right); edges are repeated."""
  _, height, width, _ = images.shape
  rows = jnp.clip(jnp.arange(height)[None, :] - offset[:, :1], 0, height - 1)  # [B, height]
  columns = jnp.clip(jnp.arange(width)[None, :] - offset[:, 1:], 0, width - 1)  # [B, width]
  return images[jnp.arange(images.shape[0])[:, None, None], rows[:, :, None], columns[:, None, :]]


def augment(kind: str, batch: Batch, key: Key) -> Batch:
  """`none`; `shift`: each image moved at random; `full`: shift, mixup (Zhang et al. 2018, Beta(1, 1) per pair),
  label smoothing 0.1. The key is consumed.

  Smoothing says what an example might be mistaken for: where the batch has an offset, one of the classes that its
  softmax runs over, in proportion to their prior [O]. Uniform targets would teach a client what the offset rules out.
  """
  if kind == "none":
    return batch
  shift_key, mix_key = jax.random.split(key)
  size = batch.images.shape[0]
  most = max_shift(batch.images.shape[1])
  images = shift(batch.images, jax.random.randint(shift_key, (size, 2), -most, most + 1))
  if kind == "shift":
    return batch._replace(images=images)
  share = jax.random.uniform(mix_key, (size,), minval=0.5)  # Beta(1, 1), the larger part kept in place
  # The example before, around the real ones: padding is no partner.
  partner = (jnp.arange(size) - 1) % jnp.maximum(jnp.sum(batch.mask).astype(jnp.int32), 1)
  mix = lambda x, s: s * x + (1.0 - s) * x[partner]
  targets = mix(batch.targets, share[:, None])
  offset = batch.logit_offset
  smooth = _SMOOTHING / targets.shape[1] if offset is None else _SMOOTHING * jax.nn.softmax(offset)
  return batch._replace(images=mix(images, share[:, None, None, None]), targets=(1.0 - _SMOOTHING) * targets + smooth)
