"""The comparison of methods: two of them on two seeds of the fast task, its tables against the runs' own files."""

import csv
import json
import math
import re
import statistics

import numpy as np
import pytest

from apfl_jax import algorithms, metrics, report
from apfl_jax.errors import InputError
from apfl_jax.report import html, plots, tables
from experiments import config, job, methods, runs
from experiments.config import Config
from tests import binaries

SMALL = {
  "dataset": "fast",
  "model": "mlp",
  "num_clients": 4,
  "partition": "iid",
  "min_size": 4,
  "monopolistic_classes": 0,
  "embeddings": "onehot",
  "drop_rate": "0.5",
  "rounds": 2,
  "personalize_every": 1,
  "local_steps": 3,
  "personal_steps": 5,
  "pooled_examples": 40,
  "checkpoint_every": 0,
  "progress": False,
}


def small(method, seed):
  return Config(algorithm=method, seed=seed, data_dir="/somewhere", **SMALL)


def keep_what_others_left(patch):
  """Other tests' programs, which they may need again, and their garbage, which takes seconds a run to look through."""
  patch.setattr(runs.jax, "clear_caches", lambda: None)
  patch.setattr(runs.gc, "collect", lambda: None)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  root = tmp_path_factory.mktemp("compared")
  configs = methods.plan(["local", "fedavg"], [0, 1], small)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, "write", lambda workdir: None)  # the pages of the runs are tested elsewhere
    keep_what_others_left(patch)
    outcome = methods.compare(root, configs, pairs=[("local", "fedavg")], best_round=True)
  assert not outcome.failed and list(outcome.summaries) == ["local-0", "fedavg-0", "local-1", "fedavg-1"]
  return root, outcome, configs


def test_the_numbers_are_those_of_the_runs(compared):
  root, _, _ = compared
  results = json.loads((root / "results.json").read_text())
  for method in ("local", "fedavg"):
    own, balanced, pooled, best, down = [], [], [], [], []
    for seed in (0, 1):
      rows = list(csv.DictReader((root / f"{method}-{seed}" / "clients.csv").open()))
      own.append(np.mean([float(row["personal_accuracy"]) for row in rows]))
      balanced.append(np.mean([float(row["reweighted_accuracy"]) for row in rows]))
      pooled.append(np.mean([float(row["pooled_accuracy"]) for row in rows]))
      lines = (root / f"{method}-{seed}" / "metrics.jsonl").read_text().splitlines()
      best.append(max(json.loads(line)["personal_accuracy"] for line in lines))
      down.append(json.loads((root / f"{method}-{seed}" / "summary.json").read_text())["cost"]["bytes_down"])
    found = results["methods"][method]
    wanted = {"own: all": own, "own: on balanced images": balanced, "pooled: personal": pooled}
    for name, want in (wanted | {"best test round": best, "down": down}).items():
      assert found[name]["mean"] == pytest.approx(statistics.mean(want), abs=1e-6)
      assert found[name]["std"] == pytest.approx(statistics.stdev(want), abs=1e-6)
      assert list(found[name]["seeds"]) == ["0", "1"]
    assert found["rounds"]["mean"] > 0
  assert results["methods"]["local"]["own: global model"] == {
    "mean": None,
    "std": None,
    "seeds": {"0": None, "1": None},
  }
  pair = results["pairs"][0]
  by_seed = {m: list(results["methods"][m]["own: all"]["seeds"].values()) for m in ("local", "fedavg")}
  assert pair["mean"] == metrics.paired(by_seed["local"], by_seed["fedavg"]).mean


def test_the_table_says_what_was_found_and_how(compared):
  root, _, _ = compared
  text, results = (root / "table.md").read_text(), json.loads((root / "results.json").read_text())

  def grid(heading):
    part = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in part.splitlines() if line.startswith("| ")]
    return {row[1]: row for row in rows}

  cells, costs = grid("Test accuracy"), grid("Cost")
  assert list(cells)[:5] == ["method", "**global**", "fedavg", "**bounds**", "local"]
  at = next(place for place, name in enumerate(costs["method"]) if name.startswith("down"))
  assert float(costs["fedavg"][at].split()[0]) > 0 and not any(name.startswith("down") for name in cells["method"])
  number = results["methods"]["fedavg"]["own: all"]
  at = cells["method"].index("own: all")
  assert cells["fedavg"][at] == f"{100 * number['mean']:.1f} ± {100 * number['std']:.1f}"
  assert cells["local"][cells["method"].index("own: global model")] == "–"
  assert "best test round" in cells["method"] and "best test round" not in costs["method"]
  assert "local - fedavg" in grid("Pairs")
  assert "The personal models of fedavg are the global model." in text
  federation = "fast, 4 clients, partition iid, dropout cold at rate 0.5, no monopolistic classes, 2 rounds"
  assert f"federation: {federation}\n" in text
  for wanted in ("--dataset=fast", "--data_dir=DIR", "seeds: 0, 1", "numpy ", "in 4 of 4 runs"):
    assert wanted in text
  assert "/somewhere" not in text and "--seed=" not in text
  page = (root / "table.html").read_text()
  assert "data:image/png;base64," in page and "http" not in page and cells["fedavg"][at] in page
  assert (root / "accuracy.png").stat().st_size > 10_000


def test_the_same_again_computes_nothing_and_tells_what_is_missing(compared, monkeypatch):
  root, _, configs = compared

  def broken(config, programs):
    raise InputError("no more of this")

  monkeypatch.setattr(job, "run", broken)
  keep_what_others_left(monkeypatch)
  more = configs | methods.plan(["fedper"], [0], small)
  outcome = methods.compare(root, more)
  assert list(outcome.summaries) == list(configs) and list(outcome.failed) == ["fedper-0"]
  text = (root / "table.md").read_text()
  assert "missing: fedper-0 (no more of this)" in text and "in 4 of 5 runs" in text and "Pairs" not in text


def test_the_federation_is_told_in_a_line():
  told = runs.federation(Config(dropout="cold,markov", drop_rate="0.5,0.25", monopolistic_classes=1))
  assert told == (
    "digits, 10 clients, partition dirichlet, alpha 0.1, dropout cold at rate 0.5 and markov at rate 0.25,"
    " 1 monopolistic class (only clients that drop hold them), 40 rounds"
  )
  assert "dropout none, " in runs.federation(Config(dropout="none"))


def test_budgets_are_equal_and_seeds_share_a_federation():
  configs = methods.plan(["fedavg", "fedprox"], [3, 4], small)
  assert list(configs) == ["fedavg-3", "fedprox-3", "fedavg-4", "fedprox-4"]
  lines = [{x for x in c.lines() if not re.match("--(algorithm|fedprox_mu)=", x)} for c in configs.values()]
  assert lines[0] == lines[1] != lines[2] == lines[3]


@pytest.mark.parametrize(
  ("pairs", "best_round", "words"),
  [([("fedavg", "gpfl")], False, "pairs: got 'gpfl'"), ([], True, "--personalize_every")],
)
def test_what_cannot_be_told_is_refused_before_anything_runs(pairs, best_round, words, tmp_path):
  configs = {"fedavg-0": Config(algorithm="fedavg")}
  with pytest.raises(InputError, match=words):
    methods.compare(tmp_path / "root", configs, pairs=pairs, best_round=best_round)
  assert not (tmp_path / "root").exists()


def test_lists_are_parsed():
  assert methods.parse_methods("all") == list(algorithms.METHODS)
  assert methods.parse_methods(" fedper, fedavg,fedper") == ["fedper", "fedavg"]
  assert methods.parse_seeds("2, 0,") == [2, 0]
  assert methods.parse_pairs("") == []
  assert methods.parse_pairs("knn_per:fedavg,gpfl:fedper") == [("knn_per", "fedavg"), ("gpfl", "fedper")]


@pytest.mark.parametrize(
  ("parse", "text", "words"),
  [
    (methods.parse_methods, "", "methods: got '', accepted are all"),
    (methods.parse_methods, "fedavg,nope", "methods: got 'nope', accepted are all"),
    (methods.parse_methods, "Fed-Avg", "methods: got 'Fed-Avg' (did you mean 'fedavg'?), accepted are all"),
    (methods.parse_methods, ",", "methods: got ','"),
    (methods.parse_seeds, "", "seeds: got ''"),
    (methods.parse_seeds, "0,one", "seeds: got 'one', accepted are whole numbers"),
    (methods.parse_seeds, "-1", "seeds: got '-1'"),
    (methods.parse_seeds, "2,0,2", "seeds: got '2,0,2', accepted is each at most once"),
    (methods.parse_pairs, "fedavg", "pairs: got 'fedavg', accepted are pairs"),
    (methods.parse_pairs, "a:b:c", "pairs: got 'a:b:c'"),
  ],
)
def test_bad_lists_are_refused_in_a_line(parse, text, words):
  with pytest.raises(InputError, match=re.escape(words)) as caught:
    parse(text)
  assert "\n" not in str(caught.value)


def test_the_binary_lists_and_tells_of_failures(tmp_path):
  (tmp_path / "fedprox-5").mkdir()
  (tmp_path / "fedprox-5" / "flags.txt").write_text("--algorithm=another\n")
  given = (f"--output={tmp_path}", "--seeds=5", "--fedprox_mu=0.5")
  call = lambda *more: binaries.run("experiments.methods", *given, *more)
  listed = call("--methods=fedavg,fedprox", "--dry_run", "--dataset=fast")
  assert listed.returncode == 0 and not listed.stderr
  first, second = listed.stdout.splitlines()
  assert first == "fedavg-5" and second.startswith("fedprox-5  cannot run: workdir: ")
  refused = call("--methods=fedavg,fedprox", "--dry_run", "--pairs=fedavg:fedprxo")
  assert refused.returncode == 2
  assert refused.stderr == (
    "error: pairs: got 'fedprxo' (did you mean 'fedprox'?), accepted are the methods that are run: fedavg, fedprox\n"
  )
  failed = call("--methods=fedprox", "--progress=false")
  assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1
  assert failed.stderr.startswith("error: fedprox-5: workdir: ")


def test_spreads_leave_out_what_is_not_known():
  assert methods.spread([]) == (None, None)
  assert methods.spread([math.nan, 2.0]) == (2.0, None)
  assert methods.spread([1.0, math.nan, 4.0]) == (2.5, pytest.approx(math.sqrt(4.5)))


def test_help_lists_every_method_under_its_group():
  lines = config.table_of_methods().splitlines()
  assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == [
    *algorithms.grouped(),
    "wrappers, for --wrappers",
  ]
  assert sorted(line.split()[0] for line in lines if line.startswith(" ")) == sorted(
    [*algorithms.METHODS, *algorithms.WRAPPERS]
  )
  for name, entry in (*algorithms.METHODS.items(), *algorithms.WRAPPERS.items()):
    (line,) = (line for line in lines if line.startswith(f"  {name} "))
    assert line.endswith(f" ({entry.paper})") and 3 <= len(line.removesuffix(f" ({entry.paper})").split()[1:]) <= 25


def test_a_group_is_one_of_those_that_tables_have():
  with pytest.raises(InputError, match=r"^group: got 'gobal' \(did you mean 'global'\?\), accepted are global, "):
    algorithms.Method(algorithms.fedavg, "nobody", "gobal")


def test_of_one_seed_there_is_no_interval():
  values = {name: {of: {0: mean} for of in methods.MEASURES} for name, mean in (("ditto", 0.9), ("local", 0.8))}
  (row, *_) = methods._grid_of_pairs(methods.told(values, "ditto", "local")).rows
  assert row == ["ditto - local", "own: all", "+10.0", "–", "–", "1"]


def test_a_picture_for_one_method_or_many():
  points = [plots.Point(f"m{i}", "global" if i % 2 else "of ours", [0.1 * i, 0.2], [0.5, 0.6]) for i in range(5)]
  for some in (points, points[:1], [plots.Point("one", "bounds", [0.5], [0.5])]):
    assert plots.compare(some, "x", "y").startswith(b"\x89PNG")


def test_text_in_grids_is_escaped():
  grid = tables.Grid(["a", "b"], [["group"], ["x|y", "<b>"]])
  assert tables.markdown(grid).splitlines() == ["| a | b |", "|---|---|", "| **group** |  |", "| x\\|y | <b> |"]
  page = html.page("<title>", [html.Section("One & two", "", grid), html.Section("Facts", "why", {"k": "<v>"})])
  assert "&lt;b&gt;" in page and "<b>" not in page and "One &amp; two" in page and '<th colspan="2">group</th>' in page


def test_a_command_imports_the_files_of_own_methods(monkeypatch):
  def mine(task):
    return algorithms.fedavg(task)

  mine.__module__ = "my_methods"
  monkeypatch.setitem(algorithms.METHODS, "mine", algorithms.Method(mine, "", "global"))
  assert config.program("methods", ["fedavg", "ap_fl", "krum"]) == "python -m experiments.methods"
  called = "python -c 'import my_methods; from experiments import methods; methods.command_line()'"
  assert config.program("methods", ["fedavg", "mine"]) == called
