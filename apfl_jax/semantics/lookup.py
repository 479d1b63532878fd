"""Finding what is known of a data set's classes in tables made by hand."""

from collections.abc import Mapping
from typing import Any

from apfl_jax.errors import InputError


def find(
  tables: Mapping[str, Mapping[str, Any]], what: str, class_names: tuple[str, ...], dataset_name: str
) -> Mapping[str, Any]:
  """The table of a data set, class name -> what it says; `what` is its name in errors.

  Raises:
    InputError: no table for this data set, or a class that it does not hold.
  """
  if dataset_name not in tables:
    raise InputError(
      f"embeddings: no {what} for data set {dataset_name!r}, there is one for {', '.join(tables)}; take onehot instead"
    )
  table = tables[dataset_name]
  unknown = [name for name in class_names if name not in table]
  if unknown:
    raise InputError(f"embeddings: the {what} of {dataset_name} has no class {unknown[0]!r}")
  return table
