"""Tables of text embeddings: those in the package, and files that are none."""

import numpy as np
import pytest

from apfl_jax import data, semantics
from apfl_jax.errors import InputError
from apfl_jax.semantics import HIERARCHIES

_SHIPPED = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")


@pytest.mark.parametrize("dataset", _SHIPPED)
def test_shipped_tables_have_every_class_and_say_where_they_come_from(dataset):
  path = semantics.table_path(dataset, "minilm")
  table = semantics.read_table(path)
  assert set(table.class_names) == set(HIERARCHIES[dataset])
  assert table.rows.shape == (len(table.class_names), 384) and table.rows.dtype == np.float16
  np.testing.assert_allclose(np.linalg.norm(table.rows.astype(np.float32), axis=1), 1, atol=1e-3)
  assert path.stat().st_size < 100_000
  provenance = table.provenance
  assert provenance["model"] == "sentence-transformers/all-MiniLM-L6-v2" and "Apache-2.0" in provenance["licence"]
  assert len(provenance["sha256"]["model.safetensors"]) == 64 and provenance["templates"] == ["{}"]
  assert len(provenance["names_in_texts"]) == len(table.class_names)
  assert not {"_", "/"} & set("".join(provenance["names_in_texts"]))


def test_text_knows_that_what_is_alike_is_alike():
  names = semantics.read_table(semantics.table_path("cifar10", "minilm")).class_names
  table = semantics.embeddings("minilm", names, "cifar10", rng=np.random.default_rng(0))
  assert table.shape == (10, 9)
  cosine = {(a, b): table[i] @ table[j] for i, a in enumerate(names) for j, b in enumerate(names)}
  assert cosine["automobile", "truck"] > 0.2 > 0 > cosine["automobile", "cat"]
  assert cosine["cat", "dog"] > 0.2 > 0 > cosine["cat", "airplane"]


def test_digits_and_mnist_are_the_same_words():
  tables = [semantics.read_table(semantics.table_path(name, "minilm")) for name in ("digits", "mnist")]
  assert tables[0].provenance["names_in_texts"] == tables[1].provenance["names_in_texts"]
  np.testing.assert_array_equal(tables[0].rows, tables[1].rows)
  assert tables[0].class_names == data.load("digits").class_names


def test_rows_come_in_the_order_of_the_names_from_any_table(tmp_path):
  rows = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float16)
  written = semantics.TextTable(rows, ("a", "b/c", "d_e"), {"model": "none"})
  path = tmp_path / "mine.npz"
  semantics.write_table(path, written)
  read = semantics.read_table(path)
  assert read.class_names == written.class_names and read.provenance == written.provenance
  np.testing.assert_array_equal(semantics.text(("d_e", "a"), "anything", str(path)), rows[[2, 0]].astype(float))
  table = semantics.embeddings(f"{path}+onehot", ("b/c", "d_e"), "anything", rng=np.random.default_rng(0))
  np.testing.assert_allclose(table @ table.T, [[1, -1], [-1, 1]], atol=1e-5)
  bits = path.read_bytes()
  semantics.write_table(path, read)
  assert path.read_bytes() == bits


@pytest.mark.parametrize("content", [b"", b"words", None])
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path, content):
  path = tmp_path / "other.npz"
  if content is None:
    np.savez(path, rows=np.zeros((2, 3)))
  else:
    path.write_bytes(content)
  with pytest.raises(InputError) as error:
    semantics.embeddings(str(path), ("a", "b"), "digits", rng=np.random.default_rng(0))
  assert "other.npz is not a table" in str(error.value) and "\n" not in str(error.value)
