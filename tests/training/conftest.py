"""A small store whose images tell which example they are."""

import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.types import Store

NUM_EXAMPLES, NUM_CLASSES = 330, 5


@pytest.fixture(scope="session")
def store() -> Store:
  """330 examples of 5 classes, images [6, 5, 1]: random, but pixels 0 and 1 are the number's low and high byte."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (NUM_EXAMPLES, 6, 5, 1), np.uint8)
  number = np.arange(NUM_EXAMPLES)
  images[:, 0, 0, 0], images[:, 0, 1, 0] = number % 256, number // 256
  labels = rng.integers(0, NUM_CLASSES, NUM_EXAMPLES, np.int32)
  index = rng.permutation(NUM_EXAMPLES).astype(np.int32)
  return Store(jnp.asarray(images), jnp.asarray(labels), jnp.asarray(index))
