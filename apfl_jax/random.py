"""Keys from (seed, purpose, ...) alone, and a keyed permutation of any range without a table.

No random state is carried from round to round and none depends on a client's place in a batch, so neither
devices, nor chunk sizes, nor who else is in the cohort changes what a client computes.
"""

import enum

import jax
import jax.numpy as jnp

from apfl_jax.types import Array, Key

_ROUNDS = 8  # Feistel rounds; fewer leave visible structure in small ranges


class Purpose(enum.IntEnum):
  """What a key is for. Values are part of a run's identity: never renumber."""

  SERVER = 0
  POPULATION = 1
  COHORT = 2
  CLIENT = 3
  LOCAL_UPDATE = 4
  AGGREGATE = 5
  PERSONALIZE = 6
  EMBEDDINGS = 7
  REPORT = 8
  PARTITION = 9
  SPLIT = 10
  POPULATION_START = 11
  VERIFICATION = 12
  DURATION = 13
  JUDGE = 20


def key(seed: Array | int, purpose: Purpose, *data: Array | int) -> Key:
  """The key of a purpose, e.g. `key(seed, Purpose.LOCAL_UPDATE, round, client_id)`.

  Args:
    seed: int32 or uint32 [], may be traced, as may the data.
    purpose: what it is for.
    *data: int32 or uint32 [], each; as many as the purpose has.
  """
  return _folded(jax.random.key(seed), jnp.stack([jnp.uint32(value) for value in (int(purpose), *data)]))


@jax.jit
def _folded(key: Key, values: Array) -> Key:
  """The key with all of uint32 [n] folded in, one after another."""
  # In a loop, which compiles the generator once and not n times: a seventh of what a run compiles.
  return jax.lax.fori_loop(0, values.shape[0], lambda i, k: jax.random.fold_in(k, values[i]), key)


def permutation_key(key: Key) -> Array:
  """uint32 [8]: what `permute` needs, drawn once and used for many positions. The key is consumed."""
  return jax.random.bits(key, (_ROUNDS,), jnp.uint32)


def permute(bits: Array, position: Array, size: Array | int) -> Array:
  """The element at `position` of a pseudo-random permutation of `range(size)`; `size` may be traced.

  An alternating Feistel network over the smallest power of two that holds `size`, at least 64, walked until it lands
  inside (Black and Rogaway 2002, cycle-walking). Costs O(1) a position, whatever `size` is.

  Args:
    bits: uint32 [8] from `permutation_key`.
    position: int32 [...], clamped into `[0, size)`.
    size: int32 [], at least 1, at most 2**30.

  Returns:
    int32 [...] in `[0, size)`, a bijection of the positions.
  """
  size = jnp.maximum(jnp.asarray(size, jnp.uint32), 1)
  # Bits of the domain. Halves of fewer than 3 bits mix badly: pairs of elements would stay together too often.
  width = jnp.maximum(32 - jax.lax.clz(size - 1), 6)
  low = (width + 1) // 2
  low_mask = (jnp.uint32(1) << low) - 1
  high_mask = (jnp.uint32(1) << (width - low)) - 1

  def mix(x, constant):  # murmur3's finaliser
    x = (x + constant) * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

  def network(x):
    high, right = x >> low, x & low_mask
    for i in range(0, _ROUNDS, 2):
      right = (right ^ mix(high, bits[i])) & low_mask
      high = (high ^ mix(right, bits[i + 1])) & high_mask
    return (high << low) | right

  def walk(carry):
    x, inside = carry
    x = jnp.where(inside, x, network(x))
    return x, x < size

  # Clamped, because a walk that starts outside may never come inside.
  start = jnp.clip(jnp.asarray(position), 0, (size - 1).astype(jnp.int32)).astype(jnp.uint32)
  walked, _ = jax.lax.while_loop(lambda carry: ~jnp.all(carry[1]), walk, (start, jnp.zeros(start.shape, bool)))
  return walked.astype(jnp.int32)


def categorical(key: Key, weights: Array, shape: tuple[int, ...]) -> Array:
  """int32 [*shape] classes drawn in proportion to float32 [C] weights >= 0, not all 0. The key is consumed.

  By inverting the cumulative sum: a class of weight 0 is never drawn, and it compiles in a tenth of the time of
  `jax.random.categorical`, whose argmax is dear on CPUs.
  """
  cumulative = jnp.cumsum(weights)
  point = jax.random.uniform(key, (*shape, 1)) * cumulative[-1]
  last = jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[0]), 0))  # rounding may reach the total itself
  return jnp.minimum(jnp.sum(cumulative <= point, axis=-1), last).astype(jnp.int32)
