"""FedScale's device files as traces: the way from a pickle to who is there in a round against a plain loop over the
lists, and files that are broken or would run code.
"""

import json
import os
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import population
from apfl_jax.errors import InputError
from experiments import convert_trace
from tests import binaries

DAY = 86400
# The first is an entry of the public file, as others print it; `duration` is the sum of its spans.
PHONES = {
  3834: {
    "duration": 211625,
    "inactive": [65881, 133574, 208292, 276575, 295006, 356236, 400906, 475099],
    "finish_time": 6 * DAY,
    "active": [12788, 100044, 188992, 271372, 276663, 352625, 356267, 441193],
    "model": "CPH1801",
  },
  7: {"duration": 40000, "inactive": [40000], "finish_time": DAY, "active": [0], "model": "a"},
  9: {"duration": 1, "inactive": [88494, 93284], "finish_time": 2 * DAY, "active": [88494, 93283], "model": "b"},
  2: {"duration": 0, "inactive": [], "finish_time": 3 * DAY, "active": [], "model": "c"},
  5: {"duration": 290000, "inactive": [90000, 4 * DAY], "finish_time": 4 * DAY, "active": [3600, 150000], "model": "d"},
}
CAPACITY = {
  name: {"computation": np.float64(ms), "communication": np.float64(kbit)}
  for name, ms, kbit in ((2, 20.0, 500.0), (3834, 162.0, 5648.1), (5, 29.0, 900.5), (7, 44.0, 1e5), (9, 153.0, 2209.6))
}


def saved(path, entries, protocol=3):
  path.write_bytes(pickle.dumps(entries, protocol))
  return path


def listed(path, entries, what="availability"):
  """What `load` makes of entries that are written as JSON."""
  path.write_text(json.dumps(entries))
  return convert_trace.load(what, path)


def command(*arguments):
  return binaries.run("experiments.convert_trace", *arguments)


@jax.jit
def looked_at(table, rounds, ids):
  process = population.trace(table)
  return jax.vmap(lambda t: population.look(process, (), t, ids, 0))(rounds)


def check(path, length):
  """Compares who is there in rounds of some seconds with what the lists say of that moment."""
  table = population.read_trace(path, length)
  period = -(-6 * DAY // length)
  assert table.period == period
  rounds = np.arange(int(1.5 * period), step=max(1, period // 900))
  got = looked_at(jax.tree.map(jnp.asarray, table), rounds, np.arange(5))
  for client, phone in enumerate(PHONES.values()):
    for place, t in enumerate(rounds):
      now = (t % period) * length % phone["finish_time"]
      there = any(a <= now < b for a, b in zip(phone["active"], phone["inactive"], strict=True))
      assert got.present[place, client] == there, (client, t)
  speeds = np.array([1 / CAPACITY[name]["computation"] for name in PHONES])
  np.testing.assert_allclose(got.speed[0], speeds / speeds.mean(), rtol=1e-6)


def test_the_command_makes_a_trace_that_says_what_the_lists_say(tmp_path):
  files = saved(tmp_path / "behaviour", PHONES), saved(tmp_path / "capacity", CAPACITY)
  output = tmp_path / "new" / "trace.csv"
  done = command(f"--availability={files[0]}", f"--capacity={files[1]}", f"--output={output}")
  assert done.returncode == 0, done.stderr
  for length in (60, 3600, 7000):
    check(output, length)

  there = 211625 / (6 * DAY) + 40000 / DAY + 1 / (2 * DAY)
  for phone in (PHONES[5],):  # four days, then half of them anew
    spans = zip(phone["active"], phone["inactive"], strict=True)
    there += sum(b - a + max(0, min(b, 2 * DAY) - min(a, 2 * DAY)) for a, b in spans) / (6 * DAY)
  rates = np.array([1000 / CAPACITY[name]["computation"] for name in PHONES])
  low, middle, high = np.quantile(rates, (0.1, 0.5, 0.9)) / rates.mean()
  bandwidth = 128 / np.mean([1 / CAPACITY[name]["communication"] for name in PHONES])
  assert done.stdout == (
    f"{output}: 5 devices, 518400 seconds, there {there / 5:.1%} of the time; speed {low:.3g}, {middle:.3g}, {high:.3g}"
    f" (10th, 50th, 90th percentile; 1 is {rates.mean():.4g} examples a second), bandwidth {bandwidth:.4g} bytes a"
    " second; paired by name\n"
  )


def test_parquet_has_the_same_rows(tmp_path):
  pytest.importorskip("pyarrow", reason="needs the extra `parquet`: pip install 'apfl_jax[parquet]'")
  phones = convert_trace.devices(
    convert_trace.load("availability", saved(tmp_path / "a", PHONES)),
    convert_trace.load("capacity", saved(tmp_path / "c", CAPACITY)),
  )
  for name in ("trace.csv", "trace.parquet"):
    convert_trace.write(tmp_path / name, convert_trace.rows(phones))
  one, other = (population.read_trace(tmp_path / name, 600) for name in ("trace.csv", "trace.parquet"))
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert {path.name for path in tmp_path.iterdir()} == {"a", "c", "trace.csv", "trace.parquet"}


def test_a_phone_that_is_printed_is_there_as_long_as_its_file_says():
  (phone,) = convert_trace.devices(convert_trace.Listed("availability", Path("-"), {"3834": PHONES[3834]}))
  table = convert_trace.rows([phone])
  assert sum(end - start for _, start, end in table) == PHONES[3834]["duration"]
  assert table[0] == (0, 12788, 65881) and table[-1] == (0, 6 * DAY, 6 * DAY)
  assert convert_trace.summary([phone], table) == "1 devices, 518400 seconds, there 40.8% of the time"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_and_json_of_plain_things_are_read(tmp_path, protocol):
  plain = {name: {key: float(x) for key, x in entry.items()} for name, entry in CAPACITY.items()}
  expected = {str(name): entry for name, entry in plain.items()}
  assert convert_trace.load("capacity", saved(tmp_path / "plain", plain, protocol)).entries == expected
  assert listed(tmp_path / "plain.json", plain).entries == expected
  if protocol > 2:  # before, a number of NumPy's is written with the help of a codec
    assert convert_trace.load("capacity", saved(tmp_path / "numpy", CAPACITY, protocol)).entries == expected


@pytest.mark.parametrize("number", [np.float32(0.1), np.float64(-0.1), np.int64(-7), np.int32(5)])
def test_numbers_of_numpy_are_what_they_are(tmp_path, number):
  raw = pickle.dumps({"a": number}, 3)
  for module in (b"numpy._core.multiarray", b"numpy.core.multiarray"):  # as NumPy 2 and 1 call it
    (tmp_path / "file").write_bytes(raw.replace(b"numpy._core.multiarray", module))
    got = convert_trace.load("capacity", tmp_path / "file").entries["a"]
    assert got == number and type(got) in (int, float)


class Call:
  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


def malicious(marker):
  touch = f"open({str(marker)!r}, 'w').close()"
  global_, tuple_, call = b"cbuiltins\nexec\n", b"(V" + touch.encode() + b"\nt", b"R."
  return {
    "reduce": pickle.dumps({1: Call(exec, touch)}, 0),
    "reduce_4": pickle.dumps({1: Call(exec, touch)}, 4),
    "key": pickle.dumps({Call(os.system, f"touch {marker}"): 1}, 3),
    "instance": b"(ibuiltins\nexec\n." + touch.encode(),
    "inst": b"(V" + touch.encode() + b"\nibuiltins\nexec\n.",
    "obj": b"(" + global_ + b"V" + touch.encode() + b"\no.",
    "after numpy": b"cnumpy\ndtype\n0" + global_ + tuple_ + call,
    "getattr": pickle.dumps({1: Call(getattr, np.float64(1), "__class__")}, 3),
    "codec": pickle.dumps({1: np.float64(1)}, 2),
    "array": pickle.dumps({1: {"active": np.arange(3)}}, 4),
    "object": pickle.dumps({1: CAPACITY}, 3).replace(b"f8", b"O8"),
    "persistent": b"Pname\n.",
    "extension": b"\x80\x02\x82\x01.",
    "set on a stand-in": b"cnumpy.core.multiarray\nscalar\n(N}V__call__\nNstb.",
  }


@pytest.mark.parametrize("kind", malicious(""))
def test_pickles_that_name_anything_else_are_refused_and_run_nothing(tmp_path, kind):
  marker, path = tmp_path / "marker", tmp_path / "file"
  path.write_bytes(malicious(marker)[kind])
  with pytest.raises(InputError) as caught:
    convert_trace.load("availability", path)
  message = str(caught.value)
  assert len(message.splitlines()) == 1 and message.startswith(f"availability: {path} is refused ("), message
  assert not marker.exists()


def test_the_payload_would_work_without_care(tmp_path):
  pickle.loads(malicious(tmp_path / "marker")["reduce"])
  assert (tmp_path / "marker").exists()


UNREADABLE = {
  b"": "refused",
  b"hello": "refused",
  b'{"1": ': "refused",
  b'{"1": {}, "1": {}}': "twice",
  b"[1, 2]": "no dict",
  b"{}": "no dict",
  pickle.dumps(PHONES)[:-9]: "refused",
  pickle.dumps([1]): "no dict",
  pickle.dumps({1: {}, "1": {}}): "entry 2",
  pickle.dumps({(1, 2): {}}): "entry 1",
  b"[" * 100_000: "refused",
}


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_other_files_are_refused(tmp_path, text):
  (tmp_path / "file").write_bytes(text)
  with pytest.raises(InputError, match=UNREADABLE[text]) as caught:
    convert_trace.load("availability", tmp_path / "file")
  assert len(str(caught.value).splitlines()) == 1 and "accepted" in str(caught.value)
  with pytest.raises(InputError, match="cannot be read"):
    convert_trace.load("availability", tmp_path / "none")


GOOD = {"active": [1, 5], "inactive": [2, 6], "finish_time": 8}
BROKEN = {
  "list": ([], "no active"),
  "missing": ({"active": [1], "inactive": [2]}, "no finish_time"),
  "lengths": ({"active": [1], "inactive": []}, "active and inactive", "one length"),
  "kind": ({"active": 1, "inactive": 2}, "active and inactive", "lists"),
  "text": ({"active": [1, "5"]}, "interval 2", "active is of type str", "finite number"),
  "none": ({"inactive": [2, None]}, "interval 2", "inactive is of type NoneType"),
  "truth": ({"active": [True, 5]}, "interval 1", "type bool"),
  "nan": ({"active": [1, float("nan")]}, "interval 2", "active is nan"),
  "infinite": ({"finish_time": float("inf")}, "finish_time is inf"),
  "huge": ({"finish_time": 10**400}, "finish_time is of type int", "below"),
  "zero": ({"finish_time": 0}, "finish_time is 0", "above 0"),
  "negative": ({"active": [-1, 5]}, "interval 1", "active is -1", "0 or more"),
  "overlap": ({"inactive": [5.5, 6]}, "interval 2", "active is 5", "5.5 or more"),
  "backwards": ({"inactive": [2, 4]}, "interval 2", "inactive is 4", "from 5"),
  "late": ({"finish_time": 5}, "interval 2", "inactive is 6", "to 5, finish_time"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_devices_are_named(tmp_path, name):
  broken, *words = BROKEN[name]
  entry = broken if name in ("list", "missing") else GOOD | broken
  file = listed(tmp_path / "file.json", {"first": GOOD, "second": entry})
  with pytest.raises(InputError) as caught:
    convert_trace.devices(file)
  message = str(caught.value)
  assert message.startswith(f"availability: {tmp_path / 'file.json'}, device 'second'") and "accepted" in message
  assert len(message.splitlines()) == 1 and all(word in message for word in words), message
  assert len(convert_trace.devices(file, drop_broken=True)) == 1


@pytest.mark.parametrize("entry, word", [({"communication": 1}, "no computation"), ({"computation": 0}, "above 0")])
def test_broken_capacities_are_named(tmp_path, entry, word):
  file = listed(tmp_path / "file.json", {"a": GOOD, "b": GOOD})
  capacity = listed(tmp_path / "other.json", {"b": entry, "a": {"computation": 1, "communication": 2}}, "capacity")
  with pytest.raises(InputError, match=f"^capacity: .*other.json, device 'b': .*{word}"):
    convert_trace.devices(file, capacity)
  (left,) = convert_trace.devices(file, capacity, drop_broken=True)
  assert left.where.endswith("'a'") and (left.rate, left.bandwidth) == (1000, 256)


def test_files_of_different_devices_are_paired_by_place(tmp_path):
  file = listed(tmp_path / "a.json", dict.fromkeys("abc", GOOD))
  capacities = {name: {"computation": 1000 / rate, "communication": 1} for name, rate in (("b", 2), ("x", 4))}
  other = listed(tmp_path / "c.json", capacities, "capacity")
  assert [phone.rate for phone in convert_trace.devices(file, other)] == [2, 4, 2]
  assert not convert_trace.by_name(file, other)


def test_a_period_must_not_be_tiny_beside_the_longest(tmp_path):
  tiny = {"active": [0], "inactive": [1e-6], "finish_time": 1e-6}
  phones = convert_trace.devices(listed(tmp_path / "a.json", {"a": GOOD, "b": tiny}))
  with pytest.raises(InputError, match="device 'b': finish_time is 1e-06, accepted is 0.0008 or more"):
    convert_trace.rows(phones)


def test_the_command_draws_drops_and_ends_with_one_line(tmp_path):
  file, output = tmp_path / "a.json", tmp_path / "trace.csv"
  file.write_text(json.dumps({f"{i}": GOOD | {"finish_time": 8 + i} for i in range(20)} | {"bad": {}}))
  done = command(f"--availability={file}", f"--output={output}")
  assert (done.returncode, done.stdout) == (2, "") and not output.exists()
  assert done.stderr == f"error: availability: {file}, device 'bad': no active, accepted is a dict with it\n"
  flags = (f"--availability={file}", f"--output={output}", "--drop_broken", "--num_devices=4", "--seed=1")
  done = command(*flags)
  assert done.returncode == 0 and done.stdout.startswith(f"{output}: 4 devices"), done.stderr
  assert done.stdout.endswith("; broken and left out: 1\n")
  table = population.read_trace(output)
  assert table.edges.shape[0] == 4 and np.all(table.speed == 1)
