"""The runner of many runs, with runs that only pretend: order, failures, going on, and who may compute what."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from apfl_jax.errors import InputError
from experiments import job, runs
from experiments.config import Config

HOLDER = (
  "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print('held', flush=True); time.sleep(99)"
)


@pytest.fixture
def computed(monkeypatch):
  """The folders of the runs that were computed; a seed of 13 fails, one of 14 is refused."""
  names = []

  def pretend(config, programs):
    del programs
    workdir = Path(config.workdir)
    names.append(workdir.name)
    time.sleep(0.01)
    if config.seed == 13:
      raise ZeroDivisionError("thirteen\nis unlucky")
    if config.seed == 14:
      raise InputError("seed: got 14, accepted is another")
    workdir.mkdir()
    (workdir / "flags.txt").write_text("\n".join(config.lines()) + "\n")
    (workdir / "summary.json").write_text(json.dumps({"seed": config.seed}))
    return {"seed": config.seed}

  monkeypatch.setattr(job, "run", pretend)
  monkeypatch.setattr(runs.jax, "clear_caches", lambda: None)  # or other tests' programs would be gone
  monkeypatch.setattr(runs.gc, "collect", lambda: None)  # over all that other tests left: seconds a run
  return names


def some(*seeds, progress=False):
  return {f"run-{seed}": Config(seed=seed, progress=progress) for seed in seeds}


def seeds_of(outcome):
  return {name: summary["seed"] for name, summary in outcome.summaries.items()}


def test_what_is_finished_is_not_computed_again(computed, tmp_path):
  assert seeds_of(runs.run(tmp_path / "new", some(0, 1))) == {"run-0": 0, "run-1": 1}
  outcome = runs.run(tmp_path / "new", some(2, 1, 0))
  assert list(seeds_of(outcome).items()) == [("run-2", 2), ("run-1", 1), ("run-0", 0)]
  assert computed == ["run-0", "run-1", "run-2"]
  assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["run-0", "run-1", "run-2"]  # no locks left


def test_a_run_that_fails_stops_no_other(computed, tmp_path, capsys):
  outcome = runs.run(tmp_path, some(13, 0, 14, 1))
  assert list(outcome.summaries) == ["run-0", "run-1"]
  assert outcome.failed["run-14"] == "seed: got 14, accepted is another"
  assert outcome.failed["run-13"].startswith("ZeroDivisionError: thirteen (")
  assert len(capsys.readouterr().err.splitlines()) == 2
  trace = tmp_path / "run-13.error.txt"
  assert "Traceback" in trace.read_text() and not (tmp_path / "run-14.error.txt").exists()
  runs.run(tmp_path, some(13, 0))
  assert computed == ["run-13", "run-0", "run-14", "run-1", "run-13"]  # tried again


def test_a_folder_with_another_run_is_a_failure(computed, tmp_path):
  runs.run(tmp_path, {"a": Config(seed=1)})
  outcome = runs.run(tmp_path, {"a": Config(seed=2), "b": Config(seed=3)})
  assert "another run (--seed=1 there, =2 here), accepted is another folder" in outcome.failed["a"]
  assert list(outcome.summaries) == ["b"]


def test_runs_share_rounds_where_only_personal_models_differ(monkeypatch, tmp_path):
  whose = {}

  def pretend(config, programs):
    del programs
    workdir = Path(config.workdir)
    (workdir / "checkpoints" / ("" if config.trained else str(config.rounds))).mkdir(parents=True)
    made_by = {"commit": "another" if config.seed == 2 else job.commit(), "versions": job.versions()}
    (workdir / "summary.json").write_text(json.dumps(made_by))
    (workdir / "flags.txt").write_text("\n".join(config.lines()))
    whose[workdir.name] = Path(config.trained).name
    return {}

  monkeypatch.setattr(job, "run", pretend)
  monkeypatch.setattr(runs.jax, "clear_caches", lambda: None)
  monkeypatch.setattr(runs.gc, "collect", lambda: None)
  config = lambda **settings: Config(algorithm="ap_fl", settings=settings)
  runs.run(
    tmp_path,
    {
      "all": config(),
      "rho": config(rho=0.0),
      "peer": config(friend="peer"),  # of which the server keeps the models
      "rho, peer": config(rho=0.0, friend="peer"),
      "few": dataclasses.replace(config(), dropped_examples=20, personal_steps=150, judge=2),
      "few, late": dataclasses.replace(config(), dropped_examples=20, dropout="late"),
      "late": dataclasses.replace(config(), dropout="late"),
      "curve": dataclasses.replace(config(), personalize_every=5),
      "curve, rho": dataclasses.replace(config(rho=0.0), personalize_every=5),
      "seed": dataclasses.replace(config(), seed=1),
      "code": dataclasses.replace(config(), seed=2),
      "code, rho": dataclasses.replace(config(rho=0.0), seed=2),
      "prior": dataclasses.replace(config(), readout="prior"),
      "prior, few": dataclasses.replace(config(), readout="prior", dropped_examples=20),
      "central": Config(algorithm="central"),
      "central, few": Config(algorithm="central", dropped_examples=20),
      "clock": Config(algorithm="fedavg", clock="synchronous"),
      "clock, few": Config(algorithm="fedavg", clock="synchronous", dropped_examples=20),
      "knn": Config(algorithm="knn_per"),
      "ft": Config(algorithm="fedavg_ft", settings={"head_only": True}),
      "fedavg": Config(algorithm="fedavg"),
      "ditto": Config(algorithm="ditto"),
    },
  )
  shared = {"rho": "all", "few": "all", "rho, peer": "peer", "ft": "knn", "fedavg": "knn"}
  assert whose == dict.fromkeys(whose, "") | shared
  assert list(whose)[:5] == ["all", "curve", "curve, rho", "seed", "code"]  # of one program
  assert set(list(whose)[-len(shared) - 1 :]) == set(shared) | {"code, rho"}  # once their rounds are there
  runs.run(tmp_path, {"another command": config(rho=0.1), "and its own": dataclasses.replace(config(), alpha=0.7)})
  assert whose["another command"] == "all" and whose["and its own"] == ""


def test_another_seed_compiles_nothing_and_has_the_numbers_that_it_has_alone(tmp_path):
  def config(name, seed, rate):
    small = {
      "num_clients": 6,
      "alpha": 0.5,
      "monopolistic_classes": 1,
      "drop_rate": "0.5",
      "rounds": 3,
      "local_steps": 3,
    }
    small |= {
      "local_steps": 3,
      "personal_steps": 5,
      "pooled_examples": 40,
      "checkpoint_every": 0,
      "progress": False,
      "report": False,
    }
    return Config(
      "ditto", dataset="fast", model="mlp", seed=seed, learning_rate=rate, workdir=f"{tmp_path}/{name}", **small
    )

  programs = job.Programs()
  job.run(config("first", 1, 0.05), programs)
  job.run(config("second", 2, 0.1), programs)
  job.run(config("alone", 2, 0.1))
  read = lambda name, file: (tmp_path / name / file).read_text()
  assert all(json.loads(line)["compilations"] == 0 for line in read("second", "timings.jsonl").splitlines())
  for file in ("metrics.jsonl", "clients.csv"):
    assert read("second", file) == read("alone", file) != read("first", file)


def test_it_says_how_far_it_is(computed, tmp_path, capsys):
  runs.run(tmp_path, some(0, 1, 2, progress=True))
  first, second, third = capsys.readouterr().err.splitlines()
  assert first == "[1 of 3] run-0"
  assert second.startswith("[2 of 3] run-1, about ") and third.startswith("[3 of 3] run-2, about ")


def test_a_dry_run_computes_nothing(computed, tmp_path):
  runs.run(tmp_path / "root", some(1))
  other = {"run-1": Config(seed=7)}
  assert runs.listed(tmp_path / "root", some(0, 1)) == "run-0\nrun-1  finished"
  assert "another run" in runs.listed(tmp_path / "root", other)
  assert runs.listed(tmp_path / "none", some(0)) == "run-0"
  assert computed == ["run-1"] and not (tmp_path / "none").exists()


def test_what_a_live_process_holds_is_left_to_it_and_what_a_dead_one_held_is_taken(computed, tmp_path):
  lock = tmp_path / ".run-0.lock"
  with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
    assert holder.stdout.readline() == "held\n"
    outcome = runs.run(tmp_path, some(0, 1))
    assert outcome.elsewhere == ("run-0",) and computed == ["run-1"]
    holder.kill()
  assert lock.exists()
  outcome = runs.run(tmp_path, some(0, 1))
  assert not outcome.elsewhere and computed == ["run-1", "run-0"] and not lock.exists()


def test_two_at_once_compute_every_run_once(computed, tmp_path):
  outcomes = []
  workers = [threading.Thread(target=lambda: outcomes.append(runs.run(tmp_path, some(*range(12))))) for _ in range(3)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  assert len(outcomes) == 3
  assert sorted(computed) == sorted(some(*range(12)))
  assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["", ".hidden", "a/b"])
def test_names_are_names_of_folders(name, tmp_path):
  with pytest.raises(InputError, match="name of a run"):
    runs.run(tmp_path, {name: Config()})


def test_facts_tell_commits_once_and_what_is_missing():
  summary = {"commit": "abc", "device": "1 x cpu", "seconds": 90.0}
  outcome = runs.Outcome({"a": summary, "b": {**summary, "commit": None}}, {"c": "it broke"}, ("d",))
  assert runs.facts(outcome, "run it") == {
    "command": "run it",
    "commit": "abc",
    "device": "1 x cpu",
    "time": "3.0 min in 2 of 4 runs",
    "missing": "c; d",
  }
