"""What asynchrony shows, on made-up runs: targets, returns, the life of a class; and the binary without running it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import data, population
from apfl_jax.errors import InputError
from apfl_jax.report import plots, run
from experiments import asynchrony, job
from experiments.asynchrony import PARTS, Done
from experiments.config import Config
from experiments.criteria import FAILS, HOLDS, NOT_MEASURED
from tests import binaries

HISTOGRAM = np.array([[5, 0, 2], [0, 0, 9], [3, 0, 0], [6, 7, 0]])  # class 2: clients 0 and 1, of which 1 has most


def lines(accuracies, second, **columns):
  """A line each 2 rounds, `second` virtual seconds and 10 bytes a round."""
  made = []
  for i, accuracy in enumerate(accuracies):
    told = {"round": 2 * i + 2, "virtual_seconds": second * (2 * i + 2), "bytes": 10.0 * (2 * i + 2)}
    told |= {"pooled_accuracy": accuracy, "personal_accuracy_each": None, "reweighted_accuracy_each": None}
    told["global_recall"] = None
    made.append(told | {name: values[i] for name, values in columns.items()})
  return made


def done(some, config=None, dropped=(), arrays=None, **time):
  config = config or Config(rounds=some[-1]["round"])
  blank = dict.fromkeys(run.Clients._fields, np.zeros(len(dropped)))
  people = run.Clients(**blank | {"id": np.arange(len(dropped)), "dropped": np.array(dropped, bool)})
  clock = {"virtual_seconds": some[-1]["virtual_seconds"], "idle_share": 0.2} | time
  clock.setdefault("staleness", {"edges": [0, 1], "counts": [4]})
  summary = {"time": clock, "seconds": 3.0}
  return Done(config, run.Run(Path(), summary, ["a", "b", "c"], [], some, [], people, arrays or {}))


@pytest.mark.parametrize("scale", ["digits", "fashion_mnist"])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_run_at_every_scale(part, scale, tmp_path):
  configs = asynchrony.plan(part, [1], scale, {}, tmp_path)
  assert len(configs) == len(PARTS[part].variants)
  sizes = {"target": {"digits": 5, "fashion_mnist": 10}, "return": {"digits": 4, "fashion_mnist": 8}}
  assert {config.cohort_size for config in configs.values()} == {sizes.get(part, {}).get(scale, 0)}


def test_the_target_is_synchronous_fedavgs_and_each_seeds_own():
  found = {}
  for seed, shift in ((1, 0.0), (2, 0.1)):
    found["fedavg", seed] = done(lines([0.4 + shift, 0.79 + shift, 0.8 + shift], second=10))
    found["fedbuff", seed] = done(lines([0.7 + shift, 0.77 + shift, 0.5 + shift], second=4))
  rows, panels, table = PARTS["target"].judge(found)
  # FedAvg needs 4 rounds of 10 seconds for .95 of .8 or .9, FedBuff 4 rounds of 4 seconds.
  assert [row.verdict for row in rows] == [HOLDS, HOLDS, HOLDS]
  assert [row.numbers["mean"] for row in rows] == pytest.approx([0.4, 1.0, 1.0])
  cells = {row[0]: row for row in table.rows}
  assert cells["fedavg"][2].startswith("40.0") and cells["fedbuff"][2].startswith("16.0")
  assert panels[0].level == pytest.approx(95 * 0.85)
  found["fedbuff", 2] = done(lines([0.1, 0.2, 0.3], second=4))
  rows, _, table = PARTS["target"].judge(found)
  assert [row.verdict for row in rows] == [FAILS] * 3  # one seed that never gets there decides
  assert "1 of 2" in {row[0]: row for row in table.rows}["fedbuff"]
  assert plots.curves(panels).startswith(b"\x89PNG")


def test_what_was_not_reached_is_left_out():
  some = lines([0.5, 0.7], second=10)
  assert asynchrony.spent({1: some, 2: some}, {1: 0.6, 2: 0.8, 3: 0.1}, "virtual_seconds") == {1: 40.0}
  assert asynchrony.target_of([*some, {"pooled_accuracy": None}], 1.0) == 0.7


def test_mean_staleness_weighs_by_uploads():
  assert asynchrony.mean_staleness({"edges": [0, 2, 4], "counts": [3, 1]}) == 0.5
  assert asynchrony.mean_staleness({"edges": [0, 1], "counts": [0]}) == 0.0


def test_returns_pair_the_clients_that_were_away():
  away = lines([None] * 3, 5, personal_accuracy_each=[None, [0.1, 0.9, None], [0.2, 0.8, 0.7]])
  twin = lines([None] * 3, 5, personal_accuracy_each=[[0.5] * 3, [0.5, 0.6, 0.7], None])
  pairs = asynchrony.returns(away, twin, np.array([False, True, True]), "personal_accuracy_each")
  assert list(pairs) == [4]  # scored in both
  with pytest.raises(InputError, match="lacks other_each"):
    asynchrony.returns(away, twin, np.ones(3, bool), "other_each")
  np.testing.assert_array_equal(pairs[4], [[0.9, np.nan], [0.6, 0.7]])


def test_a_return_is_judged_at_each_time_and_against_a_round(monkeypatch):
  made = Config(rounds=4, clock="asynchronous", cohort_size=4)
  of_round = lambda value: [[0.0, value, value], [0.0, value, value]]
  found = {}
  for seed in (1, 2):
    each = lambda own, balanced: {
      "personal_accuracy_each": of_round(own),
      "reweighted_accuracy_each": of_round(balanced),
    }
    found["returned", seed] = done(lines([0.1, 0.2], 5, **each(0.9, 0.8)), made, (0, 1, 1))
    found["twin", seed] = done(lines([0.1, 0.2], 5, **each(0.905, 0.82)), made, (0, 0, 0))
    found["fedavg", seed] = done(lines([0.1, 0.2], 50), made, (0, 1, 1))
  monkeypatch.setattr(asynchrony, "_latency", lambda done: np.array([10.0, 30.0]))
  rows, panels, table = PARTS["return"].judge(found)
  assert [row.verdict for row in rows] == [HOLDS, FAILS, HOLDS, FAILS, HOLDS]
  assert [row.numbers["mean"] for row in rows[:2]] == pytest.approx([-0.005, -0.02])
  assert rows[-1].numbers["mean"] == pytest.approx(20 / 50)
  assert [row[:2] for row in table.rows] == [["2", "10"], ["4", "20"]]
  assert len(panels) == 4 and {len(row) for row in table.rows} == {len(table.header)}
  assert plots.curves(panels).startswith(b"\x89PNG")
  monkeypatch.setattr(asynchrony, "_latency", lambda done: np.array([100.0]))
  assert PARTS["return"].judge(found)[0][-1].verdict == FAILS


def test_a_return_takes_its_download_and_its_steps():
  made = Config(algorithm="fedavg_ft", personal_steps=20, step_seconds=0.5, bandwidth=100.0)
  np.testing.assert_allclose(asynchrony.return_seconds([200.0, 100.0], [1.0, 0.5], made), [2 + 10, 1 + 20])
  unlimited = dataclasses.replace(made, bandwidth=0.0)
  np.testing.assert_allclose(asynchrony.return_seconds([200.0], [2.0], unlimited), [5.0])
  befriended = dataclasses.replace(unlimited, algorithm="ap_fl", settings={"friend_steps": 8})
  np.testing.assert_allclose(asynchrony.return_seconds([200.0], [2.0], befriended), [5.0 + 2.0])


def test_speeds_are_those_of_the_schedule():
  common = {"dataset": "fast", "model": "mlp", "embeddings": "onehot", "alpha": 0.5, "num_clients": 6, "cohort_size": 2}
  clock = {"clock": "asynchronous", "speed": "lognormal", "rounds": 6, "step_seconds": 2.0, "local_steps": 5}
  made = Config(algorithm="fedavg", dropout="cold", drop_rate="0.5", monopolistic_classes=0, seed=3, **common, **clock)
  schedule = job.prepare(made).clock.schedule
  assert len(set(schedule.client)) == 3
  speed = asynchrony.speeds(made, schedule.client)
  np.testing.assert_allclose(schedule.end - schedule.start, 10 / speed, rtol=1e-5)


def test_the_class_that_leaves_takes_no_other_with_it():
  life = asynchrony.chosen(HISTOGRAM)
  assert life == asynchrony.Life(2, (0, 1), 1)
  assert asynchrony.chosen(HISTOGRAM[:, ::-1]).label == 0
  assert asynchrony.chosen(np.array([[1, 0, 2], [0, 2, 1], [1, 1, 0], [1, 1, 0]])) == asynchrony.Life(0, (0, 2, 3), 0)
  with pytest.raises(InputError, match="no class can leave alone"):
    asynchrony.chosen(np.eye(3, dtype=int))


@pytest.mark.parametrize("rounds", [20, 60])
def test_the_trace_is_read_as_it_was_meant(tmp_path, rounds):
  life = asynchrony.chosen(HISTOGRAM)
  path = tmp_path / "life.csv"
  rows = [("client", "start", "end"), *asynchrony.trace_rows(life, 4, rounds)]
  path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
  process = population.trace(jax.tree.map(jnp.asarray, population.read_trace(path, 1.0, 4)))
  there = np.array([process.look((), t, np.arange(4), None).present for t in range(rounds + 1)])
  held = (HISTOGRAM[:, life.label] > 0) & there
  first = asynchrony.begins(rounds)
  assert (held[: first["monopolised"]].sum(axis=1) == 2).all()
  assert (held[first["monopolised"] : first["left"]] == [False, True, False, False]).all()
  assert not held[first["left"] : first["returned"]].any()
  assert (held[first["returned"] :].sum(axis=1) == 2).all()
  assert there[:, 2:].all()


def test_phases_are_told_by_their_last_measurement():
  values = {at + 0.5: (float(at), 0.0) for at in range(2, 71, 3)}
  ends = asynchrony.at_ends(values, 60)
  assert {name: both[0] for name, both in ends.items()} == {
    "present": 23.0,
    "monopolised": 29.0,
    "left": 44.0,
    "returned": 68.0,  # however long the run takes
  }
  assert list(asynchrony.at_ends({70.0: (1.0, 0.0)}, 60)) == ["returned"]


def test_a_life_is_judged_by_what_is_left():
  def lived(kept):
    at_round = lambda t: kept if 10 < t <= 15 else 0.9
    recall = [[0.6, 0.8, at_round(2 * i + 2)] for i in range(10)]
    some = lines([0.7] * 10, 15, global_recall=recall)
    return done(some, Config(rounds=20), arrays={"histogram": HISTOGRAM}, round_seconds=15.0)

  kept = {"fedbuff": 0.0, "fedbuff+mask": 0.4, "ap_fl+mask": 0.5, "ap_fl+mask+memory": 0.6}
  found = {(label, seed): lived(value) for label, value in kept.items() for seed in (1, 2)}
  rows, panels, table = PARTS["life"].judge(found)
  assert [row.verdict for row in rows] == [HOLDS] * 5
  assert [row.numbers["mean"] for row in rows] == pytest.approx([0.6, 0.2, 0.1, 0.0, 0.0])
  assert table.rows[0][:5] == ["fedbuff", "90.0 ± 0.0", "90.0 ± 0.0", "0.0 ± 0.0", "90.0 ± 0.0"]
  assert "seed 1: class c, 2 of 10 clients" in table.rows[-1][0]
  assert panels[0].spans["left"] == (10, 15) and panels[0].spans["returned"] == (15, 20)
  assert plots.curves(panels).startswith(b"\x89PNG")


def test_without_runs_nothing_is_measured():
  for part in PARTS.values():
    rows, panels, _ = part.judge({})
    assert {row.verdict for row in rows} <= {NOT_MEASURED}
    assert plots.curves(panels).startswith(b"\x89PNG")


def test_runs_of_a_part_differ_and_flags_reach_them(tmp_path):
  for part in PARTS:
    configs = asynchrony.plan(part, [1, 2], "fashion_mnist", {"rounds": 12, "ap_fl_beta": 0.25}, tmp_path)
    assert len({tuple(sorted(one.identity())) for one in configs.values()}) == len(configs)
    assert all(one.rounds == 12 and one.num_clients == 20 for one in configs.values())
    assert all(one.clock != "rounds" for one in configs.values())
    assert all(one.settings["beta"] == 0.25 for one in configs.values() if one.algorithm == "ap_fl")
  away = asynchrony.plan("return", [1], "digits", {}, tmp_path)["returned", 1]
  assert away.cohort_size == 4  # of 10, the others are away
  assert (away.personal_steps, away.settings["friend_steps"]) == (400, 200)
  short = asynchrony.plan("return", [1], "digits", {"personal_steps": 30}, tmp_path)["returned", 1]
  assert (short.personal_steps, short.settings["friend_steps"]) == (30, 15)
  lived = asynchrony.plan("life", [3], "digits", {}, tmp_path)["fedbuff", 3]
  assert lived.trace == str(tmp_path / "life-3.csv")


def test_a_written_trace_is_of_the_runs_partition(tmp_path):
  given = {"dataset": "fast", "model": "mlp", "embeddings": "onehot", "alpha": 0.5, "rounds": 20, "num_clients": 6}
  plan = asynchrony.plan("life", [1], "digits", given, tmp_path)
  made = plan["fedbuff", 1]
  asynchrony.write_trace(made)
  table = population.read_trace(made.trace, 1.0, 6)
  assert table.speed.shape == (6,) and int(table.period) == 40

  # The clock knows when the class is away: after its last holder has left, and before the first is back.
  ready = job.prepare(plan["ap_fl+mask", 1])
  life = asynchrony.chosen(data.histogram(ready.federation, len(ready.dataset.class_names)))
  clock = ready.clock
  at = clock.schedule.start / clock.schedule.round_seconds
  away = (at >= 10) & (at < 15)
  assert away.sum() > 3 and not np.isin(clock.schedule.client[away], life.holders).any()
  there = clock.schedule.classes_present(np.eye(6, dtype=bool))[0]
  np.testing.assert_array_equal(there[:, list(life.holders)].any(axis=1), ~away)


def test_an_unknown_part_ends_with_a_line(tmp_path):
  ended = binaries.run("experiments.asynchrony", f"--output={tmp_path}", "--parts=fate")
  assert ended.returncode == 2
  assert ended.stderr.strip().endswith("parts: got 'fate', accepted are target, return, life, comma-separated")
