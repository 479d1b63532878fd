"""A run: chunks of rounds on the device, and what the host does between them."""

import functools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from apfl_jax import data, metrics
from apfl_jax.errors import InputError
from apfl_jax.simulation import memory
from apfl_jax.simulation.batches import Plan
from apfl_jax.simulation.checkpoints import Checkpoints
from apfl_jax.simulation.chunks import Chunks
from apfl_jax.simulation.rounds import BROKEN, Inputs, Scores, Simulator
from apfl_jax.simulation.staging import Snapshot, Staging
from apfl_jax.types import PyTree, State


class Record(NamedTuple):
  """What was measured so far; part of every checkpoint.

  Attributes:
    metrics: a dict per evaluated round: only what the seed determines.
    timings: a dict per chunk of rounds.
    present: a number a round, visits computed: those begun, on a clock those that were waited for.
    arrived: a number a round, uploads that arrived.
    broken: a number a round, uploads that were not finite.
    presence: a string a round, a digit for each of `presence_ids`: 0 absent, 1 upload lost, 2 arrived, 3 not finite.
  """

  metrics: list[dict[str, Any]]
  timings: list[dict[str, Any]]
  present: list[int]
  arrived: list[int]
  broken: list[int]
  presence: list[str]


class Result(NamedTuple):
  """What a run ends with.

  Attributes:
    state: after the last round; its `times` are [N], its `clients` only what is on the device.
    record: see `Record`.
    rows: int32 [R], the federation rows that were scored.
    presence_ids: int32 [N'], the ids of the presence map.
    restored: how many of the timings come from earlier processes of this run.
    starts: int [N] by row, visits begun; on a virtual clock also those that were cut off or not over when it ended.
    dropped: bool [N] by row, never took part or left for good.
    global_scores: Scores [R] of the global model on the clients' own test examples; None where the method has none.
    personal_scores: Scores [R] of the personal models.
    plan: what memory the run was to take.
    pooled_confusion: (classes bool [C]) -> float32 [C, C], the global model on the pooled test examples, answering with
      one of these classes only, ties shared out; None without a global model.
  """

  state: State
  record: Record
  rows: np.ndarray
  presence_ids: np.ndarray
  restored: int
  starts: np.ndarray
  dropped: np.ndarray
  global_scores: Scores | None
  personal_scores: Scores
  plan: memory.MemoryPlan
  pooled_confusion: Callable[[np.ndarray], np.ndarray] | None


def run(
  simulator: Simulator,
  inputs: Inputs,
  *,
  rounds: int,
  gone: np.ndarray,
  histogram: np.ndarray | None = None,
  eval_every: int = 5,
  personalize_every: int = 0,
  eval_clients: int = 0,
  checkpoint_every: int = 0,
  directory: Path | None = None,
  trained: Path | None = None,
  data_on: str = "device",
  client_state: str = "device",
  memory_limit: int = 0,
  clock: Plan | None = None,
  traffic: tuple[int, int] = (0, 0),
  on_start: Callable[[], object] = lambda: None,
  on_record: Callable[[Record], None] = lambda record: None,
  progress: bool = True,
) -> Result:
  """Runs to the last round, from the newest checkpoint if there is one, and scores global and personal models.

  Args:
    simulator: the compiled functions.
    inputs: what is traced, with the whole federation; NumPy arrays where it is not to be on the device.
    rounds: T >= 1.
    gone: bool [N] by row, clients that never take part or leave for good, as `population.departed` tells.
    histogram: int [N, C] by row, the mix of classes at which a client's personal model is also scored; None for that
      of the examples that it trains on.
    eval_every: rounds between evaluations of the global model; 0 for the last round only.
    personalize_every: rounds between evaluations of personal models; 0 for the last round only.
    eval_clients: how many clients are scored, spread evenly over the rows; 0 for all.
    checkpoint_every: rounds between checkpoints; 0 for none.
    directory: where checkpoints and files of client rows live; None for none.
    trained: directory of a finished run of these very rounds, whose last checkpoint is taken in their place, whatever
      there is in `directory`; None for none.
    data_on: where examples live, see `Staging`.
    client_state: where the methods' client rows live.
    memory_limit: bytes that the host and each device may take; 0 for what there is.
    clock: the plan of the virtual clock for which the simulator was made; None for rounds.
    traffic: bytes of a visit's download and upload, see `cost.traffic`.
    on_start: called once the memory plan is accepted and before anything is written.
    on_record: called with the record whenever it has grown, and once at the start of a resumed run.
    progress: whether to show a bar.

  Raises:
    InputError: the memory plan says that there is no room, or checkpoints are there that cannot be read, or
      `trained` has none of the last round.
  """
  staging = Staging(simulator, inputs, data_on=data_on, client_state=client_state, directory=directory)
  chatty = progress and jax.process_index() == 0
  keeping = directory is not None and checkpoint_every > 0
  with Stopwatch() as first:
    plan, advance = memory.plan(staging, rounds, keeping, trained=trained is not None)
  memory.check(plan, simulator.population_size, memory_limit)
  on_start()
  if chatty:
    tqdm.write(str(plan), file=sys.stderr)
  federation = inputs.federation
  population = federation.id.shape[0]
  rows = _spread(population, eval_clients)
  presence_ids = np.sort(np.asarray(inputs.federation.id)[_spread(population, 256)])
  record = Record([], [], [], [], [], [])
  checkpoints = Checkpoints(directory / "checkpoints") if directory is not None and keeping else None
  found = None
  if trained:
    found = _trained(trained, staging, rounds)
  elif checkpoints:
    found = checkpoints.restore(staging.shapes()[0])
  if found:
    restored_state, snapshot, kept = found
    state, inputs = staging.begin(snapshot)
    state = simulator.place(restored_state._replace(clients=state.clients, times=state.times))
    if set(kept) != set(Record._fields):
      raise InputError(
        f"{'trained' if trained else 'workdir'}: {trained or directory} has checkpoints of another version; accepted is"
        " another folder"
      )
    record = Record(**kept)
    on_record(record)
    if chatty:
      of = f" of {trained}" if trained else ""
      tqdm.write(f"going on from the checkpoint of round {int(state.round)}{of}", file=sys.stderr)
  else:
    state, inputs = staging.begin()
  restored = 0 if trained else len(record.timings)
  done = int(state.round)
  record.timings.append({"round": done, **first.read()})

  def due(every: int, at: int) -> bool:
    return bool(every) and at % every == 0

  def evaluate(state: State, at: int, personal: bool) -> tuple[np.ndarray, Scores | None, Scores | None]:
    staging.flush(state)
    # Before the end, a client that was not sampled yet may still be.
    dropped = gone | (staging.times == 0) if at == rounds else gone
    bar = chatty and at == rounds
    bring = partial(staging.bring, state, inputs)
    score = partial(_score, bring=bring, place=simulator.place, rows=rows, block=simulator.block, progress=bar)
    shared = score(simulator.score_global, name="scoring") if simulator.has_global_model else None
    own = None
    if personal:
      make = partial(simulator.score_personal, classes=classes_present(state, at))
      own = score(make, name="personalising")
    confusion = None if shared is None else pooled_confusion(state, everything)
    reweighted = None if own is None else own.reweighted((held() if histogram is None else histogram)[rows])
    line = _line(record, at, dropped[rows], shared, own, reweighted, confusion)
    moved = sum(record.present) * sum(traffic) if clock is None else clock.schedule.traffic(*traffic)[at - 1]
    seconds = None if clock is None else float(clock.schedule.seconds[at - 1])
    record.metrics.append(line | {"virtual_seconds": seconds, "bytes": float(moved)})
    return dropped, shared, own

  def classes_present(state: State, at: int) -> Any:
    """bool [C]: held by the clients that were there in the last round; None where the softmax is not masked so."""
    if simulator.softmax_mask != "present":
      return None
    if clock is not None:
      assert clock.present is not None
      return simulator.place(clock.present[at - 1])
    last = simulator.place(np.int32(at - 1))
    there = np.asarray(simulator.present(state.population, inputs.seed, inputs.settings, last))
    return simulator.place((held() > 0)[there[np.asarray(federation.id)]].any(axis=0))

  @functools.cache
  def held() -> np.ndarray:
    """int32 [N, C]: who trains on how much of each class."""
    return data.histogram(federation, simulator.num_classes)

  def pooled_confusion(state: State, classes: np.ndarray) -> np.ndarray:
    return np.asarray(simulator.score_pooled(state, staging.pooled(state, inputs), simulator.place(classes)))

  def chunk_from(start: int) -> int:
    cadences = [c for c in (eval_every, personalize_every, checkpoint_every) if c]
    return min([simulator.chunk, rounds - start, *(c - start % c for c in cadences)])

  everything = np.ones(simulator.num_classes, bool)
  chunks = Chunks(simulator, staging, state, inputs, advance, clock)

  with tqdm(
    total=rounds, initial=done, desc="rounds", unit="round", disable=not chatty, mininterval=_interval()
  ) as bar:
    text = ""
    bar.set_postfix_str(_FIRST if done < rounds else text)
    while done < rounds:
      size = chunk_from(done)
      with Stopwatch() as watch:
        then = chunk_from(done + size) if done + size < rounds else 0
        happened = chunks.run(size, then)
        state, inputs = chunks.state, chunks.inputs
      done += size
      record.present.extend(happened.present.tolist())
      record.arrived.extend(happened.arrived.tolist())
      record.broken.extend(np.count_nonzero(np.asarray(happened.status) == BROKEN, axis=1).tolist())
      record.presence.extend(_presence(np.asarray(happened.ids), np.asarray(happened.status), presence_ids, population))
      record.timings.append({"round": done, **watch.read()})
      if done < rounds and (due(eval_every, done) or due(personalize_every, done)):
        evaluate(state, done, personal=due(personalize_every, done))
        shown = record.metrics[-1]["pooled_accuracy"]
        text = "" if shown is None else f"global model after {done}: {100 * shown:.1f} % pooled"
      bar.set_postfix_str(text if done < rounds else "", refresh=False)  # the end is scored below, and told there
      bar.update(size)
      on_record(record)
      if checkpoints and (due(checkpoint_every, done) or done == rounds):
        checkpoints.save(state, staging.snapshot(state), record._asdict())
  if checkpoints:
    checkpoints.close()

  with Stopwatch() as watch:
    dropped, shared, own = evaluate(state, rounds, personal=True)
  record.timings.append({"round": rounds, **watch.read()})
  on_record(record)
  assert own is not None
  confusion = partial(pooled_confusion, state) if simulator.has_global_model else None
  state = state._replace(times=jnp.asarray(staging.times))
  starts = staging.times if clock is None else clock.schedule.starts[np.asarray(federation.id)]
  return Result(state, record, rows, presence_ids, restored, starts, dropped, shared, own, plan, confusion)


def _trained(directory: Path, staging: Staging, rounds: int) -> tuple[State, Snapshot, dict[str, Any]]:
  """The last checkpoint of another run."""
  if not (directory / "checkpoints").is_dir():
    raise InputError(f"trained: {directory} has no checkpoints, accepted is a run with --checkpoint_every above 0")
  checkpoints = Checkpoints(directory / "checkpoints")
  found = checkpoints.restore(staging.shapes()[0])
  checkpoints.close()
  if found is None or int(found[0].round) != rounds:
    raise InputError(f"trained: {directory} has no checkpoint of round {rounds}, accepted is a finished run")
  return found


def _line(
  record: Record,
  at: int,
  dropped: np.ndarray,
  shared: Scores | None,
  own: Scores | None,
  reweighted: np.ndarray | None,
  confusion: np.ndarray | None,
) -> dict[str, Any]:
  """A line of metrics.jsonl."""

  def mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else None

  known = lambda values: [None if np.isnan(value) else float(value) for value in values]
  line: dict[str, Any] = {"round": at, "present": record.present[-1], "arrived": record.arrived[-1]}
  for name, scores in (("global", shared), ("personal", own)):
    each = np.full(len(dropped), np.nan) if scores is None else metrics.accuracy(scores.own)
    line[f"{name}_accuracy"] = mean(each)
    line[f"{name}_accuracy_dropped"] = mean(each[dropped])
    line[f"{name}_accuracy_present"] = mean(each[~dropped])
  line["personal_accuracy_each"] = None if own is None else known(metrics.accuracy(own.own))
  line["reweighted_accuracy_each"] = None if reweighted is None else known(reweighted)
  line["pooled_accuracy"] = None if confusion is None else mean(metrics.accuracy(confusion)[None])
  line["global_recall"] = None if confusion is None else known(metrics.recall(confusion))
  line["personal_pooled_accuracy"] = None if own is None else mean(metrics.accuracy(own.pooled))
  return line


def _score(
  function: Callable[..., Scores],
  bring: Callable[[np.ndarray, int], tuple[State, Inputs, np.ndarray]],
  place: Callable[[PyTree], PyTree],
  rows: np.ndarray,
  block: int,
  name: str,
  progress: bool,
) -> Scores:
  """Scores in blocks, so that long work shows progress and one block's shapes serve them all."""
  block = min(len(rows), block)
  parts = []
  with tqdm(total=len(rows), desc=name, unit="client", disable=not progress, mininterval=_interval()) as bar:
    bar.set_postfix_str(_FIRST)
    for start in range(0, len(rows), block):
      some = rows[start : start + block]
      state, inputs, there = bring(some, block)
      ok = np.arange(block) < len(some)
      scores = function(state, inputs, *place((np.pad(there, (0, block - len(some))), ok)))
      parts.append(jax.tree.map(np.asarray, scores))
      bar.set_postfix_str("", refresh=False)
      bar.update(len(some))
  return jax.tree.map(lambda *blocks: np.concatenate(blocks)[: len(rows)], *parts)


def _presence(cohorts: np.ndarray, statuses: np.ndarray, ids: np.ndarray, population: int) -> list[str]:
  place = np.full(population, -1)
  place[ids] = np.arange(len(ids))
  lines = []
  for cohort, status in zip(cohorts, statuses, strict=True):
    shown = np.zeros(len(ids), np.uint8)
    inside = (place[cohort] >= 0) & (status > 0)
    shown[place[cohort[inside]]] = status[inside]
    lines.append("".join(map(str, shown)))
  return lines


def _spread(population: int, count: int) -> np.ndarray:
  """Row numbers int32, evenly spread; all of them for 0."""
  if not count or count >= population:
    return np.arange(population, dtype=np.int32)
  return np.linspace(0, population - 1, count).round().astype(np.int32)


_FIRST = "compiling"  # beside a bar that nothing has moved yet


def _interval() -> float:
  return 0.2 if sys.stderr.isatty() else 10.0


def peak_memory_bytes() -> int:
  """Peak bytes in use: of the first device where it tells, else resident memory of this process."""
  stats = jax.local_devices()[0].memory_stats()
  return int(stats["peak_bytes_in_use"]) if stats and "peak_bytes_in_use" in stats else memory.peak_resident_bytes()


class Stopwatch:
  """Wall seconds since a block began, and how many of them XLA spent compiling."""

  def __enter__(self) -> "Stopwatch":
    self._compile_seconds, self._compilations = 0.0, 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    self._start = time.perf_counter()
    return self

  def __exit__(self, *_: object) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      self._compilations += 1
      self._compile_seconds += duration_secs

  def read(self) -> dict[str, Any]:
    """The row of timings.jsonl so far."""
    return {
      "seconds": round(time.perf_counter() - self._start, 4),
      "compile_seconds": round(self._compile_seconds, 4),
      "compilations": self._compilations,
      "peak_memory_bytes": peak_memory_bytes(),
    }
