"""Other simulators beside ours: what passes between, what a script says that it needs, one line for what fails."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import benchmark, peers
from experiments.peers import Peer, PeerError, worker

SCRIPT = '''# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["numpy==2.4.6"]
# ///
"""Counts instead of learning."""

import time


def prepare(spec, train, test):
  if spec["model"] == "none":
    raise ValueError("no such\\nmodel")
  print("what a library says")
  rounds = 0

  def run():
    nonlocal rounds
    rounds += 1
    time.sleep(0.05 * rounds)
    return spec["steps"] * spec["batch"] * len(train)

  return run
'''


def spec(**changes):
  return {
    "case": "toy",
    "model": "mlp",
    "image_shape": [2, 2, 1],
    "classes": 3,
    "examples": 20,
    "train": [4, 6],
    "test": [],
    "steps": 3,
    "batch": 2,
    "learning_rate": 0.1,
    "seed": 0,
    "samples": 12,
  } | changes


@pytest.fixture
def script(tmp_path):
  path = tmp_path / "toy.py"
  path.write_text(SCRIPT)
  return path


@pytest.fixture
def peer(script):
  peer = Peer("toy", script, python=Path(sys.executable))
  yield peer
  peer.close()


def test_a_turn_is_timed_after_one_that_is_not(peer):
  assert peer.turn(spec()) == pytest.approx(0.10, abs=0.04)  # its second round
  assert peer.turn(spec()) == pytest.approx(0.15, abs=0.04)
  assert peer.turn(spec(case="another")) == pytest.approx(0.10, abs=0.04)


def test_a_case_that_fails_is_one_line_and_the_next_goes_on(peer):
  with pytest.raises(PeerError, match="^ValueError: no such model$"):
    peer.turn(spec(case="bad", model="none"))
  with pytest.raises(PeerError, match="trained on 12 examples, not on 13"):
    peer.turn(spec(samples=13))
  assert peer.turn(spec()) > 0


def test_a_peer_that_ends_says_its_last_line(script):
  script.write_text(SCRIPT + "raise SystemExit('no such library')\n")
  peer = Peer("toy", script, python=Path(sys.executable))
  for _ in range(2):
    with pytest.raises(PeerError, match="ended with exit code 1: no such library"):
      peer.turn(spec())
  peer.close()


def test_rows_of_peers(peer, monkeypatch, capsys):
  twin = benchmark.Case("sleep", lambda: time.sleep(0.05), samples=12, clients=2, peer=spec())
  lost = benchmark.Case("lost", lambda: None, samples=12, peer=spec(case="lost", model="none"))
  alone = benchmark.Case("alone", lambda: None, samples=1)
  monkeypatch.setitem(benchmark.SUITES, "round", lambda wanted: iter([twin, lost, alone]))
  rows = benchmark.measure("round", 3, [peer])
  assert [(row["case"], row["peer"]) for row in rows] == [
    ("sleep", None),
    ("lost", None),
    ("alone", None),
    ("sleep", "toy"),
  ]
  row = rows[-1]
  # Rounds of 0.15, 0.2 and 0.25 s: one is not timed, one was asked for before the turns.
  assert row["ratio"] == pytest.approx(0.2 / 0.05, rel=0.3)
  assert row["ratio_min"] < row["ratio"] < row["ratio_max"]
  assert row["samples_per_second"] == pytest.approx(12 / row["seconds"])
  assert row["versions"] == {"numpy": "2.4.6"}
  assert "ours / toy" in benchmark.line(row)
  assert capsys.readouterr().err == "round lost: toy left out: ValueError: no such model\n"


def test_clients_have_the_sizes_asked_for_and_the_seed_decides():
  train, test = worker.clients(spec(test=[1, 5]))
  assert [len(labels) for _, labels in train + test] == [4, 6, 1, 5]
  for images, labels in train + test:
    assert images.shape == (len(labels), 2, 2, 1) and images.dtype == np.float32
    assert np.abs(images).max() <= 1 and labels.max() < 3
  again, _ = worker.clients(spec(test=[1, 5]))
  np.testing.assert_array_equal(train[1][0], again[1][0])


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_pins_what_it_needs(name):
  path = Path(peers.__file__).parent / f"{name.partition('/')[0]}.py"
  found = peers.metadata(path)
  assert found.accepts((3, 11)) and not found.accepts((3, 9))
  assert found.versions["numpy"] and all(found.versions.values())


def test_a_python_that_does_not_fit_is_one_line(script, tmp_path, monkeypatch):
  monkeypatch.setenv("APFL_JAX_CACHE", str(tmp_path))
  monkeypatch.setattr(peers.shutil, "which", lambda name: None)
  script.write_text(SCRIPT.replace(">=3.11,<3.14", ">=3.6,<3.8"))
  with pytest.raises(PeerError, match="needs Python >=3.6,<3.8; this is 3"):
    peers.environment(script)


def test_an_environment_is_made_once_and_again_when_its_packages_change(script, tmp_path, monkeypatch):
  monkeypatch.setenv("APFL_JAX_CACHE", str(tmp_path))
  commands = []

  def run(command, **_):
    commands.append(command)
    made = Path(command[-1])
    if "venv" in command:
      made.mkdir(parents=True, exist_ok=True)
    failed = "numpy==0" in command
    return peers.subprocess.CompletedProcess(command, int(failed), "", "noise\nERROR: no numpy 0\n")

  monkeypatch.setattr(peers.subprocess, "run", run)
  assert peers.environment(script) == peers.environment(script)
  assert len(commands) == 2 and commands[1][-1] == "numpy==2.4.6"
  script.write_text(SCRIPT.replace("numpy==2.4.6", "numpy==0"))
  for _ in range(2):  # a failed one is not taken for complete
    with pytest.raises(PeerError, match="^not installed: ERROR: no numpy 0$"):
      peers.environment(script)


def test_no_metadata_is_one_line(tmp_path):
  path = tmp_path / "bare.py"
  path.write_text("print()\n")
  with pytest.raises(PeerError, match="bare.py: no inline metadata"):
    peers.metadata(path)
