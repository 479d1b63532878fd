"""The table that ends a run."""

import json

import pytest

from apfl_jax import report
from apfl_jax.report import tables

KEYS = ("mean", "dropped", "present", "monopolists", "worst_decile")
HEAD = {"algorithm": "ditto", "dataset": "emnist", "num_clients": 1_000_000, "rounds": 400, "seed": 3}


def body(text):
  return [line for line in text.splitlines() if line.startswith(("global model", "personal models"))]


def test_every_number_is_under_its_column():
  summary = HEAD | {
    "global_accuracy": dict(zip(KEYS, (0.11, 0.12, 0.13, 0.14, 0.15), strict=True)) | {"std": 0.77},
    "personal_accuracy": dict(zip(KEYS, (1.0, 0.22, 0.23, 0.2449, 0.0), strict=True)),
    "pooled_accuracy": {"global_model": 0.31, "personal_mean": 0.32, "personal_dropped": 0.33},
  }
  shared, personal = body(report.table(summary))
  assert shared.split()[2:] == ["11.0", "12.0", "13.0", "14.0", "15.0", "31.0", "31.0"]
  assert personal.split()[3:] == ["100.0", "22.0", "23.0", "24.5", "0.0", "32.0", "33.0"]
  header = next(line for line in report.table(summary).splitlines() if "monopolists" in line)
  for column, value in (("monopolists", "14.0"), ("worst 10 %", "15.0"), ("present", "13.0")):
    assert header.index(column) + len(column) == shared.index(value) + len(value)


@pytest.mark.parametrize("nothing", [{}, {"personal_accuracy": None}, {"personal_accuracy": {"mean": None}}])
def test_what_is_null_or_missing_is_a_dash(nothing):
  for line in body(report.table(HEAD | nothing)):
    assert line.split()[-7:] == ["-"] * 7


def test_pooled_accuracy_of_dropped_clients_is_a_dash_where_nobody_dropped():
  pooled = {"global_model": 0.31, "personal_mean": 0.32, "personal_dropped": None}
  shared, personal = body(report.table(HEAD | {"pooled_accuracy": pooled}))
  assert shared.split()[-2:] == ["31.0", "-"] and personal.split()[-2:] == ["32.0", "-"]


def test_a_table_of_figures_read_out_with_the_prior_says_so():
  plain, prior = (report.table(HEAD | {"readout": readout}) for readout in ("plain", "prior"))
  added = prior.removeprefix(plain)
  assert "label prior" in added and "test time" in added
  assert max(map(len, added.splitlines())) <= 100


def test_fits_a_terminal_however_long_the_names(ap_fl):
  summary = json.loads((ap_fl / "summary.json").read_text())
  for names in ({}, {"algorithm": "m" * 80, "dataset": "d" * 80}):
    lines = report.table(summary | names).splitlines()
    assert max(map(len, lines)) <= 100
    assert len({len(line) for line in lines[1:]}) == 1  # aligned


def test_percent():
  assert tables.percent(0.12349) == "12.3" and tables.percent(float("nan")) == tables.percent(None) == "-"
