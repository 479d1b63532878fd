"""Layer statistics: channel means and second moments of pre-activations, summed over clients, compared scale-free."""

from typing import NamedTuple

import jax.numpy as jnp

from apfl_jax.types import Array


class Moments(NamedTuple):
  """Of one layer.

  Attributes:
    mean: float32 [channels].
    square: float32 [channels], the second moment.
  """

  mean: Array
  square: Array


def moments(taps: tuple[Array, ...], mask: Array) -> tuple[Moments, ...]:
  """Moments of each pre-activation [B, ..., channels] over rows and places; `mask` float32 [B], 1 counts a row."""

  def of(tap):
    rows = tap.reshape(tap.shape[0], -1, tap.shape[-1])  # [B, places, channels]
    kept = jnp.where(mask[:, None, None] > 0, rows, 0.0)
    average = lambda x: jnp.sum(x, axis=(0, 1)) / jnp.maximum(jnp.sum(mask) * rows.shape[1], 1.0)
    return Moments(average(kept), average(kept**2))

  return tuple(of(tap) for tap in taps)


def distance(found: tuple[Moments, ...], wanted: tuple[Moments, ...]) -> Array:
  """L_st of method 2.6 [O], a scale-free form of DeepInversion (Yin et al. 2020); [] >= 0, 0 where equal.

  sum_l mean_k (m - m')^2 / mean_k v'  +  0.1 mean_k log((v + 1e-4) / (v' + 1e-4))^2
  """
  total = jnp.zeros(())
  for a, b in zip(found, wanted, strict=True):
    variance, target = jnp.maximum(a.square - a.mean**2, 0.0), jnp.maximum(b.square - b.mean**2, 0.0)
    total += jnp.mean((a.mean - b.mean) ** 2) / jnp.maximum(jnp.mean(target), 1e-6)
    total += 0.1 * jnp.mean(jnp.log((variance + 1e-4) / (target + 1e-4)) ** 2)
  return total
