"""The benchmark: its rows say what was run, its rates follow from them, bad input is one line."""

import json
import time

import numpy as np
import pytest

from experiments import benchmark
from tests import binaries

KEYS = {"suite", "case", "samples_per_second", "seconds", "compile_seconds", "peak_memory_bytes", "device", "versions"}


def test_rows_follow_from_what_was_timed(monkeypatch):
  calls = []

  def slow():
    calls.append(time.sleep(0.05))

  case = benchmark.Case("sleep", slow, samples=100, clients=4, flops=1e9)
  monkeypatch.setitem(benchmark.SUITES, "round", lambda wanted: iter([case]))
  (row,) = benchmark.measure("round", 3)
  assert set(row) >= KEYS
  assert len(calls) == 1 + 3  # one to compile, three that count
  assert row["seconds"] == pytest.approx(0.05, rel=0.5)
  assert row["samples_per_second"] == pytest.approx(100 / row["seconds"])
  assert row["clients_per_second"] == pytest.approx(4 / row["seconds"])
  assert row["share_of_matmul_rate"] == pytest.approx(1e9 / row["seconds"] / row["matmul_flops_per_second"])
  assert "round sleep" in benchmark.line(row)


def test_a_case_goes_on_from_state_to_state():
  rounds = benchmark.Rounds((8, 8, 1), 200, model="mlp", num_clients=3, examples_per_client=20, local_steps=2)
  rounds.advance()
  rounds.advance(2)
  assert int(rounds.chunks.state.round) == 3
  assert len(rounds.score(rounds.simulator.score_global)) == 1
  # Two steps of 16 examples through 64 x 200 x 10 weights, forward and backward but for the inputs' gradient.
  price = rounds.prices().local_update
  assert price == pytest.approx(2 * 16 * 2 * (2 * 64 * 200 + 3 * 200 * 10), rel=1e-6)


@pytest.mark.parametrize(
  ("flag", "word"), [("--suites=speed", "local_training"), ("--repeats=0", "1 or more"), ("--peers=speed", "fedjax")]
)
def test_bad_input_is_one_line(flag, word):
  result = binaries.run("experiments.benchmark", flag)
  assert result.returncode == 2
  assert len(result.stderr.splitlines()) == 1 and word in result.stderr


def test_the_spec_of_a_peer_is_what_we_do():
  rounds = benchmark.Rounds((8, 8, 1), 200, model="mlp", num_clients=3, examples_per_client=27, batch_size=16)
  spec = rounds.peer("toy", 48, scored=True)
  assert spec["train"] == [16] * 3 and spec["test"] == np.asarray(rounds.inputs.federation.test.size).tolist()
  assert (spec["model"], spec["image_shape"], spec["batch"], spec["samples"]) == ("mlp", [8, 8, 1], 16, 48)
  assert rounds.peer("toy", 48)["test"] == [] and json.loads(json.dumps(spec)) == spec


@pytest.mark.slow
def test_a_suite_from_the_command_line(tmp_path):
  file = tmp_path / "rows.json"
  result = binaries.run("experiments.benchmark", "--suites=generator", "--repeats=1", f"--json={file}")
  assert result.returncode == 0, result.stderr
  rows = json.loads(file.read_text())
  assert [row["case"] for row in rows] == ["ap_fl/8x8x1", "ap_fl/28x28x1", "ap_fl/32x32x3"]
  assert len(result.stdout.splitlines()) == 1 + len(rows)
