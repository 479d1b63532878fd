"""The main binary, as a person runs it: what it leaves, that it repeats and resumes to the bit, how it refuses."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import job
from experiments.config import Config
from tests import binaries

TINY = (
  "--dataset=fast",
  "--model=mlp",
  "--num_clients=6",
  "--alpha=0.5",
  "--drop_rate=0.5",
  "--monopolistic_classes=1",
  "--rounds=8",
  "--eval_every=2",
  "--checkpoint_every=2",
  "--local_steps=5",
  "--personal_steps=20",
  "--pooled_examples=80",
  "--progress=false",
  "--devices=1",
  "--ap_fl_friend_steps=10",
  "--ap_fl_generator_steps=2",
  "--ap_fl_generator_batch=20",
  "--ap_fl_generator_warmup=0.1",
  "--ap_fl_unseen_warmup=0.3",
  "--ap_fl_synthetic_examples=32",
)


def train(*flags: str, cwd: Path = binaries.ROOT) -> subprocess.CompletedProcess[str]:
  return binaries.run("experiments.train", *flags, cwd=cwd)


def numbers(workdir: Path) -> dict:
  """All that the seed determines."""
  summary = json.loads((workdir / "summary.json").read_text())
  for name in ("seconds", "compile_seconds", "peak_memory_bytes", "planned_memory_bytes", "rounds_of"):
    del summary[name]
  with np.load(workdir / "arrays.npz") as file:
    arrays = {name: file[name].tobytes() for name in file}
  return {
    "metrics": (workdir / "metrics.jsonl").read_bytes(),
    "clients": (workdir / "clients.csv").read_bytes(),
    "summary": summary,
    "arrays": arrays,
  }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "first"
  result = train(f"--workdir={workdir}", *TINY)
  assert result.returncode == 0, result.stderr
  return workdir, result.stdout


REMEMBERING = "--algorithm=ditto"  # its clients have a memory, and it compiles soon


@pytest.fixture(scope="module")
def unreported(tmp_path_factory):
  """A run where matplotlib is missing."""
  folder = tmp_path_factory.mktemp("runs")
  (folder / "matplotlib.py").write_text("raise ModuleNotFoundError('no plots here', name='matplotlib')")
  return folder / "ditto", train(f"--workdir={folder}/ditto", *TINY, REMEMBERING, cwd=folder)


@pytest.fixture(scope="module")
def remembering(unreported):
  workdir, result = unreported
  assert result.returncode == 0, result.stderr
  return workdir


def test_a_run_leaves_all_that_the_design_lists(finished):
  workdir, _ = finished
  files = ("flags.txt", "metrics.jsonl", "timings.jsonl", "clients.csv", "summary.json", "report.html", "checkpoints")
  assert all((workdir / name).exists() for name in files)
  assert list(workdir.glob("*.png"))
  assert not [path for path in workdir.iterdir() if path.name.startswith(".")]  # no temporary files
  summary = json.loads((workdir / "summary.json").read_text())
  wanted = {
    "personal_accuracy": "mean weighted_mean std worst_decile dropped present monopolists",
    "pooled_accuracy": "global_model personal_mean personal_dropped",
    "unseen": "classes accuracy seen_accuracy harmonic_mean restricted_accuracy",
    "cost": "local_flops generator_flops server_flops personalize_flops evaluation_flops bytes_up bytes_down"
    " generator_share break_even_rounds",
    "reweighted_accuracy": "mean dropped gini jain dropped_gap monopolist_gap",
    "recall": "global_model personal",
  }
  assert {"algorithm", "dataset", "num_clients", "rounds", "seed", "device", "versions", "commit"} <= set(summary)
  for name, keys in wanted.items():
    assert set(keys.split()) <= set(summary[name]), name
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["round"] for line in lines] == [2, 4, 6, 8]
  assert lines[0]["personal_accuracy"] is None
  assert lines[-1]["personal_accuracy"] == pytest.approx(summary["personal_accuracy"]["mean"])
  for column in ("personal_accuracy", "reweighted_accuracy"):
    each = [float(row[column]) for row in csv.DictReader((workdir / "clients.csv").open())]
    assert lines[0][f"{column}_each"] is None and lines[-1][f"{column}_each"] == pytest.approx(each)
  assert lines[-1]["global_recall"] == pytest.approx(summary["recall"]["global_model"]["each"])
  assert all(line["present"] == line["arrived"] == 3 for line in lines)


def test_the_clients_table_agrees_with_the_summary(finished):
  workdir, _ = finished
  rows = list(csv.DictReader((workdir / "clients.csv").open()))
  summary = json.loads((workdir / "summary.json").read_text())
  assert len(rows) == 6
  dropped = [row for row in rows if row["dropped"] == "1"]
  assert len(dropped) == 3
  assert all((row["rounds_present"] == "0") == (row["dropped"] == "1") for row in rows)
  mean = lambda rows, name: sum(float(row[name]) for row in rows) / len(rows)
  assert mean(rows, "personal_accuracy") == pytest.approx(summary["personal_accuracy"]["mean"])
  assert mean(dropped, "personal_accuracy") == pytest.approx(summary["personal_accuracy"]["dropped"])
  assert mean(dropped, "pooled_accuracy") == pytest.approx(summary["pooled_accuracy"]["personal_dropped"])
  assert mean(rows, "reweighted_accuracy") == pytest.approx(summary["reweighted_accuracy"]["mean"])
  for name in ("local_flops", "personalize_flops", "bytes_up", "bytes_down"):
    assert sum(float(row[name]) for row in rows) == pytest.approx(summary["cost"][name], rel=1e-6)
  assert all((float(row["local_flops"]) == 0) == (row["dropped"] == "1") for row in rows)
  with np.load(workdir / "arrays.npz") as file:
    recalls, scored = file["personal_recall"], file["scored"]
  assert scored.tolist() == list(range(6))
  for row, recall in zip(rows, recalls, strict=True):
    held = [int(c) for c in row["classes"].split()]
    assert min(recall[held]) - 1e-6 <= float(row["reweighted_accuracy"]) <= max(recall[held]) + 1e-6
    assert np.nanmean(recall) == pytest.approx(float(row["pooled_accuracy"]))  # as many examples of each class
  # A monopolistic class is held by dropped clients only, so the federation never saw it.
  held = [{int(c) for c in row["classes"].split()} for row in rows]
  here = set.union(*(h for h, row in zip(held, rows, strict=True) if row["dropped"] == "0"))
  assert summary["monopolistic_classes"] == summary["unseen"]["classes"] == sorted(set.union(*held) - here)
  assert len(summary["monopolistic_classes"]) >= 1


def test_the_clients_table_tells_what_they_chose(finished):
  workdir, _ = finished
  rows = list(csv.DictReader((workdir / "clients.csv").open()))
  assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("lambda_base", "lambda_head"))
  assert all(row["guard"] in "0123" and np.isfinite(float(row["barrier"])) for row in rows)
  with np.load(workdir / "arrays.npz") as file:
    assert file["surface"].shape == (6, 6)
  assert (workdir / "surface.png").is_file()


def test_it_ends_with_the_table(finished):
  _, output = finished
  assert "global model" in output
  assert "personal models (ap_fl)" in output
  assert "report.html" in output


def test_a_finished_run_is_left_as_it_is(finished):
  workdir, output = finished
  stamp = lambda: {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  before = stamp()
  result = train(f"--workdir={workdir}", *TINY)
  assert result.returncode == 0, result.stderr
  assert stamp() == before
  assert result.stdout == output


@pytest.mark.slow  # devices_test.py has two processes of one device each
def test_two_devices_give_the_same(tmp_path):
  for name, devices in (("one", 1), ("two", 2)):
    flags = (*TINY, "--algorithm=fedavg_ft", "--report=false", f"--devices={devices}")
    result = train(f"--workdir={tmp_path}/{name}", *flags)
    assert result.returncode == 0, result.stderr
  one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
  assert two["device"].startswith("2 x")
  for name in ("personal_accuracy", "global_accuracy"):
    assert two[name] == pytest.approx(one[name], abs=1e-3, nan_ok=True)


@pytest.mark.slow  # to compile, twice
def test_two_devices_match_images_and_compile_once(tmp_path):
  """Batched LAPACK calls, of which there were some, wait there for each other."""
  matched = ("--ap_fl_source=matched", "--ap_fl_tier=s2", "--ap_fl_matching_steps=2", "--rounds=6", "--eval_clients=1")
  flags = (f"--workdir={tmp_path}/run", *TINY, *matched, "--devices=2", "--report=false")
  result = binaries.run("experiments.train", *flags, timeout=300)
  assert result.returncode == 0, result.stderr
  assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"].startswith("2 x")
  timings = [json.loads(line) for line in (tmp_path / "run" / "timings.jsonl").read_text().splitlines()]
  assert [row["compilations"] for row in timings[1:-1]] == [0, 0, 0]


def test_a_run_killed_before_its_report_gets_it(finished, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(finished[0], copy)
  (copy / "report.html").unlink()
  result = train(f"--workdir={copy}", *TINY)
  assert result.returncode == 0, result.stderr
  assert (copy / "report.html").is_file()


def kill_in_the_middle(workdir: Path, *flags: str) -> None:
  """Starts a run and kills it after its first checkpoint and before its end."""
  process = binaries.start("experiments.train", *flags, f"--workdir={workdir}", output=workdir.parent)
  try:
    limit = time.monotonic() + 300
    complete = lambda: [p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    while not complete():
      assert process.is_alive(), "ended before its first checkpoint"
      assert time.monotonic() < limit
      time.sleep(0.01)
  finally:
    process.kill()
    process.join()
  assert not (workdir / "summary.json").exists()


def go_on(workdir: Path, *flags: str) -> None:
  """In a process that has hashes of its own."""
  command = [sys.executable, "-m", "experiments.train", *flags, f"--workdir={workdir}"]
  result = subprocess.run(command, cwd=binaries.ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr


def test_the_flagfile_repeats_the_run_to_the_bit_even_if_it_is_killed_and_goes_on(remembering, tmp_path):
  killed, again = tmp_path / "killed", (f"--flagfile={remembering}/flags.txt", "--devices=1", "--report=false")
  kill_in_the_middle(killed, *again)
  go_on(killed, *again)
  assert numbers(killed) == numbers(remembering)


def rounds_are_shared(workdir: Path, first: Path, *flags: str) -> None:
  """With other personal models the rounds of `first` serve as its own would; flags are those of `first` and others."""
  for name, more in (("alone", ()), ("shared", (f"--trained={first}",))):
    result = train(f"--workdir={workdir}/{name}", *flags, "--dropped_examples=4", "--report=false", *more)
    assert result.returncode == 0, result.stderr
  assert numbers(workdir / "shared") == numbers(workdir / "alone") != numbers(first)
  summary = json.loads((workdir / "shared" / "summary.json").read_text())
  assert summary["rounds_of"] == first.name
  timings = [json.loads(line) for line in (workdir / "shared" / "timings.jsonl").read_text().splitlines()]
  # Its last chunk, and twice what comes after: no round was computed again.
  assert [line["round"] for line in timings].count(summary["rounds"]) == 3
  assert timings[-2]["compilations"] == 0 < timings[-1]["compilations"]  # of the plan, of scoring


def test_the_rounds_of_another_run_give_the_same_bits(remembering, tmp_path):
  rounds_are_shared(tmp_path, remembering, *TINY, REMEMBERING, "--personal_steps=15")


@pytest.mark.slow
def test_the_rounds_of_another_run_of_ap_fl_give_the_same_bits(finished, tmp_path):
  rounds_are_shared(tmp_path, finished[0], *TINY, "--ap_fl_rho=0", "--personal_steps=15")


@pytest.mark.slow
def test_the_default_run_killed_repeated_and_judged(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  assert train(f"--workdir={whole}").returncode == 0
  kill_in_the_middle(killed)
  go_on(killed)
  assert numbers(killed) == numbers(whole)
  summary = json.loads((whole / "summary.json").read_text())
  assert summary["personal_accuracy"]["dropped"] >= summary["global_accuracy"]["dropped"] + 0.2


BAD = {
  ("--trained={tmp}",): ("trained", "no finished run"),
  ("--trained={other}",): ("trained", "other rounds", "differs"),
  ("--trained={other}", "--personalize_every=5"): ("trained", "personalize_every=0"),
  ("--algorithm=FedProx",): ("algorithm", "'FedProx' (did you mean 'fedprox'?)", "fedavg_ft"),
  ("--algorithm=ditto", "--ditto_lambda=1"): ("ditto_lambda", "no such flag", "ditto_proximal_weight"),
  ("--ap_fl_generator_step=3",): ("ap_fl_generator_step", "(did you mean 'ap_fl_generator_steps'?)"),
  ("--local_step=3",): ("local_step", "(did you mean 'local_steps'?)"),  # `local` is a method, without settings
  ("--algorithm=persafl", "--persafl_option=C"): ("persafl_option", "(did you mean 'c'?)"),
  ("--dataset=nope",): ("nope", "digits"),
  ("--dataset=mnist", "--data_dir=/nowhere"): ("data_dir", "/nowhere"),
  ("--dataset=mnist", "--data_dir={tmp}"): ("mnist", "prepare"),
  ("--flagfile={tmp}/nope.txt",): ("flagfile", "nope.txt: No such file", "flags.txt"),
  ("--alpha=0",): ("alpha", "0.0", "above 0"),
  ("--alpha=-1",): ("alpha", "-1.0", "above 0"),
  ("--alpha=nan",): ("alpha", "nan", "finite"),
  ("--alpha=much",): ("alpha", "'much'", "a number"),
  ("--rounds=0",): ("rounds", "0", "1 or more"),
  ("--rounds=2.5",): ("rounds", "'2.5'", "whole number"),
  ("--num_clients=100000",): ("100000",),
  ("--drop_rate=1.2",): ("drop_rate", "'1.2'", "0 to 1"),
  ("--drop_rate=-0.1",): ("drop_rate", "'-0.1'", "0 to 1"),
  ("--drop_rate=1",): ("drop_rate", "none of the 10 clients"),
  ("--dropout=none",): ("monopolistic_classes", "accepted is 0"),
  ("--dataset=digit",): ("dataset", "did you mean 'digits'"),
  ("--dropout=warm",): ("dropout", "'warm'", "bernoulli"),
  ("--dropout=cold,bernoulli", "--drop_rate=.1,.2,.3"): ("drop_rate", "3 rates for --dropout=cold,bernoulli"),
  ("--monopolistic_classes=10",): ("monopolistic_classes", "10"),
  ("--cohort_size=11",): ("cohort_size", "11"),
  ("--partition=pathological", "--classes_per_client=11"): ("classes_per_client", "11"),
  ("--model=resnet",): ("model", "'resnet'", "cnn_small"),
  ("--dataset=fast", "--embeddings=clip"): ("embeddings", "no clip table", "'fast'", "experiments.embed_classes"),
  ("--embeddings=attributes+words",): ("embeddings", "'words'", "onehot"),
  ("--embedding_influence=1.5",): ("embedding_influence", "1.5", "at most 1"),
  ("--client_map=vmap:0",): ("client_map", "'vmap:0'", "vmap:CHUNK"),
  ("--dropout=bernoulli", "--drop_rate=1", "--monopolistic_classes=0"): ("drop_rate", "bernoulli", "less than 1"),
  ("--dropout=regional", "--drop_rate=1", "--monopolistic_classes=0"): ("drop_rate", "regional", "less than 1"),
  ("--dropout=markov", "--drop_rate=.9", "--off_rounds=5"): ("drop_rate", "0.9", "off_rounds", "0.8"),
  ("--dropout=late", "--leave_at=1"): ("monopolistic_classes", "late", "accepted is 0"),
  ("--dropout=late", "--drop_rate=1"): ("drop_rate", "none of the 10 clients"),
  ("--leave_at=1.1",): ("leave_at", "1.1", "at most 1"),
  ("--off_rounds=.5",): ("off_rounds", "0.5", "1 or more"),
  ("--day_rounds=0",): ("day_rounds", "0.0", "above 0"),
  ("--regions=0",): ("regions", "0", "1 or more"),
  ("--trace={tmp}/trace.csv",): ("trace.csv", "--dropout"),
  ("--dropout=trace", "--trace=/nowhere.csv"): ("trace", "/nowhere.csv", "No such file"),
  ("--dropout=trace", "--trace_round=0"): ("trace_round", "0.0", "above 0"),
  ("--dropout=trace",): ("monopolistic_classes", "accepted is 0"),
  ("--speed=fast",): ("speed", "'fast'", "pareto"),
  ("--speed=uniform", "--speed_spread=1"): ("speed_spread", "1", "less than 1"),
  ("--speed_spread=5",): ("speed_spread", "5.0", "at most 4"),
  ("--ap_fl_beta=nan",): ("ap_fl_beta", "nan", "finite"),
  ("--ap_fl_beta=1.5",): ("ap_fl_beta", "1.5", "at most 1"),
  ("--ap_fl_generator_steps=-3",): ("ap_fl_generator_steps", "-3", "0 or more"),
  ("--ap_fl_friend_steps=201",): ("ap_fl_friend_steps", "201"),
  ("--ap_fl_interpolation=magic",): ("ap_fl_interpolation", "'magic'", "grid"),
  ("--algorithm=fedavg", "--wrappers=crumb"): ("wrappers", "'crumb'", "(did you mean 'krum'?)"),
  ("--algorithm=fedavg", "--wrappers=krum", "--krum_byzantine=4"): ("krum", "10 clients a round", "accepted are 11"),
  ("--algorithm=fedavg", "--wrappers=krum", "--krum_selected=0"): ("krum_selected", "0", "1 or more"),
  ("--algorithm=fedavg", "--wrappers=krum", "--clock=asynchronous"): ("wrappers", "krum", "--clock=synchronous"),
  ("--algorithm=central", "--data_on=host"): ("data_on", "'host'", "device"),
  ("--verification_classes=1",): ("verification_classes", "1", "2 to 8"),
  ("--server_wait=-1",): ("server_wait", "-1", "0 or more"),
  ("--no_such_flag=1",): ("no_such_flag",),
  ("digits",): ("digits", "not a flag"),
  ("--workdir={other}",): ("workdir", "another run"),
  ("--workdir={tmp}/file",): ("workdir", "is a file"),
  ("--workdir={full}",): ("workdir", "not empty"),
}


def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(finished, tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").write_text("")
  names = {"{tmp}": str(tmp_path), "{other}": str(finished[0]), "{full}": str(tmp_path / "full")}
  cases = []
  for flags in BAD:
    for name, value in names.items():
      flags = tuple(flag.replace(name, value) for flag in flags)
    place = () if any("--workdir" in flag for flag in flags) else (f"--workdir={tmp_path}/new",)
    cases.append([*place, *flags])
  # All in one process: starting one for each would take minutes.
  (tmp_path / "cases.json").write_text(json.dumps(cases))
  (tmp_path / "cases.py").write_text("""
import contextlib, io, json, pathlib, sys
from absl import flags
from experiments import config, train
config.define_flags()
answers = []
for case in json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()):
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  sys.argv = ["train", *case]
  code, text = 0, io.StringIO()
  with contextlib.redirect_stderr(text):
    try:
      config.main(train.main)
    except SystemExit as end:
      code = end.code
  answers.append([code, text.getvalue()])
print(json.dumps(answers))
""")
  result = binaries.run(str(tmp_path / "cases.py"))
  assert result.returncode == 0, result.stderr
  answers = json.loads(result.stdout.splitlines()[-1])
  for flags, wanted, (exit_code, text) in zip(BAD, BAD.values(), answers, strict=True):
    assert exit_code == 2, (flags, exit_code, text)
    assert len(text.splitlines()) == 1, (flags, text)
    assert all(word in text for word in wanted), (flags, text)
  assert not (tmp_path / "new").exists()


def test_help_lists_the_methods():
  result = train("--algorithm=help")
  assert result.returncode == 0
  assert {"ap_fl", "fedavg", "fedavg_ft", "local"} <= {line.split()[0] for line in result.stdout.splitlines()}


def test_it_runs_where_matplotlib_is_missing(unreported):
  workdir, result = unreported
  assert result.returncode == 0, result.stderr
  assert "apfl_jax[report]" in result.stderr
  assert (workdir / "summary.json").is_file() and not (workdir / "report.html").exists()


def test_uploads_that_are_not_finite_are_told(tmp_path, capsys):
  """Training that goes astray is not taken for absence."""
  small = {"dataset": "fast", "model": "mlp", "num_clients": 4, "partition": "iid", "monopolistic_classes": 0}
  brief = {"rounds": 2, "local_steps": 4, "personal_steps": 1, "min_size": 4, "dropout": "none"}
  quiet, programs = {"progress": False, "report": False, "checkpoint_every": 0}, job.Programs()
  run = lambda rate: job.run(
    Config(algorithm="fedavg", learning_rate=rate, workdir=str(tmp_path / f"{rate:g}"), **small, **brief, **quiet),
    programs,
  )
  run(1e30)
  said = capsys.readouterr().err.splitlines()
  assert "note: 8 uploads held numbers that are not finite, and counted as lost" in said
  assert (np.load(tmp_path / "1e+30" / "arrays.npz")["presence"] == 3).all()
  run(0.01)
  assert "not finite" not in capsys.readouterr().err
