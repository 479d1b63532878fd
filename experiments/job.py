"""From a `Config` to a run directory: what `experiments.train` does, as a function for Colab, sweeps and tests."""

import csv
import functools
import hashlib
import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import apfl_jax
from apfl_jax import algorithms, data, files, metrics, nn, population, random, report, semantics, simulation, training
from apfl_jax.errors import InputError
from apfl_jax.types import Algorithm, Array, Federation, HeldOut, LocalSGD, Process, PyTree, Task
from experiments import judge
from experiments.config import Config, program

_SAMPLES = 8  # images a class in the report


class Job(NamedTuple):
  """A run that is ready to go: everything that can be refused has been.

  Attributes:
    config: the settings.
    dataset: what is learnt, without the classes of verification.
    verified: names of those.
    federation: who holds what; with a method that pools, the inputs have the pool instead.
    inputs: what is traced.
    build: settings -> (algorithm, process).
    task: settings -> Task.
    simulator: the compiled functions.
    gone: bool [N], clients that never take part or leave for good.
    traffic: bytes of a visit, down and up.
    clock: the plan of the virtual clock; None for rounds.
  """

  config: Config
  dataset: data.Dataset
  verified: tuple[str, ...]
  federation: Federation
  inputs: simulation.Inputs
  build: Callable[[PyTree], tuple[Algorithm, Process]]
  task: Callable[[PyTree], Task]
  simulator: simulation.Simulator
  gone: np.ndarray
  traffic: tuple[int, int]
  clock: simulation.batches.Plan | None


def prepare(
  config: Config, dataset: data.Dataset | None = None, *, batch_width: int = 0, like: Job | None = None
) -> Job:
  """Loads, partitions and builds; nothing is written. Raises InputError for whatever does not fit together.

  Args:
    config: the settings.
    dataset: taken in place of the one that the settings name.
    batch_width: visits of the asynchronous clock computed together, at most; 0 for what fits its schedule.
    like: a job whose compiled functions are taken if this one has the same, as if it differs in its seed alone; they
      may still be compiled for other shapes.
  """
  simulation.resolve(config.client_map)
  if config.clock != "rounds" and jax.process_count() > 1:
    raise InputError(f"clock: got {config.clock!r} with several processes that share a run; accepted is rounds")
  entry = algorithms.METHODS[config.algorithm]
  if entry.pools and (config.softmax_mask, config.readout) != ("none", "plain"):
    raise InputError(
      f"softmax_mask, readout: got {config.softmax_mask}, {config.readout} with --algorithm={config.algorithm}, whose"
      " clients' labels are everybody's; accepted are none, plain"
    )
  if entry.pools and (place := places(config)["data_on"]) != "device":
    raise InputError(
      f"data_on: got {place!r} with --algorithm={config.algorithm}, whose clients all read the whole pool;"
      " accepted is device"
    )
  dataset = dataset or data.load(config.dataset, config.data_dir or None)
  host = lambda purpose: np.random.default_rng([config.seed, int(purpose)])
  dataset, held_out, verified = _without(config, dataset, host(random.Purpose.VERIFICATION))
  num_classes, image_shape = len(dataset.class_names), dataset.images.shape[1:]

  names, rates = config.processes
  facts = _facts(config)
  replayed = _replayed(config)
  gone = replayed.gone if replayed else _departed(config, facts)
  if gone.all():
    raise InputError(
      f"drop_rate: got {config.drop_rate} with --dropout={config.dropout}, which leaves none of the"
      f" {config.num_clients} clients; accepted is a rate at which one stays"
    )
  if config.monopolistic_classes and not gone.any():
    raise InputError(
      f"monopolistic_classes: got {config.monopolistic_classes}, but --dropout={config.dropout}"
      f" --drop_rate={config.drop_rate} makes no client leave to hold them; accepted is 0"
    )
  partition = _partition(config, dataset.labels, num_classes, gone, host(random.Purpose.PARTITION))
  federation, pooled = data.build(
    dataset,
    partition,
    rng=host(random.Purpose.SPLIT),
    pooled_examples=config.pooled_examples,
    index_size=_index_size(config, dataset),
  )
  if config.dropped_examples:
    federation = _with_few(federation, gone, config.dropped_examples)
  if "label" in names:
    facts = facts._replace(label_rank=_label_rank(federation, num_classes))
  table = semantics.embeddings(
    config.embeddings,
    dataset.class_names,
    dataset.name,
    rng=host(random.Purpose.EMBEDDINGS),
    influence=config.embedding_influence,
    whitening=config.embedding_whitening,
  )

  mesh = simulation.default_mesh()
  traced, static = _parted(config.settings)
  around = {name: _parted(settings) for name, settings in config.wrapper_settings.items()}

  def task(settings: PyTree) -> Task:
    model = nn.classifier(
      config.model,
      image_shape,
      num_classes,
      head=config.head,
      embeddings=settings["embeddings"],
      dtype=jnp.dtype(config.compute_dtype),
    )
    sgd = LocalSGD(
      learning_rate=settings["learning_rate"],
      batch_size=config.batch_size,
      epochs=config.local_epochs,
      steps=config.local_steps,
      personal_steps=config.personal_steps,
      weighting=config.weighting,
      augment=config.augment,
    )
    return Task(
      num_clients=config.num_clients,
      num_classes=num_classes,
      image_shape=image_shape,
      embeddings=settings["embeddings"],
      model=model,
      sgd=sgd,
      rounds=settings["rounds"],
      spread=simulation.spread(mesh),
      aggregations=(config.cohort_size or config.num_clients) if config.clock == "asynchronous" else 1,
    )

  def build(settings: PyTree) -> tuple[Algorithm, Process]:
    algorithm = entry.make(task(settings), **static, **settings["method"])
    for name, (_, fixed) in around.items():
      algorithm = algorithms.WRAPPERS[name].make(algorithm, task(settings), **fixed, **settings["wrappers"][name])
    others = population.waiting(settings["server_wait"]), population.speeds(config.speed, settings["speed_spread"])
    rates, facts = settings["drop_rates"], settings["population"]
    return algorithm, population.make(names, config.num_clients, rates, *others, facts=facts)

  inputs = simulation.Inputs(
    seed=jnp.uint32(config.seed),
    federation=data.pooled(federation) if entry.pools else federation,
    pooled=pooled,
    settings={
      "learning_rate": jnp.float32(config.learning_rate),
      "drop_rates": jnp.asarray(rates, jnp.float32),
      "population": facts,
      "speed_spread": jnp.float32(config.speed_spread),
      "embeddings": jnp.asarray(table),
      "method": traced,
      "wrappers": {name: floats for name, (floats, _) in around.items()},
      "rounds": jnp.int32(config.rounds),
      "server_wait": jnp.int32(config.server_wait),
    },
    held_out=held_out,
  )
  if "trace" in names and not config.trace:
    print("note: --dropout=trace without --trace: a synthetic sample says who is there", file=sys.stderr)
  shapes_of = lambda inputs, dataset: (
    jax.tree.map(jnp.shape, inputs.settings),
    len(dataset.class_names),
    dataset.images.shape[1:],
  )
  if (
    like
    and config.clock == "rounds"
    and config.program_identity() == like.config.program_identity()
    and shapes_of(inputs, dataset) == shapes_of(like.inputs, like.dataset)
  ):
    of_it = like._replace(config=config, dataset=dataset, verified=verified)
    return of_it._replace(federation=federation, inputs=inputs, gone=gone)
  masked = (config.softmax_mask, config.readout) != ("none", "plain")
  # First of all: what follows reads the method's functions.
  shapes = simulation.outline(
    build,
    inputs,
    num_classes,
    population_size=config.num_clients,
    cohort_size=1 if config.clock == "asynchronous" else config.cohort_size or config.num_clients,
    offsets=masked,
    name=" with ".join([config.algorithm, *config.wrapper_names]),
  )
  traffic = simulation.traffic(build, inputs, shapes.server, num_classes if masked else 0)
  made = replayed or _schedule(config, build, task, inputs, traffic)
  held = _held(federation, num_classes) if config.softmax_mask == "present" else None
  clock = simulation.batches.plan(made, batch_width, held) if made else None
  if made:
    if still := np.count_nonzero(gone & ~made.gone):
      print(
        f"note: the run ends at virtual second {made.seconds[-1]:.6g}, before {still} clients leave", file=sys.stderr
      )
    gone = made.gone
  simulator = simulation.simulator(
    build,
    inputs,
    num_classes,
    population_size=config.num_clients,
    cohort_size=clock.per_round if clock else config.cohort_size or config.num_clients,
    chunk=min(10, config.rounds),
    layout=clock.layout if clock else None,
    softmax_mask=config.softmax_mask,
    readout=config.readout,
    how=config.client_map,
    mesh=mesh,
    shapes=shapes,
  )
  return Job(config, dataset, verified, federation, inputs, build, task, simulator, gone, traffic, clock)


def _held(federation: Federation, num_classes: int) -> np.ndarray:
  """bool [N, C] by id: who has which classes."""
  held = np.zeros((len(federation.id), num_classes), bool)
  held[np.asarray(federation.id)] = data.histogram(federation, num_classes) > 0
  return held


def _replayed(config: Config) -> simulation.schedule.Schedule | None:
  """The schedule that is read from a file; None where none is."""
  if not config.schedule:
    return None
  size = config.cohort_size or config.num_clients
  return simulation.schedule.load(Path(config.schedule), config.clock, config.num_clients, size, config.rounds)


def _schedule(
  config: Config,
  build: Callable[[PyTree], tuple[Algorithm, Process]],
  task: Callable[[PyTree], Task],
  inputs: simulation.Inputs,
  traffic: tuple[int, int],
) -> simulation.schedule.Schedule | None:
  """Who starts and ends when; None for rounds."""
  if config.clock == "rounds":
    return None
  size = config.cohort_size or config.num_clients
  federation = inputs.federation
  steps = jax.jit(lambda settings, sizes: training.num_steps(task(settings).sgd, sizes))
  compute = np.zeros(config.num_clients)
  compute[np.asarray(federation.id)] = config.step_seconds * np.asarray(steps(inputs.settings, federation.train.size))
  download, upload = (x / config.bandwidth if config.bandwidth else 0.0 for x in traffic)
  settings = simulation.schedule.Settings(
    clock=config.clock,
    rounds=config.rounds,
    cohort_size=size,
    concurrency=config.concurrency or size,
    over_selection=config.over_selection,
    deadline=config.deadline,
    jitter=config.duration_jitter,
    round_seconds=config.round_seconds,
    max_staleness=config.max_staleness,
  )
  process = lambda traced: build(traced)[1]
  moving = {"download": download, "upload": upload}
  presence = config.softmax_mask == "present"
  made = simulation.schedule.make(process, inputs.settings, config.seed, settings, compute, **moving, presence=presence)
  if not made.arrives.any():
    cause = f"deadline: got {config.deadline:g}" if config.deadline else f"dropout: got {config.dropout!r}"
    raise InputError(f"{cause}, with which no upload of the run arrives; accepted is one with which some do")
  if config.clock == "asynchronous":
    # Batches are as wide under every seed, for their width is a shape: as those of seed 0 if clients were alike.
    alike = np.full(config.num_clients, compute.mean())
    usual = simulation.schedule.undisturbed(process, inputs.settings, 0, settings, alike, **moving)
    made = made._replace(width=simulation.batches.fitting(usual))
  return made


class Programs:
  """The last job that was run with these; for a next one of the same program no rounds and no scores are compiled."""

  job: Job | None = None


def run(config: Config, programs: Programs | None = None) -> dict[str, Any]:
  """Runs a job in its run directory, from where it stopped if it did; returns summary.json's content.

  Args:
    config: the settings.
    programs: what runs one after another share.

  Raises:
    InputError: see `prepare`; or the directory holds another run.
  """
  _agree(config)
  workdir = _workdir(config)
  if summary := finished(config):
    print("this run is finished; nothing is computed", file=sys.stderr)
    if config.report and not (workdir / "report.html").is_file():  # killed just before
      _draw(workdir)
    return _announced(summary, workdir)
  trained = _trained(config)
  with simulation.Stopwatch() as watch:
    job = prepare(config, like=programs.job if programs else None)
    if programs:
      programs.job = job
    # Of several processes all compute, and what is asked of the devices is asked by all; the first one writes.
    writes = jax.process_index() == 0
    histogram = data.histogram(job.federation, len(job.dataset.class_names))
    result = simulation.run(
      job.simulator,
      job.inputs,
      rounds=config.rounds,
      gone=job.gone,
      histogram=histogram,
      eval_every=config.eval_every,
      personalize_every=config.personalize_every,
      eval_clients=config.eval_clients,
      checkpoint_every=config.checkpoint_every,
      directory=workdir,
      trained=trained,
      **places(config),
      memory_limit=int(config.memory_limit * 2**30),
      clock=job.clock,
      traffic=job.traffic,
      on_start=partial(_begin, workdir, job, write=writes),
      on_record=partial(_write_record, workdir) if writes else lambda record: None,
      progress=config.progress,
    )
    arrays = _arrays(job, result, histogram)
    judged, drawn = judge.measure(job, result, arrays["seen"]) if config.judge else ({}, {})
    arrays |= drawn
    prices = _prices(job, result)
    summary = _summary(job, result, arrays, prices, watch) | judged
  if not writes:
    return _announced(summary, workdir)
  _write_clients(workdir / "clients.csv", job, result, arrays, simulation.cost_per_client(prices, result))
  with files.replacing(workdir / "arrays.npz") as path, open(path, "wb") as file:
    np.savez_compressed(file, allow_pickle=False, **arrays)
  files.write(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
  if config.report:
    _draw(workdir)
  if not any(result.record.arrived):
    why = "nobody was there, or uploads were lost, late or not finite"
    print(f"no upload arrived in any round ({why}): the global model is the initial one", file=sys.stderr)
  if broken := sum(result.record.broken):
    uploads = report.tables.counted(broken, "upload")
    print(f"note: {uploads} held numbers that are not finite, and counted as lost", file=sys.stderr)
  for name, least in config.least_uploads().items():
    if few := sum(0 < number < least for number in result.record.arrived):
      print(
        f"note: {name} promises nothing of a round with fewer than {least} uploads, as in {few} of {config.rounds}",
        file=sys.stderr,
      )
  return _announced(summary, workdir)


def finished(config: Config) -> dict[str, Any] | None:
  """What `run` returned if the run is finished, else None. Raises InputError if the directory holds another run."""
  workdir = _workdir(config)
  summary = _claim(workdir, config, write=False)
  return summary and _announced(summary, workdir)


def _trained(config: Config) -> Path | None:
  """The run whose rounds are taken, if any. Raises InputError if it has others."""
  if not config.trained:
    return None
  there = Path(config.trained)
  if jax.process_count() > 1:
    raise InputError(f"trained: got {there} with several processes that share a run; accepted is one")
  if not (there / "summary.json").is_file() or not (there / "flags.txt").is_file():
    raise InputError(f"trained: {there} holds no finished run, accepted is the directory of one")
  if not config.rounds_identity():
    raise InputError(
      f"trained: got {there} with --personalize_every={config.personalize_every}; accepted is --personalize_every=0"
    )
  if lines := differing(config, there):
    free = [name for name, setting in algorithms.settings(config.algorithm).items() if setting.personal]
    may = ", ".join(["personal_steps", "judge", *(f"{config.algorithm}_{name}" for name in free)])
    raise InputError(
      f"trained: {there} has other rounds ({lines[0]} differs), accepted is a run with the same, as with"
      f" --flagfile={there / 'flags.txt'}; free are {may}"
    )
  return there


def differing(config: Config, there: Path) -> list[str]:
  """The flags in which a run's rounds are others than those of the run in a directory; none if they are the same."""
  here = set()
  for line in (there / "flags.txt").read_text().splitlines():
    name = line.removeprefix("--algorithm=")
    entry = algorithms.METHODS.get(name) if name != line else None
    here.add(f"--algorithm={entry.rounds_of or name}" if entry else line)
  return sorted(config.rounds_identity() - here)


def _agree(config: Config) -> None:
  """Of several processes that share a run, all have the same settings; or all end with InputError, none waits."""
  if jax.process_count() == 1:
    return
  told = [*sorted(config.identity()), config.trained]
  mine = np.frombuffer(hashlib.sha256("\n".join(told).encode()).digest(), np.uint8)
  others = multihost_utils.process_allgather(mine).reshape(-1, len(mine))
  differing = [str(number) for number, other in enumerate(others) if (other != others[0]).any()]
  if differing:
    raise InputError(
      f"process_id: process {', '.join(differing)} has other settings than process 0, accepted are the same flags for"
      " all processes"
    )


def places(config: Config) -> dict[str, str]:
  """Where rows live: `data_on` and `client_state`, with `auto` decided."""
  usual = ("device", "device") if jax.process_count() == 1 else ("disk", "host")
  asked = {"data_on": config.data_on, "client_state": config.client_state}
  return {name: auto if place == "auto" else place for (name, place), auto in zip(asked.items(), usual, strict=True)}


def _draw(workdir: Path) -> None:
  try:
    report.write(workdir)
  except InputError as error:  # matplotlib is missing; the numbers are all there
    print(f"report.html is not drawn: {error}", file=sys.stderr)


def _parted(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Settings that are traced, and those that are not."""
  traced = {name: jnp.float32(value) for name, value in settings.items() if isinstance(value, float)}
  return traced, {name: value for name, value in settings.items() if name not in traced}


def _facts(config: Config) -> population.Facts:
  """What the availability processes read besides their rates, but for what clients hold."""
  trace = ()
  if "trace" in config.processes[0]:
    table = population.read_trace(config.trace or population.SAMPLE, config.trace_round, config.num_clients)
    trace = jax.tree.map(jnp.asarray, table)
  return population.Facts(
    rounds=jnp.int32(config.rounds),
    leave_at=jnp.float32(config.leave_at),
    off_rounds=jnp.float32(config.off_rounds),
    day_rounds=jnp.float32(config.day_rounds),
    regions=jnp.int32(config.regions),
    trace=trace,
  )


def _label_rank(federation: Federation, num_classes: int) -> Array:
  """float32 [N] in [0, 1]: the smallest label that each client holds for training, over the largest of all."""
  smallest = np.argmax(data.histogram(federation, num_classes) > 0, axis=1)
  return jnp.asarray(smallest / max(1, num_classes - 1), jnp.float32)


def _departed(config: Config, facts: population.Facts) -> np.ndarray:
  """bool [N]: who never takes part or leaves for good, known from the seed before anything is partitioned."""
  names, rates = config.processes
  # What clients hold is not known yet; nobody leaves for good by that.
  facts = facts._replace(label_rank=jnp.zeros(config.num_clients))

  @jax.jit
  def schedule(seed, rates, facts):
    process = population.make(names, config.num_clients, rates, facts=facts)
    return population.departed(process, seed, facts.rounds, config.num_clients)

  return np.asarray(schedule(jnp.uint32(config.seed), jnp.asarray(rates, jnp.float32), facts))


def _without(
  config: Config, dataset: data.Dataset, rng: np.random.Generator
) -> tuple[data.Dataset, HeldOut | tuple[()], tuple[str, ...]]:
  """The data set without the classes that are verified; examples of those and their names."""
  number, most = config.verification_classes, len(dataset.class_names) - 2
  if not number:
    return dataset, (), ()
  if not 2 <= number <= most:
    raise InputError(f"verification_classes: got {number}, accepted are 0 and 2 to {most}")
  classes = np.sort(rng.choice(len(dataset.class_names), number, replace=False))
  return *data.hold_out(dataset, classes), tuple(dataset.class_names[c] for c in classes)


def _with_few(federation: Federation, gone: np.ndarray, most: int) -> Federation:
  """The federation in which clients that leave have few examples to train on, and a quarter as many to validate."""
  cut = lambda span, most: span._replace(size=np.where(gone, np.minimum(span.size, most), span.size).astype(np.int32))
  return federation._replace(
    train=cut(federation.train, most), validation=cut(federation.validation, max(1, round(most / 4)))
  )


def _index_size(config: Config, dataset: data.Dataset) -> int:
  """Entries of the index if no class were taken out: how large those are is the seed's choice."""
  examples = config.num_clients * config.examples_per_client or len(dataset.labels)
  return examples + min(config.pooled_examples or len(dataset.test_labels), len(dataset.test_labels))


def _partition(
  config: Config, labels: np.ndarray, num_classes: int, gone: np.ndarray, rng: np.random.Generator
) -> data.Partition:
  """Who holds what; some classes, if asked for, only among the clients that leave."""
  classes = data.choose_monopolistic(rng, num_classes, config.monopolistic_classes)
  allowed = data.monopolistic(num_classes, gone, classes) if len(classes) else None
  splits: dict[str, Callable[..., data.Partition]] = {
    "iid": data.partition.iid,
    "dirichlet": partial(data.partition.dirichlet, alpha=config.alpha),
    "pathological": partial(data.partition.pathological, classes_per_client=config.classes_per_client),
    "clustered": partial(data.partition.clustered, clusters=config.clusters),
  }
  there = np.flatnonzero(labels >= 0)
  partition = splits[config.partition](
    labels[there],
    config.num_clients,
    rng=rng,
    allowed=allowed,
    min_size=config.min_size,
    examples_per_client=config.examples_per_client,
  )
  return partition._replace(index=there[partition.index])


# --- the run directory ------------------------------------------------------------------------------------------------


def _workdir(config: Config) -> Path:
  return Path(config.workdir or f"runs/{config.algorithm}-{config.dataset.replace('/', '_')}-{config.seed}").absolute()


def _claim(workdir: Path, config: Config, *, write: bool) -> dict[str, Any] | None:
  """Makes sure that the directory is free or holds this very run; its summary if that is finished."""
  if workdir.exists() and not workdir.is_dir():
    raise InputError(f"workdir: {workdir} is a file, accepted is a folder or a new name")
  kept = workdir / "flags.txt"
  if kept.is_file():
    here = dict(line.partition("=")[::2] for line in kept.read_text().splitlines() if line)
    wanted = dict(line.partition("=")[::2] for line in sorted(config.identity()))
    if others := [name for name, value in wanted.items() if here.get(name) != value]:
      first, *more = (f"{name}={here.get(name, 'missing')} there, ={wanted[name]} here" for name in others)
      found = f"{first}, and {len(more)} more" if more else first
      other = "another folder" if config.workdir else f"another folder, as --workdir={_free(workdir)}"
      raise InputError(f"workdir: {workdir} holds another run ({found}), accepted is {other}")
    if (workdir / "summary.json").is_file():
      return json.loads((workdir / "summary.json").read_text())
  elif workdir.is_dir() and any(not path.name.startswith(".") for path in workdir.iterdir()):
    raise InputError(f"workdir: {workdir} is not empty and holds no run, accepted is an empty folder or a new name")
  if write:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      files.write(kept, "\n".join(config.lines()) + "\n")
    except OSError as error:
      raise InputError(
        f"workdir: {workdir} cannot be written ({error.strerror}), accepted is a writable place"
      ) from error
  return None


def _free(workdir: Path) -> str:
  """A name beside it that nothing has."""
  number = next(n for n in itertools.count(2) if not workdir.with_name(f"{workdir.name}-{n}").exists())
  return f"{workdir.parent.name}/{workdir.name}-{number}"


def _begin(workdir: Path, job: Job, *, write: bool) -> None:
  """The directory is the run's from now on, and has its schedule."""
  _claim(workdir, job.config, write=write)
  if write and job.clock:
    with files.replacing(workdir / "schedule.npz") as path, open(path, "wb") as file:
      simulation.schedule.save(job.clock.schedule, file)


def _announced(summary: dict[str, Any], workdir: Path) -> dict[str, Any]:
  """The summary with where things are; the paths are not stored, so that a run directory can be moved."""
  page = workdir / "report.html"
  return {**summary, "workdir": str(workdir), "report": str(page) if page.is_file() else None}


def _write_record(workdir: Path, record: simulation.Record) -> None:
  """metrics.jsonl and timings.jsonl, whole: after a resume they hold what the checkpoint holds, and no more."""
  for name, rows in (("metrics.jsonl", record.metrics), ("timings.jsonl", record.timings)):
    files.write(workdir / name, "".join(json.dumps(row) + "\n" for row in rows))


def _write_clients(
  path: Path, job: Job, result: simulation.Result, arrays: dict[str, np.ndarray], costs: simulation.PerClient
) -> None:
  """clients.csv: a line for each client; accuracies are empty where it was not scored."""
  federation = job.federation

  def cells(values: np.ndarray) -> list[str]:
    everyone = np.full(len(result.dropped), np.nan)
    everyone[result.rows] = values
    kind = int if np.issubdtype(values.dtype, np.integer) else float
    return ["" if np.isnan(value) else repr(kind(value)) for value in everyone]

  columns: dict[str, Iterable[Any]] = {
    "client": np.asarray(federation.id),
    "dropped": result.dropped.astype(int),
    "rounds_present": np.asarray(result.state.times),
    "train_size": np.asarray(federation.train.size),
    "validation_size": np.asarray(federation.validation.size),
    "test_size": np.asarray(federation.test.size),
    "classes": [" ".join(map(str, np.flatnonzero(row))) for row in arrays["histogram"]],
    "personal_accuracy": cells(metrics.accuracy(result.personal_scores.own)),
    "global_accuracy": cells(
      metrics.accuracy(result.global_scores.own) if result.global_scores else np.full(len(result.rows), np.nan)
    ),
    "pooled_accuracy": cells(metrics.accuracy(result.personal_scores.pooled)),
    "reweighted_accuracy": cells(result.personal_scores.reweighted(arrays["histogram"][result.rows])),
    **{name: [f"{value:.0f}" for value in values] for name, values in costs._asdict().items()},
    **{name: cells(values) for name, values in _described(result).items() if values.ndim == 1},
  }
  with files.replacing(path) as temporary, open(temporary, "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))


def _described(result: simulation.Result) -> dict[str, np.ndarray]:
  """What the method tells of the personal models, [R, ...] by name."""
  return {name: np.asarray(values) for name, values in dict(result.personal_scores.described).items()}


def _arrays(job: Job, result: simulation.Result, histogram: np.ndarray) -> dict[str, np.ndarray]:
  """What the report draws and no other file holds."""
  took_part = (np.asarray(result.state.times) > 0) | algorithms.METHODS[job.config.algorithm].pools
  arrays: dict[str, np.ndarray] = {
    "histogram": histogram,
    "presence": np.array([list(map(int, line)) for line in result.record.presence], np.uint8),
    "presence_clients": result.presence_ids,
    "seen": np.any(histogram[took_part] > 0, axis=0),
    "real": _real_samples(job.dataset),
    "scored": result.rows,
    "personal_recall": metrics.recall(result.personal_scores.pooled).astype(np.float32),
  }
  if result.pooled_confusion is not None:
    arrays["pooled_confusion"] = result.pooled_confusion(np.ones(len(job.dataset.class_names), bool))
  for name, values in _described(result).items():
    if values.ndim > 1:  # a model that diverged has nothing to tell
      arrays[name] = np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)
  images = judge.samples(job, result, _SAMPLES, random.Purpose.REPORT)
  if images is None:
    del arrays["real"]
  else:
    arrays["samples"] = images
  return arrays


def _real_samples(dataset: data.Dataset) -> np.ndarray:
  """uint8 [C, n, ...]: the first training images of each class, fewer than `_SAMPLES` repeated."""
  rows = [np.resize(np.flatnonzero(dataset.labels == c), _SAMPLES) for c in range(len(dataset.class_names))]
  return dataset.images[np.stack(rows)]


def _prices(job: Job, result: simulation.Result) -> simulation.Prices:
  config = job.config
  offsets = len(job.dataset.class_names) if (config.softmax_mask, config.readout) != ("none", "plain") else 0
  aggregations = (config.cohort_size or config.num_clients) if config.clock == "asynchronous" else 0
  together = 1 if aggregations else job.simulator.cohort_size
  server = result.state.server
  return simulation.prices(job.build, job.inputs, server, config.server_wait, offsets, together, aggregations)


def _summary(
  job: Job,
  result: simulation.Result,
  arrays: dict[str, np.ndarray],
  prices: simulation.Prices,
  watch: simulation.Stopwatch,
) -> dict[str, Any]:
  """summary.json. Times are those of all processes that the run took, as far as checkpoints kept them."""
  config = job.config
  held: np.ndarray = arrays["histogram"] > 0
  monopolistic = np.flatnonzero(held.any(axis=0) & ~held[~result.dropped].any(axis=0))
  monopolist = np.any(held[:, monopolistic], axis=1)[result.rows]
  dropped = result.dropped[result.rows]
  sizes = np.asarray(job.federation.test.size)[result.rows]
  mean = lambda values: float(values.mean()) if values.size else None
  over_clients = partial(metrics.summarise, examples=sizes, dropped=dropped, monopolist=monopolist)

  def summarised(scores: simulation.Scores | None) -> dict[str, float | None] | None:
    return None if scores is None else over_clients(metrics.accuracy(scores.own))

  pooled = metrics.accuracy(result.personal_scores.pooled)
  lost: np.ndarray = np.flatnonzero(~arrays["seen"])
  unseen = None
  global_pooled = global_recall = None
  if result.pooled_confusion is not None:
    confusion = arrays["pooled_confusion"]
    global_pooled = float(metrics.accuracy(confusion))
    global_recall = metrics.fairness.classes(metrics.recall(confusion))
    unseen = metrics.unseen(
      confusion, result.pooled_confusion(~arrays["seen"]) if len(lost) else confusion, lost.tolist()
    )
  devices = job.simulator.mesh.size if job.simulator.mesh else 1
  generates = algorithms.METHODS[config.algorithm].group == "generators"
  spent = [watch.read(), *result.record.timings[: result.restored]]
  return {
    "algorithm": config.algorithm,
    "wrappers": list(config.wrapper_names),
    "dataset": config.dataset,
    "num_clients": config.num_clients,
    "rounds": config.rounds,
    "seed": config.seed,
    "personal_accuracy": summarised(result.personal_scores),
    "global_accuracy": summarised(result.global_scores),
    "pooled_accuracy": {
      "global_model": global_pooled,
      "personal_mean": mean(pooled),
      "personal_dropped": mean(pooled[dropped]),
    },
    "reweighted_accuracy": over_clients(result.personal_scores.reweighted(arrays["histogram"][result.rows])),
    "recall": {"global_model": global_recall, "personal": metrics.fairness.classes(arrays["personal_recall"])},
    "unseen": unseen,
    "verification": _verification(job, result),
    "cost": simulation.cost(prices, result, job.inputs, generates=generates)._asdict(),
    "time": _time(job, sum(result.record.arrived)),
    "partition": config.partition,
    "alpha": config.alpha if config.partition == "dirichlet" else None,
    "dropout": config.dropout,
    "drop_rate": config.drop_rate,
    "softmax_mask": config.softmax_mask,
    "readout": config.readout,
    "class_names": list(job.dataset.class_names),
    "monopolistic_classes": monopolistic.tolist(),
    "seconds": round(sum(row["seconds"] for row in spent), 3),
    "compile_seconds": round(sum(row["compile_seconds"] for row in spent), 3),
    "peak_memory_bytes": simulation.peak_memory_bytes(),
    "planned_memory_bytes": result.plan.host if result.plan.shared else result.plan.device,
    "device": f"{devices} x {jax.devices()[0].device_kind}, {simulation.resolve(config.client_map)[0]}",
    "versions": versions(),
    "commit": commit(),
    "program": program("train", [config.algorithm, *config.wrapper_names]),
    "rounds_of": Path(config.trained).name if config.trained else None,
    "finished": True,
  }


def _time(job: Job, arrived: int) -> dict[str, Any] | None:
  """What summary.json says of virtual time; None for rounds. Of uploads that should, so many `arrived`."""
  if job.clock is None:
    return None
  schedule, sizes = job.clock.schedule, job.clock.sizes
  return {
    "clock": schedule.clock,
    "replayed": Path(job.config.schedule).name if job.config.schedule else None,
    "virtual_seconds": float(schedule.seconds[-1]),
    "round_seconds": schedule.round_seconds,
    "idle_share": schedule.idle_share,
    "visits": schedule.visits(arrived),
    "staleness": schedule.staleness_histogram(),
    "batches": {"count": len(sizes), "mean": float(sizes.mean()), "max": int(sizes.max())},
  }


def _verification(job: Job, result: simulation.Result) -> dict[str, Any] | None:
  """What summary.json says of verification."""
  if not job.verified:
    return None
  dropped, personal = result.dropped[result.rows], np.asarray(result.personal_scores.verification)
  section: dict[str, Any] = {"classes": list(job.verified), "far": metrics.verification.FAR}
  for place, name in enumerate(("eer", "tar")):
    # A model that diverged has no rates.
    known = lambda rows, place=place: rows[np.isfinite(rows[:, place]), place]
    mean = lambda rows, known=known: float(known(rows).mean()) if len(known(rows)) else None
    section[name] = {
      "global_model": mean(np.asarray(result.global_scores.verification)[:1]) if result.global_scores else None,
      "personal_mean": mean(personal),
      "personal_dropped": mean(personal[dropped]),
      "personal_present": mean(personal[~dropped]),
    }
  return section


def versions() -> dict[str, str]:
  """Of this package, Python and what it stands on."""
  found = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")}
  return {"apfl_jax": apfl_jax.__version__, "python": platform.python_version(), **found}


@functools.cache
def commit() -> str | None:
  """The commit of the checkout that runs, with a + if it was changed; None outside one. As it was when first asked."""
  here = Path(__file__).parent
  git = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout
  try:
    return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
  except (OSError, subprocess.CalledProcessError):
    return None
