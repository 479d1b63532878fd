"""Which clients a round computes: the first K present ones along a keyed permutation of the ids."""

import jax
import jax.numpy as jnp

from apfl_jax import population, random
from apfl_jax.types import Array, Availability, Process, PyTree


def draw_cohort(
  process: Process, state: PyTree, round: Array, seed: Array, population_size: int, cohort_size: int
) -> tuple[Array, Array]:
  """Walks along the permutation until K present clients are found; no work is O(N) unless few are present.

  Args:
    process: who is there.
    state: of the process, stepped to `round`.
    round: int32 [].
    seed: the run's.
    population_size: N.
    cohort_size: K <= N.

  Returns:
    (ids int32 [K], ok bool [K]); fewer present clients than K leave the rest of ok false.
  """
  bits = random.permutation_key(random.key(seed, random.Purpose.COHORT, round))
  block = min(population_size, 2 * cohort_size)

  def missing(carry):
    position, found, _ = carry
    return (found < cohort_size) & (position < population_size)

  def search(carry):
    position, found, ids = carry
    positions = position + jnp.arange(block)
    candidates = random.permute(bits, positions, population_size)
    present = population.look(process, state, round, candidates, seed).present & (positions < population_size)
    place = jnp.where(present, found + jnp.cumsum(present) - 1, cohort_size)
    return position + block, found + jnp.sum(present), ids.at[place].set(candidates, mode="drop")

  start = (jnp.int32(0), jnp.int32(0), jnp.zeros(cohort_size, jnp.int32))
  _, found, ids = jax.lax.while_loop(missing, search, start)
  return ids, jnp.arange(cohort_size) < found


def along(
  process: Process, state: PyTree, round: Array, seed: Array, population_size: Array | int, positions: Array
) -> tuple[Array, Availability]:
  """The clients int32 [...] at these positions of the order in which a round draws, and how they are there."""
  bits = random.permutation_key(random.key(seed, random.Purpose.COHORT, round))
  ids = random.permute(bits, positions, population_size)
  return ids, population.look(process, state, round, ids, seed)
