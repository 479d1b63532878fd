"""Verdicts on made-up runs, what is run for which claim, and the binary without running anything."""

import json

import numpy as np
import pytest

from apfl_jax import algorithms
from apfl_jax.errors import InputError
from apfl_jax.report import run, tables
from experiments import claims, config, criteria, fronts
from experiments.criteria import CLAIMS, FAILS, HOLDS, NOT_MEASURED, ONE_SEED, REPORTED, TIE, Found, of, told
from tests import binaries

SEEDS = (0, 1, 2, 3, 4)
NOISE = (0.0, 0.004, -0.004, 0.002, -0.002)


def found(
  own=0.9,
  *,
  raw=0.5,
  pooled=0.6,
  unseen=0.5,
  lost=3,
  share=0.4,
  flops=1e12,
  left=0.5,
  others=0.7,
  curve=(),
  clients=(),
  less_balanced=0.0,
  samples=None,
  shift=0.0,
):
  """A run in which every group has the same accuracies, but for a shift that is the seed's."""
  bars = lambda value: dict.fromkeys(("mean", "dropped", "present", "monopolists"), value + shift)
  spread = {"each": [left + shift] * 2 + [others + shift] * 3}
  summary = {
    "personal_accuracy": bars(own),
    "reweighted_accuracy": bars(own),
    "global_accuracy": bars(raw),
    "pooled_accuracy": {"personal_dropped": pooled + shift, "global_model": pooled + shift},
    "unseen": {"restricted_accuracy": unseen + shift, "classes": list(range(lost))},
    "cost": {"generator_flops": flops, "generator_share": share},
    "recall": {"global_model": spread, "personal": spread},
    "monopolistic_classes": [0, 1],
    "samples": samples,
    "privacy": {"closer": 0.5, "distance_auc": 0.51, "loss_auc": 0.52},
  }
  accuracy = np.array([value for value, *_ in clients], float)
  flags = lambda place: np.array([bool(row[place]) for row in clients], bool)
  blank = dict.fromkeys(run.Clients._fields, np.zeros(len(clients)))
  blank |= {"dropped": flags(1), "monopolist": flags(2)}
  people = run.Clients(**blank | {"personal_accuracy": accuracy, "reweighted_accuracy": accuracy - less_balanced})
  lines = [{"round": 5 * (i + 1), "personal_accuracy": value} for i, value in enumerate(curve)]
  return Found(summary, people, lines)


def runs_of(**settings):
  """The same run on five seeds, give or take."""
  return {seed: found(shift=shift, **settings) for seed, shift in zip(SEEDS, NOISE, strict=True)}


def verdicts(id, evidence):
  return [row.verdict for row in CLAIMS[id].judge(evidence)]


@pytest.mark.parametrize(
  ("differences", "verdict"),
  [
    ([0.05, 0.06, 0.04], HOLDS),
    ([0.05, 0.06, -0.04], TIE),
    ([-0.05, -0.06, -0.04], FAILS),
    ([0.01, 0.01, 0.01], HOLDS),  # at the threshold
    ([0.5], ONE_SEED),  # which decides nothing
    ([], NOT_MEASURED),
  ],
)
def test_the_interval_decides(differences, verdict):
  sample = criteria.paired(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
  assert criteria.decide(sample, 0.01) == verdict
  assert criteria.decide(None, 0.01) == NOT_MEASURED


@pytest.mark.parametrize(("value", "verdict"), [(0.0, FAILS), (1e-6, HOLDS), (-1e-6, FAILS)])
def test_what_has_no_effect_is_not_above_nothing(value, verdict):
  sample = criteria.paired(dict.fromkeys(SEEDS, value), dict.fromkeys(SEEDS, 0.0))
  assert criteria.decide(sample, 0.0, strict=True) == verdict


def test_of_several_the_worst_stands():
  assert criteria.worst([HOLDS, TIE, HOLDS]) == TIE and criteria.worst([TIE, FAILS]) == FAILS == criteria.worst(
    [ONE_SEED, FAILS]
  )
  assert criteria.worst([HOLDS, NOT_MEASURED]) == NOT_MEASURED == criteria.worst([])


def test_a1_takes_the_rival_that_comes_nearest():
  evidence = {of("ap_fl"): runs_of(own=0.9)} | {variant: runs_of(raw=0.4) for variant in criteria.RAW}
  (row,) = CLAIMS["A1"].judge(evidence | {of("mifa"): runs_of(raw=0.7)})
  assert row.verdict == HOLDS and "against mifa" in row.measured and "+20.0 points" in row.measured
  assert verdicts("A1", evidence | {of("mifa"): runs_of(raw=0.85)}) == [FAILS]
  assert verdicts("A1", evidence | {of("mifa"): {}}) == [NOT_MEASURED]


def test_a2_no_worse_than_the_best_and_better_than_the_median():
  rivals = {variant: runs_of(own=0.8) for variant in criteria.PERSONAL} | {of("ditto"): runs_of(own=0.905)}
  assert verdicts("A2", {of("ap_fl"): runs_of(own=0.9)} | rivals) == [HOLDS, HOLDS]
  assert verdicts("A2", {of("ap_fl"): runs_of(own=0.85)} | rivals) == [FAILS, HOLDS]
  assert verdicts("A2", {of("ap_fl"): runs_of(own=0.7)} | rivals) == [FAILS, FAILS]
  assert verdicts("A2", {of("ap_fl"): runs_of(own=0.8)} | rivals) == [FAILS, FAILS]  # not better: the same


def skewed(name, own, pooled):
  """A method whose accuracies go along a line from alpha 10 to .05."""
  variants = criteria._skewed(name).values()
  between = lambda ends: np.linspace(*ends, len(variants))
  steps = zip(variants, between(own), between(pooled), strict=True)
  return {variant: runs_of(own=a, raw=a, pooled=b) for variant, a, b in steps}


def test_a3_compares_falls_and_spans():
  rivals = {}
  for name in ("fedavg", "fedprox", "fedgen"):
    rivals |= skewed(name, (0.8, 0.5), (0.8, 0.5))
  assert verdicts("A3", rivals | skewed("ap_fl", (0.85, 0.95), (0.8, 0.7))) == [HOLDS, HOLDS, HOLDS]
  assert verdicts("A3", rivals | skewed("ap_fl", (0.5, 0.9), (0.8, 0.4))) == [HOLDS, FAILS, FAILS]
  assert verdicts("A3", rivals) == [NOT_MEASURED] * 3


def test_a4_and_the_summary_page_share_a_ratio():
  twin, there = {"monopolistic_classes": 0}, {"monopolistic_classes": 0, "dropout": "none"}
  evidence = {
    of("ap_fl"): runs_of(own=0.9),
    of("ap_fl", **twin): runs_of(own=0.93),
    of("ap_fl", **there): runs_of(own=0.95),
    of("fedavg", **twin): runs_of(raw=0.5),
    of("fedavg", **there): runs_of(raw=0.9),
  }
  assert verdicts("A4", evidence) == [HOLDS, FAILS, HOLDS]
  assert [row.verdict for row in CLAIMS["R"].judge(evidence)] == [NOT_MEASURED, HOLDS, NOT_MEASURED]
  assert "unverified" in CLAIMS["R"].judge(evidence)[1].claim


def test_a5_a12_and_harm_read_their_groups():
  evidence = {of("ap_fl"): runs_of(own=0.9), of("fedavg"): runs_of(raw=0.6), of("fedavg_ft"): runs_of(own=0.95)}
  assert verdicts("A5", evidence) == [HOLDS, FAILS]
  few = {"dropped_examples": 20}
  assert verdicts("A12", {of("ap_fl", **few): runs_of(own=0.8), of("local", **few): runs_of(own=0.75)}) == [HOLDS]
  with_it = {seed: found(clients=[(0.9, 1, 0), (0.5, 1, 0), (0.7, 0, 0), (0.6, 0, 0)]) for seed in SEEDS}
  without = {seed: found(clients=[(0.9, 1, 0), (0.6, 1, 0), (0.6, 0, 0), (0.6, 0, 0)]) for seed in SEEDS}
  (row,) = CLAIMS["H"].judge({of("ap_fl"): with_it, of("ap_fl", ap_fl_beta=0.0): without})
  assert (
    row.verdict == REPORTED
    and row.measured.startswith("25.0 % of the clients")
    and "worst client -10.0" in row.measured
  )


def test_a6_has_controls_and_costs_nothing():
  kinds = {kind: criteria._ZERO_SHOT[kind] for kind in ("attributes", "onehot", "random")}
  evidence = {kinds["attributes"]: runs_of(unseen=0.6), criteria._NO_ZERO_SHOT: runs_of()}
  evidence |= {kinds[kind]: runs_of(unseen=0.35) for kind in ("onehot", "random")}
  assert verdicts("A6", evidence) == [HOLDS, HOLDS]
  assert verdicts("A6", evidence | {kinds["onehot"]: runs_of(unseen=0.65)}) == [FAILS, HOLDS]
  assert verdicts("A6", evidence | {kinds["attributes"]: runs_of(unseen=0.3, own=0.8)}) == [FAILS, FAILS]
  assert verdicts("A6", evidence | {kinds["onehot"]: runs_of(unseen=0.6)})[0] == FAILS
  # Among five classes chance is a fifth.
  blank = {variant: runs_of(unseen=0.1) for variant in (kinds["onehot"], kinds["random"])}
  assert verdicts("A6", evidence | blank | {kinds["attributes"]: runs_of(unseen=0.25, lost=5)})[0] == HOLDS
  assert verdicts("A6", evidence | blank | {kinds["attributes"]: runs_of(unseen=0.25)})[0] == FAILS


def test_a7_bad_samples():
  noise, local, friend, coupled, *alone = CLAIMS["A7"].variants
  evidence = {noise: runs_of(own=0.9), local: runs_of(own=0.9), friend: runs_of(own=0.8), coupled: runs_of(own=0.89)}
  evidence |= dict(zip(alone, evidence.values(), strict=True))
  assert verdicts("A7", evidence) == [HOLDS] * 6
  assert verdicts("A7", evidence | {noise: runs_of(own=0.85)}) == [FAILS, HOLDS, FAILS, HOLDS, HOLDS, HOLDS]
  assert verdicts("A7", evidence | {alone[0]: runs_of(own=0.85)}) == [HOLDS, HOLDS, HOLDS, FAILS, HOLDS, FAILS]
  assert dict(friend.changes)["ap_fl_lambda_base"] == 0.0 and dict(local.changes)["ap_fl_lambda_head"] == 1.0


def test_a8_counts_rounds_to_a_level():
  one = found(curve=(0.5, 0.7, 0.9))
  assert [criteria.rounds_to(one, level) for level in (0.4, 0.7, 0.95)] == [5, 10, 20]
  mine, theirs = (criteria._CURVES[name] for name in ("ap_fl", "fedavg_ft"))
  slow = runs_of(own=0.9, curve=(0.6, 0.7, 0.8, 0.9))
  assert verdicts("A8", {mine: runs_of(curve=(0.6, 0.9, 0.9, 0.9)), theirs: slow}) == [HOLDS]
  assert verdicts("A8", {mine: runs_of(curve=(0.1, 0.2, 0.3, 0.4)), theirs: slow}) == [FAILS]
  assert verdicts("R", {mine: runs_of(curve=(0.6, 0.9, 0.9, 0.9)), theirs: slow})[2] == HOLDS


def test_a9_leaves_out_present_clients_and_monopolists():
  away, there = CLAIMS["A9"].variants
  rows = [(0.9, 1, 0), (0.2, 1, 1), (0.1, 0, 0), (np.nan, 1, 0)]
  twin = [(0.9, 0, 0), (0.9, 0, 0), (0.9, 0, 0), (0.9, 0, 0)]
  evidence = {away: runs_of(clients=rows), there: runs_of(clients=twin)}
  assert verdicts("A9", evidence) == [HOLDS, HOLDS, NOT_MEASURED]
  elsewhere = {away: runs_of(clients=rows, less_balanced=0.1)}
  assert verdicts("A9", evidence | elsewhere) == [HOLDS, FAILS, NOT_MEASURED]
  worse = [(0.8, *rest) for _, *rest in rows]
  assert verdicts("A9", evidence | {away: runs_of(clients=worse)})[:2] == [FAILS, FAILS]


def test_a10_tells_the_mask_from_the_memory():
  left = criteria._LEFT
  evidence = {
    left["FedAvg"]: runs_of(left=0.1, others=0.8),
    left["FedAvg + mask"]: runs_of(left=0.6, others=0.8),
    left["AP-FL + mask"]: runs_of(left=0.6, others=0.8),
    left["AP-FL + mask + memory"]: runs_of(left=0.7, others=0.7),
  }
  assert verdicts("A10", evidence) == [HOLDS, FAILS, HOLDS, HOLDS, HOLDS]


def test_a11_compares_fronts():
  evidence = {}
  for few in (False, True):
    for variant, (method, words) in criteria._front_variants(few).items():
      ours = {"ap_fl": 0.62, "ap_fl, tier s2": 0.615, "ap_fl, matched": 0.61}
      evidence[variant] = runs_of(own=0.9, pooled=ours.get(method, 0.5) if "rho" in words else 0.5)
  rows = CLAIMS["A11"].judge(evidence)
  assert {row.verdict for row in rows} == {HOLDS}
  # What another setting brings is not the generator's: its controls have the default one alone, but for `matched`.
  elsewhere = {of("ap_fl", **more): runs_of(own=0.9, pooled=0.5) for more in criteria._READOUTS}
  found = [row.verdict for row in CLAIMS["A11"].judge(evidence | elsewhere)]
  assert [place for place, verdict in enumerate(found[:31]) if verdict == FAILS] == [24, 26, 27, 28]
  rival = of("ditto", ditto_proximal_weight=1.0)
  worse = [row.verdict for row in CLAIMS["A11"].judge(evidence | {rival: runs_of(own=0.9, pooled=0.7)})]
  assert [place for place, verdict in enumerate(worse) if verdict == FAILS] == [
    4 * front + place for front in range(6) for place in (0, 3)
  ]
  rival = of("ditto", ditto_proximal_weight=1.0, readout="prior")  # counts for nothing where the read-out is plain
  worse = [row.verdict for row in CLAIMS["A11"].judge(evidence | {rival: runs_of(own=0.9, pooled=0.7)})]
  assert [place for place, verdict in enumerate(worse) if verdict == FAILS] == [0, 3, 4, 7, 8, 11]
  even = {v: runs_of(own=0.9, pooled=0.5) for v in evidence}
  # On each other's fronts, ahead of nothing.
  assert [row.verdict for row in CLAIMS["A11"].judge(even)[:31]] == ([HOLDS] + [FAILS] * 3) * 6 + [FAILS] * 7
  assert CLAIMS["A11"].judge(evidence | {rival: {}})[0].verdict == HOLDS  # other variants of it are there
  out_of_reach = CLAIMS["A11"].judge(evidence | {rival: runs_of(own=0.99, pooled=0.3)})
  assert out_of_reach[3].measured.endswith("(does not get there on 5 of 5 seeds)")
  assert out_of_reach[0].verdict == FAILS and out_of_reach[1].verdict == FAILS  # nobody else gets there


def test_the_ledger_decides_what_is_cheap():
  tenth = criteria._CHEAP["a tenth of the steps"]
  evidence = {of("ap_fl"): runs_of(flops=1e12), tenth: runs_of(own=0.895, flops=1e11)}
  rows = CLAIMS["C"].judge(evidence)
  assert [row.verdict for row in rows] == [REPORTED, HOLDS, *[NOT_MEASURED] * 3]
  assert rows[0].measured == "40.0 %" and "10.0 % of the FLOPs" in rows[1].measured
  assert CLAIMS["C"].judge(evidence | {tenth: runs_of(flops=2e11)})[1].verdict == FAILS


def test_samples_are_judged_by_what_they_teach():
  section = {
    "agreement_recognised": {"mean": 0.9, "least": 0.7, "each": [1.0, None, 0.7, 0.8]},
    "agreement_among_recognised": {"least": 0.85},
    "judge_recall": {"each": [0.99, 0.99, 0.6, 0.83]},
    "teacher": 0.85,
    "tstr": {"mean": 0.7},
    "trust": {"correlation": 0.3},
  }
  judged = {
    criteria._JUDGED["default"]: runs_of(samples=section, own=0.8, pooled=0.5),
    criteria._JUDGED["tier s2"]: runs_of(samples=section, own=0.79, pooled=0.6),
  }
  rows = CLAIMS["J"].judge(judged)
  by_claim = {row.claim: row for row in rows}
  whole, each, among, as_real = (row for row in rows if row.claim == "samples are of their class (default)")
  assert (whole.verdict, each.verdict, among.verdict) == (HOLDS, FAILS, HOLDS)
  assert (as_real.measured, as_real.verdict) == ("-3.0 points", HOLDS)
  assert by_claim["samples teach a fresh network (default)"].verdict == FAILS
  assert by_claim["samples are of their class (class means)"].verdict == NOT_MEASURED
  assert by_claim["trust foretells the judge (default)"].measured == "0.3"
  worth = "samples are worth more to personal models than the default's"
  own, pooled = (row for row in rows if row.claim == f"{worth} (tier s2)")
  assert (own.measured, own.verdict) == ("-1.0 points", FAILS)
  assert (pooled.measured, pooled.verdict) == ("+10.0 points", HOLDS)
  assert f"{worth} (default)" not in by_claim


def test_every_claim_can_be_judged_without_any_run():
  rows = claims.judged(CLAIMS, {})
  assert {row.verdict for row in rows} == {NOT_MEASURED}
  assert all(row.measured for row in rows)
  assert {row.id for row in rows} == set(CLAIMS)
  assert tables.markdown(claims.grid(rows)).count("\n") == len(rows) + 1


def test_runs_are_shared_and_settings_that_are_not_there_are_left_out(monkeypatch):
  configs, names = claims.plan(["A1", "A2", "A5"], [3, 4], "digits", {"rounds": 7, "gpfl_decay": 0.5})
  each = {variant for id in ("A1", "A2", "A5") for variant in CLAIMS[id].variants}
  assert len(configs) == 2 * len(each) == len({tuple(sorted(c.identity())) for c in configs.values()})
  assert all(config.rounds == 7 for config in configs.values())
  assert configs["gpfl-3"].settings["decay"] == 0.5
  assert names["ap_fl-3"] == (of("ap_fl"), 3)
  every, _ = claims.plan(CLAIMS, [0], "digits", {})
  assert len({tuple(sorted(c.identity())) for c in every.values()}) == len(every)
  assert not criteria.missing(of("ap_fl", ap_fl_beta=0.0, dropout="late"))
  assert criteria.missing(of("ap_fl", ap_fl_nothing=1)) == "--ap_fl_nothing=1"
  assert criteria.missing(of("ap_fl", ap_fl_interpolation="magic")) == "--ap_fl_interpolation=magic"
  unknown = criteria.Claim((of("ap_fl", ap_fl_nothing=1),), CLAIMS["A1"].judge)
  monkeypatch.setitem(CLAIMS, "A1", unknown)
  assert claims.plan(["A1"], [0], "digits", {}) == ({}, {})
  assert claims.judged(["A1"], {})[0].measured == "needs --ap_fl_nothing=1"


def test_variants_change_what_the_scale_says():
  made = claims.make(of("ap_fl", ap_fl_rho=1.0, alpha=0.5), 2, "fashion_mnist", {"data_dir": "/d", "alpha": 0.3})
  assert (made.dataset, made.num_clients, made.alpha, made.settings["rho"], made.seed) == (
    "fashion_mnist",
    20,
    0.5,
    1.0,
    2,
  )
  given = {"local_steps": 10, "fedavg_ft_head_only": True, "gpfl_decay": 0.5}
  for name, settings in (("local", {}), ("fedavg", {}), ("fedavg_ft", {"head_only": True}), ("gpfl", {"decay": 0.5})):
    plain = claims.make(of(name), 0, "digits", {}).settings
    made = claims.make(of(name), 0, "digits", given)
    assert made.local_steps == 10 and made.settings == plain | settings
  assert told(of("local", local_steps=3)) == "local+local_steps=3"
  for scale in claims.SCALES:
    assert set(claims.SCALES[scale].settings) <= {field.name for field in config.fields()}


def test_settings_that_variants_set_themselves_are_told():
  variants = [of("fedavg"), of("fedavg", rounds=80), of("ap_fl", rounds=120), of("ap_fl", rounds=80), of("fedavg")]
  assert claims.overruled(variants, {"rounds": 80, "alpha": 0.3}) == [
    "note: 1 of 4 variants set rounds themselves (120), not to 80"
  ]
  for id, name in (("A10", "leave_at"), ("A3", "alpha")):
    assert len(claims.overruled(CLAIMS[id].variants, {name: 0.7})) == 1
  assert not claims.overruled(CLAIMS["A5"].variants, {"rounds": 3})


def test_the_estimate_learns_from_finished_runs():
  configs, _ = claims.plan(["A5"], [0, 1], "digits", {})
  guess = claims.estimate(configs, "digits", {})
  assert guess == pytest.approx(2 * 8 * (4 + 1 + 1))
  assert claims.estimate(configs, "digits", {"ap_fl-0": 100.0}) == pytest.approx(100 + 4 * 8)


def test_what_is_written_can_be_read(tmp_path):
  evidence = {variant: runs_of() for variant in [*CLAIMS["A5"].variants, *criteria._front_variants(False)]}
  claims.write(tmp_path, claims.judged(["A5"], evidence), evidence, {})
  assert not list(tmp_path.glob("*.png"))  # fronts belong to A11
  rows = claims.judged(["A5", "A11"], evidence)
  text = claims.write(tmp_path, rows, evidence, {"command": "made up"})
  content = json.loads((tmp_path / "claims.json").read_text())
  assert [row["verdict"] for row in content["claims"]] == [row.verdict for row in rows]
  assert len(content["claims"][0]["numbers"]["differences"]) == len(SEEDS)
  assert list(content["fronts"]) == ["dropped clients"] and "**holds**" in text and "| ditto | 0.3, prior |" in text
  assert (tmp_path / "fronts_all.png").read_bytes().startswith(b"\x89PNG") and not (
    tmp_path / "fronts_few.png"
  ).exists()
  points = fronts.by_method(criteria.front_points(evidence, few=False))
  assert len(points["ditto"]) == 8 and len(points["ap_fl"]) == 18


def test_claims_are_parsed():
  assert claims.parse_claims("all") == list(CLAIMS)
  assert claims.parse_claims(" A5, A1,A5") == ["A5", "A1"]
  for text in ("", "A1,B2"):
    with pytest.raises(InputError, match="claims: got '(B2|)', accepted are some of A1, .*, or all or help alone"):
      claims.parse_claims(text)


def test_the_binary_lists_its_runs(tmp_path):
  flags = ("--dry_run", f"--output={tmp_path}", "--claims=A5,A7", "--seeds=0,1", "--rounds=3")
  result = binaries.run("experiments.claims", *flags)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert {"ap_fl-0", "fedavg-1", "fedavg_ft-1"} <= set(lines)
  there = "source" in algorithms.settings("ap_fl")
  assert any("--ap_fl_source=noise is not there" in line for line in lines) != there
  assert "runs, 0 finished" in lines[-1] and not list(tmp_path.iterdir())


def test_settings_of_wrappers_reach_the_runs():
  given = {"wrappers": "krum", "krum_byzantine": 3}
  made = claims.make(of("fedavg"), 1, "digits", given)
  assert made.wrapper_settings["krum"]["byzantine"] == 3
  assert not claims.make(of("fedavg"), 1, "digits", {"krum_byzantine": 3}).wrapper_settings


def test_help_tells_what_each_claim_says():
  lines = claims.listed().partition("\n\n")[0].splitlines()
  assert {line.split()[0] for line in lines} == set(CLAIMS) and len(lines) == len(set(lines))
  assert any(line.split(maxsplit=1) == ["A1", "better than global models under dropout"] for line in lines)
