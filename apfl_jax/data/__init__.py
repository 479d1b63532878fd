"""Where examples come from and who holds them; host-side NumPy, pure and seeded."""

from pathlib import Path

from apfl_jax.data import digits, fast, partition, tfds
from apfl_jax.data.datasets import Dataset
from apfl_jax.data.federation import build, histogram, pooled
from apfl_jax.data.held_out import hold_out
from apfl_jax.data.partition import Partition, choose_monopolistic, monopolistic
from apfl_jax.errors import InputError
from apfl_jax.settings import near

BUILT_IN = {"digits": digits.load, "fast": fast.load}


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
  """The images and labels of a data set.

  Args:
    name: `digits`, `fast`, or an image-classification set that tensorflow-datasets has prepared, e.g. `mnist`,
      `emnist/balanced`, `cifar10`.
    data_dir: where tensorflow-datasets keeps prepared sets; None is its own default (`TFDS_DATA_DIR`, else
      `~/tensorflow_datasets`). The built-in sets do not need it.

  Raises:
    InputError: the name is unknown, or the set is not prepared, not readable or not image classification.
  """
  if name in BUILT_IN:
    return BUILT_IN[name]()
  try:
    return tfds.load(name, data_dir)
  except InputError as error:
    if meant := near(name, BUILT_IN):
      raise InputError(f"{error}{meant}") from error
    raise


__all__ = [
  "BUILT_IN",
  "Dataset",
  "Partition",
  "build",
  "choose_monopolistic",
  "histogram",
  "hold_out",
  "load",
  "monopolistic",
  "partition",
  "pooled",
]
