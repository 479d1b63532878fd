"""Traces: what a file says against a plain loop over its intervals, and each way in which a file can be broken.

Parquet needs the extra `parquet` (pyarrow); it is held against CSV.
"""

import csv
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import population
from apfl_jax.errors import InputError
from apfl_jax.population import sample

CLIENTS, INTERVALS = 4, 5  # of every made-up file, so that one program serves them all


@jax.jit
def looked_at(table, rounds, ids):
  process = population.trace(table)
  return jax.vmap(lambda t: population.look(process, (), t, ids, 0))(rounds)


def made_up(seed):
  """[(client, start, end, speed)] in any order, in steps of 1/4; some intervals touch and some are empty."""
  rng = np.random.default_rng(seed)
  speeds = np.round(rng.uniform(0.5, 3, CLIENTS), 2)
  rows = []
  for client in range(CLIENTS):
    edges = np.sort(rng.integers(0, 60, 2 * INTERVALS)) / 4
    rows += [(client, *edges[i : i + 2], speeds[client]) for i in range(0, 2 * INTERVALS, 2)]
  return [rows[i] for i in rng.permutation(len(rows))], speeds


@pytest.mark.parametrize("seed", range(8))
def test_who_is_there_is_what_the_intervals_say(tmp_path, seed):
  rows, speeds = made_up(seed)
  round_length = (0.25, 1.0, 2.5, 4.0)[seed % 4]
  columns = np.random.default_rng(seed).permutation(4)
  with open(tmp_path / "trace.csv", "w", newline="") as file:
    writer = csv.writer(file)
    for row in (("client", "start", "end", "speed"), *rows):
      writer.writerow([row[c] for c in columns])
  table = jax.tree.map(jnp.asarray, population.read_trace(tmp_path / "trace.csv", round_length))
  rounds, ids = np.arange(80), np.array([0, 3, 2, 1, 7, 4, 4001])  # beyond the file's clients
  got = looked_at(table, rounds, ids)

  period = int(np.ceil(max(end for _, _, end, _ in rows) / round_length))
  for t in rounds:
    moment = (t % period) * round_length
    for place, i in enumerate(ids):
      there = any(start <= moment < end for client, start, end, _ in rows if client == i % CLIENTS)
      assert got.present[t, place] == there, (t, i)
  np.testing.assert_allclose(got.speed, np.broadcast_to((speeds / speeds.mean())[ids % CLIENTS], (80, 7)), rtol=1e-6)
  assert np.all(got.arrives) and not np.any(got.gone)


def test_a_run_of_few_clients_keeps_their_rows_alone(tmp_path):
  rows, _ = made_up(0)
  with open(tmp_path / "trace.csv", "w", newline="") as file:
    csv.writer(file).writerows([("client", "start", "end", "speed"), *rows])
  whole, few = (population.read_trace(tmp_path / "trace.csv", num_clients=n) for n in (None, 2))
  for name in ("edges", "speed"):
    np.testing.assert_array_equal(getattr(few, name), getattr(whole, name)[:2])
  assert few.period == whole.period


def test_speed_may_be_left_out_and_lines_may_be_blank(tmp_path):
  (tmp_path / "trace.csv").write_bytes(b"\xef\xbb\xbfend, client ,start\r\n2,0,1\r\n\r\n 5 ,0,4\r\n3,1,3\r\n")
  table = population.read_trace(tmp_path / "trace.csv")
  np.testing.assert_array_equal(table.speed, [1, 1])
  there = looked_at(jax.tree.map(jnp.asarray, table), np.arange(7), np.arange(2)).present
  np.testing.assert_array_equal(there[:, 0], [0, 1, 0, 0, 1, 0, 1])  # and anew after 5 rounds
  assert not np.any(there[:, 1]), "its interval is empty: it is only said to exist"


BROKEN = {
  "": ("row 1", "client"),
  "client,start\n0,1\n": ("row 1", "no column end"),
  "client,start,end,sped\n0,1,2,3\n": ("row 1", "'sped'", "speed"),
  "client,start,end,end\n0,1,2,3\n": ("row 1", "'end'", "once"),
  "client,start,end\n": ("no row",),
  "client,start,end\n0,1,2\n0,3\n": ("row 3", "2 fields", "3"),
  "client,start,end\n0,1,soon\n": ("row 2", "end is 'soon'", "finite number"),
  "client,start,end\n0,1,inf\n": ("row 2", "end is 'inf'", "finite number"),
  "client,start,end\n0,,2\n": ("row 2", "start is ''", "finite number"),
  "client,start,end\n0,-1,2\n": ("row 2", "start is -1", "0 or more"),
  "client,start,end\n0,1,2\n\n0,6,5\n": ("row 4", "end is 5, before start", "6 or more"),
  "client,start,end\n0,1,2\n-1,1,2\n": ("row 3", "client is '-1'", "whole number"),
  "client,start,end\na,1,2\n": ("row 2", "client is 'a'", "number"),
  "client,start,end\n0.5,1,2\n": ("row 2", "client is '0.5'", "whole number"),
  "client,start,end\n0,1,2\n3,1,2\n2,1,2\n": ("row 4", "unknown client 2", "no client 1"),
  "client,start,end\n1,1,2\n": ("row 2", "unknown client 1", "no client 0"),
  "client,start,end\n0,4,8\n1,5,6\n0,1,5\n": ("row 4", "client 0", "from 1 to 5", "overlaps row 2", "from 4 to 8"),
  "client,start,end\n0,4,8\n0,5,6\n": ("row 3", "from 5 to 6", "overlaps row 2"),
  "client,start,end,speed\n0,1,2,0\n": ("row 2", "speed is 0", "above 0"),
  "client,start,end,speed\n0,1,2,1\n0,2,3,1.5\n": ("row 3", "speed of client 0 is 1.5", "1 in row 2"),
  "client,start,end\n0,0.5,0.75\n": ("nobody there", "length 1"),
  "client,start,end\n0,0,1e12\n": ("lasts 1e+12 rounds",),
  'client,start,end\n0,"1,2\n': ("no CSV text",),
  b"client,start,end\n\xff,1,2\n": ("no CSV text",),
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_files_are_refused_with_the_row(tmp_path, text):
  path = tmp_path / "trace.csv"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(InputError) as caught:
    population.read_trace(path)
  message = str(caught.value)
  assert len(message.splitlines()) == 1 and str(path) in message and "accepted" in message
  assert all(word in message for word in BROKEN[text]), message


@pytest.fixture(scope="module")
def parquet():
  """Writes columns by name, which may repeat, into a file."""
  pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `parquet`: pip install 'apfl_jax[parquet]'")
  from pyarrow import parquet

  def write(path, columns, **options):
    table = pyarrow.Table.from_arrays([pyarrow.array(values) for _, values in columns], [name for name, _ in columns])
    parquet.write_table(table, path, **options)
    return path

  return write


@pytest.mark.parametrize("seed", range(3))
def test_parquet_says_what_csv_says(tmp_path, parquet, seed):
  rows, _ = made_up(seed)
  with open(tmp_path / "trace.csv", "w", newline="") as file:
    csv.writer(file).writerows([("client", "start", "end", "speed"), *rows])
  columns = list(zip(("client", "start", "end", "speed"), zip(*rows, strict=True), strict=True))
  columns = [columns[i] for i in np.random.default_rng(seed).permutation(4)]
  parquet(tmp_path / "trace.PARQUET", columns, row_group_size=7)
  for few in (None, 2):
    one, other = (population.read_trace(tmp_path / f"trace.{kind}", 0.5, few) for kind in ("csv", "PARQUET"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def tables():
  """Of the broken files those that a table can say too."""
  for text in BROKEN:
    if isinstance(text, str) and text and "\n\n" not in text and '"' not in text:
      header, *rows = [line.split(",") for line in text.splitlines()]
      if all(len(row) == len(header) for row in rows):
        yield text, header, rows


def test_broken_parquet_is_refused_in_the_words_of_csv(tmp_path, parquet):
  path, other = tmp_path / "trace.csv", tmp_path / "trace.parquet"
  found = list(tables())
  assert len(found) > 15
  for text, header, rows in found:
    path.write_text(text)
    columns = [[row[i] for row in rows] for i in range(len(header))]
    parquet(other, list(zip(header, columns, strict=True)), row_group_size=1)
    messages = []
    for file in (path, other):
      with pytest.raises(InputError) as caught:
        population.read_trace(file)
      messages.append(str(caught.value).replace(str(file), "FILE"))
    assert messages[0] == messages[1], text


TYPED = {
  "none": ([None, 6.0], ("row 2", "end is None", "finite number")),
  "nan": ([2.0, float("nan")], ("row 3", "end is nan", "finite number")),
  "dates": (np.array(["2020-01-31", "2020-02-01"], "datetime64[ms]"), ("row 2", "end is datetime", "finite number")),
  "lists": ([[1], [2]], ("row 2", "end is [1]", "finite number")),
  "backwards": ([2, 4], ("row 3", "end is 4, before start", "5 or more")),
}


@pytest.mark.parametrize("name", TYPED)
def test_what_only_parquet_can_hold_is_refused_with_the_row(tmp_path, parquet, name):
  end, words = TYPED[name]
  path = parquet(tmp_path / "trace.parquet", [("client", [0, 0]), ("start", [1, 5]), ("end", end)])
  with pytest.raises(InputError) as caught:
    population.read_trace(path)
  message = str(caught.value)
  assert len(message.splitlines()) == 1 and all(word in message for word in (str(path), *words)), message


def test_what_is_no_parquet_is_refused(tmp_path, parquet):
  path = parquet(tmp_path / "trace.parquet", [("client", [0]), ("start", [1]), ("end", [2])])
  whole = path.read_bytes()
  for data in (b"", b"client,start,end\n0,1,2\n", whole[:-9], whole[:4] + bytes(40) + whole[44:]):
    path.write_bytes(data)
    with pytest.raises(InputError, match="no Parquet file") as caught:
      population.read_trace(path)
    assert len(str(caught.value).splitlines()) == 1 and str(path) in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  (tmp_path / "trace.parquet").write_bytes(b"PAR1")
  with pytest.raises(InputError, match=r"trace.parquet needs the package pyarrow; .*pip install 'apfl_jax\[parquet\]'"):
    population.read_trace(tmp_path / "trace.parquet")


@pytest.mark.parametrize("name", ["nothing.csv", "nothing.parquet", ""])
def test_what_is_no_file_is_refused(tmp_path, name):
  with pytest.raises(InputError, match="cannot be read"):
    population.read_trace(tmp_path / name)


def test_the_sample_is_a_week_of_phones_that_charge_at_night():
  table = population.read_trace(population.SAMPLE)
  assert table.period == 7 * 24 and len(table.speed) == 60
  hours = np.arange(7 * 24)
  passed = np.sum(table.edges[:, None, :] <= hours[:, None], axis=-1)
  there = passed % 2 == 1  # [60, 168]
  assert 0.15 < np.mean(there) < 0.4 and np.all(np.any(there, axis=1))
  by_hour = there.reshape(60, 7, 24).mean(axis=1)
  # A phone's best hours of the day are its nights, at an hour of its own zone.
  assert np.mean(np.max(by_hour, axis=1)) > 0.6 and np.mean(np.min(by_hour, axis=1)) < 0.05
  assert len(np.unique(np.argmax(by_hour, axis=1))) > 5


def test_the_sample_is_what_its_script_makes():
  with open(population.SAMPLE, newline="") as file:
    lines = list(csv.reader(file))[1:]
  made = sample.rows(np.random.default_rng(0))
  assert np.array_equal(np.array(lines, float)[:, 0], [row[0] for row in made])
  np.testing.assert_allclose(np.array(lines, float), made, atol=1e-9)
