"""A run on the virtual clock from its flags: what it leaves, that a saved schedule replays it, how it refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from apfl_jax import metrics
from apfl_jax.errors import InputError
from apfl_jax.report import plots
from apfl_jax.simulation import schedule
from experiments import config, job
from experiments.config import Config

BASE = Config(
  algorithm="fedbuff",
  dataset="fast",
  model="mlp",
  embeddings="onehot",
  clock="asynchronous",
  num_clients=8,
  cohort_size=4,
  concurrency=3,
  rounds=6,
  eval_every=2,
  alpha=0.5,
  dropout="bernoulli",
  drop_rate="0.2",
  monopolistic_classes=0,
  speed="pareto",
  bandwidth=5e3,
  duration_jitter=0.3,
  local_steps=5,
  pooled_examples=80,
  checkpoint_every=0,
  progress=False,
  settings={"buffer_size": 3},
)


def run(workdir: Path, **values) -> dict:
  return job.run(dataclasses.replace(BASE, workdir=str(workdir), **values))


def lines(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_tells_its_time_and_its_schedule_replays_it(tmp_path, monkeypatch):
  monkeypatch.setattr(plots, "_png", lambda figure: b"a picture")  # plots_test.py draws them
  values = {"dropout": "markov", "drop_rate": "0.4", "softmax_mask": "present"}
  one = run(tmp_path / "one", **values)
  told = lines(tmp_path / "one")
  times, moved = ([line[key] for line in told] for key in ("virtual_seconds", "bytes"))
  assert len(times) == 3 and (np.diff(times) > 0).all() and (np.diff(moved) > 0).all()
  section = one["time"]
  assert section["virtual_seconds"] == times[-1] and 0 <= section["idle_share"] < 1
  with np.load(tmp_path / "one" / "schedule.npz") as made:
    assert sum(section["staleness"]["counts"]) == np.sum(made["arrives"] & (made["group"] >= 0))
    assert len(made["presence"]) >= section["virtual_seconds"] / section["round_seconds"] - 1
    assert len(np.unique(made["presence"])) > 1
  assert section["batches"]["mean"] > 1 and section["batches"]["count"] * section["batches"]["mean"] == 24
  assert metrics.time.to_target(told, 0.0) == times[0]
  assert (tmp_path / "one" / "time.png").is_file()

  # Neither seed nor processes nor speeds matter to who comes when; the seed still matters to what is learnt.
  saved = str(tmp_path / "one" / "schedule.npz")
  unread = {"speed": "constant", "duration_jitter": 0.0, "bandwidth": 0.0, "dropout": "none", "drop_rate": "0"}
  other = run(tmp_path / "two", schedule=saved, softmax_mask="present", **unread)
  assert section["replayed"] is None
  assert "schedule: schedule.npz" in (tmp_path / "two" / "report.html").read_text()
  assert (tmp_path / "two" / "metrics.jsonl").read_bytes() == (tmp_path / "one" / "metrics.jsonl").read_bytes()
  assert other["time"] == section | {"replayed": "schedule.npz"}


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"clock": "rounds"}, "concurrency: got 3 with --clock=rounds, accepted is --clock=asynchronous"),
    ({"concurrency": 9}, "concurrency: got 9, accepted is 0 to num_clients=8"),
    ({"deadline": 3.0}, "deadline: got 3.0 with --clock=asynchronous, accepted is --clock=synchronous"),
    (
      {"clock": "synchronous", "concurrency": 0, "over_selection": 1.5},
      "over_selection: got 1.5, accepted is at most num_clients / cohort_size - 1 = 1",
    ),
    ({"clock": "rounds", "concurrency": 0, "schedule": "x.npz"}, "schedule: got .*x.npz with --clock=rounds"),
    ({"clock": "sundial"}, "clock: got 'sundial', accepted are rounds, synchronous, asynchronous"),
  ],
)
def test_settings_that_the_clock_does_not_read_are_refused(values, words):
  with pytest.raises(InputError, match=words):
    dataclasses.replace(BASE, **values)


def test_a_cohort_larger_than_the_population_is_named():
  with pytest.raises(InputError, match="cohort_size: got 20, accepted is 0 .all. to num_clients=8"):
    dataclasses.replace(BASE, cohort_size=20)


# Slow to compile; that its batches have one width is in schedule_test.py.
SYNCHRONOUS = {"clock": "synchronous", "concurrency": 0, "over_selection": 0.5}


@pytest.mark.parametrize("values", [{}, pytest.param(SYNCHRONOUS, marks=pytest.mark.slow)])
def test_no_shape_depends_on_the_seed(values):
  layouts = {job.prepare(dataclasses.replace(BASE, seed=seed, **values)).clock.layout for seed in range(3)}
  assert len(layouts) == 1


def test_who_is_gone_is_who_left_in_this_run(tmp_path, capsys):
  leaving = dataclasses.replace(BASE, dropout="late", drop_rate="0.5", monopolistic_classes=1)
  usual = job.prepare(leaving)
  assert usual.gone.sum() == 4 and not capsys.readouterr().err
  assert not job.prepare(dataclasses.replace(leaving, round_seconds=1e6)).gone.any()
  assert "before 4 clients leave" in capsys.readouterr().err
  schedule.save(usual.clock.schedule, tmp_path / "schedule.npz")
  replayed = job.prepare(dataclasses.replace(leaving, dropout="none", schedule=str(tmp_path / "schedule.npz")))
  np.testing.assert_array_equal(replayed.gone, usual.gone)


_DEFAULTS = {field.name: getattr(Config(), field.name) for field in config.fields()}


def _notes(**given) -> list[str]:
  return config.notes_on_time(["fedasync"], _DEFAULTS | {"fedasync_max_staleness": 16} | given)


def test_flags_without_effect_are_told():
  assert not _notes()
  assert not _notes(clock="synchronous", step_seconds=2.0)
  (line,) = _notes(step_seconds=2.0)
  assert line == "--step_seconds has no effect with --clock=rounds, which has no time"
  (line,) = _notes(clock="synchronous", schedule="x.npz", drop_rate="0.1")
  assert line.startswith("--drop_rate has no effect with --schedule")
  (line,) = _notes(clock="asynchronous", num_clients=90)
  assert "--fedasync_max_staleness=16 leaves out most uploads: with 90 clients at work they are 89" in line
  assert not _notes(clock="asynchronous", num_clients=90, cohort_size=9)


def test_flags_that_a_choice_leaves_without_effect_are_told():
  notes = lambda **given: config.notes_on_choices(_DEFAULTS | given)
  assert not notes()
  assert notes(partition="iid", alpha=0.3) == ["--alpha has no effect with --partition=iid, only with dirichlet"]
  assert notes(local_epochs=3) == ["--local_epochs has no effect with --local_steps=15, only with 0"]
  assert not notes(local_epochs=3, local_steps=0)
  assert notes(dropout="none", drop_rate="0.9") == ["--drop_rate has no effect with --dropout=none"]
  assert not notes(dropout="trace, markov", drop_rate="0.9", off_rounds=2.0)
  (line,) = notes(dropout="cold,late", leave_at=0.2, regions=9)
  assert line == "--regions has no effect with --dropout=cold,late, only with regional"
  assert not notes(regions=9, schedule="x.npz")  # told with the schedule


def test_a_schedule_that_does_not_tell_who_is_there_is_one_line(tmp_path):
  path = tmp_path / "schedule.npz"
  schedule.save(job.prepare(BASE).clock.schedule, path)
  with pytest.raises(InputError, match="schedule: got one that does not tell who is there, accepted is one of a run"):
    job.prepare(dataclasses.replace(BASE, schedule=str(path), softmax_mask="present"))


def test_a_clock_on_which_nothing_arrives_is_one_line():
  late = dataclasses.replace(BASE, algorithm="fedavg", settings={}, clock="synchronous", concurrency=0, deadline=1e-3)
  with pytest.raises(InputError, match=r"deadline: got 0\.001, with which no upload of the run arrives"):
    job.prepare(late)


def test_a_schedule_of_another_run_is_one_line(tmp_path):
  with pytest.raises(InputError, match="nothing.npz is no saved schedule"):
    job.prepare(dataclasses.replace(BASE, schedule=str(tmp_path / "nothing.npz")))
