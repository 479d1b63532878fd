"""What AP-FL is claimed to do, put to the test: `python -m experiments.claims --scale=digits --output=DIR`.

The claims and their criteria are in `experiments/criteria.py`. Runs have the same budgets, are shared among claims and
lie in folders of DIR (`experiments/runs.py`), with claims.json, claims.md and pictures of the fronts beside them. Any
setting of a run can be given as a flag and holds for all; `--dry_run` lists the runs and how long they may take.
"""

import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from apfl_jax import algorithms, files
from apfl_jax.errors import InputError
from apfl_jax.report import plots, run, tables
from experiments import config, fronts, runs
from experiments.config import Config
from experiments.criteria import (
  AP_FL,
  CLAIMS,
  NOT_MEASURED,
  Evidence,
  Found,
  Row,
  Variant,
  front_points,
  missing,
  own_setting,
  told,
)
from experiments.methods import parse_seeds

_ENOUGH = 5  # seeds under which an interval is too narrow
_GIVEN = ("algorithm", "seed", "workdir", "trained")  # fields of a run that the claims decide


class Scale(NamedTuple):
  """A setting in which the claims are tried.

  Attributes:
    settings: of every run, by flag.
    seconds: roughly, of a run of a plain method on two cores; for the estimate before anything is run.
  """

  settings: dict[str, Any]
  seconds: float


SCALES = {
  "digits": Scale({"dataset": "digits"}, 8),
  "fashion_mnist": Scale(
    {"dataset": "fashion_mnist", "num_clients": 20, "examples_per_client": 250, "pooled_examples": 2000}, 40
  ),
  "cifar10": Scale({"dataset": "cifar10", "num_clients": 20, "examples_per_client": 500, "pooled_examples": 2000}, 80),
}
_SLOW = {"ap_fl": 4.0, "dense": 10.0, "fedftg": 3.0, "gpfl": 1.5, "pfedme": 3.0}  # times a plain method's seconds


def make(variant: Variant, seed: int, scale: str, given: Mapping[str, Any]) -> Config:
  """The settings of a run: the scale's, over them those given by flag, over them the variant's."""
  chosen = SCALES[scale].settings | dict(given) | dict(variant.changes)
  fields = {field.name for field in config.fields()}
  named = {name: own_setting(variant.algorithm, name) for name in chosen}
  own = {named[name]: value for name, value in chosen.items() if named[name]}
  shared = {name: value for name, value in chosen.items() if name in fields}
  around = {
    wrapper: {short: value for name, value in chosen.items() if (short := own_setting(wrapper, name))}
    for wrapper in algorithms.WRAPPERS
    if wrapper in config.listed(shared.get("wrappers", ""))
  }
  return Config(algorithm=variant.algorithm, seed=seed, settings=own, wrapper_settings=around, **shared)


def plan(
  ids: Iterable[str], seeds: Sequence[int], scale: str, given: Mapping[str, Any]
) -> tuple[dict[str, Config], dict[str, tuple[Variant, int]]]:
  """(the runs of some claims by name, the variant and the seed of each); each is there once."""
  variants = list(dict.fromkeys(v for id in ids for v in CLAIMS[id].variants if not missing(v)))
  names = {f"{told(variant)}-{seed}": (variant, seed) for seed in seeds for variant in variants}
  return {name: make(variant, seed, scale, given) for name, (variant, seed) in names.items()}, names


def overruled(variants: Iterable[Variant], given: Mapping[str, Any]) -> list[str]:
  """A note on each setting given by flag that some variants set otherwise, as A10 does the number of rounds."""
  notes = []
  each = [dict(variant.changes) for variant in dict.fromkeys(variants)]
  for name, value in given.items():
    if own := [str(one[name]) for one in each if one.get(name, value) != value]:
      set_to = ", ".join(dict.fromkeys(own))
      notes.append(f"note: {len(own)} of {len(each)} variants set {name} themselves ({set_to}), not to {value}")
  return notes


def load(summary: dict[str, Any]) -> Found:
  """A finished run's files."""
  read = run.read(Path(summary["workdir"]))
  return Found(read.summary, read.clients, read.metrics)


def judged(ids: Iterable[str], evidence: Evidence) -> list[Row]:
  """The table; a row that is not measured says what there was not."""
  rows = []
  for id in ids:
    lacking = list(dict.fromkeys(filter(None, map(missing, CLAIMS[id].variants))))
    unrun = [told(v) for v in CLAIMS[id].variants if not missing(v) and not evidence.get(v)]
    reason = "; ".join(
      ([f"needs {', '.join(lacking)}"] if lacking else []) + ([f"{len(unrun)} not run"] if unrun else [])
    )
    for row in CLAIMS[id].judge(evidence):
      rows.append(row._replace(measured=row.measured or reason) if row.verdict == NOT_MEASURED else row)
  return rows


def estimate(configs: Mapping[str, Config], scale: str, finished: Mapping[str, float]) -> float:
  """Seconds that runs may still take: as long as finished ones of their method, else a guess.

  Args:
    configs: all runs by name.
    scale: of `SCALES`.
    finished: seconds of the finished ones, by name.
  """
  known: dict[str, list[float]] = {}
  for name, seconds in finished.items():
    known.setdefault(configs[name].algorithm, []).append(seconds)
  guess = lambda c: SCALES[scale].seconds * _SLOW.get(c.algorithm, 1.0) * (1 + c.rounds / 40) / 2  # half is compiling
  each = lambda c: statistics.mean(known[c.algorithm]) if c.algorithm in known else guess(c)
  return sum(each(c) for name, c in configs.items() if name not in finished)


# --- what is written --------------------------------------------------------------------------------------------------


def grid(rows: Sequence[Row]) -> tables.Grid:
  """*claim | criterion | measured | interval | verdict*."""
  header = ["", "claim", "criterion", "measured", "95 % interval", "seeds", "verdict"]
  seeds = [len(row.numbers.get("differences", [])) for row in rows]
  said = lambda row, number: f"**{row.verdict}**" if number >= _ENOUGH or row.verdict == NOT_MEASURED else row.verdict
  return tables.Grid(
    header, [[*row[:5], str(number or "–"), said(row, number)] for row, number in zip(rows, seeds, strict=True)]
  )


def front_grid(points_of: Sequence[fronts.Point]) -> tables.Grid:
  """Every variant's means, those on their method's front in bold."""
  rows = []
  for method, some in fronts.by_method(points_of).items():
    best = fronts.front(some)
    for point in sorted(some, key=lambda p: -fronts.mean(p.own)):
      mark = "**" if point in best else ""
      cells = [f"{mark}{100 * fronts.mean(v):.1f}{mark}" for v in (point.own, point.pooled, point.tested)]
      rows.append([method, point.variant, *cells, str(len(point.own))])
  return tables.Grid(["method", "variant", "own", "pooled", "own test examples", "seeds"], rows)


def write(root: Path, rows: Sequence[Row], evidence: Evidence, facts: Mapping[str, str]) -> str:
  """claims.json, claims.md and, with claim A11, pictures of the fronts; returns the Markdown text."""
  parts = ["# Claims", "\n".join(f"- {name}: {value}" for name, value in facts.items()), tables.markdown(grid(rows))]
  parts.append(
    "Measured on each seed and averaged; own accuracy, on the client's own test examples, where nothing else is said."
    f" Intervals are the percentile bootstrap's over seeds, too narrow for fewer than {_ENOUGH}: their verdicts are not"
    " in bold. *Holds* and *fails*: the whole interval is on that side of the criterion; *tie*: these seeds do not"
    " decide; *one seed* has no interval."
  )
  drawn: dict[str, list[dict[str, Any]]] = {}
  shown = any(row.id == "A11" for row in rows)
  for few, name in ((False, "dropped clients"), (True, "returners with 20 examples")) if shown else ():
    points_of = front_points(evidence, few)
    by_method = fronts.by_method(points_of)
    if not by_method:
      continue
    drawn[name] = [point._asdict() for some in by_method.values() for point in some]
    parts += [
      f"## Own against pooled accuracy: {name}",
      "Own: on the client's mix of classes, each class judged on balanced test images; pooled: all classes alike. In"
      " bold what no other variant of the method beats in both. *prior*: trained with balanced softmax, and the log of"
      " the client's label prior is added where own data are scored.",
      tables.markdown(front_grid(points_of)),
    ]
    try:
      file = f"fronts_{'few' if few else 'all'}.png"
      files.write(root / file, plots.fronts(lines(by_method), "pooled accuracy", "own accuracy"))
      parts.append(f"![{name}]({file})")
    except InputError as error:  # matplotlib is missing; the numbers are all there
      print(f"fronts are not drawn: {error}", file=sys.stderr)
  text = "\n\n".join(parts) + "\n"
  content = {"facts": dict(facts), "claims": [row._asdict() for row in rows], "fronts": drawn}
  files.write(root / "claims.json", json.dumps(content, indent=2) + "\n")
  files.write(root / "claims.md", text)
  return text


def lines(by_method: Mapping[str, Sequence[fronts.Point]]) -> list[plots.Front]:
  """What the picture shows of each method: all variants, and which are on its front."""
  return [
    plots.Front(
      method,
      [fronts.mean(p.pooled) for p in some],
      [fronts.mean(p.own) for p in some],
      [p in fronts.front(some) for p in some],
    )
    for method, some in by_method.items()
  ]


def listed() -> str:
  """What is claimed, a line each: what `--claims=help` prints."""
  rows = [(id, row.claim) for id, claim in CLAIMS.items() for row in claim.judge({})]
  bare = lambda text: re.sub(r" [(\[].*[)\]]$", "", text)  # without of which samples, or whose figure
  lines = dict.fromkeys(f"{id:4} {bare(claim)}" for id, claim in rows)
  return "\n".join(
    [
      *lines,
      "",
      "Criteria stand in the table; C is the cost of the generator, J the worth of its samples, H",
      "harm by synthetic data, R figures of a machine-written summary of the paper that nobody has verified.",
    ]
  )


def parse_claims(text: str) -> list[str]:
  """The claims of a comma list, each once, or all."""
  ids = list(CLAIMS) if text == "all" else list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
  for id in ids or [text]:
    if id not in CLAIMS:
      raise InputError(f"claims: got {id!r}, accepted are some of {', '.join(CLAIMS)}, or all or help alone")
  return ids


def given_flags(but: Collection[str] = _GIVEN) -> dict[str, Any]:
  """Settings of runs, methods and wrappers that the command line gives, `but` for fields that are no flags."""
  names = [field.name for field in config.fields() if field.name not in but]
  owners = (*algorithms.METHODS, *algorithms.WRAPPERS)
  names += [f"{owner}_{name}" for owner in owners for name in algorithms.settings(owner)]
  return {name: flags.FLAGS[name].value for name in names if flags.FLAGS[name].present}


def main(arguments: Sequence[str]) -> int:
  """Runs what the claims need and prints their table; 1 if a run failed."""
  del arguments
  asked = flags.FLAGS
  if asked.claims == "help":
    print(listed())
    return 0
  ids, seeds, scale = parse_claims(asked.claims), parse_seeds(asked.seeds), asked.scale
  given = given_flags()
  configs, names = plan(ids, seeds, scale, given)
  methods = list(dict.fromkeys(one.algorithm for one in configs.values()))
  config.note_unused(methods)
  config.note_choices(methods)
  for note in overruled((variant for variant, _ in names.values()), given):
    print(note, file=sys.stderr)
  root = Path(asked.output)
  if asked.dry_run:
    placed = {name: root / name / "summary.json" for name in configs}
    finished = {name: float(json.loads(path.read_text())["seconds"]) for name, path in placed.items() if path.is_file()}
    print(runs.listed(root, configs))
    for id in ids:
      for lacking in dict.fromkeys(filter(None, map(missing, CLAIMS[id].variants))):
        print(f"{id} is not measured in whole: {lacking} is not there")
    left = estimate(configs, scale, finished)
    print(f"{len(configs)} runs, {len(finished)} finished; the rest may take {math.ceil(left / 60)} min in one process")
    return 0
  outcome = runs.run(root, configs)
  evidence: dict[Variant, dict[int, Found]] = {}
  for name, summary in outcome.summaries.items():
    variant, seed = names[name]
    evidence.setdefault(variant, {})[seed] = load(summary)
  words = [f"--{name}={'DIR' if name in config.PATHS else value}" for name, value in given.items()]
  own = [f"--scale={scale}", f"--seeds={asked.seeds}", f"--claims={asked.claims}", "--output=DIR"]
  command = " ".join(["python -m experiments.claims", *map(shlex.quote, [*own, *words])])
  usual = make(AP_FL, seeds[0], scale, given)
  facts = {"federation": f"{runs.federation(usual)}, where a claim says nothing else"} | runs.facts(outcome, command)
  print(write(root, judged(ids, evidence), evidence, facts))
  return 1 if outcome.failed else 0


if __name__ == "__main__":
  config.define_flags(but=_GIVEN)
  flags.DEFINE_enum("scale", "digits", list(SCALES), "on what the claims are tried")
  flags.DEFINE_string("seeds", "1,2,3,4,5,6,7,8,9,10", "comma-separated")
  flags.DEFINE_string("claims", "all", f"all, or some of {', '.join(CLAIMS)}, comma-separated; or help")
  flags.DEFINE_string("output", "runs/claims", "folder of the runs and of the table")
  flags.DEFINE_bool("dry_run", False, "list the runs with the time that they may take, and stop")
  for field in config.fields():
    if field.name not in _GIVEN:
      flags.declare_key_flag(field.name)
  config.main(main)
