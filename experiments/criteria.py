"""The claims that `experiments.claims` puts to the test: criteria, the runs that they need, and verdicts.

A1 to A12 are those of method 5 [O]; C is the cost of the generator, J the worth of its samples, H the harm of synthetic
data, and R are figures of a machine-written summary of the paper that nobody has verified. A verdict is a pure function
of runs. It `holds` or `fails` if the whole interval over seeds is on one side of the criterion; it is a `tie` if these
seeds do not decide, `one seed` if there is but one, which has no interval; what lacks a run is `not measured`.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from apfl_jax import algorithms, metrics
from apfl_jax.metrics import Paired
from apfl_jax.report import run
from experiments import config, fronts

HOLDS, FAILS, TIE, ONE_SEED = "holds", "fails", "tie", "one seed"
NOT_MEASURED, REPORTED = "not measured", "reported"
_ORDER = (NOT_MEASURED, FAILS, ONE_SEED, TIE, HOLDS)  # of several verdicts the first stands


class Variant(NamedTuple):
  """What is run, on every seed.

  Attributes:
    algorithm: the method.
    changes: (flag, value) of all that differs from the scale's settings, sorted.
  """

  algorithm: str
  changes: tuple[tuple[str, Any], ...] = ()


def of(algorithm: str, **changes: Any) -> Variant:
  """A method with other settings; its own are given by their flags, e.g. `ap_fl_beta=0.0`."""
  return Variant(algorithm, tuple(sorted(changes.items())))


class Found(NamedTuple):
  """A finished run.

  Attributes:
    summary: summary.json.
    clients: clients.csv.
    metrics: the lines of metrics.jsonl.
  """

  summary: dict[str, Any]
  clients: run.Clients
  metrics: list[dict[str, Any]]


Evidence = Mapping[Variant, Mapping[int, Found]]
Values = dict[int, float]  # by seed


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    id: of the claim.
    claim: what is said.
    criterion: when it holds.
    measured: what was found, in words.
    interval: of 95 %, by the bootstrap over seeds; empty where there is none.
    verdict: one of those above.
    numbers: what stands behind it, for claims.json.
  """

  id: str
  claim: str
  criterion: str
  measured: str
  interval: str
  verdict: str
  numbers: dict[str, Any]


class Claim(NamedTuple):
  """A claim.

  Attributes:
    variants: what must be run.
    judge: runs -> its rows of the table.
  """

  variants: tuple[Variant, ...]
  judge: Callable[[Evidence], list[Row]]


def told(variant: Variant) -> str:
  """A variant in a word that can name a folder."""
  said = lambda value: str(value).lower() if isinstance(value, bool) else str(value)
  short = lambda name: own_setting(variant.algorithm, name) or name
  return "+".join([variant.algorithm, *(f"{short(name)}={said(v)}" for name, v in variant.changes)])


def own_setting(algorithm: str, flag: str) -> str:
  """The method's setting that a flag sets; empty where it sets none, be it a run's or another method's."""
  if flag in {field.name for field in config.fields()}:  # `local_steps` is no setting of `local`
    return ""
  name = flag.removeprefix(f"{algorithm}_")
  return name if name != flag and name in algorithms.settings(algorithm) else ""


def missing(variant: Variant) -> str:
  """The first of its settings that this version does not take; empty if it takes all."""
  fields = {field.name for field in config.fields()}
  for name, value in variant.changes:
    if name in fields:
      continue
    setting = algorithms.settings(variant.algorithm).get(own_setting(variant.algorithm, name))
    if setting is None or (setting.limits.choices and value not in setting.limits.choices):
      return f"--{name}={value}"
  return ""


# --- from runs to numbers ---------------------------------------------------------------------------------------------


def values(evidence: Evidence, variant: Variant, *path: str) -> Values:
  """A number of summary.json by seed; seeds where it is null are left out."""
  found = {}
  for seed, one in evidence.get(variant, {}).items():
    value: Any = one.summary
    for key in path:
      value = value.get(key) if isinstance(value, dict) else None
    if value is not None:
      found[seed] = float(value)
  return found


def paired(a: Values, b: Values) -> Paired:
  """Differences on the seeds that both have."""
  seeds = [seed for seed in a if seed in b]
  return metrics.paired([a[s] for s in seeds], [b[s] for s in seeds])


def decide(difference: Paired | None, threshold: float, strict: bool = False) -> str:
  """The verdict on "at least `threshold`"; with `strict` on "above" it, which what has no effect does not pass."""
  if difference is None or difference.mean is None:
    return NOT_MEASURED
  if difference.low is None or difference.high is None:
    return ONE_SEED
  edge = threshold + (1e-9 if strict else -1e-9)
  return HOLDS if difference.low >= edge else FAILS if difference.high < edge else TIE


def worst(verdicts: Iterable[str]) -> str:
  """Of claims that must all hold."""
  return min(verdicts, key=_ORDER.index, default=NOT_MEASURED)


def against(
  own: Values, rivals: Mapping[str, Values], threshold: float, strict: bool
) -> tuple[str, Paired | None, str]:
  """(the rival that comes nearest, the difference from it, the verdict on being `threshold` above every one)."""
  found = {name: paired(own, theirs) for name, theirs in rivals.items()}
  known = {name: pair for name, pair in found.items() if pair.mean is not None}
  nearest = min(known, key=lambda name: known[name].mean or 0.0, default="")
  return nearest, known.get(nearest), worst(decide(pair, threshold, strict) for pair in found.values())


def points(value: float | None) -> str:
  """A share as points, with its sign."""
  return "–" if value is None else f"{100 * value:+.1f}"


def line(
  id: str, claim: str, criterion: str, difference: Paired | None, verdict: str, note: str = "", unit: str = "points"
) -> Row:
  """A row about a difference in points, a share in "%", or a plain number where `unit` is empty."""

  def shown(value: float | None) -> str:
    if unit == "points" or value is None:
      return points(value)
    return f"{100 * value:.1f}" if unit == "%" else f"{value:.3g}"

  known = difference is not None and difference.mean is not None
  measured = "" if difference is None or not known else f"{shown(difference.mean)} {unit}".strip()
  interval = ""
  if difference is not None and difference.low is not None:
    interval = f"{shown(difference.low)} to {shown(difference.high)}"
  numbers: dict[str, Any] = {}
  if difference is not None and known:
    numbers = difference._asdict() | {"differences": difference.differences.tolist()}
  return Row(id, claim, criterion, f"{measured} {note}".strip(), interval, verdict, numbers)


def reported(id: str, claim: str, what: str, measured: Values, unit: str, note: str = "") -> Row:
  """A row about a number that nothing is asked of."""
  shown = paired(measured, dict.fromkeys(measured, 0.0))
  return line(id, claim, what, shown, REPORTED if measured else NOT_MEASURED, note, unit)


def least(id: str, claim: str, criterion: str, a: Values, b: Values, threshold: float, *, strict: bool = False) -> Row:
  """A row about "a is at least `threshold` above b"; with `strict` more than that."""
  difference = paired(a, b)
  return line(id, claim, criterion, difference, decide(difference, threshold, strict))


def every(
  id: str,
  claim: str,
  criterion: str,
  own: Values,
  rivals: Mapping[str, Values],
  threshold: float,
  *,
  strict: bool = False,
) -> Row:
  """A row about "at least `threshold` above each of the rivals", which shows the nearest of them; see `least`."""
  nearest, difference, verdict = against(own, rivals, threshold, strict)
  return line(id, claim, criterion, difference, verdict, f"(least, against {nearest})" if nearest else "")


# --- the claims -------------------------------------------------------------------------------------------------------

AP_FL, FEDAVG, FT, LOCAL = of("ap_fl"), of("fedavg"), of("fedavg_ft"), of("local")
RAW = tuple(of(name) for name in ("fedavg", "fedprox", "scaffold", "fedgen", "fedbuff", "fedasync", "fl_fdms", "mifa"))
PERSONAL = tuple(
  of(name)
  for name in ("fedavg_ft", "ditto", "fedrep", "fedper", "adaptive_pfl", "knn_per", "gpfl", "pfedme", "per_fedavg")
)
_DROPPED, _ALL = ("personal_accuracy", "dropped"), ("personal_accuracy", "mean")
_POOLED = ("pooled_accuracy", "personal_dropped")
_TWIN = {"monopolistic_classes": 0}  # so that who stays away does not change who holds what
_NOBODY_AWAY = _TWIN | {"dropout": "none"}


def _of_each(evidence: Evidence, variants: Iterable[Variant], *path: str) -> dict[str, Values]:
  return {told(variant): values(evidence, variant, *path) for variant in variants}


def a1(evidence: Evidence) -> list[Row]:
  """Dropout, against global models as they are."""
  rivals = _of_each(evidence, RAW, "global_accuracy", "dropped")
  own = values(evidence, AP_FL, *_DROPPED)
  return [every("A1", "better than global models under dropout", "dropped clients: each +10 points", own, rivals, 0.1)]


def a2(evidence: Evidence) -> list[Row]:
  """Dropout, against personalised models."""
  own, rivals = values(evidence, AP_FL, *_DROPPED), _of_each(evidence, PERSONAL, *_DROPPED)
  best = every("A2", "no worse than the best personalised method", "dropped clients: each -1 point", own, rivals, -0.01)
  common = [seed for seed in own if all(seed in theirs for theirs in rivals.values())]
  median = {seed: statistics.median(theirs[seed] for theirs in rivals.values()) for seed in common}
  return [best, least("A2", "better than the median of them", "dropped clients: > 0", own, median, 0.0, strict=True)]


ALPHAS = (10.0, 1.0, 0.5, 0.1, 0.05)


def _skewed(algorithm: str) -> dict[float, Variant]:
  return {alpha: of(algorithm) if alpha == 0.1 else of(algorithm, alpha=alpha) for alpha in ALPHAS}


def a3(evidence: Evidence) -> list[Row]:
  """Heterogeneity."""

  def fall(algorithm: str, spread: bool, *path: str) -> Values:
    """By how much less there is at the most skewed partition, or the span over all of them, by seed."""
    by_alpha = {alpha: values(evidence, variant, *path) for alpha, variant in _skewed(algorithm).items()}
    common = [seed for seed in by_alpha[10.0] if all(seed in each for each in by_alpha.values())]
    span = lambda seed: max(v[seed] for v in by_alpha.values()) - min(v[seed] for v in by_alpha.values())
    return {seed: span(seed) if spread else by_alpha[10.0][seed] - by_alpha[0.05][seed] for seed in common}

  rows = []
  told_as = {
    "own examples": (False, _DROPPED, ("global_accuracy", "dropped")),
    "pooled examples": (False, _POOLED, ("pooled_accuracy", "global_model")),
    "own examples, max - min": (True, _DROPPED, ("global_accuracy", "dropped")),
  }
  for what, (spread, mine, theirs) in told_as.items():
    own = fall("ap_fl", spread, *mine)
    rivals = {name: fall(name, spread, *theirs) for name in ("fedavg", "fedprox", "fedgen")}
    less = {name: paired(values, own) for name, values in rivals.items()}
    known = {name: pair for name, pair in less.items() if pair.mean is not None}
    nearest = min(known, key=lambda name: known[name].mean or 0.0, default="")
    criterion = f"{what}: falls less from alpha 10 to .05 than FedAvg, FedProx, FedGen"
    verdict = worst(decide(pair, 0.0, strict=True) for pair in less.values())
    note = f"(least, against {nearest})" if nearest else ""
    rows.append(line("A3", "stable as heterogeneity grows", criterion, known.get(nearest), verdict, note))
  return rows


def _ratio(a: Values, b: Values) -> Values:
  return {seed: a[seed] / b[seed] for seed in a if seed in b and b[seed]}


def a4(evidence: Evidence) -> list[Row]:
  """The rate of dropout."""
  kept = lambda name, part: _ratio(
    values(evidence, of(name, **_TWIN), part, "mean"), values(evidence, of(name, **_NOBODY_AWAY), part, "mean")
  )
  own, theirs = kept("ap_fl", "personal_accuracy"), kept("fedavg", "global_accuracy")
  claim = "robust to 60 % dropout"
  none = dict.fromkeys(own, 0.0)
  whole = paired(own, none)
  forced = _ratio(values(evidence, AP_FL, *_ALL), values(evidence, of("ap_fl", **_NOBODY_AWAY), *_ALL))
  with_forced = paired(forced, dict.fromkeys(forced, 0.0))
  return [
    line("A4", claim, "all clients: at .6 at least .95 of what it is at 0", whole, decide(whole, 0.95), "of it", "%"),
    line(
      "A4",
      claim,
      "the same with classes that only dropped clients hold",
      with_forced,
      decide(with_forced, 0.95),
      "of it",
      "%",
    ),
    least("A4", claim, "that share is larger than FedAvg's", own, theirs, 0.0, strict=True),
  ]


def a5(evidence: Evidence) -> list[Row]:
  """Monopolistic classes."""
  own = values(evidence, AP_FL, "personal_accuracy", "monopolists")
  raw = values(evidence, FEDAVG, "global_accuracy", "monopolists")
  tuned = values(evidence, FT, "personal_accuracy", "monopolists")
  return [
    least("A5", "serves holders of monopolistic classes", "+20 points on FedAvg", own, raw, 0.2),
    least("A5", "serves holders of monopolistic classes", "no less than FedAvg-FT", own, tuned, 0.0),
  ]


_THREE = {"monopolistic_classes": 3}
_ZERO_SHOT = {
  kind: of("ap_fl", ap_fl_unseen="prototypes", embeddings=kind, **_THREE) for kind in ("attributes", "onehot", "random")
}
_NO_ZERO_SHOT = of("ap_fl", ap_fl_unseen="none", **_THREE)


def a6(evidence: Evidence) -> list[Row]:
  """Zero-shot classes, a triple a seed; `experiments.zero_shot` has the whole board."""
  told_apart = {
    kind: values(evidence, variant, "unseen", "restricted_accuracy") for kind, variant in _ZERO_SHOT.items()
  }
  controls = {kind: told_apart[kind] for kind in ("onehot", "random")}
  asked = evidence.get(_ZERO_SHOT["attributes"], {})
  # Chance may leave more classes without a holder than the three that are kept back.
  controls["chance"] = {seed: 1 / len(asked[seed].summary["unseen"]["classes"]) for seed in told_apart["attributes"]}
  on, off = (values(evidence, variant, *_ALL) for variant in (_ZERO_SHOT["attributes"], _NO_ZERO_SHOT))
  return [
    every(
      "A6",
      "tells unseen classes apart",
      "restricted accuracy > each control",
      told_apart["attributes"],
      controls,
      0.0,
      strict=True,
    ),
    least("A6", "zero-shot costs nothing", "all clients: -0.5 point", on, off, -0.005),
  ]


_ENDS = {"local": 1.0, "friend": 0.0}


def _noise(end: str = "", **more: Any) -> Variant:
  """AP-FL with labelled noise for samples; `end` fixes its coefficients."""
  fixed = {}
  if end:
    fixed = {"ap_fl_interpolation": "fixed", "ap_fl_lambda_base": _ENDS[end], "ap_fl_lambda_head": _ENDS[end]}
  return of("ap_fl", ap_fl_source="noise", **fixed, **more)


_ON_NOISE: dict[str, dict[str, Any]] = {
  "noise for samples": {},
  "friend on noise alone": {"ap_fl_friend": "synthetic", "ap_fl_friend_start": "global"},
}


def a7(evidence: Evidence) -> list[Row]:
  """Bad synthetic data: beside real data, and where the friend has nothing else."""
  claim = "decoupled interpolation protects from bad samples"
  rows = []
  for what, changes in _ON_NOISE.items():
    own = values(evidence, _noise(**changes), *_ALL)
    local, friend = (values(evidence, _noise(end, **changes), *_ALL) for end in _ENDS)
    rivals = {"coupled": values(evidence, _noise(ap_fl_coupled=True, **changes), *_ALL), "friend": friend}
    rows += [
      least("A7", claim, f"{what}: the local model -1 point", own, local, -0.01),
      least("A7", claim, f"{what}: the friend alone is 5 points below the local model", local, friend, 0.05),
      every("A7", claim, f"{what}: no worse than coupled and friend alone, -0.5 point", own, rivals, -0.005),
    ]
  return rows


_EVERY = 5
_CURVES = {name: of(name, personalize_every=_EVERY) for name in ("ap_fl", "fedavg_ft")}


def rounds_to(found: Found, level: float) -> float:
  """The first scored round whose personal models reach the level; one more interval than the run has if none does."""
  scored = [(one["round"], one["personal_accuracy"]) for one in found.metrics if one["personal_accuracy"] is not None]
  return next((at for at, accuracy in scored if accuracy >= level), scored[-1][0] + _EVERY if scored else math.nan)


def speed(evidence: Evidence) -> Values:
  """AP-FL's rounds to FedAvg-FT's final accuracy less a point, over FedAvg-FT's own."""
  mine, theirs = (evidence.get(_CURVES[name], {}) for name in ("ap_fl", "fedavg_ft"))
  found = {}
  for seed in mine:
    if seed in theirs:
      level = theirs[seed].summary["personal_accuracy"]["mean"] - 0.01
      found[seed] = rounds_to(mine[seed], level) / rounds_to(theirs[seed], level)
  return found


def _at_most(values: Values, limit: float) -> tuple[Paired, str]:
  """(the values as they are, the verdict on "at most `limit`")."""
  shown = paired(values, dict.fromkeys(values, 0.0))
  return shown, decide(paired({seed: -value for seed, value in values.items()}, dict.fromkeys(values, 0.0)), -limit)


def a8(evidence: Evidence) -> list[Row]:
  """Convergence."""
  shown, verdict = _at_most(speed(evidence), 1.0)
  return [
    line(
      "A8", "converges as fast", "rounds to FedAvg-FT's end - 1 point: ratio <= 1", shown, verdict, "of the rounds", ""
    )
  ]


# The same accuracy by a client's own test examples, which are few, and by recalls on balanced images (method 8.3).
MEASURES = {"own test examples": "personal_accuracy", "balanced images": "reweighted_accuracy"}


def a9(evidence: Evidence) -> list[Row]:
  """A returning client beside its twin that was there all the time."""
  away, there = (evidence.get(of("ap_fl", **settings), {}) for settings in (_TWIN, _NOBODY_AWAY))
  rows = []
  for what, column in MEASURES.items():
    returned, twin = {}, {}
    for seed in away:
      if seed in there:
        chosen = away[seed].clients.dropped & ~away[seed].clients.monopolist
        pair = [getattr(one.clients, column)[chosen] for one in (away[seed], there[seed])]
        known = ~np.isnan(pair[0] + pair[1])
        if known.any():
          returned[seed], twin[seed] = (float(each[known].mean()) for each in pair)
    criterion = f"{what}: no worse than a twin that was never away, -1 point"
    rows.append(least("A9", "returns with one download and no round", criterion, returned, twin, -0.01))
  return [
    *rows,
    Row(
      "A9",
      "usable within a FedAvg round",
      "simulated seconds of a return",
      "needs a clock: experiments.asynchrony has it",
      "",
      NOT_MEASURED,
      {},
    ),
  ]


_LATE = {"dropout": "late", "drop_rate": "0.3", "leave_at": 0.5, "rounds": 80}  # as in pilot 8.2


_LEFT = {
  "FedAvg": of("fedavg", **_LATE),
  "FedAvg + mask": of("fedavg", softmax_mask="present", **_LATE),
  "AP-FL + mask": of("ap_fl", softmax_mask="present", **_LATE),
  "AP-FL + mask + memory": of("ap_fl", softmax_mask="present", ap_fl_memory="average", **_LATE),
}


def _recalls(evidence: Evidence, variant: Variant, left: bool, model: str = "global_model") -> Values:
  """Mean recall on the classes that left, or on all others."""
  found = {}
  for seed, one in evidence.get(variant, {}).items():
    each = (one.summary["recall"][model] or {}).get("each", [])
    lost = set(one.summary["monopolistic_classes"])
    some = [value for c, value in enumerate(each) if (c in lost) == left and value is not None]
    if some:
      found[seed] = statistics.mean(some)
  return found


def a10(evidence: Evidence) -> list[Row]:
  """Classes whose holders leave half-way."""
  claim = "remembers classes whose holders left"
  left = {name: _recalls(evidence, variant, True) for name, variant in _LEFT.items()}
  others = {name: _recalls(evidence, variant, False) for name, variant in _LEFT.items()}
  whole = "AP-FL + mask + memory"
  personal = _recalls(evidence, _LEFT["AP-FL + mask"], True, "personal")
  return [
    least("A10", claim, "global model, classes that left: +40 points on FedAvg", left[whole], left["FedAvg"], 0.4),
    least(
      "A10", claim, "global model, other classes: within 3 points of FedAvg", others[whole], others["FedAvg"], -0.03
    ),
    least(
      "A10",
      "the mask alone does",
      "classes that left: FedAvg + mask on FedAvg, +10 points",
      left["FedAvg + mask"],
      left["FedAvg"],
      0.1,
    ),
    least(
      "A10",
      "the memory adds to the mask",
      "classes that left: > 0",
      left[whole],
      left["FedAvg + mask"],
      0.0,
      strict=True,
    ),
    least(
      "A10",
      "personal models remember",
      "classes that left: AP-FL + mask on FedAvg's global model, +10 points",
      personal,
      left["FedAvg"],
      0.1,
    ),
  ]


_FEW = {"dropped_examples": 20}
_PRIOR = ", prior"  # how the variant of a front that uses it ends
_READOUTS: tuple[dict[str, Any], ...] = ({}, {"readout": "prior"})
_SOURCES = {
  "class_means": {"ap_fl_source": "class_means", "ap_fl_tier": "s2"},
  "matched": {"ap_fl_source": "matched", "ap_fl_tier": "s2"},
  "untrained": {"ap_fl_source": "untrained"},
  "noise": {"ap_fl_source": "noise"},
  "none": {"ap_fl_source": "none"},
}


_AT_S2 = "ap_fl, tier s2"
_FRONTS: dict[str, dict[str, Any]] = {
  "ap_fl": {},
  _AT_S2: {"ap_fl_tier": "s2"},
  "ap_fl, matched": _SOURCES["matched"],
}


def _front_variants(few: bool) -> dict[Variant, tuple[str, str]]:
  """(method, its variant in words) of all that the fronts show.

  What Ditto makes for a client that never took part is proximal fine-tuning of the global model.
  """
  found = {}
  for readout in _READOUTS:
    common = readout | (_FEW if few else {})
    end = _PRIOR if readout else ""
    for name in ("fedavg", "fedavg_ft", "local", "knn_per", "fedper", "fedrep"):
      found[of(name, **common)] = (name, f"plain{end}")
    found[of("fedavg_ft", fedavg_ft_head_only=True, **common)] = ("head only", f"plain{end}")
    for weight in (0.1, 0.3, 0.5, 1.0):
      changes = {} if weight == 0.1 else {"ditto_proximal_weight": weight}
      found[of("ditto", **changes, **common)] = ("ditto", f"{weight:g}{end}")
    for name, samples_of in _FRONTS.items():
      for rho in (0.0, 0.1, 0.3, 1.0):
        changes = {} if rho == 0.3 else {"ap_fl_rho": rho}
        found[of("ap_fl", **samples_of, **changes, **common)] = (name, f"rho {rho:g}{end}")
      for weight in (0.1, 0.3, 0.5, 1.0):
        found[of("ap_fl", **samples_of, ap_fl_proximal_weight=weight, **common)] = (name, f"proximal {weight:g}{end}")
      found[of("ap_fl", **samples_of, **_friend_alone(), **common)] = (name, f"friend{end}")
    for source in _SOURCES:
      found.setdefault(of("ap_fl", **_SOURCES[source], **common), (_sampled(source), f"rho 0.3{end}"))
  return found


def _sampled(source: str) -> str:
  """AP-FL with samples of a source, in words."""
  return f"ap_fl, {source.replace('_', ' ')}"


def _friend_alone() -> dict[str, Any]:
  return {"ap_fl_interpolation": "fixed", "ap_fl_lambda_base": 0.0, "ap_fl_lambda_head": 0.0}


def front_points(evidence: Evidence, few: bool) -> list[fronts.Point]:
  """Dropped clients' personal models."""
  read = lambda what, part: values(evidence, what, part, "dropped")
  return [
    fronts.Point(
      method,
      variant,
      read(what, "reweighted_accuracy"),
      values(evidence, what, *_POOLED),
      read(what, "personal_accuracy"),
    )
    for what, (method, variant) in _front_variants(few).items()
  ]


def a11(evidence: Evidence) -> list[Row]:
  """Own against pooled accuracy."""
  rows = []
  for few in (False, True):
    who = "returners with 20 examples" if few else "dropped clients"
    rivals = dict.fromkeys(name for name, _ in _front_variants(few).values() if not name.startswith("ap_fl"))
    points_of = front_points(evidence, few)
    # The prior is not always known where a model answers, and lifts all methods to what the global model knows.
    plain = [point for point in points_of if not point.variant.endswith(_PRIOR)]
    for some, group in ((points_of, who), (plain, f"{who}, plain read-out")):
      methods = fronts.by_method(some)
      for name in _FRONTS:
        rows += _ahead(name, methods, rivals, group)
    methods = fronts.by_method(points_of)
    of_s2 = [source for source, changes in _SOURCES.items() if changes.get("ap_fl_tier") == "s2"]
    for name, others in (("ap_fl", _SOURCES), (_AT_S2, of_s2)):
      for source in others:
        mine, theirs = methods.get(name, []), methods.get(_sampled(source), [])
        alike = [point for point in mine if point.variant in {other.variant for other in theirs}]
        pair = fronts.lead(alike, theirs, [point for each in methods.values() for point in each])
        at = " at tier s2" if name == _AT_S2 else ""
        more = f"the trained generator{at} is worth more than samples of kind {source}"
        rows.append(_front_line(more, f"{who}, there: > 0", pair, decide(pair, 0.0, strict=True)))
  return rows


def _ahead(name: str, methods: Mapping[str, list[fronts.Point]], rivals: Iterable[str], who: str) -> list[Row]:
  """How a front of ours lies to those of other methods."""
  every_point = [point for points in methods.values() for point in points]
  mine = methods.get(name, [])
  leads = {rival: fronts.leads(mine, methods.get(rival, []), every_point) for rival in rivals}
  known = [(rival, pair) for rival, pairs in leads.items() for pair in pairs if pair.mean is not None]
  nearest, least_lead = min(known, key=lambda one: one[1].mean or 0.0, default=("", None))
  verdict = worst(worst(decide(pair, 0.0) for pair in pairs) for pairs in leads.values())
  claim = "personal models know more of all classes" + (f" ({name})" if name != "ap_fl" else "")
  front = f"{who}: front on or above each other's"
  rows = [_front_line(claim, front, least_lead, verdict, f"(least, against {nearest})" if nearest else "")]
  for rival, threshold in (("fedavg_ft", 0.1), ("head only", 0.05), ("ditto", 0.1)):
    pair = fronts.lead(mine, methods.get(rival, []), every_point)
    criterion = f"{who}, at the best own accuracy less a point: +{100 * threshold:g} points pooled on {rival}"
    rows.append(_front_line(claim, criterion, pair, decide(pair, threshold)))
  return rows


def _front_line(claim: str, criterion: str, pair: Paired | None, verdict: str, note: str = "") -> Row:
  """A row about a lead; says on how many seeds one of the two does not get to the level, see `fronts.lead`."""
  if pair is None or pair.mean is None:
    return line("A11", claim, criterion, None, verdict)
  for value, what in ((-1.0, "does not get there"), (1.0, "gets there alone")):
    if count := int(np.sum(pair.differences == value)):
      note += f" ({what} on {count} of {len(pair.differences)} seeds)"
  return line("A11", claim, criterion, pair, verdict, note.strip())


def a12(evidence: Evidence) -> list[Row]:
  """Returners with few examples."""
  own, alone = (values(evidence, of(name, **_FEW), *_DROPPED) for name in ("ap_fl", "local"))
  return [least("A12", "helps returners with 20 examples", "dropped clients: +3 points on Local", own, alone, 0.03)]


_CHEAP = {
  "a tenth of the steps": of("ap_fl", ap_fl_generator_steps=2),
  "once, after the last round": of("ap_fl", ap_fl_generator_schedule="final"),
  "once, 60 steps": of("ap_fl", ap_fl_generator_schedule="final", ap_fl_generator_final_steps=60),
  "features for images": of("ap_fl", ap_fl_source="feature"),
}


def cost(evidence: Evidence) -> list[Row]:
  """The generator's price."""
  flops = ("cost", "generator_flops")
  share = values(evidence, AP_FL, "cost", "generator_share")
  rows = [reported("C", "the generator's share of a run", "all FLOPs but evaluation", share, "%")]
  for name, variant in _CHEAP.items():
    own = paired(values(evidence, variant, *_ALL), values(evidence, AP_FL, *_ALL))
    pooled = paired(values(evidence, variant, *_POOLED), values(evidence, AP_FL, *_POOLED))
    dear = _ratio(values(evidence, variant, *flops), values(evidence, AP_FL, *flops))
    note = ""
    verdict = decide(own, -0.01)
    if dear:
      ratio = statistics.mean(dear.values())
      note = f"with {100 * ratio:.1f} % of the FLOPs; pooled {points(pooled.mean)}"
      verdict = verdict if ratio <= 0.1 + 1e-3 else FAILS
    rows.append(
      line(
        "C", f"a cheap generator is as good: {name}", "all clients: -1 point at 10 % of its FLOPs", own, verdict, note
      )
    )
  return rows


_JUDGED = {
  "default": of("ap_fl", judge=256),
  "moments of images": of("ap_fl", judge=256, ap_fl_image_moments=True),
  "tier s2": of("ap_fl", judge=256, ap_fl_tier="s2"),
  "class means": of("ap_fl", judge=256, **_SOURCES["class_means"]),
  "matched": of("ap_fl", judge=256, **_SOURCES["matched"]),
}


def _least_agreement(evidence: Evidence, variant: Variant) -> tuple[Values, Values]:
  """The judge's agreement with samples, and with real test images, of the class that falls shortest of the latter."""
  agreement, real = {}, {}
  for seed, one in evidence.get(variant, {}).items():
    section = one.summary.get("samples") or {}
    if section.get("judge_recall"):
      each, on_real = section["agreement_recognised"]["each"], section["judge_recall"]["each"]
      pairs = [(mine, theirs) for mine, theirs in zip(each, on_real, strict=True) if None not in (mine, theirs)]
      if pairs:
        agreement[seed], real[seed] = min(pairs, key=lambda pair: pair[0] - pair[1])
  return agreement, real


def samples(evidence: Evidence) -> list[Row]:
  """The generator's samples."""
  rows = []
  for name, variant in _JUDGED.items():
    teacher = values(evidence, variant, "samples", "teacher")
    learnt = values(evidence, variant, "samples", "tstr", "mean")
    for what, *path in (
      ("judge agrees on .80", "agreement_recognised", "mean"),
      ("judge agrees on .80 of each class", "agreement_recognised", "least"),
      ("judge agrees on .80 of each class, choosing among recognised ones only", "agreement_among_recognised", "least"),
    ):
      agreement = values(evidence, variant, "samples", *path)
      wanted = dict.fromkeys(agreement, 0.8)
      rows.append(least("J", f"samples are of their class ({name})", what, agreement, wanted, 0.0))
    what = "judge agrees as often as on real test images, -5 points, of each class"
    agreement, real = _least_agreement(evidence, variant)
    rows.append(least("J", f"samples are of their class ({name})", what, agreement, real, -0.05))
    rows.append(
      least(
        "J",
        f"samples teach a fresh network ({name})",
        "real test images: within 5 points of the teacher",
        learnt,
        teacher,
        -0.05,
      )
    )
    if name != "default":
      for what, *path in (("own", *_DROPPED), ("pooled", *_POOLED)):
        mine, plain = (values(evidence, v, *path) for v in (variant, _JUDGED["default"]))
        claim = f"samples are worth more to personal models than the default's ({name})"
        rows.append(least("J", claim, f"dropped clients, {what} accuracy: > 0", mine, plain, 0.0, strict=True))
    trust = values(evidence, variant, "samples", "trust", "correlation")
    rows.append(reported("J", f"trust foretells the judge ({name})", "correlation over classes", trust, ""))
    for key, what in (
      ("closer", "samples nearer to training than to test images"),
      ("distance_auc", "attack by distance to samples"),
      ("loss_auc", "attack by the global model's loss"),
    ):
      found = values(evidence, variant, "privacy", key)
      rows.append(reported("J", f"gives nothing away: {what} ({name})", "nothing is .5", found, ""))
  return rows


_NO_SAMPLES = of("ap_fl", ap_fl_beta=0.0)


def harm(evidence: Evidence) -> list[Row]:
  """Clients that synthetic data harm."""
  shares, worst_of = {}, {}
  for seed, one in evidence.get(AP_FL, {}).items():
    if seed in evidence.get(_NO_SAMPLES, {}):
      found = metrics.fairness.harm(
        one.clients.personal_accuracy, evidence[_NO_SAMPLES][seed].clients.personal_accuracy
      )
      if found["harmed"] is not None and found["worst"] is not None:
        shares[seed], worst_of[seed] = found["harmed"], found["worst"]
  note = f"of the clients; worst client {points(min(worst_of.values()))} points" if worst_of else ""
  return [reported("H", "synthetic data harm few", "clients that lose more than a point by them", shares, "%", note)]


_SUMMARY = "[unverified figure of a machine-written summary]"


def summary_page(evidence: Evidence) -> list[Row]:
  """What a summary of the paper says, which its abstract does not."""
  own = values(evidence, AP_FL, *_ALL)
  rivals = _of_each(evidence, PERSONAL, *_ALL) | _of_each(evidence, RAW, "global_accuracy", "mean")
  shown, verdict = _at_most(speed(evidence), 0.6)
  kept = a4(evidence)[0]
  return [
    every(
      "R",
      f"5.2 to 9.8 points of average accuracy {_SUMMARY}",
      "all clients: +5.2 points on each baseline",
      own,
      rivals,
      0.052,
    ),
    kept._replace(id="R", claim=f"robust at 60 % dropout {_SUMMARY}"),
    line(
      "R",
      f"40 % faster convergence {_SUMMARY}",
      "rounds to FedAvg-FT's end - 1 point: ratio <= .6",
      shown,
      verdict,
      "of the rounds",
      "",
    ),
  ]


CLAIMS: dict[str, Claim] = {
  "A1": Claim((AP_FL, *RAW), a1),
  "A2": Claim((AP_FL, *PERSONAL), a2),
  "A3": Claim(tuple(v for name in ("ap_fl", "fedavg", "fedprox", "fedgen") for v in _skewed(name).values()), a3),
  "A4": Claim((AP_FL, *(of(name, **s) for name in ("ap_fl", "fedavg") for s in (_TWIN, _NOBODY_AWAY))), a4),
  "A5": Claim((AP_FL, FEDAVG, FT), a5),
  "A6": Claim((*_ZERO_SHOT.values(), _NO_ZERO_SHOT), a6),
  "A7": Claim(
    tuple(
      variant
      for changes in _ON_NOISE.values()
      for variant in (*(_noise(end, **changes) for end in ("", *_ENDS)), _noise(ap_fl_coupled=True, **changes))
    ),
    a7,
  ),
  "A8": Claim(tuple(_CURVES.values()), a8),
  "A9": Claim((of("ap_fl", **_TWIN), of("ap_fl", **_NOBODY_AWAY)), a9),
  "A10": Claim(tuple(_LEFT.values()), a10),
  "A11": Claim((*_front_variants(False), *_front_variants(True)), a11),
  "A12": Claim((of("ap_fl", **_FEW), of("local", **_FEW)), a12),
  "C": Claim((AP_FL, *_CHEAP.values()), cost),
  "J": Claim(tuple(_JUDGED.values()), samples),
  "H": Claim((AP_FL, _NO_SAMPLES), harm),
  "R": Claim(
    (AP_FL, *RAW, *PERSONAL, *_CURVES.values(), of("ap_fl", **_TWIN), of("ap_fl", **_NOBODY_AWAY)), summary_page
  ),
}
