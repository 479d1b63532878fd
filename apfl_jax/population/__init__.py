"""Who is there when: processes of availability that chain as optax transformations do."""

from apfl_jax.population.processes import (
  PROCESSES,
  bernoulli,
  chain,
  cold,
  departed,
  everyone,
  look,
  make,
  start,
  step,
  waiting,
)

__all__ = [
  "PROCESSES",
  "bernoulli",
  "chain",
  "cold",
  "departed",
  "everyone",
  "look",
  "make",
  "start",
  "step",
  "waiting",
]
