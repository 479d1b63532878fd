"""Tables of text embeddings: what a language model makes of class names, pretrained knowledge that no baseline gets.

A table is a small file, made once by `experiments.embed_classes` and read with NumPy alone, so that no run needs a
language model. Those of `minilm` for digits, mnist, fashion_mnist, cifar10 and cifar100 are in the package.
"""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apfl_jax.errors import InputError
from apfl_jax.files import replacing

TEXT_KINDS = ("minilm", "bert", "clip")
TABLES = Path(__file__).parent / "tables"


class TextTable(NamedTuple):
  """A file's content.

  Attributes:
    rows: float16 [T, d], as the model has them.
    class_names: T names, as the data set spells them.
    provenance: model, revision, sha256 of its weights, licence, templates, texts, versions.
  """

  rows: np.ndarray
  class_names: tuple[str, ...]
  provenance: dict[str, Any]


def table_path(dataset_name: str, kind: str) -> Path:
  """Where the table of a data set lies."""
  return TABLES / f"{dataset_name.replace('/', '_')}.{kind}.npz"


def write_table(path: Path, table: TextTable) -> None:
  """Writes a table, whole or not at all; equal tables are equal files."""
  arrays = {"rows": table.rows.astype(np.float16), "class_names": np.array(table.class_names)}
  with replacing(path) as temporary, open(temporary, "wb") as file:
    np.savez_compressed(file, allow_pickle=False, **arrays, provenance=np.array(json.dumps(table.provenance)))


def read_table(path: Path) -> TextTable:
  """A table from its file. Raises InputError if it is no such file."""
  try:
    with np.load(path, allow_pickle=False) as file:
      names = tuple(map(str, file["class_names"]))
      table = TextTable(file["rows"], names, json.loads(str(file["provenance"])))
  except (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
    what = "does not exist" if isinstance(error, FileNotFoundError) else "is not a table of class embeddings"
    raise InputError(f"embeddings: {path} {what}, accepted is a file made by experiments.embed_classes") from error
  if table.rows.ndim != 2 or len(table.rows) != len(names):
    raise InputError(f"embeddings: {path} has rows of shape {list(table.rows.shape)} for {len(names)} classes")
  return table


def text(class_names: tuple[str, ...], dataset_name: str, kind: str) -> np.ndarray:
  """float64 [C, d]: the raw table, rows in the order of `class_names`.

  Args:
    class_names: C names.
    dataset_name: by which the table is found.
    kind: one of `TEXT_KINDS`, or the path of a table.

  Raises:
    InputError: no such table, or a class that it does not have.
  """
  path = table_path(dataset_name, kind) if kind in TEXT_KINDS else Path(kind)
  if kind in TEXT_KINDS and not path.is_file():
    there = sorted(file.name.removesuffix(f".{kind}.npz") for file in TABLES.glob(f"*.{kind}.npz"))
    raise InputError(
      f"embeddings: no {kind} table for data set {dataset_name!r}, there is one for {', '.join(there) or 'none'}; make"
      f" it with: python -m experiments.embed_classes --dataset={dataset_name} --kind={kind}"
    )
  table = read_table(path)
  unknown = [name for name in class_names if name not in table.class_names]
  if unknown:
    raise InputError(f"embeddings: the table {path.name} has no class {unknown[0]!r}")
  return table.rows[[table.class_names.index(name) for name in class_names]].astype(np.float64)
