"""All methods on one federation, with the same rounds, local epochs and personal steps:
`python -m experiments.methods --output=DIR --seeds=0,1,2`.

Every setting of a run is a flag here too and holds for every run, a method's own settings for its runs. Each run has a
folder of DIR (`experiments/runs.py`: the same command goes on, and several processes may share the work); beside them
stand table.md, table.html, accuracy.png and results.json. What is reported is the last round's. `--readme` writes the
table of methods into README.md instead.
"""

import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from apfl_jax import algorithms, files, metrics
from apfl_jax.errors import InputError
from apfl_jax.report import html, plots, tables
from apfl_jax.settings import near
from experiments import config, runs
from experiments.config import Config

_GIVEN = ("algorithm", "seed", "workdir", "trained")  # fields of a run that the comparison decides
_ROOT = Path(__file__).parents[1]
_MARKERS = "<!-- methods: python -m experiments.methods --readme -->\n", "<!-- end of methods -->\n"
_COMPARED = ("own: all", "own: on balanced images", "pooled: personal")  # in pairs


class Measure(NamedTuple):
  """A column of the table.

  Attributes:
    unit: '%' of a share in [0, 1], 's', 'B' or 'FLOP'.
    read: a run's summary -> its value, or None.
  """

  unit: str
  read: Callable[[dict[str, Any]], float | None]


def _of(part: str, key: str) -> Callable[[dict[str, Any]], float | None]:
  return lambda summary: (summary[part] or {}).get(key)


def _round_seconds(summary: dict[str, Any]) -> float:
  """Seconds that the rounds took, compiling and scoring left out."""
  total, before = 0.0, 0
  for line in _lines(summary, "timings.jsonl"):
    total += line["seconds"] - line["compile_seconds"] if line["round"] > before else 0.0
    before = line["round"]
  return total


def _best_round(summary: dict[str, Any]) -> float | None:
  """The largest accuracy of the personal models on own test examples in any round that scored them."""
  scores = [line["personal_accuracy"] for line in _lines(summary, "metrics.jsonl")]
  return max((score for score in scores if score is not None), default=None)


def _lines(summary: dict[str, Any], name: str) -> list[dict[str, Any]]:
  return [json.loads(line) for line in (Path(summary["workdir"]) / name).read_text().splitlines()]


def _server(summary: dict[str, Any]) -> float | None:
  """Operations of the server, with a generator or without."""
  generator = _of("cost", "generator_flops")(summary)
  return _of("cost", "server_flops")(summary) if generator is None else generator


MEASURES = {
  "own: all": Measure("%", _of("personal_accuracy", "mean")),
  "own: on balanced images": Measure("%", _of("reweighted_accuracy", "mean")),
  "own: weighted": Measure("%", _of("personal_accuracy", "weighted_mean")),
  "own: worst 10 %": Measure("%", _of("personal_accuracy", "worst_decile")),
  "own: dropped": Measure("%", _of("personal_accuracy", "dropped")),
  "own: present": Measure("%", _of("personal_accuracy", "present")),
  "own: global model": Measure("%", _of("global_accuracy", "mean")),
  "pooled: personal": Measure("%", _of("pooled_accuracy", "personal_mean")),
  "pooled: global model": Measure("%", _of("pooled_accuracy", "global_model")),
  "rounds": Measure("s", _round_seconds),
  "local": Measure("FLOP", _of("cost", "local_flops")),
  "server": Measure("FLOP", _server),
  "personal": Measure("FLOP", _of("cost", "personalize_flops")),
  "up": Measure("B", _of("cost", "bytes_up")),
  "down": Measure("B", _of("cost", "bytes_down")),
}
_BEST = {"best test round": Measure("%", _best_round)}

# method -> measure -> seed -> value; what is not known is nan
Values = dict[str, dict[str, dict[int, float]]]


def compare(
  root: str | Path,
  configs: Mapping[str, Config],
  *,
  pairs: Sequence[tuple[str, str]] = (),
  best_round: bool = False,
  command: str = "",
) -> runs.Outcome:
  """Runs what is not finished and writes the table of what is.

  Args:
    root: the folder of the runs and of the table.
    configs: the runs by name, as `plan` makes them.
    pairs: methods whose differences are told, the first less the second.
    best_round: whether a column has the best test round, which needs `personalize_every`.
    command: what repeats it, for the table's head; without it the settings that are not the defaults stand there.

  Raises:
    InputError: see `runs.run`; or nothing could be run; or a pair names a method that is not run.
  """
  root = Path(root)
  _check(configs, pairs, best_round)
  outcome = runs.run(root, configs)
  if outcome.summaries:
    values = collect(outcome.summaries, MEASURES | _BEST if best_round else MEASURES)
    _write(root, values, [told(values, *pair) for pair in pairs], _facts(configs, outcome, command), outcome)
  return outcome


def _check(configs: Mapping[str, Config], pairs: Sequence[tuple[str, str]], best_round: bool) -> None:
  """Raises InputError for a pair or a column that these runs cannot have."""
  listed = sorted({config.algorithm for config in configs.values()})
  for name in (name for pair in pairs for name in pair):
    if name not in listed:
      known = ", ".join(listed)
      raise InputError(f"pairs: got {name!r}{near(name, listed)}, accepted are the methods that are run: {known}")
  if best_round and not all(config.personalize_every for config in configs.values()):
    raise InputError("best_round: needs scores of personal models during the run, give --personalize_every")


def plan(methods: Iterable[str], seeds: Iterable[int], make: Callable[[str, int], Config]) -> dict[str, Config]:
  """The runs by name; `make` is (method, seed) -> its settings."""
  methods = list(methods)
  return {f"{method}-{seed}": make(method, seed) for seed in seeds for method in methods}


def collect(summaries: Mapping[str, dict[str, Any]], measures: Mapping[str, Measure]) -> Values:
  """All numbers of the table, methods by group and there by their accuracy on own examples."""
  values: Values = {}
  for summary in summaries.values():
    of_method = values.setdefault(summary["algorithm"], {name: {} for name in measures})
    for name, measure in measures.items():
      value = measure.read(summary)
      of_method[name][summary["seed"]] = math.nan if value is None else float(value)
  groups = list(algorithms.grouped())

  def place(method: str) -> tuple[int, float]:
    mean, _ = spread(values[method]["own: all"].values())
    return groups.index(algorithms.METHODS[method].group), -mean if mean is not None else math.inf

  return {method: values[method] for method in sorted(values, key=place)}


def spread(values: Iterable[float]) -> tuple[float | None, float | None]:
  """Mean and standard deviation (of a sample, n - 1) of what is known."""
  known = [value for value in values if not math.isnan(value)]
  return (statistics.mean(known) if known else None), (statistics.stdev(known) if len(known) > 1 else None)


def told(values: Values, first: str, second: str) -> list[dict[str, Any]]:
  """Differences of two methods over the seeds that both have, a row for each of the measures that are compared."""
  rows = []
  for name in _COMPARED:
    a, b = (values.get(method, {}).get(name, {}) for method in (first, second))
    seeds = [seed for seed in a if not math.isnan(a[seed] - b.get(seed, math.nan))]
    result = metrics.paired([a[s] for s in seeds], [b[s] for s in seeds])
    row = result._asdict() | {"differences": result.differences.tolist()}
    rows.append({"first": first, "second": second, "measure": name, "seeds": seeds, **row})
  return rows


# --- what is written --------------------------------------------------------------------------------------------------


def _write(
  root: Path, values: Values, pairs: list[list[dict[str, Any]]], facts: dict[str, str], outcome: runs.Outcome
) -> None:
  of_pairs = [row for pair in pairs for row in pair]
  prior = any(summary["readout"] == "prior" for summary in outcome.summaries.values())
  title = "Methods on " + next(iter(outcome.summaries.values()))["dataset"]
  apart = {summary["algorithm"] for summary in outcome.summaries.values() if not tables.one_model(summary)}
  same = [method for method in values if method not in apart]
  sections = [
    html.Section("How it was made", "", facts),
    html.Section(
      "Test accuracy",
      "In percent, after the last round: mean ± standard deviation over seeds. Own: personal models on the client's "
      "own test examples, mean over clients; pooled: on a test set with all classes."
      + (f" The personal models of {', '.join(same)} are the global model." if same else "")
      + (f" {tables.PRIOR}" if prior else ""),
      _grid(values, shares=True),
    ),
    html.Section(
      "Cost",
      "Of a run: mean ± standard deviation over seeds. Rounds: seconds without compiling and scoring. FLOP: operations "
      "of local training, of the server's own training and of making personal models, counted from the programs "
      "(apfl_jax/metrics/ledger.py). Up and down: what all clients sent and read.",
      _grid(values, shares=False),
    ),
  ]
  if of_pairs:
    text = (
      "In points, over the seeds that both have: mean ± standard deviation; the bootstrap's interval (too narrow for "
      "few seeds); p one-sided, that the first is better, by flipping signs, at best 1 / 2^seeds."
    )
    sections.append(html.Section("Pairs", text, _grid_of_pairs(of_pairs)))
  drawn = [(name, of["pooled: personal"], of["own: all"]) for name, of in values.items()]
  points = [
    plots.Point(name, algorithms.METHODS[name].group, list(x.values()), list(y.values()))
    for name, x, y in drawn
    if not any(map(math.isnan, [*x.values(), *y.values()]))
  ]
  try:
    if points:
      picture = plots.compare(points, "personal models on the pooled test set", "personal models on own test examples")
      sections.append(html.Section("Own against pooled", "A point for each method, bars of ± a deviation.", picture))
      files.write(root / "accuracy.png", picture)
  except InputError as error:  # matplotlib is missing; the numbers are all there
    print(f"accuracy.png is not drawn: {error}", file=sys.stderr)
  files.write(root / "table.html", html.page(title, sections))
  files.write(root / "table.md", _markdown(title, sections))
  results = {
    "facts": facts,
    "methods": {
      method: {
        name: {"mean": spread(by_seed.values())[0], "std": spread(by_seed.values())[1], "seeds": _plain(by_seed)}
        for name, by_seed in of_method.items()
      }
      for method, of_method in values.items()
    },
    "pairs": of_pairs,
    "failed": outcome.failed,
    "elsewhere": list(outcome.elsewhere),
  }
  files.write(root / "results.json", json.dumps(results, indent=2) + "\n")


def _plain(by_seed: dict[int, float]) -> dict[str, float | None]:
  return {str(seed): None if math.isnan(value) else value for seed, value in by_seed.items()}


def _markdown(title: str, sections: Sequence[html.Section]) -> str:
  parts = [f"# {title}"]
  for section in sections:
    parts += [f"## {section.heading}", section.text]
    if isinstance(section.content, bytes):
      parts.append(f"![{section.heading}](accuracy.png)")
    elif isinstance(section.content, tables.Grid):
      parts.append(tables.markdown(section.content))
    else:
      parts.append("\n".join(f"- {name}: {value}" for name, value in section.content.items()))
  return "\n\n".join(filter(None, parts)) + "\n"


def _grid(values: Values, *, shares: bool) -> tables.Grid:
  """The methods by group, with their measures that are shares or those that are not."""
  measured = next(iter(values.values()))
  known = {name: of for name, of in (MEASURES | _BEST).items() if name in measured and (of.unit == "%") == shares}
  units = {name: _unit(measure.unit, (of[name].values() for of in values.values())) for name, measure in known.items()}
  digits = {name: 2 if measure.unit == "s" else 1 for name, measure in known.items()}
  rows: list[list[str]] = []
  group = ""
  for method, of_method in values.items():
    if algorithms.METHODS[method].group != group:
      group = algorithms.METHODS[method].group
      rows.append([group])
    rows.append([method, *(_cell(of_method[name].values(), scale, digits[name]) for name, (_, scale) in units.items())])
  return tables.Grid(["method", *(f"{name} ({unit})" if unit else name for name, (unit, _) in units.items())], rows)


def _unit(unit: str, columns: Iterable[Iterable[float]]) -> tuple[str, float]:
  """What the column's head says and what multiplies values; bytes and operations in the prefix of the largest."""
  if unit not in ("B", "FLOP"):
    return ("", 100.0) if unit == "%" else (unit, 1.0)
  most = max((value for column in columns for value in column if not math.isnan(value)), default=0.0)
  power = min(max(int(math.log10(max(most, 1)) / 3), 0), 5)
  return ("", "k", "M", "G", "T", "P")[power] + unit, 1000.0**-power


def _cell(values: Iterable[float], scale: float, digits: int) -> str:
  mean, std = spread(values)
  if mean is None:
    return "–"
  return f"{scale * mean:.{digits}f}" + ("" if std is None else f" ± {scale * std:.{digits}f}")


def _grid_of_pairs(rows: Sequence[dict[str, Any]]) -> tables.Grid:
  def points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f}"

  cells = [
    [
      f"{row['first']} - {row['second']}",
      row["measure"],
      points(row["mean"]) + ("" if row["std"] is None else f" ± {100 * row['std']:.1f}"),
      "–" if row["low"] is None else f"{points(row['low'])} to {points(row['high'])}",
      "–" if row["low"] is None else f"{row['p_value']:.3g}",
      str(len(row["differences"])),
    ]
    for row in rows
  ]
  return tables.Grid(["pair", "measure", "difference", "95 % interval", "p", "seeds"], cells)


def _facts(configs: Mapping[str, Config], outcome: runs.Outcome, command: str) -> dict[str, str]:
  summaries = list(outcome.summaries.values())
  versions = [", ".join(f"{name} {version}" for name, version in s["versions"].items()) for s in summaries]
  joined = lambda texts: "; ".join(dict.fromkeys(map(str, texts)))
  missing = [f"{name} ({why})" for name, why in outcome.failed.items()]
  missing += [f"{name} (of another process)" for name in outcome.elsewhere]
  facts = {
    "federation": joined(map(runs.federation, configs.values())),
    "command": command,
    "settings": "" if command else " ".join(_changed(configs.values())) or "the defaults",
    "seeds": ", ".join(dict.fromkeys(str(config.seed) for config in configs.values())),
    "commit": joined(s["commit"] for s in summaries if s["commit"]),
    "versions": joined(versions),
    "device": joined(s["device"] for s in summaries),
    "time": f"{sum(s['seconds'] for s in summaries) / 60:.1f} min in {len(summaries)} of {len(configs)} runs",
    "missing": "; ".join(missing),
  }
  return {name: value for name, value in facts.items() if value}


def _changed(configs: Iterable[Config]) -> list[str]:
  """The flags that differ from the defaults, quoted for a shell; where data lie is no part of what was done."""
  found: dict[str, None] = {}
  for one in configs:
    usual = Config(algorithm=one.algorithm).lines()
    found |= dict.fromkeys(line for line in one.lines() if line not in usual)
  left_out = tuple(f"--{name}=" for name in (*_GIVEN, "progress", "report"))
  hidden = [f"--{name}=" for name in config.PATHS]
  lines = [next((f"{start}DIR" for start in hidden if line.startswith(start)), line) for line in found]
  return [shlex.quote(line) for line in lines if not line.startswith(left_out)]


# --- the README's table -----------------------------------------------------------------------------------------------


def readme_table() -> str:
  """The methods by group, as README.md holds them between its markers."""
  parts = []
  for group, methods in algorithms.grouped().items():
    rows = [[f"`{name}`", method.paper, _link(method.make), method.keeps] for name, method in sorted(methods.items())]
    grid = tables.Grid(["name", "paper", "file", "what it keeps on the client"], rows)
    parts.append(f"**{group}**: {algorithms.GROUPS[group]}\n\n{tables.markdown(grid)}\n")
  return "\n".join(parts)


def _link(make: Callable[..., Any]) -> str:
  """The file of a method, or its package's folder."""
  module, *inside = make.__module__.removeprefix("apfl_jax.algorithms.").split(".")
  name, path = (f"{module}/", module) if inside else (f"{module}.py", f"{module}.py")
  return f"[{name}](apfl_jax/algorithms/{path})"


def with_table(text: str) -> str:
  """The README's text with its table made anew.

  Raises:
    InputError: the text has no markers.
  """
  first, last = _MARKERS
  before, found, rest = text.partition(first)
  _, also, after = rest.partition(last)
  if not found or not also:
    raise InputError(f"README.md: no line {(last if found else first).strip()!r}, between which the table stands")
  return f"{before}{first}\n{readme_table()}\n{last}{after}"


# --- the command line -------------------------------------------------------------------------------------------------


def parse_methods(text: str) -> list[str]:
  """The methods of a comma list, each once, or all of them."""
  if text == "all":
    return list(algorithms.METHODS)
  names = _parts(text)
  for name in names or [text]:
    if name not in algorithms.METHODS:
      meant, known = near(name, algorithms.METHODS), ", ".join(algorithms.METHODS)
      raise InputError(f"methods: got {name!r}{meant}, accepted are all, or some of {known}")
  return names


def parse_seeds(text: str) -> list[int]:
  """The seeds of a comma list, each once."""
  if len(_parts(text)) < len([part for part in text.split(",") if part.strip()]):
    raise InputError(f"seeds: got {text!r}, accepted is each at most once")
  for part in _parts(text) or [text]:
    if not (part.isascii() and part.isdigit()):
      raise InputError(f"seeds: got {part!r}, accepted are whole numbers from 0, comma-separated")
  return list(map(int, _parts(text)))


def parse_pairs(text: str) -> list[tuple[str, str]]:
  """The pairs of a comma list of FIRST:SECOND."""
  pairs = []
  for part in _parts(text):
    first, _, second = part.partition(":")
    if not first or not second or ":" in second:
      raise InputError(f"pairs: got {part!r}, accepted are pairs of methods, comma-separated, e.g. knn_per:fedavg")
    pairs.append((first, second))
  return pairs


def _parts(text: str) -> list[str]:
  return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def main(arguments: Sequence[str]) -> int:
  """Runs the comparison that the flags describe and prints its table; 1 if a run failed."""
  del arguments
  asked = flags.FLAGS
  if asked.readme:
    path = _ROOT / "README.md"
    files.write(path, with_table(path.read_text()))
    print(f"{path}: its table has {len(algorithms.METHODS)} methods")
    return 0
  if asked.methods == "help":
    print(config.table_of_methods())
    return 0
  methods, seeds, pairs = parse_methods(asked.methods), parse_seeds(asked.seeds), parse_pairs(asked.pairs)
  config.note_unused(methods)
  config.note_choices(methods)
  configs = plan(
    methods, seeds, lambda method, seed: config.from_flags(algorithm=method, seed=seed, workdir=asked.output)
  )
  if asked.dry_run:
    _check(configs, pairs, asked.best_round)
    print(runs.listed(asked.output, configs))
    return 0
  own = {name: str(asked[name].value) for name in ("methods", "seeds", "pairs") if asked[name].present}
  own["output"] = "DIR"
  best = ["--best_round"] if asked.best_round else []
  words = [*(shlex.quote(f"--{name}={value}") for name, value in own.items()), *best, *_changed(configs.values())]
  wrappers = {name for settings in configs.values() for name in settings.wrapper_names}
  command = " ".join([config.program("methods", [*methods, *sorted(wrappers)]), *words])
  outcome = compare(asked.output, configs, pairs=pairs, best_round=asked.best_round, command=command)
  if outcome.summaries:
    print("\n" + (Path(asked.output) / "table.md").read_text())
    print(f"table: {Path(asked.output) / 'table.html'}")
  for name in outcome.elsewhere:
    print(f"{name} is of another process; the same command makes the whole table later", file=sys.stderr)
  return 1 if outcome.failed else 0


def command_line() -> None:
  """The binary."""
  config.define_flags(but=_GIVEN)
  flags.DEFINE_string("methods", "all", "all, or names, comma-separated; `help` lists them")
  flags.DEFINE_string("seeds", "0,1,2", "comma-separated")
  flags.DEFINE_string("output", "runs/methods", "folder of the runs and of the table")
  flags.DEFINE_string("pairs", "", "pairs of methods to compare seed by seed, e.g. knn_per:fedavg,gpfl:fedper")
  flags.DEFINE_bool("best_round", False, "also the best test round; needs --personalize_every")
  flags.DEFINE_bool("dry_run", False, "list the runs and stop")
  flags.DEFINE_bool("readme", False, "write the table of methods into README.md and stop")
  for field in config.fields():  # --help shows these; methods' own settings come with --helpfull
    if field.name not in _GIVEN:
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[field.name])
  config.main(main)


if __name__ == "__main__":
  command_line()
