"""Prepared sets: a tiny one written by hand, record by record, and the real Fashion-MNIST where it is at hand."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from apfl_jax import data
from apfl_jax.errors import InputError

pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
array_record = pytest.importorskip("array_record.python.array_record_module", reason="array_record is not installed")
image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

_REAL = Path(os.environ.get("APFL_JAX_TFDS") or Path(__file__).parents[3] / "shared" / "tfds")
_needs_real = pytest.mark.skipif(
  not (_REAL / "fashion_mnist").is_dir(),
  reason=f"REAL DATA NOT TESTED: no prepared fashion_mnist in {_REAL}; set APFL_JAX_TFDS",
)
_NAMES = ("square", "round", "other")


def _field(number, payload):
  """A length-delimited protocol buffer field; payloads here may exceed 127 bytes."""
  size, head = len(payload), bytes([number << 3 | 2])
  while size > 127:
    head, size = head + bytes([size & 127 | 128]), size >> 7
  return head + bytes([size]) + payload


def _record(pixels, label):
  """A tf.train.Example with a PNG and an int64 label."""
  file = io.BytesIO()
  image.fromarray(pixels).save(file, "PNG")
  features = {b"image": _field(1, _field(1, file.getvalue())), b"label": _field(3, _field(1, bytes([label])))}
  return _field(1, b"".join(_field(1, _field(1, key) + _field(2, value)) for key, value in features.items()))


@pytest.fixture
def prepared(tmp_path, monkeypatch):
  """A data_dir with the set `tiny`, 1,030 + 12 colour images of 5 x 4, and the arrays that went into it."""
  monkeypatch.setenv("APFL_JAX_CACHE", str(tmp_path / "cache"))
  folder = tmp_path / "prepared" / "tiny" / "1.0.0"
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  arrays, splits = [], []
  for split, size in (("train", 1030), ("test", 12)):
    images, labels = rng.integers(256, size=(size, 5, 4, 3)).astype(np.uint8), rng.integers(3, size=size)
    writer = array_record.ArrayRecordWriter(str(folder / f"tiny-{split}.array_record-00000-of-00001"), "group_size:1")
    for pixels, label in zip(images, labels, strict=True):
      writer.write(_record(pixels, label))
    writer.close()
    arrays += [images, labels]
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    splits.append({"name": split, "shardLengths": [str(size)], "numBytes": "1", "filepathTemplate": template})
  info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": splits}
  (folder / "dataset_info.json").write_text(json.dumps(info))
  module = "tensorflow_datasets.core.features"
  shape = {"dtype": "uint8", "shape": {"dimensions": ["5", "4", "3"]}}
  features = {
    "image": {"image": shape, "pythonClassName": f"{module}.image_feature.Image"},
    "label": {"classLabel": {"numClasses": "3"}, "pythonClassName": f"{module}.class_label_feature.ClassLabel"},
  }
  features = {"featuresDict": {"features": features}, "pythonClassName": f"{module}.features_dict.FeaturesDict"}
  (folder / "features.json").write_text(json.dumps(features))
  (folder / "label.labels.txt").write_text("\n".join(_NAMES))
  return tmp_path / "prepared", arrays


def _edit(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def _assert_is(dataset, arrays):
  for got, expected in zip(dataset[1:5], arrays, strict=True):
    np.testing.assert_array_equal(got, expected)
  assert [array.dtype for array in dataset[1:5]] == [np.uint8, np.int32] * 2
  assert dataset.name == "tiny"
  assert dataset.class_names == _NAMES


def test_decodes_and_reads_the_cache_the_second_time(prepared, monkeypatch):
  folder, arrays = prepared
  _assert_is(data.load("tiny", folder), arrays)
  monkeypatch.setattr(data.tfds, "_decode", lambda *_: pytest.fail("decoded again"))
  again = data.load("tiny", str(folder))
  _assert_is(again, arrays)
  assert isinstance(again.images, np.memmap)
  rng = np.random.default_rng(0)
  federation, _ = data.build(again, data.partition.iid(again.labels, 4, rng=rng), rng=rng)
  assert isinstance(federation.store.images, np.memmap)  # both splits, and no copy
  np.testing.assert_array_equal(federation.store.images, np.concatenate([arrays[0], arrays[2]]))


@pytest.mark.parametrize("harm", ["truncate", "remove", "other shape", "not an array"])
def test_a_bad_cache_is_rebuilt(prepared, tmp_path, harm):
  folder, arrays = prepared
  data.load("tiny", folder)
  (path,) = (tmp_path / "cache").glob("*/images.npy")
  if harm == "truncate":
    os.truncate(path, path.stat().st_size - 5)
  elif harm == "remove":
    path.unlink()
  elif harm == "other shape":
    np.save(path, np.zeros((1030, 4, 5, 3), np.uint8))
  else:
    path.write_bytes(b"nothing")
  _assert_is(data.load("tiny", folder), arrays)
  assert np.load(path).shape == (len(arrays[0]) + len(arrays[2]), 5, 4, 3)
  assert len(list((tmp_path / "cache").iterdir())) == 1  # nothing half-written is left


def test_another_folder_is_another_cache_entry(prepared, tmp_path):
  folder, arrays = prepared
  _assert_is(data.load("tiny", folder), arrays)
  other = tmp_path / "other"
  shutil.copytree(folder, other)
  _assert_is(data.load("tiny", other), arrays)
  assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_that_cannot_be_written_only_warns(prepared, tmp_path, monkeypatch):
  folder, arrays = prepared
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("APFL_JAX_CACHE", str(tmp_path / "file" / "cache"))
  with pytest.warns(UserWarning, match="not cached"):
    _assert_is(data.load("tiny", folder), arrays)


def _says(name, folder, *parts):
  with pytest.raises(InputError) as error:
    data.load(name, folder)
  assert "\n" not in str(error.value)
  for part in parts:
    assert part in str(error.value)


def test_errors_of_the_folder_and_the_name(prepared, tmp_path):
  folder, _ = prepared
  _says("tiny", tmp_path / "nowhere", "data_dir", "does not exist")
  _says("tiny", folder / "tiny" / "1.0.0" / "features.json", "data_dir", "is not a folder")
  command = f"tfds build mnist --file_format=array_record --data_dir={folder}"
  _says("mnist", folder, "not prepared", "there is: tiny", command)
  for name in ("no_such_set", "../tiny", "", "tiny:9.9.9"):
    _says(name, folder, "not known", "digits, fast", "tiny")
  _says("imagenette", folder, "imagenette", "all of one size")
  _says("celeb_a", folder, "celeb_a", "image and label")


def test_errors_of_the_preparation(prepared):
  folder, _ = prepared
  info = folder / "tiny" / "1.0.0" / "dataset_info.json"
  original = info.read_text()
  _edit(info, lambda content: content.update(fileFormat="tfrecord"))
  _says("tiny", folder, "prepared as tfrecord", "array_record")
  info.write_text(original)
  _edit(info, lambda content: content["splits"].pop())
  _says("tiny", folder, "train and one of test, validation")
  info.write_text(original)
  os.truncate(info.with_name("tiny-test.array_record-00000-of-00001"), 1000)
  _says("tiny", folder, "cannot be read", "prepare it again")


def test_a_missing_package_names_the_extra(prepared, monkeypatch):
  folder, _ = prepared
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  _says("tiny", folder, "tensorflow-datasets", "pip install 'apfl_jax[data]'")
  _says("tiny", folder / "nowhere", "data_dir", "does not exist")  # a package would not help
  monkeypatch.undo()


def test_a_validation_split_serves_as_test(prepared):
  folder, arrays = prepared
  info = folder / "tiny" / "1.0.0" / "dataset_info.json"
  _edit(info, lambda content: content["splits"][1].update(name="validation"))
  shard = info.with_name("tiny-test.array_record-00000-of-00001")
  shard.rename(shard.with_name(shard.name.replace("test", "validation")))
  _assert_is(data.load("tiny", folder), arrays)


@_needs_real
def test_fashion_mnist_matches_its_records(tmp_path, monkeypatch):
  """Some of the records in shards of their own, since to decode all of them takes long."""
  monkeypatch.setenv("APFL_JAX_CACHE", str(tmp_path / "cache"))
  (real,) = _REAL.glob("fashion_mnist/*")
  folder = tmp_path / "prepared" / "fashion_mnist" / real.name
  folder.mkdir(parents=True)
  chosen = {"train": np.linspace(0, 59_999, 1000).astype(int), "test": np.linspace(0, 9999, 200).astype(int)}
  records = {}
  for file in real.iterdir():
    if "array_record" not in file.name:
      shutil.copy(file, folder)
      continue
    split = "train" if "-train." in file.name else "test"
    records[split] = array_record.ArrayRecordReader(str(file)).read(chosen[split].tolist())
    writer = array_record.ArrayRecordWriter(str(folder / file.name), "group_size:1")
    for record in records[split]:
      writer.write(record)
    writer.close()

  def fewer(content):
    for split in content["splits"]:
      split["shardLengths"] = [str(len(chosen[split["name"]]))]

  _edit(folder / "dataset_info.json", fewer)
  dataset = data.load("fashion_mnist", tmp_path / "prepared")
  assert dataset.class_names[9] == "Ankle boot"
  for split, images, labels in (
    ("train", dataset.images, dataset.labels),
    ("test", dataset.test_images, dataset.test_labels),
  ):
    for record, pixels, number in zip(records[split], images, labels, strict=True):
      expected = np.asarray(image.open(io.BytesIO(record[record.index(b"\x89PNG") :])))
      np.testing.assert_array_equal(pixels[:, :, 0], expected)
      (label,) = re.findall(rb"label\x12\x05\x1a\x03\x0a\x01(.)", record, re.DOTALL)
      assert number == label[0]


@pytest.mark.slow  # to decode; its records are compared above, though not in the shards they came in
@_needs_real
def test_fashion_mnist_has_its_known_counts(tmp_path, monkeypatch):
  monkeypatch.setenv("APFL_JAX_CACHE", str(tmp_path))
  dataset = data.load("fashion_mnist", _REAL)
  np.testing.assert_array_equal(np.bincount(dataset.labels), np.full(10, 6000))
  np.testing.assert_array_equal(np.bincount(dataset.test_labels), np.full(10, 1000))


@pytest.mark.slow
@_needs_real
def test_cifar10_has_its_known_counts(tmp_path, monkeypatch):
  monkeypatch.setenv("APFL_JAX_CACHE", str(tmp_path))
  dataset = data.load("cifar10", _REAL)
  assert dataset.images.shape == (50000, 32, 32, 3)
  np.testing.assert_array_equal(np.bincount(dataset.labels), np.full(10, 5000))
  np.testing.assert_array_equal(np.bincount(dataset.test_labels), np.full(10, 1000))
  # The known channel means of the training images.
  np.testing.assert_allclose(dataset.images.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
