"""What an update counts that was computed on a server tau versions old: s(tau), Xie et al. 2019, section 5 [M].

  constant    s = 1
  polynomial  s = (1 + tau)^-a
  hinge       s = 1 for tau <= b, else 1 / (a (tau - b) + 1)

In every one s(0) = 1. The simulation tells tau in versions of the server (`staleness` of `Visit` and `Received`): a
round makes one, and on the asynchronous clock each upload that arrives.
"""

import jax.numpy as jnp

from apfl_jax.types import Array


def polynomial(staleness: Array, exponent: Array | float) -> Array:
  """float32 [...]: (1 + tau)^-a of int32 [...]; 1 for exponent 0."""
  return (1.0 + staleness) ** -exponent


def hinge(staleness: Array, slope: Array | float, start: Array | float) -> Array:
  """float32 [...]: 1 up to `start`, then falling as 1 / (a (tau - b) + 1), of int32 [...]."""
  return 1.0 / (slope * jnp.maximum(staleness - start, 0.0) + 1.0)
