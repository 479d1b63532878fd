"""What asynchrony shows: `python -m experiments.asynchrony --scale=digits --seeds=1,2,3 --output=DIR`.

Three parts [O], over virtual time:
  target  heavy-tailed speeds: FedBuff on the asynchronous clock against synchronous FedAvg, plain and with
          over-selection and a deadline; virtual seconds and bytes to a target, idle time, staleness.
  return  claim A9 (method 5): clients that stayed away return at some virtual time, with one download and no round,
          beside their twins in a run of the same seed and data in which nobody was away; how long a return takes.
  life    the life of a class, heavy-tailed speeds: its holders are all there, one is left, none is, all are back; the
          global model's recall, AP-FL's against FedBuff's, on the asynchronous clock. Phases begin at shares of the
          virtual time that the run would take if all were always there; it takes longer, for they are not.

Runs lie in folders of DIR (`experiments/runs.py`), beside them asynchrony.json, asynchrony.md and a picture of each
part. Any setting of a run can be given as a flag and holds for all runs, but for what tells those of a part apart. What
the parts set of their methods was chosen on seeds 20 to 22, which are not to be quoted.
"""

import csv
import dataclasses
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from absl import flags

from apfl_jax import data, files, metrics, population
from apfl_jax.errors import InputError
from apfl_jax.report import plots, run, tables
from experiments import claims, config, job, runs
from experiments.config import Config
from experiments.criteria import FAILS, MEASURES, Row, Values, Variant, decide, line, of, paired
from experiments.methods import parse_seeds

_GIVEN = ("algorithm", "seed", "workdir", "trained", "trace")  # that the parts decide


class Done(NamedTuple):
  """A finished run.

  Attributes:
    config: its settings.
    read: its directory.
  """

  config: Config
  read: run.Run


Runs = Mapping[tuple[str, int], Done]  # of a part, by label and seed
Judged = tuple[list[Row], list[plots.Panel], tables.Grid]


class Part(NamedTuple):
  """What is run for a picture.

  Attributes:
    settings: of all its runs; flags that are given win over them.
    variants: what tells its runs apart, by label.
    judge: its runs -> (rows about criteria, panels of the picture, a table).
  """

  settings: dict[str, Any]
  variants: dict[str, Variant]
  judge: Callable[[Runs], Judged]


def _cell(values: Sequence[float], scale: float = 1.0) -> str:
  """Mean ± deviation (n - 1)."""
  if not values:
    return "–"
  mean = f"{scale * statistics.fmean(values):.1f}"
  return mean + (f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _of(found: Runs, label: str) -> dict[int, Done]:
  """A label's runs by seed."""
  return {seed: done for (name, seed), done in found.items() if name == label}


def _scored(done: Done, key: str) -> list[dict[str, Any]]:
  """The lines in which something was measured."""
  return [told for told in done.read.metrics if told[key] is not None]


def _ratio_row(part: str, claim: str, own: Values, theirs: Values, note: str, failed: bool = False) -> Row:
  """A row about "own is at most theirs"."""
  ratio = {seed: own[seed] / theirs[seed] for seed in own if seed in theirs}
  none = dict.fromkeys(ratio, 0.0)
  verdict = FAILS if failed else decide(paired({seed: -value for seed, value in ratio.items()}, none), -1.0)
  return line(part, claim, "ratio <= 1", paired(ratio, none), verdict, note, "")


# --- target -----------------------------------------------------------------------------------------------------------

SHARE = 0.95  # of the best accuracy of synchronous FedAvg on the same seed is the target
_SYNCHRONOUS, _BUFFERED = "fedavg", "fedbuff"
_COSTS = {"virtual_seconds": "virtual seconds", "bytes": "bytes", "round": "visits"}


def target_of(lines: Sequence[Mapping[str, Any]], share: float = SHARE) -> float:
  """A share of the best pooled accuracy among a run's lines."""
  return share * max(told["pooled_accuracy"] for told in lines if told["pooled_accuracy"] is not None)


def spent(own: Mapping[int, Sequence[Mapping[str, Any]]], targets: Values, by: str) -> Values:
  """What reaching the targets took, on the seeds on which they were reached; lines by seed."""
  known = {seed: metrics.time.to_target(own[seed], level, by=by) for seed, level in targets.items() if seed in own}
  return {seed: float(value) for seed, value in known.items() if value is not None}


def mean_staleness(histogram: Mapping[str, Sequence[int]]) -> float:
  """Each bin counted at its lower edge."""
  counts = histogram["counts"]
  return float(np.average(histogram["edges"][:-1], weights=counts)) if sum(counts) else 0.0


def _target(found: Runs) -> Judged:
  labels = list(dict.fromkeys(label for label, _ in found))
  lines = {label: {seed: done.read.metrics for seed, done in _of(found, label).items()} for label in labels}
  targets = {seed: target_of(some) for seed, some in lines.get(_SYNCHRONOUS, {}).items()}
  took = {label: {by: spent(lines[label], targets, by) for by in _COSTS} for label in labels}
  rows = []
  for label in labels:
    for by, what in _COSTS.items() if label != _SYNCHRONOUS else ():
      own, theirs, asked = took[label][by], took[_SYNCHRONOUS][by], len(targets.keys() & lines[label].keys())
      note = f"of synchronous FedAvg's, reached on {len(own)} of {asked} seeds"
      rows.append(_ratio_row("target", f"{label}: no more {what}", own, theirs, note, failed=len(own) < asked))

  cells = []
  for label in labels:
    some = [done.read for done in _of(found, label).values()]
    clock = [one.summary["time"] for one in some]
    scales = {"virtual_seconds": 1.0, "bytes": 1e-6, "round": 1.0}
    cells.append(
      [
        label,
        _cell([target_of(one.metrics, 1.0) for one in some], 100),
        *(_cell(list(took[label][by].values()), scale) for by, scale in scales.items()),
        f"{len(took[label]['round'])} of {len(targets.keys() & lines[label].keys())}",
        _cell([told["virtual_seconds"] for told in clock]),
        _cell([told["idle_share"] for told in clock], 100),
        _cell([mean_staleness(told["staleness"]) for told in clock]),
        _cell([one.summary["seconds"] for one in some]),
      ]
    )
  header = "run;best (%);virtual s to target;MB to target;rounds to target;reached;virtual s in all;idle (%)"

  def curves(by: str, scale: float = 1.0) -> list[plots.Curve]:
    known = {key: _scored(done, "pooled_accuracy") for key, done in found.items()}
    return [
      plots.Curve(label, [scale * told[by] for told in some], [100 * told["pooled_accuracy"] for told in some])
      for (label, _), some in known.items()
    ]

  level = 100 * statistics.fmean(targets.values()) if targets else None
  stale = []
  for done in _of(found, _BUFFERED).values():
    told = done.read.summary["time"]["staleness"]
    stale.append(
      plots.Curve(_BUFFERED, told["edges"][:-1], 100 * np.array(told["counts"]) / max(1, sum(told["counts"])))
    )
  panels = [
    plots.Panel(
      "global model on pooled images", "virtual seconds", "accuracy (%)", curves("virtual_seconds"), True, level
    ),
    plots.Panel("the same by bytes", "MB moved", "accuracy (%)", curves("bytes", 1e-6), False, level),
    plots.Panel("staleness", "uploads aggregated since the download", "uploads (%)", stale),
  ]
  return rows, panels, tables.Grid([*header.split(";"), "mean staleness", "wall s"], cells)


# --- return -----------------------------------------------------------------------------------------------------------

_AWAY, _TWIN, _ROUNDS = "returned", "twin", "fedavg"


def returns(
  away: Sequence[Mapping[str, Any]], twin: Sequence[Mapping[str, Any]], gone: np.ndarray, column: str
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
  """By round, accuracies float [n] of the clients that stayed away, had they returned then, and of their twins.

  Args:
    away: lines of the run in which they were away.
    twin: lines of the one in which nobody was.
    gone: bool [R], who was away.
    column: of the lines, which has the accuracies.

  Raises:
    InputError: the lines have no such column.
  """
  if any(column not in told for told in (*away, *twin)):
    raise InputError(f"output: it has runs whose metrics.jsonl lacks {column}, accepted are runs of this version")
  each = lambda told: np.array([np.nan if x is None else x for x in told[column]], float)[gone]
  scored = lambda lines: {told["round"]: each(told) for told in lines if told[column] is not None}
  theirs = scored(twin)
  return {at: (values, theirs[at]) for at, values in scored(away).items() if at in theirs}


def return_seconds(down: npt.ArrayLike, speed: npt.ArrayLike, settings: Config) -> np.ndarray:
  """float [n]: virtual seconds from a client's return to its personal model: one download and all personal steps.

  A step of AP-FL's friend reads a synthetic batch beside the real one, and counts as two.

  Args:
    down: [n], bytes of the download.
    speed: [n], the client's.
    settings: of the run.
  """
  download = np.asarray(down, float) / settings.bandwidth if settings.bandwidth else 0.0
  steps = settings.personal_steps + settings.settings.get("friend_steps", 0)
  return download + steps * settings.step_seconds / np.asarray(speed, float)


def _latency(done: Done) -> np.ndarray:
  """float [n]: `return_seconds` of the clients that stayed away, whose only download that was."""
  with open(done.read.path / "clients.csv", newline="") as file:
    down = np.array([float(row["bytes_down"]) for row in csv.DictReader(file)])
  ids, gone = done.read.clients.id, done.read.clients.dropped
  return return_seconds(down[gone], speeds(done.config, ids[gone]), done.config)


def speeds(settings: Config, ids: npt.ArrayLike) -> np.ndarray:
  """float [n]: of some of a run's clients, by its law of speeds; drawn as the run does, after one other process."""
  others = population.waiting(0), population.speeds(settings.speed, settings.speed_spread)
  process = population.make(("none",), settings.num_clients, jnp.zeros(1), *others)
  state = population.start(process, settings.seed)
  return np.asarray(population.look(process, state, 0, jnp.asarray(ids), settings.seed).speed)


def _return(found: Runs) -> Judged:
  away, twin, rounds = (_of(found, label) for label in (_AWAY, _TWIN, _ROUNDS))
  seeds = [seed for seed in away if seed in twin]
  lines_of = {s: (away[s].read.metrics, twin[s].read.metrics, away[s].read.clients.dropped) for s in seeds}
  pairs = {name: {s: returns(*lines_of[s], f"{column}_each") for s in seeds} for name, column in MEASURES.items()}
  times = dict.fromkeys(at for by_seed in pairs.values() for by_round in by_seed.values() for at in by_round)
  when = {label: _times(_of(found, label)) for label in (_AWAY, _TWIN)}
  rows, cells = [], []
  for at in times:
    second, twins_second = (statistics.fmean(of_run[at] for of_run in when[label].values()) for label in (_AWAY, _TWIN))
    cells.append([str(at), f"{second:.0f}", f"{twins_second:.0f}"])
    for name, of_seed in pairs.items():
      both = [of_seed[seed][at] for seed in seeds if at in of_seed[seed]]
      own, theirs = (np.concatenate(values) for values in zip(*both, strict=True))
      difference = metrics.paired(own, theirs)
      claim = f"returns in virtual second {second:.0f} (round {at})"
      criterion = f"{name}: no worse than its twin, -1 point"
      note = f"over {len(difference.differences)} pairs"
      rows.append(line("return", claim, criterion, difference, decide(difference, -0.01), note))
      by_seed = metrics.paired(*([float(np.nanmean(values)) for values in side] for side in zip(*both, strict=True)))
      spread = "" if by_seed.std is None else f" ± {100 * by_seed.std:.1f}"
      means = (tables.percent(float(np.nanmean(values))) for values in (own, theirs))
      cells[-1] += [*means, f"{100 * (by_seed.mean or 0):+.1f}{spread}"]
  took = {seed: _latency(done) for seed, done in away.items()}
  usual = {seed: done.read.summary["time"]["virtual_seconds"] / done.config.rounds for seed, done in rounds.items()}
  mean = {seed: float(values.mean()) for seed, values in took.items() if len(values)}
  if mean and usual:
    note = f"of a round, {statistics.fmean(mean.values()):.0f} of {statistics.fmean(usual.values()):.0f} s"
    rows.append(_ratio_row("return", "usable within a synchronous FedAvg round", mean, usual, note))

  def curve(name: str, label: str, seed: int, side: int) -> plots.Curve:
    values = {at: both[side] for at, both in pairs[name][seed].items()}
    return plots.Curve(
      label, [when[label][seed][at] for at in values], [100 * float(np.nanmean(v)) for v in values.values()]
    )

  panels: list[plots.Panel] = []
  for name in MEASURES:
    sides = [[curve(name, label, seed, side) for seed in seeds] for side, label in enumerate((_AWAY, _TWIN))]
    less = [
      plots.Curve("difference", a.x, (np.array(a.y) - np.array(b.y)).tolist()) for a, b in zip(*sides, strict=True)
    ]
    panels += [
      plots.Panel(f"had they returned then: {name}", "virtual seconds", "accuracy (%)", [*sides[0], *sides[1]]),
      plots.Panel(f"less their twins: {name}", "virtual seconds of the return", "points", less, level=-1.0),
    ]
  header = ["round", "virtual s", "twins' virtual s"]
  for name in MEASURES:
    header += [f"{name}: {what}" for what in ("returned (%)", "twins (%)", "difference by seed (points)")]
  return rows, panels, tables.Grid(header, cells)


def _times(done: Mapping[int, Done]) -> dict[int, dict[int, float]]:
  """By seed and round, virtual seconds."""
  return {seed: {told["round"]: told["virtual_seconds"] for told in one.read.metrics} for seed, one in done.items()}


# --- life -------------------------------------------------------------------------------------------------------------

PHASES = {"present": 0.0, "monopolised": 0.4, "left": 0.5, "returned": 0.75}  # by the share of the rounds before
_KEEPING = "ap_fl+mask+memory"


class Life(NamedTuple):
  """Whose presence the life of a class is.

  Attributes:
    label: the class.
    holders: the clients that hold it.
    keeper: the one of them that has most of it, the last to leave.
  """

  label: int
  holders: tuple[int, ...]
  keeper: int


def chosen(histogram: np.ndarray) -> Life:
  """The class of the most holders, the first of several, among those whose holders' absence takes no other class.

  What few hold is hardly learnt when it is there, so that nothing could be remembered.

  Args:
    histogram: int [N, C], clients' training examples.

  Raises:
    InputError: there is none.
  """
  held = histogram > 0
  others = lambda c: np.delete(held[~held[:, c]].any(axis=0), c)
  able = [c for c in range(held.shape[1]) if held[:, c].sum() >= 2 and others(c).all()]
  if not able:
    raise InputError("partition: no class can leave alone, accepted is one in which others hold what its holders hold")
  label = max(able, key=lambda c: held[:, c].sum())
  holders = np.flatnonzero(held[:, label])
  return Life(label, tuple(holders.tolist()), int(holders[np.argmax(histogram[holders, label])]))


def begins(rounds: int) -> dict[str, int]:
  """The first round of the trace in each phase."""
  return {name: round(share * rounds) for name, share in PHASES.items()}


def trace_rows(life: Life, num_clients: int, rounds: int) -> list[tuple[int, int, int]]:
  """(client, start, end) in rounds, as `population.read_trace` reads them; it begins anew only after the run."""
  first, end = begins(rounds), 2 * rounds
  found = []
  for client in range(num_clients):
    if client in life.holders:
      leaves = first["left"] if client == life.keeper else first["monopolised"]
      found += [(client, 0, leaves), (client, first["returned"], end)]
    else:
      found.append((client, 0, end))
  return found


def write_trace(settings: Config) -> None:
  """Writes the trace that a run reads. Who holds what does not depend on who is there, so it is known before."""
  path = Path(settings.trace)
  ready = job.prepare(dataclasses.replace(settings, dropout="none", trace=""))
  life = chosen(data.histogram(ready.federation, len(ready.dataset.class_names)))
  with files.replacing(path) as temporary, open(temporary, "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("client", "start", "end"))
    writer.writerows(trace_rows(life, settings.num_clients, settings.rounds))


def recalls(lines: Sequence[Mapping[str, Any]], label: int, round_seconds: float) -> dict[float, tuple[float, float]]:
  """By virtual time in rounds of the trace, the global model's recall of a class and its mean recall of the others."""
  found = {}
  for told in lines:
    if told["global_recall"] is not None:
      each = [np.nan if value is None else value for value in told["global_recall"]]
      found[told["virtual_seconds"] / round_seconds] = (each[label], float(np.nanmean(np.delete(each, label))))
  return found


def at_ends(found: Mapping[float, tuple[float, float]], rounds: int) -> dict[str, tuple[float, float]]:
  """By phase, what was measured last in it."""
  starts = begins(rounds)
  ends = dict(zip(PHASES, [*list(starts.values())[1:], np.inf], strict=True))
  within = {name: [at for at in found if starts[name] < at <= end] for name, end in ends.items()}
  return {name: found[max(some)] for name, some in within.items() if some}


def _life(found: Runs) -> Judged:
  ends: dict[str, dict[int, dict[str, tuple[float, float]]]] = {}
  panels: list[list[plots.Curve]] = [[], []]
  spans: dict[str, tuple[float, float]] = {}
  for (label, seed), done in found.items():
    rounds, clock = done.config.rounds, done.read.summary["time"]
    measured = recalls(done.read.metrics, chosen(done.read.arrays["histogram"]).label, clock["round_seconds"])
    ends.setdefault(label, {})[seed] = at_ends(measured, rounds)
    for side, curves in enumerate(panels):
      curves.append(plots.Curve(label, list(measured), [100 * both[side] for both in measured.values()]))
    edges = [*begins(rounds).values(), max([rounds, *measured])]
    spans = {name: (float(a), float(b)) for name, a, b in zip(PHASES, edges, edges[1:], strict=False)}
  at = lambda label, phase, side: {s: by[phase][side] for s, by in ends.get(label, {}).items() if phase in by}
  rows = []
  for rival, least in ((_BUFFERED, 0.4), (f"{_BUFFERED}+mask", 0.0), ("ap_fl+mask", 0.0)):
    difference = paired(at(_KEEPING, "left", 0), at(rival, "left", 0))
    criterion = f"recall of the class: {100 * least:+.0f} points on {rival}"
    rows.append(line("life", "remembered when all holders have left", criterion, difference, decide(difference, least)))
  others = paired(at(_KEEPING, "left", 1), at(_BUFFERED, "left", 1))
  criterion = f"their recall then: {_BUFFERED}'s -3 points"
  rows.append(line("life", "at no cost to other classes", criterion, others, decide(others, -0.03)))
  drop = paired(at(_KEEPING, "returned", 0), at(_KEEPING, "present", 0))
  rows.append(line("life", "as good when they are back", "recall of the class: -5 points", drop, decide(drop, -0.05)))
  cells = []
  for label in ends:
    alone = [_cell(list(at(label, phase, 0).values()), 100) for phase in PHASES]
    cells.append([label, *alone, *(_cell(list(at(label, phase, 1).values()), 100) for phase in ("left", "returned"))])
  classes = "; ".join(f"seed {s}: {_told_life(d)}" for s, d in _of(found, next(iter(ends), "")).items())
  header = ["run", *(f"class: {phase}" for phase in PHASES), "others: left", "others: returned"]
  time = "virtual time in rounds of the trace"
  shown = [
    plots.Panel("recall of the class", time, "recall (%)", panels[0], spans=spans),
    plots.Panel("mean recall of the others", time, "recall (%)", panels[1], spans=spans),
  ]
  return rows, shown, tables.Grid(header, [*cells, [classes]])


def _told_life(done: Done) -> str:
  life = chosen(done.read.arrays["histogram"])
  return f"class {done.read.class_names[life.label]}, {len(life.holders)} of {done.config.num_clients} clients hold it"


# --- the parts --------------------------------------------------------------------------------------------------------

_AWAY_SHARE = 0.6
_NOBODY_AWAY = {"dropout": "none", "monopolistic_classes": 0}
_COLD = {"dropout": "cold", "drop_rate": str(_AWAY_SHARE), "monopolistic_classes": 0}
_ONE_BY_ONE = {"ap_fl_mixing": 0.5, "ap_fl_staleness_exponent": 0.5}
_MASK = {"softmax_mask": "present"}
_HEAVY = {"speed": "pareto", "speed_spread": 1.0}
_BUFFER = {"clock": "asynchronous", "fedbuff_buffer_size": 5}

# The share of clients at work at a time: half leaves room for over-selection; as many as are never away let both runs
# of a pair have the same number of visits in a time.
_AT_WORK = {"target": 0.5, "return": 1 - _AWAY_SHARE}

PARTS = {
  "target": Part(
    _NOBODY_AWAY | _HEAVY | {"alpha": 0.5, "rounds": 60, "eval_every": 2},
    {
      _SYNCHRONOUS: of("fedavg", clock="synchronous"),
      "fedavg+selection": of("fedavg", clock="synchronous", over_selection=0.5, deadline=60.0),
      _BUFFERED: of("fedbuff", **_BUFFER),
    },
    _target,
  ),
  "return": Part(
    # A return gains on its twin with the length of its training.
    _ONE_BY_ONE
    | {"personal_steps": 400, "speed": "lognormal", "bandwidth": 1e5, "eval_every": 0, "personalize_every": 10},
    {
      _AWAY: of("ap_fl", clock="asynchronous", **_COLD),
      _TWIN: of("ap_fl", clock="asynchronous", **_NOBODY_AWAY),
      _ROUNDS: of("fedavg", clock="synchronous", **_COLD),
    },
    _return,
  ),
  "life": Part(
    _ONE_BY_ONE | _HEAVY | {"monopolistic_classes": 0, "dropout": "trace", "rounds": 60, "eval_every": 2},
    {
      _BUFFERED: of("fedbuff", **_BUFFER),
      f"{_BUFFERED}+mask": of("fedbuff", **_BUFFER, **_MASK),
      "ap_fl+mask": of("ap_fl", clock="asynchronous", **_MASK),
      _KEEPING: of("ap_fl", ap_fl_memory="average", clock="asynchronous", **_MASK),
    },
    _life,
  ),
}


def plan(
  part: str, seeds: Sequence[int], scale: str, given: Mapping[str, Any], root: Path
) -> dict[tuple[str, int], Config]:
  """The runs of a part by label and seed."""
  settings, variants, _ = PARTS[part]
  known = settings | dict(given)
  if "personal_steps" in known:  # half of them the friend's, as where nothing is set
    known = {"ap_fl_friend_steps": known["personal_steps"] // 2} | known
  if part in _AT_WORK:
    clients = (claims.SCALES[scale].settings | known).get("num_clients", Config.num_clients)
    known = {"cohort_size": round(_AT_WORK[part] * clients)} | known
  made = lambda variant, seed: claims.make(variant, seed, scale, known | _trace(part, root, seed))
  return {(label, seed): made(variant, seed) for seed in seeds for label, variant in variants.items()}


def _trace(part: str, root: Path, seed: int) -> dict[str, str]:
  return {"trace": str(root / f"life-{seed}.csv")} if part == "life" else {}


# --- what is written --------------------------------------------------------------------------------------------------

_WORDS = {
  "target": f"The target is {100 * SHARE:.0f} % of the best accuracy that synchronous FedAvg reached on the same seed,"
  " the global model's on pooled images; the first evaluated round that has it counts. A round is as many visits in all"
  " runs as FedAvg waits for. Staleness counts aggregated uploads.",
  "return": "Clients that stay away from the beginning get a personal model at several times of the run, from one"
  " download and no round, as each would that returns then. Their twins have the same data and have been there all the"
  " time; as many clients are at work at a time in both runs. Accuracies are on the client's own test examples, which"
  " are few, and by recalls on balanced images at its mix of classes, which are less a matter of chance."
  " Clients of a run share a server, so that intervals over pairs are narrower than over seeds.",
  "life": "Mean over seeds ± deviation of the global model's recall on pooled images (%), in the last evaluated round"
  " of each phase: all holders of a class are there, the one that has most of it, none, all again. Whoever is there is"
  " at work all the time, on the asynchronous clock. A round of the trace is the share of the virtual time that a round"
  " would take if all were always there.",
}


def grid(rows: Sequence[Row]) -> tables.Grid:
  """*claim | criterion | measured | interval | verdict*."""
  header = ["claim", "criterion", "measured", "95 % interval", "verdict"]
  return tables.Grid(header, [[*row[1:5], f"**{row.verdict}**"] for row in rows])


def write(root: Path, judged: Mapping[str, Judged], facts: Mapping[str, str]) -> str:
  """asynchrony.json, asynchrony.md and the pictures; returns the Markdown text."""
  parts = ["# Asynchrony", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
  for name, (rows, panels, table) in judged.items():
    parts += [f"## {name.capitalize()}", _WORDS[name], tables.markdown(grid(rows)), tables.markdown(table)]
    try:
      files.write(root / f"{name}.png", plots.curves(panels))
      parts.append(f"![{name}]({name}.png)")
    except InputError as error:  # matplotlib is missing; the numbers are all there
      print(f"{name} is not drawn: {error}", file=sys.stderr)
  text = "\n\n".join(parts) + "\n"
  content = {
    "facts": dict(facts),
    "rows": {name: [row._asdict() for row in rows] for name, (rows, _, _) in judged.items()},
    "tables": {name: table._asdict() for name, (_, _, table) in judged.items()},
  }
  files.write(root / "asynchrony.json", json.dumps(content, indent=2) + "\n")
  files.write(root / "asynchrony.md", text)
  return text


def parse_parts(text: str) -> list[str]:
  """The parts of a comma list, each once."""
  names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
  for name in names or [text]:
    if name not in PARTS:
      raise InputError(f"parts: got {name!r}, accepted are {', '.join(PARTS)}, comma-separated")
  return names


def main(arguments: Sequence[str]) -> int:
  """Runs the parts and writes what they show; 1 if a run failed."""
  del arguments
  asked = flags.FLAGS
  names, seeds, root = parse_parts(asked.parts), parse_seeds(asked.seeds), Path(asked.output)
  given = claims.given_flags(_GIVEN)
  plans = {part: plan(part, seeds, asked.scale, given, root.absolute()) for part in names}
  told = {f"{part}-{label}-{seed}": (part, label, seed) for part, some in plans.items() for label, seed in some}
  configs = {name: plans[part][label, seed] for name, (part, label, seed) in told.items()}
  config.note_unused(list(dict.fromkeys(one.algorithm for one in configs.values())))
  if asked.dry_run:
    print(runs.listed(root, configs))
    return 0
  root.mkdir(parents=True, exist_ok=True)
  for seed in seeds if "life" in names else ():
    write_trace(plans["life"][_BUFFERED, seed])
  outcome = runs.run(root, configs)
  found: dict[str, dict[tuple[str, int], Done]] = {part: {} for part in names}
  for name, summary in outcome.summaries.items():
    part, label, seed = told[name]
    found[part][label, seed] = Done(configs[name], run.read(Path(summary["workdir"])))
  words = [f"--{name}={'DIR' if name in config.PATHS else value}" for name, value in given.items()]
  own = [f"--scale={asked.scale}", f"--seeds={asked.seeds}", f"--parts={asked.parts}", "--output=DIR"]
  command = " ".join(["python -m experiments.asynchrony", *map(shlex.quote, [*own, *words])])
  judged = {part: PARTS[part].judge(some) for part, some in found.items() if some}
  print(write(root, judged, runs.facts(outcome, command)))
  return 1 if outcome.failed else 0


if __name__ == "__main__":
  config.define_flags(but=_GIVEN)
  flags.DEFINE_enum("scale", "digits", list(claims.SCALES), "on what it is tried")
  flags.DEFINE_string("seeds", "1,2,3", "comma-separated")
  flags.DEFINE_string("parts", ",".join(PARTS), "comma-separated")
  flags.DEFINE_string("output", "runs/asynchrony", "folder of the runs, of the tables and of the pictures")
  flags.DEFINE_bool("dry_run", False, "list the runs and stop")
  for field in config.fields():
    if field.name not in _GIVEN:
      flags.declare_key_flag(field.name)  # --help shows these; methods' own settings come with --helpfull
  config.main(main)
