"""Image-classification sets that tensorflow-datasets has prepared, read without TensorFlow, decoded once.

Decoded arrays are kept in `$APFL_JAX_CACHE`, by default `~/.cache/apfl_jax`; deleting that folder is always safe.
Images come as tensorflow-datasets stores them: those of emnist are transposed (rows are columns) there, and so here.
"""

import hashlib
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from apfl_jax.data.datasets import Dataset
from apfl_jax.errors import InputError
from apfl_jax.files import cache_dir

_BLOCK = 1000  # records decoded at a time, between two moves of the progress bar
_BUILT_IN = "digits, fast"  # of `data`, which imports this module
_INSTALL = "install it with: pip install 'apfl_jax[data]'"


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
  """A prepared set: its `train` split and, as test images, its `test` (or else `validation`) split.

  Args:
    name: as tensorflow-datasets names it, e.g. `mnist`, `emnist/balanced`.
    data_dir: the folder of prepared sets; None is tensorflow-datasets' own default.

  Raises:
    InputError: no such folder or set, not prepared, not readable, not image classification, or a missing package.
  """
  root = _root(name, data_dir)
  builder = _builder(name, root)
  shape, class_names = _features(builder)  # what can never be used is said before how to prepare it
  _check_prepared(builder, name, root)
  full_name = "/".join(filter(None, (builder.name, builder.builder_config and builder.builder_config.name)))
  splits = ("train", _test_split(builder, full_name))
  sizes = [builder.info.splits[split].num_examples for split in splits]
  folder = cache_dir() / f"{full_name.replace('/', '-')}-{builder.version}-{_fingerprint(Path(builder.data_path))}"
  arrays = _read(folder, shape, sizes)
  if arrays is None:
    arrays = [array for split in splits for array in _decode(builder, full_name, split, shape)]
    _write(folder, arrays)
    arrays = _read(folder, shape, sizes) or arrays  # mapped, where they could be kept
  for labels in arrays[1::2]:
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
      raise InputError(f"dataset {full_name}: holds labels outside 0..{len(class_names) - 1}; all need a class")
  images, labels, test_images, test_labels = arrays
  return Dataset(full_name, images, labels, test_images, test_labels, class_names)


def _root(name: str, data_dir: str | Path | None) -> Path:
  """The folder of prepared sets; also the place that notices a missing package."""
  root = None if data_dir is None else Path(data_dir).expanduser()
  if root is not None and not root.is_dir():
    what = "is not a folder" if root.exists() else "does not exist"
    raise InputError(f"data_dir: {str(data_dir)!r} {what}; needs the folder in which tensorflow-datasets prepared sets")
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise InputError(
      f"dataset: {name!r} is none of {_BUILT_IN}; for any other the package tensorflow-datasets is needed, {_INSTALL}"
    ) from error
  return root or Path(tfds.core.constants.DATA_DIR).expanduser()


def _builder(name: str, root: Path) -> Any:
  """The set's builder; tensorflow-datasets answers odd names with exceptions of several kinds."""
  import tensorflow_datasets as tfds

  try:
    return tfds.builder(name, data_dir=str(root))
  except (ValueError, AssertionError, ImportError, RuntimeError) as error:
    raise InputError(
      f"dataset: {name!r} is not known; accepted are {_BUILT_IN} and the image-classification sets of "
      f"tensorflow-datasets (prepared in {root}: {_prepared(root)})"
    ) from error


def _check_prepared(builder: Any, name: str, root: Path) -> None:
  command = f"tfds build {name} --file_format=array_record --data_dir={root}"
  if not builder.is_prepared():
    there = _prepared(root)
    raise InputError(f"dataset {name}: not prepared in {root}, where there is: {there}; prepare it with: {command}")
  if builder.info.file_format.value != "array_record":
    found = builder.info.file_format.value
    raise InputError(f"dataset {name}: prepared as {found}, needs array_record; remove it and prepare with: {command}")


def _prepared(root: Path) -> str:
  """The names of the sets found in a folder, each kept as name/version or name/config/version."""
  infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
  return ", ".join(sorted({info.parent.parent.relative_to(root).as_posix() for info in infos})) or "none"


def _features(builder: Any) -> tuple[tuple[int, int, int], tuple[str, ...]]:
  """The image shape and the class names, or InputError if this is not image classification."""
  features = builder.info.features
  found = set(features or ())
  if not {"image", "label"} <= found:
    raise InputError(
      f"dataset {builder.name}: has {', '.join(sorted(found)) or 'nothing'}; "
      "needs the features image and label (image classification)"
    )
  shape, names = features["image"].shape, getattr(features["label"], "names", None)
  if len(shape) != 3 or None in shape or features["image"].np_dtype != np.uint8:
    raise InputError(f"dataset {builder.name}: images are {shape}; needs 8-bit images, all of one size")
  if names is None:
    raise InputError(f"dataset {builder.name}: its label is not one class of a list; needs image classification")
  return shape, tuple(names)


def _test_split(builder: Any, name: str) -> str:
  splits = builder.info.splits
  for split in ("test", "validation"):
    if {"train", split} <= set(splits):
      return split
  raise InputError(f"dataset {name}: has the splits {', '.join(splits)}; needs train and one of test, validation")


def _decode(builder: Any, name: str, split: str, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
  """uint8 [M, height, width, channels] and int32 [M], in the order of the records."""
  from tqdm import tqdm

  try:
    source = builder.as_data_source(split=split)
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    with tqdm(total=len(source), desc=f"decoding {name} {split}", unit=" images", disable=None) as bar:
      for start in range(0, len(source), _BLOCK):
        rows = source.__getitems__(range(start, min(start + _BLOCK, len(source))))
        images[start : start + len(rows)] = [row["image"] for row in rows]
        labels[start : start + len(rows)] = [row["label"] for row in rows]
        bar.update(len(rows))
  except ImportError as error:
    raise InputError(f"dataset {name}: decoding needs the packages pillow and array_record; {_INSTALL}") from error
  except (OSError, RuntimeError, ValueError) as error:
    reason = str(error).partition("\n")[0]
    raise InputError(f"dataset {name}: {builder.data_path} cannot be read ({reason}); prepare it again") from error
  return images, labels


def _fingerprint(folder: Path) -> str:
  """Names one preparation of a set: another folder, or the same one prepared anew, is another cache entry."""
  state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
  return hashlib.sha256(repr((str(folder.resolve()), state)).encode()).hexdigest()[:12]


def _files(folder: Path) -> list[Path]:
  return [folder / f"{name}.npy" for name in ("images", "labels")]


def _read(folder: Path, shape: tuple[int, int, int], sizes: list[int]) -> list[np.ndarray] | None:
  """The cached arrays, memory-mapped, or None if they are not all there and whole.

  Training and test images lie one after the other in one file, of which both are views: a federation needs no copy.
  """
  try:
    images, labels = (np.load(path, mmap_mode="r") for path in _files(folder))
  except (OSError, ValueError, EOFError):
    return None
  expected = (((sum(sizes), *shape), np.uint8), ((sum(sizes),), np.int32))
  if ((images.shape, images.dtype), (labels.shape, labels.dtype)) != expected:
    return None
  first = sizes[0]
  return [images[:first], labels[:first], images[first:], labels[first:]]


def _write(folder: Path, arrays: list[np.ndarray]) -> None:
  """Appears in one step, so that no reader sees half of it; a cache that cannot be written only costs time."""
  part = None
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    for path, pair in zip(_files(part), (arrays[0::2], arrays[1::2]), strict=True):
      np.save(path, np.concatenate(pair))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
  except OSError as error:
    warnings.warn(f"decoded images are not cached in {folder.parent}: {error}", stacklevel=3)
    if part is not None:
      shutil.rmtree(part, ignore_errors=True)
