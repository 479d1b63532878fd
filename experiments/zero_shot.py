"""Zero-shot board: every table of classes on many triples of unseen classes,
`python -m experiments.zero_shot --output=DIR --dataset=fashion_mnist --data_dir=DATA --triples=10`.

Some classes (three by default) are held by clients alone that never take part. A federation of the others trains one
global model a triple, with a free head and one-hot embeddings: it reads no table, so all tables are scored on the same
features (`apfl_jax/algorithms/ap_fl/unseen.py`; method 2.7, 8.1). What the server has of the seen classes is the tier:
samples of its generator under `s0` and `s1`, class means and variances of the clients' features under `s2`, with no
generator at all. The same global model results, as no tier touches the rounds.

`onehot` and `random` are the controls. All other tables are prior knowledge, `attributes` and `hierarchy` of people who
know the images; no baseline has it. Defaults were chosen on triples of other seeds (`--first_seed`) than those shown.

DIR holds a file of features for each triple, so that the same command goes on where it stopped; board.json has all
numbers, board.md the table. Every setting of a run is a flag here too.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from apfl_jax import data, metrics, random, semantics, training
from apfl_jax.algorithms import ap_fl_package as ap_fl
from apfl_jax.algorithms.ap_fl import unseen
from apfl_jax.errors import InputError
from apfl_jax.files import replacing
from apfl_jax.report import tables
from apfl_jax.types import PyTree
from experiments import config, job
from experiments.config import Config

TIERS = ("s0", "s1", "s2")
# The board decides.
_GIVEN = ("algorithm", "head", "embeddings", "seed", "workdir", "trained", "monopolistic_classes")
_CONTROLS = ("onehot", "random")
_EXAMPLES = 30  # of each class that a server chooses a shift by
_BLOCK = 500  # images a pass


class Scoring(NamedTuple):
  """How tables are made and scored, by the flags of the same names; the features of a `Base` do not depend on it."""

  ap_fl_unseen_penalty: float = 0.3
  ap_fl_unseen_keep: float = 0.8
  ap_fl_unseen_p_value: float = 0.05
  embedding_influence: float = 1.0
  embedding_whitening: bool = False


class Base(NamedTuple):
  """What one triple leaves: features of the final global model.

  Attributes:
    seen: bool [C], held by a client that takes part.
    means: float32 [C, F], of the seen classes, as the server knows them.
    examples: float32 [C, n, F], by which it chooses shifts: of generated samples, or drawn around real means.
    places: float32 [C, F], by which it judges tables, see `unseen.judged_by`.
    test: float32 [P, F], of the pooled test examples.
    test_logits: float32 [P, C], the head's.
    test_labels: int32 [P].
  """

  seen: np.ndarray
  means: np.ndarray
  examples: np.ndarray
  places: np.ndarray
  test: np.ndarray
  test_logits: np.ndarray
  test_labels: np.ndarray


# --- bases ------------------------------------------------------------------------------------------------------------


def plan(number: int, first_seed: int, make: Callable[[int], Config]) -> Iterator[tuple[job.Job, tuple[int, ...]]]:
  """Jobs of successive seeds with their unseen classes, no set of classes twice.

  A seed is passed over where chance leaves more classes without a holder than were asked for.

  Args:
    number: of them.
    first_seed: where to begin.
    make: seed -> Config.

  Raises:
    InputError: there are not so many sets.
  """
  found: set[tuple[int, ...]] = set()
  ready = None
  for seed in range(first_seed, first_seed + 20 * number):
    if len(found) == number:
      return
    ready = job.prepare(make(seed), like=ready)
    classes = tuple(np.flatnonzero(~_seen(ready)).tolist())
    if classes not in found and len(classes) == ready.config.monopolistic_classes:
      found.add(classes)
      yield ready, classes
  if len(found) < number:
    raise InputError(f"triples: got {number}, but {20 * number} seeds have {len(found)} sets of classes; take fewer")


def _seen(ready: job.Job) -> np.ndarray:
  held: np.ndarray = data.histogram(ready.federation, len(ready.dataset.class_names)) > 0
  return held[~ready.gone].any(axis=0)


def train(ready: job.Job) -> Base:
  """Runs a job's rounds and reads the features.

  Raises:
    InputError: the job is on a virtual clock, whose programs are made for one schedule.
  """
  if ready.clock is not None:
    raise InputError(f"clock: got {ready.config.clock!r}, accepted is rounds: sets of classes share one program")
  simulator = ready.simulator
  inputs = simulator.place(ready.inputs)
  state = simulator.init(inputs)
  for start in range(0, ready.config.rounds, simulator.chunk):
    rounds = simulator.place(np.int32(min(simulator.chunk, ready.config.rounds - start)))
    state, _ = simulator.advance(state, inputs, rounds)
  return _features(ready, state.server)


def _features(ready: job.Job, server: PyTree) -> Base:
  task = ready.task(ready.inputs.settings)
  predict = jax.jit(functools.partial(training.predict, task.model))
  store, num_classes = ready.federation.store, task.num_classes

  def features(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits of images in [0, 1], in blocks of one shape."""
    padded = np.resize(images, (-(-len(images) // _BLOCK) * _BLOCK, *images.shape[1:]))
    found = [predict(server.params, padded[i : i + _BLOCK]) for i in range(0, len(padded), _BLOCK)]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *found)
    return joined.features, joined.logits

  key = random.key(ready.config.seed, random.Purpose.REPORT)
  measured = isinstance(server.statistics.classes, ap_fl.ByClass)
  if measured:
    real = server.statistics.classes.estimated.features
    means, examples = np.asarray(real.mean), np.asarray(unseen.around(real.mean, real.square, _EXAMPLES, key))
  else:
    images = np.asarray(ap_fl.samples(task, server, key, _EXAMPLES))
    examples = features(images.reshape(-1, *images.shape[2:]))[0].reshape(num_classes, _EXAMPLES, -1)
    means = examples.mean(1)
  places = np.asarray(unseen.judged_by(task.model, server.params.head, jnp.asarray(means), real=measured))
  span = ready.inputs.pooled
  pooled = np.asarray(store.index)[int(span.start) : int(span.start) + int(span.size)]
  test, logits = features(np.asarray(store.images)[pooled] / np.float32(255))
  return Base(_seen(ready), means, examples, places, test, logits, np.asarray(store.labels)[pooled])


def kept(path: Path, ready: job.Job) -> Base:
  """The base in a file, trained if it is not there.

  Raises:
    InputError: the file is of other settings.
  """
  identity = "\n".join(sorted(ready.config.identity()))
  if path.is_file():
    with np.load(path) as found:
      if str(found["identity"]) != identity:
        raise InputError(f"output: {path} was made with other settings, accepted is another folder, or the same flags")
      return Base(*(found[name] for name in Base._fields))
  base = train(ready)
  with replacing(path) as temporary, open(temporary, "wb") as file:
    np.savez_compressed(file, allow_pickle=False, identity=np.array(identity), **base._asdict())
  return base


# --- scores -----------------------------------------------------------------------------------------------------------


@jax.jit
def _judge(table: jax.Array, base: Any, penalty: float, keep: float) -> dict[str, jax.Array]:
  seen = base.seen
  found = unseen.prototypes(table, base.means, seen, penalty)
  p_value = unseen.table_test(table, base.places, seen)
  raw = unseen.cosine_scores(base.examples, found)
  reading = unseen.read(raw, seen, found, p_value, unseen.Settings("prototypes", 1.0, keep, penalty))
  scores = unseen.cosine_scores(base.test, found) / reading.unit
  everything = jnp.ones_like(seen)

  def counts(shift: Any, classes: jax.Array) -> jax.Array:
    logits = unseen.answer(base.test_logits, scores, seen, shift, jnp.bool_(True))
    answers = metrics.shared_answers(logits, classes)
    return metrics.confusion(base.test_labels, answers, jnp.ones(len(logits), bool), len(seen))

  return {
    "plain": counts(reading.shift, everything),
    "unshifted": counts(0.0, everything),
    "restricted": counts(0.0, ~seen),
    "shift": reading.shift,
    "p_value": p_value,
  }


def score(base: Base, table: np.ndarray, scoring: Scoring) -> dict[str, float]:
  """How a table float32 [C, D] does on one triple: measures of `metrics.unseen`, and what the server thinks of it."""
  found = jax.tree.map(np.asarray, _judge(table, base, scoring.ap_fl_unseen_penalty, scoring.ap_fl_unseen_keep))
  classes = np.flatnonzero(~base.seen).tolist()
  measured = metrics.unseen(found["plain"], found["restricted"], classes)
  del measured["classes"]
  before = metrics.unseen(found["unshifted"], found["restricted"], classes)
  without = np.argmax(np.where(base.seen, base.test_logits, -np.inf), axis=1)
  mine = base.seen[base.test_labels]
  return measured | {
    "unshifted_harmonic_mean": before["harmonic_mean"],
    "seen_accuracy_without": float(np.mean(without[mine] == base.test_labels[mine])),
    **{name: float(found[name]) for name in ("shift", "p_value")},
  }


def board(
  base: Base, kinds: Sequence[str], dataset: data.Dataset, scoring: Scoring, *, seed: int, random_tables: int
) -> list[dict[str, Any]]:
  """A row for each table, of one triple."""
  rows = []
  for kind in kinds:
    for draw in range(random_tables if kind == "random" else 1):
      rng = np.random.default_rng([seed, draw, int(random.Purpose.EMBEDDINGS)])
      table = semantics.embeddings(
        kind,
        dataset.class_names,
        dataset.name,
        rng=rng,
        influence=scoring.embedding_influence,
        whitening=scoring.embedding_whitening,
      )
      rows.append({"embeddings": kind, "draw": draw, **score(base, table, scoring)})
  return rows


# --- what is written --------------------------------------------------------------------------------------------------


_COLUMNS = {
  "restricted_accuracy": "restricted",
  "seen_accuracy": "seen",
  "accuracy": "unseen",
  "harmonic_mean": "harmonic mean",
  "unshifted_harmonic_mean": "unshifted",
}


def summed(rows: list[dict[str, Any]], largest: float) -> list[dict[str, Any]]:
  """For each tier and table: means over triples with standard errors, and differences from the controls in pairs."""
  seeds = list(dict.fromkeys(row["seed"] for row in rows))

  def by_triple(tier: str, kind: str, name: str) -> list[float]:
    """A number a triple, the mean over draws."""
    of = lambda seed: [row[name] for row in rows if (row["seed"], row["tier"], row["embeddings"]) == (seed, tier, kind)]
    return [statistics.fmean(of(seed)) for seed in seeds]

  result = []
  for tier, kind in dict.fromkeys((row["tier"], row["embeddings"]) for row in rows):
    entry: dict[str, Any] = {"tier": tier, "embeddings": kind, "triples": len(seeds)}
    for name in (*_COLUMNS, "seen_accuracy_without", "p_value"):
      values = by_triple(tier, kind, name)
      error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
      entry[name] = {"mean": statistics.fmean(values), "error": error}
    passed = [row["p_value"] <= largest for row in rows if (row["tier"], row["embeddings"]) == (tier, kind)]
    entry["passes"] = statistics.fmean(passed)
    for control in _CONTROLS:
      if kind not in _CONTROLS and any(row["embeddings"] == control for row in rows):
        for name in ("restricted_accuracy", "harmonic_mean"):
          pair = metrics.paired(by_triple(tier, kind, name), by_triple(tier, control, name))._asdict()
          entry[f"{name} less {control}"] = pair | {"differences": pair["differences"].tolist()}
    result.append(entry)
  return result


def grid(summary: list[dict[str, Any]]) -> tables.Grid:
  """The board as a table, in percent, with standard errors over triples."""

  def cell(value: dict[str, float | None]) -> str:
    error = value["error"]
    return tables.percent(value["mean"]) + ("" if error is None else f" ± {tables.percent(error)}")

  def wins(entry: dict[str, Any], control: str) -> str:
    pair = entry.get(f"restricted_accuracy less {control}")
    if pair is None:
      return "–"
    return f"{100 * pair['mean']:+.1f} ({sum(d > 0 for d in pair['differences'])} of {len(pair['differences'])})"

  header = ["embeddings", *_COLUMNS.values(), "passes the gate", *(f"restricted less {c}" for c in _CONTROLS)]
  lines: list[list[str]] = []
  for tier in dict.fromkeys(entry["tier"] for entry in summary):
    lines.append([f"tier {tier}"])
    for entry in (entry for entry in summary if entry["tier"] == tier):
      cells = [cell(entry[name]) for name in _COLUMNS]
      lines.append(
        [entry["embeddings"], *cells, f"{100 * entry['passes']:.0f}", *(wins(entry, control) for control in _CONTROLS)]
      )
  return tables.Grid(header, lines)


def _markdown(summary: list[dict[str, Any]], facts: dict[str, str], scoring: Scoring) -> str:
  chance = 100 / int(facts["unseen classes"])
  text = (
    "In percent, mean over sets of unseen classes ± standard error. Restricted: told that it is one of them, ties "
    f"shared out (chance {chance:.1f}); seen, unseen: mean recall when all classes can be answered, with the shift "
    f"that keeps {scoring.ap_fl_unseen_keep:g} of the seen accuracy; unshifted: their harmonic mean at shift 0. Passes "
    "the gate: share of sets on which the table would be trusted. Differences in pairs, with the number of sets on "
    "which the table is ahead. `attributes` and `hierarchy` are what people know of the images: no baseline has that."
  )
  listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
  return f"# Zero-shot board: {facts['dataset']}\n\n{listed}\n\n{text}\n\n{tables.markdown(grid(summary))}\n"


def bases(
  root: Path, tier: str, jobs: Iterable[tuple[job.Job, tuple[int, ...]]]
) -> Iterator[tuple[str, job.Job, Base]]:
  """The sets' names, jobs and bases; those that are not in files are trained."""
  for ready, classes in jobs:
    name = ", ".join(ready.dataset.class_names[c] for c in classes)
    start = time.perf_counter()
    base = kept(root / f"{tier}-{ready.config.seed}.npz", ready)
    print(f"{tier} {ready.config.seed}: {name}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    yield name, ready, base


def main(arguments: Sequence[str]) -> None:
  """Trains what is not trained and writes the board."""
  del arguments
  asked = flags.FLAGS
  kinds, tiers = (list(dict.fromkeys(part.strip() for part in x.split(","))) for x in (asked.tables, asked.tiers))
  for kind in kinds:
    semantics.parts(kind)
  for tier in tiers:
    if tier not in TIERS:
      raise InputError(f"tiers: got {tier!r}, accepted are {', '.join(TIERS)}, comma-separated")
  root = Path(asked.output)
  root.mkdir(parents=True, exist_ok=True)
  begun = time.perf_counter()
  scoring = Scoring(*(getattr(asked, name) for name in Scoring._fields))
  rows: list[dict[str, Any]] = []
  sets: dict[str, None] = {}

  def make(seed: int, tier: str) -> Config:
    made = config.from_flags(
      algorithm="ap_fl",
      head="free",
      embeddings="onehot",
      seed=seed,
      workdir=str(root),
      monopolistic_classes=asked.unseen_classes,
      embedding_influence=1.0,
      embedding_whitening=False,
    )
    source = {"source": "none"} if tier == "s2" else {}
    # What scores are made with changes no base.
    settings = {name: value for name, value in made.settings.items() if f"ap_fl_{name}" not in Scoring._fields}
    return dataclasses.replace(made, settings=settings | {"tier": tier} | source)

  for tier in tiers:
    for name, ready, base in bases(
      root, tier, plan(asked.triples, asked.first_seed, functools.partial(make, tier=tier))
    ):
      sets[name], dataset, seed = None, ready.dataset, ready.config.seed
      found = board(base, kinds, dataset, scoring, seed=seed, random_tables=asked.random_tables)
      rows += [{"seed": seed, "tier": tier, **row} for row in found]
  usual = Config(algorithm="ap_fl").lines()
  changed = [line for line in make(0, tiers[0]).lines() if line not in usual]
  scored = {name: value for name, value in scoring._asdict().items() if value != getattr(Scoring(), name)}
  changed += [f"--{name}={value}" for name, value in scored.items()]
  left_out = tuple(f"--{name}=" for name in (*_GIVEN, "ap_fl_tier", "ap_fl_source", "data_dir", "progress", "report"))
  facts = {
    "dataset": dataset.name,
    "unseen classes": str(asked.unseen_classes),
    "sets": "; ".join(sets),
    "settings": " ".join(line for line in changed if not line.startswith(left_out)) or "the defaults",
    "time": f"{(time.perf_counter() - begun) / 60:.1f} min, without what was there",
    "commit": str(job.commit()),
    "versions": ", ".join(f"{name} {version}" for name, version in job.versions().items()),
  }
  summary = summed(rows, scoring.ap_fl_unseen_p_value)
  text = _markdown(summary, facts, scoring)
  written = json.dumps({"facts": facts, "summary": summary, "rows": rows}, indent=1) + "\n"
  for file, content in (("board.json", written), ("board.md", text)):
    with replacing(root / file) as path:
      path.write_text(content)
  print(text)


if __name__ == "__main__":
  config.define_flags(but=_GIVEN)
  flags.DEFINE_string("output", "runs/zero_shot", "folder of the features and of the board")
  flags.DEFINE_integer("triples", 10, "sets of unseen classes", lower_bound=1)
  flags.DEFINE_integer("unseen_classes", 3, "classes of each set", lower_bound=1)
  flags.DEFINE_integer("first_seed", 0, "of the sets; those after it follow", lower_bound=0)
  flags.DEFINE_string(
    "tables", "onehot,random,attributes,hierarchy,minilm,attributes+minilm", "embeddings, comma-separated"
  )
  flags.DEFINE_integer("random_tables", 5, "draws of random", lower_bound=1)
  flags.DEFINE_string("tiers", "s1,s2", f"comma-separated: {', '.join(TIERS)}")
  for field in config.fields():
    if field.name not in _GIVEN:
      flags.declare_key_flag(field.name)  # --help shows these; methods' own settings come with --helpfull
  config.main(main)
