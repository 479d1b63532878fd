"""Every setting of a run, defined once: a field of `Config` is a flag, a key of flags.txt and an argument in Python.

A method's own settings are the keyword arguments of its `make`; they become flags prefixed by its name.
"""

import _thread
import dataclasses
import inspect
import os
import re
import shlex
import sys
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from apfl_jax import algorithms, nn, semantics, simulation, training
from apfl_jax.errors import InputError
from apfl_jax.files import cache_dir
from apfl_jax.population import FACTS, PROCESSES, SPEEDS
from apfl_jax.settings import Limits, checked, near
from apfl_jax.simulation import CLOCKS
from apfl_jax.training.augment import AUGMENTATIONS

_PLACES = ("auto", *simulation.PLACES)
PARTITIONS = ("iid", "dirichlet", "pathological", "clustered")
# Only a virtual clock reads them; then they are parts of its schedule, as those below them are.
_OF_TIME = ("step_seconds", "bandwidth", "duration_jitter", "round_seconds", "speed", "speed_spread")
_OF_A_SCHEDULE = (
  *_OF_TIME,
  *("concurrency", "over_selection", "deadline", "max_staleness", "server_wait"),
  *("dropout", "drop_rate", "leave_at", "off_rounds", "day_rounds", "regions", "trace", "trace_round"),
)
# What only some choices read: the setting whose choices these are, and the choices.
_READ_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
  "alpha": ("partition", ("dirichlet",)),
  "classes_per_client": ("partition", ("pathological",)),
  "clusters": ("partition", ("clustered",)),
  "drop_rate": ("dropout", tuple(name for name in PROCESSES if name not in ("none", "trace"))),
  "leave_at": ("dropout", ("late",)),
  "off_rounds": ("dropout", ("markov",)),
  "day_rounds": ("dropout", ("diurnal",)),
  "regions": ("dropout", ("regional",)),
  "trace_round": ("dropout", ("trace",)),
  "local_epochs": ("local_steps", ("0",)),
}
# Of this machine, so that no table that is shown around has them.
PATHS = ("data_dir", "trace", "schedule")
# May differ when a run is continued.
_NOT_OF_A_RUN = ("workdir", "progress", "report", "data_on", "client_state", "memory_limit")
# What examples there are, and when something is scored or kept: no program knows.
_NOT_OF_A_PROGRAM = (
  *("examples_per_client", "partition", "classes_per_client", "clusters", "min_size", "dropped_examples"),
  *("monopolistic_classes", "pooled_examples", "drop_rate", "trace", "seed"),
  *("eval_every", "eval_clients", "personalize_every", "checkpoint_every", "judge"),
)
# Read once the rounds are over.
_AFTER_ROUNDS = ("personal_steps", "judge", "checkpoint_every")


def _setting(default: Any, help: str, **limits: Any) -> Any:
  """A field with its help text and its `Limits`."""
  return dataclasses.field(default=default, metadata={"help": help, "limits": Limits(**limits)})


@dataclasses.dataclass(frozen=True)
class Config:
  """The settings of one run; the defaults are the main job: AP-FL on digits, most clients gone, two classes lost."""

  algorithm: str = _setting("ap_fl", "method; `help` lists them", choices=algorithms.METHODS)
  wrappers: str = _setting(
    "", f"around the method, comma-separated, the first innermost: {', '.join(algorithms.WRAPPERS)}"
  )
  dataset: str = _setting("digits", "digits, fast, or a prepared image-classification set of tensorflow-datasets")
  data_dir: str = _setting("", "folder of prepared tensorflow-datasets; empty for their default")
  num_clients: int = _setting(10, "clients in the population", least=1)
  examples_per_client: int = _setting(0, "examples of each client; 0 shares out the whole set", least=0)
  cohort_size: int = _setting(0, "clients computed a round; 0 for all", least=0)
  partition: str = _setting("dirichlet", "how examples are shared out", choices=PARTITIONS)
  alpha: float = _setting(0.1, "Dirichlet concentration: small is skewed", above=0)
  classes_per_client: int = _setting(2, "of the pathological partition", least=1)
  clusters: int = _setting(5, "of clients that hold the same classes, of the clustered partition", least=1)
  min_size: int = _setting(16, "least examples of a client", least=2)
  dropped_examples: int = _setting(
    0, "training examples of a client that leaves, at most, and a quarter as many for validation; 0 for all", least=0
  )
  monopolistic_classes: int = _setting(2, "classes that only clients which drop hold", least=0)
  verification_classes: int = _setting(
    0, "classes that nobody trains on and features are verified on; 0 for none, or 2 or more", least=0
  )
  dropout: str = _setting(
    "cold",
    "processes of availability, comma-separated: "
    + ", ".join(f"{name} ({process.text})" for name, process in PROCESSES.items()),
  )
  drop_rate: str = _setting("0.6", "rate of each process in [0, 1], comma-separated; one stands for all")
  leave_at: float = _setting(
    FACTS.leave_at, "share of the rounds after which clients of late are gone", least=0, most=1
  )
  off_rounds: float = _setting(FACTS.off_rounds, "mean rounds of an absence of markov", least=1)
  day_rounds: float = _setting(FACTS.day_rounds, "rounds of a day of diurnal", above=0)
  regions: int = _setting(FACTS.regions, "of regional", least=1, most=2**31 - 1)
  trace: str = _setting(
    "", "file of trace, CSV or Parquet, see apfl_jax/population/traces.py; empty for a synthetic sample"
  )
  trace_round: float = _setting(1.0, "length of a round in the trace's unit of time; the sample's is an hour", above=0)
  speed: str = _setting("constant", "law of clients' speeds, mean 1; only a virtual clock reads them", choices=SPEEDS)
  speed_spread: float = _setting(
    0.5,
    "of speeds: half the width of uniform (less than 1), deviation of lognormal's logarithm, for pareto the tail index"
    " of the time that a step takes is 1 / spread",
    least=0,
    most=4,
  )
  server_wait: int = _setting(0, "local steps for which a client is idle while the server is late", least=0)
  clock: str = _setting(
    "rounds", "rounds without time, synchronous rounds in virtual time, or a server step at each upload", choices=CLOCKS
  )
  concurrency: int = _setting(0, "clients at work at a time, of the asynchronous clock; 0 for cohort_size", least=0)
  over_selection: float = _setting(
    0.0, "share of clients that a synchronous round starts beyond those it waits for", least=0, most=10
  )
  deadline: float = _setting(0.0, "virtual seconds after which a synchronous round ends; 0 for none", least=0)
  step_seconds: float = _setting(1.0, "virtual seconds of an SGD step at speed 1", above=0)
  bandwidth: float = _setting(0.0, "bytes that a client moves in a virtual second; 0 for no limit", least=0)
  duration_jitter: float = _setting(
    0.0, "standard deviation of the logarithm of what a visit's duration is multiplied by", least=0, most=4
  )
  round_seconds: float = _setting(
    0.0,
    "virtual seconds of a round of the availability processes; 0 for a round of the run if all were always there",
    least=0,
  )
  max_staleness: int = _setting(0, "server versions that an upload may be behind and still arrive; 0 for any", least=0)
  schedule: str = _setting("", "schedule.npz of a run, to be replayed by a run of the same clock and sizes")
  rounds: int = _setting(40, "rounds", least=1)
  local_epochs: int = _setting(1, "passes over a client's examples a round, where local_steps is 0", least=1)
  local_steps: int = _setting(15, "SGD steps of a client a round; 0 for local_epochs", least=0)
  personal_steps: int = _setting(200, "SGD steps that a method may spend to personalise", least=0)
  batch_size: int = _setting(16, "examples an SGD step", least=1)
  learning_rate: float = _setting(0.05, "of local SGD", above=0)
  weighting: str = _setting("examples", "what a client counts by", choices=("examples", "uniform"))
  augment: str = _setting("shift", "of clients' training examples, for every method", choices=AUGMENTATIONS)
  softmax_mask: str = _setting(
    "none",
    "softmax of losses on a client's real data, for every method: over all classes; those of the client and of the"
    " clients present; the client's own",
    choices=training.SOFTMAX_MASKS,
  )
  readout: str = _setting(
    "plain",
    "for every method; prior: balanced softmax on clients, and a client's log label prior is added where its own test"
    " examples are scored, which needs that prior at test time",
    choices=training.READOUTS,
  )
  model: str = _setting("cnn_small", "classifier", choices=nn.MODELS)
  head: str = _setting("free", "classifier's head; free is a dense layer, others read the embeddings", choices=nn.HEADS)
  embeddings: str = _setting(
    "attributes", f"of classes: {', '.join(semantics.KINDS)}, the path of a table (.npz), or several joined by +"
  )
  embedding_influence: float = _setting(
    1.0, "weight of the embeddings beside onehot: 1 is without onehot, 0 is onehot alone", least=0, most=1
  )
  embedding_whitening: bool = _setting(
    False, "whiten the embeddings, by their covariance shrunk half-way to the identity"
  )
  compute_dtype: str = _setting("float32", "what layers compute in", choices=("float32", "bfloat16"))
  seed: int = _setting(0, "of everything random", least=0, most=2**32 - 1)
  workdir: str = _setting("", "run directory; empty for runs/ALGORITHM-DATASET-SEED")
  trained: str = _setting(
    "", "directory of a finished run that differs in what only personal models read; its rounds are taken"
  )
  client_map: str = _setting("auto", "how clients run: auto, sequential, vmap, vmap:CHUNK")
  data_on: str = _setting("auto", "where examples live; auto: the device, of several hosts disk", choices=_PLACES)
  client_state: str = _setting(
    "auto", "where client rows live; auto: the device, of several hosts host", choices=_PLACES
  )
  memory_limit: float = _setting(0.0, "GiB that the host and each device may take; 0 for what there is", least=0)
  eval_every: int = _setting(5, "rounds between scores of the global model; 0 for the last only", least=0)
  eval_clients: int = _setting(0, "clients scored; 0 for all", least=0)
  pooled_examples: int = _setting(1000, "pooled test examples, class-balanced; 0 for the whole split", least=0)
  judge: int = _setting(
    0,
    "generated images a class that a classifier trained on all training images judges, with what fresh networks learn"
    " from them and what they give away, for the report alone, minutes after the rounds; 0 for none",
    least=0,
  )
  personalize_every: int = _setting(0, "rounds between scores of personal models; 0 for the last only", least=0)
  checkpoint_every: int = _setting(10, "rounds between checkpoints; 0 for none", least=0)
  progress: bool = _setting(True, "show progress")
  report: bool = _setting(True, "draw report.html; `python -m experiments.report --workdir=DIR` does it later")
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  wrapper_settings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by wrapper

  def __post_init__(self) -> None:
    """Raises InputError for the first field outside its limits."""
    for field in fields():
      value = checked(field.name, getattr(self, field.name), type(field.default), field.metadata["limits"])
      object.__setattr__(self, field.name, value)
    if self.data_dir:
      object.__setattr__(self, "data_dir", os.path.abspath(os.path.expanduser(self.data_dir)))
    object.__setattr__(self, "embeddings", "+".join(semantics.parts(self.embeddings)))
    if self.trace:
      object.__setattr__(self, "trace", os.path.abspath(os.path.expanduser(self.trace)))
    object.__setattr__(self, "settings", _whole(self.algorithm, self.settings))
    for name in self.wrapper_settings:
      if name not in self.wrapper_names:
        raise InputError(f"wrapper_settings: got {name!r}, accepted are those of wrappers: {self.wrappers or 'none'}")
    wrapping = {name: _whole(name, self.wrapper_settings.get(name, {})) for name in self.wrapper_names}
    object.__setattr__(self, "wrapper_settings", wrapping)
    computed = self.cohort_size or self.num_clients
    for name, least in self.least_uploads().items():
      if computed < least:
        given = " ".join(f"--{name}_{key}={value}" for key, value in wrapping[name].items())
        raise InputError(
          f"wrappers: got {name} with {given} and {computed} clients a round, accepted are {least} clients or more"
        )
    processes, rates = self.processes
    if len(rates) != len(processes):
      raise InputError(
        f"drop_rate: got {len(rates)} rates for --dropout={','.join(processes)}, accepted are one rate or one for each"
      )
    if self.trace and "trace" not in processes:
      raise InputError(f"trace: got {self.trace} with --dropout={self.dropout}, accepted is --dropout with trace in it")
    if self.speed == "uniform" and self.speed_spread >= 1:
      raise InputError(f"speed_spread: got {self.speed_spread:g} with --speed=uniform, accepted is less than 1")
    if self.trained:
      object.__setattr__(self, "trained", os.path.abspath(os.path.expanduser(self.trained)))
    if self.schedule:
      object.__setattr__(self, "schedule", os.path.abspath(os.path.expanduser(self.schedule)))
    if self.cohort_size > self.num_clients:
      raise InputError(f"cohort_size: got {self.cohort_size}, accepted is 0 (all) to num_clients={self.num_clients}")
    self._check_clock()

  def _check_clock(self) -> None:
    """Raises InputError for a setting that the clock does not read."""
    readers = {
      "concurrency": ("asynchronous",),
      "max_staleness": ("asynchronous",),
      "over_selection": ("synchronous",),
      "deadline": ("synchronous",),
      "schedule": ("synchronous", "asynchronous"),
    }
    for name, clocks in readers.items():
      if getattr(self, name) and self.clock not in clocks:
        raise InputError(
          f"{name}: got {getattr(self, name)} with --clock={self.clock}, accepted is --clock={' or '.join(clocks)}"
        )
    size = self.cohort_size or self.num_clients
    if size * (1 + self.over_selection) > self.num_clients:
      raise InputError(
        f"over_selection: got {self.over_selection:g}, accepted is at most num_clients / cohort_size - 1 ="
        f" {self.num_clients / size - 1:.4g}"
      )
    if self.concurrency > self.num_clients:
      raise InputError(f"concurrency: got {self.concurrency}, accepted is 0 to num_clients={self.num_clients}")

  @property
  def wrapper_names(self) -> tuple[str, ...]:
    """The wrappers, the innermost first."""
    names = listed(self.wrappers)
    for name in names:
      if name not in algorithms.WRAPPERS:
        meant, known = near(name, algorithms.WRAPPERS), ", ".join(algorithms.WRAPPERS)
        raise InputError(f"wrappers: got {name!r}{meant}, accepted are {known}, comma-separated")
    if len(set(names)) < len(names):
      raise InputError(f"wrappers: got {self.wrappers!r}, accepted is each at most once")
    return names

  def least_uploads(self) -> dict[str, int]:
    """By wrapper, how many uploads of a round it needs for what it promises."""
    return {name: algorithms.WRAPPERS[name].least_uploads(**own) for name, own in self.wrapper_settings.items()}

  @property
  def processes(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and rates of the availability processes."""
    names = tuple(part.strip() for part in self.dropout.split(","))
    for name in names:
      if name not in PROCESSES:
        meant, known = near(name, PROCESSES), ", ".join(PROCESSES)
        raise InputError(f"dropout: got {name!r}{meant}, accepted are {known}, comma-separated")
    rates = []
    for part in str(self.drop_rate).split(","):
      try:
        rate = float(part)
      except ValueError:
        rate = -1.0
      if not 0 <= rate <= 1:
        raise InputError(f"drop_rate: got {part!r}, accepted are numbers from 0 to 1, comma-separated")
      rates.append(rate)
    rates = rates * len(names) if len(rates) == 1 else rates
    for name, rate in zip(names, rates, strict=False):
      if rate == 1 and PROCESSES[name].endless:
        raise InputError(f"drop_rate: got 1 for {name}, with which no upload ever arrives; accepted is less than 1")
      if name == "markov" and rate > (most := 1 - 1 / self.off_rounds) + 1e-6:
        raise InputError(
          f"drop_rate: got {rate:g} for markov with --off_rounds={self.off_rounds:g}, accepted is at most"
          f" 1 - 1 / off_rounds = {most:.4g}"
        )
    return names, tuple(rates)

  def _values(self) -> dict[str, Any]:
    """All settings by flag."""
    values = {field.name: getattr(self, field.name) for field in fields()}
    for owner, settings in {self.algorithm: self.settings, **self.wrapper_settings}.items():
      values |= {f"{owner}_{name}": value for name, value in settings.items()}
    return values

  def lines(self) -> list[str]:
    """All flags of the run, a --name=value a line, as flags.txt holds them; whose rounds it takes makes it no other."""
    values = {name: value for name, value in self._values().items() if name != "trained"}
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()]

  def identity(self) -> set[str]:
    """The lines that make it this run and no other."""
    return _without(self.lines(), _NOT_OF_A_RUN)

  def program_identity(self) -> set[str]:
    """The lines that compiled programs depend on beside shapes; numbers with a point are arguments of theirs."""
    floats = [name for name, value in self._values().items() if isinstance(value, float)]
    return _without(self.lines(), [*_NOT_OF_A_RUN, *_NOT_OF_A_PROGRAM, *floats])

  def rounds_identity(self) -> set[str]:
    """The lines that rounds depend on: runs that have them all in common train the same server.

    Empty where that cannot be told, for personal models are scored between rounds.
    """
    if self.personalize_every:
      return set()
    entry, own = algorithms.METHODS[self.algorithm], algorithms.settings(self.algorithm)
    personal = [f"{self.algorithm}_{name}" for name, setting in own.items() if setting.personal]
    # Who never takes part brings nothing into a round, but into a pool, a clock's schedule and its own read-out.
    apart = (
      set(self.processes[0]) == {"cold"} and self.clock == "rounds" and self.readout == "plain" and not entry.pools
    )
    after = [*_AFTER_ROUNDS, *(["dropped_examples"] if apart else []), *personal, "algorithm"]
    return _without(self.lines(), [*_NOT_OF_A_RUN, *after]) | {f"--algorithm={entry.rounds_of or self.algorithm}"}


def _without(lines: Iterable[str], names: Iterable[str]) -> set[str]:
  """Flags but for some."""
  return {line for line in lines if not line.startswith(tuple(f"--{name}=" for name in names))}


def _whole(owner: str, given: dict[str, Any]) -> dict[str, Any]:
  """All settings of a method or wrapper, those given and the defaults, checked."""
  known = algorithms.settings(owner)
  for name in given:
    if name not in known:
      own = ", ".join(f"{owner}_{other}" for other in known) or f"none, {owner} has no settings"
      raise InputError(f"{owner}_{name}: no such setting{near(f'{owner}_{name}', own.split(', '))}, accepted are {own}")
  return {
    name: checked(f"{owner}_{name}", given.get(name, setting.default), type(setting.default), setting.limits)
    for name, setting in known.items()
  }


# How a process runs, not what: no part of a run's settings.
flags.DEFINE_integer("devices", 0, "CPU cores to use, each a device; 0 for all", lower_bound=0)
flags.DEFINE_string(
  "coordinator_address", "", "HOST:PORT of process 0, where several processes share a run; auto: found by JAX"
)
flags.DEFINE_integer("num_processes", 0, "processes that share a run", lower_bound=0)
flags.DEFINE_integer("process_id", -1, "this process's number, from 0", lower_bound=-1)


def fields() -> list[dataclasses.Field]:
  """The fields that are flags of their own."""
  return [field for field in dataclasses.fields(Config) if not field.name.endswith("settings")]


_DEFINE: dict[type, Any] = {
  str: flags.DEFINE_string,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  bool: flags.DEFINE_bool,
}


def listed(text: str) -> tuple[str, ...]:
  """The parts of a comma-separated list."""
  return tuple(part.strip() for part in text.split(",") if part.strip())


def define_flags(but: Collection[str] = ()) -> None:
  """Defines a flag for every field of `Config`, `but` for some, and for every setting of every method and wrapper."""
  for field in fields():
    if field.name in but:
      continue
    choices = field.metadata["limits"].choices
    help = field.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
    _DEFINE[type(field.default)](field.name, field.default, help)
  for owner in (*algorithms.METHODS, *algorithms.WRAPPERS):
    for name, setting in algorithms.settings(owner).items():
      _DEFINE[type(setting.default)](f"{owner}_{name}", setting.default, f"{owner}: {setting.text}")


def from_flags(**given: Any) -> Config:
  """The Config that the parsed flags say, but for the fields that are `given`; of others without a flag the default."""
  asked = [field.name for field in fields() if field.name not in given and field.name in flags.FLAGS]
  values: dict[str, Any] = {name: flags.FLAGS[name].value for name in asked} | given
  of = lambda owner: {name: flags.FLAGS[f"{owner}_{name}"].value for name in algorithms.settings(owner)}
  if values["algorithm"] in algorithms.METHODS:
    values["settings"] = of(values["algorithm"])
  values["wrapper_settings"] = {name: of(name) for name in listed(values["wrappers"]) if name in algorithms.WRAPPERS}
  return Config(**values)


def note_unused(methods: Collection[str]) -> None:
  """Tells of flags that are settings of other methods and wrappers."""
  used = (*methods, *listed(flags.FLAGS.wrappers))
  for other in (*algorithms.METHODS, *algorithms.WRAPPERS):
    for name in algorithms.settings(other) if other not in used else ():
      if flags.FLAGS[f"{other}_{name}"].present:
        print(f"note: --{other}_{name} has no effect on {', '.join(used)}", file=sys.stderr)


def note_choices(methods: Collection[str]) -> None:
  """Tells what `notes_on_choices` and `notes_on_time` have to tell."""
  values = flags.FLAGS.flag_values_dict()
  for note in notes_on_choices(values) + notes_on_time(methods, values):
    print(f"note: {note}", file=sys.stderr)


def _changed(names: Iterable[str], values: Mapping[str, Any]) -> list[str]:
  """Those of these settings that are not at their defaults."""
  defaults = {field.name: field.default for field in fields()}
  return [name for name in names if values[name] != defaults[name]]


def notes_on_choices(values: Mapping[str, Any]) -> list[str]:
  """Lines on flags that have no effect with what another flag chooses; `values` of flags by name."""
  notes = []
  for name in _changed(_READ_WITH, values):
    chooser, choices = _READ_WITH[name]
    chosen = str(values[chooser])
    told = values["schedule"] and name in _OF_A_SCHEDULE
    if not told and not set(choices) & set(listed(chosen)):
      only = f", only with {choices[0]}" if len(choices) == 1 else ""
      notes.append(f"--{name} has no effect with --{chooser}={chosen}{only}")
  return notes


def notes_on_time(methods: Collection[str], values: Mapping[str, Any]) -> list[str]:
  """Lines on flags that have no effect on or without a clock, or one that nobody wants; `values` of flags by name."""
  if values["schedule"]:
    without = _changed(_OF_A_SCHEDULE, values)
    return [f"--{name} has no effect with --schedule, which says who comes when" for name in without]
  if values["clock"] == "rounds":
    return [f"--{name} has no effect with --clock=rounds, which has no time" for name in _changed(_OF_TIME, values)]
  at_work = values["concurrency"] or values["cohort_size"] or values["num_clients"]
  if "fedasync" in methods and values["clock"] == "asynchronous" and at_work - 1 > values["fedasync_max_staleness"]:
    return [
      f"--fedasync_max_staleness={values['fedasync_max_staleness']} leaves out most uploads: with {at_work} clients at"
      f" work they are {at_work - 1} versions late on average"
    ]
  return []


def program(binary: str, names: Iterable[str]) -> str:
  """What starts a binary that has these methods and wrappers: itself, or the file that registers one.

  Args:
    binary: of `experiments`, as 'train'.
    names: of methods and wrappers.
  """
  makes = [(algorithms.METHODS.get(name) or algorithms.WRAPPERS[name]).make for name in names]
  modules = dict.fromkeys(getattr(make, "func", make).__module__ for make in makes)
  own = [module for module in modules if not module.startswith("apfl_jax.")]
  file = getattr(sys.modules["__main__"], "__file__", None)
  if "__main__" in own and file:
    return f"python {shlex.quote(os.path.relpath(file))}"
  if own and "__main__" not in own:
    return f"python -c 'import {', '.join(own)}; from experiments import {binary}; {binary}.command_line()'"
  return f"python -m experiments.{binary}"


def table_of_methods() -> str:
  """A line for each method under its group, and for each wrapper: what `--algorithm=help` prints."""
  width = max(map(len, algorithms.METHODS))

  def row(name: str, entry: algorithms.Method | algorithms.Wrapper) -> str:
    first = (inspect.getdoc(entry.make) or "").partition("\n")[0]
    what = re.sub(r" \[[A-Z]\]", "", first).rstrip(".")  # without its tag
    return f"  {name:{width}}  " + (f"{what} ({entry.paper})" if what else entry.paper)

  lines = []
  for group, methods in algorithms.grouped().items():
    lines.append(f"{group}: {algorithms.GROUPS[group]}")
    lines += [row(name, method) for name, method in methods.items()]
  lines += ["wrappers, for --wrappers"]
  lines += [row(name, wrapper) for name, wrapper in algorithms.WRAPPERS.items()]
  return "\n".join(lines)


def main(run: Any) -> None:
  """Runs an absl binary; bad input of any kind ends it with one line on standard error and exit code 2."""

  def parse(arguments: Sequence[str]) -> list[str]:
    try:
      rest = flags.FLAGS(arguments)
    except flags.Error as error:
      _fail(_one_line(error))
    except SystemExit:  # --help and its like, which did what was asked; absl ends with 1
      sys.exit(0)
    if len(rest) > 1:
      _fail(f"{rest[1]}: not a flag; flags begin with --, --help lists them")
    return rest

  def guarded(arguments: Sequence[str]) -> Any:
    try:
      _start()
      return run(arguments)
    except InputError as error:
      _fail(str(error))
    except OSError as error:
      _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
      print("stopped; the same command goes on from its last checkpoint, if there is one", file=sys.stderr, flush=True)
      sys.exit(130)

  # Python drops what is raised in a callback of its garbage collector, and JAX has one: Ctrl-C must not be lost there.
  report = sys.unraisablehook

  def again(unraisable: Any) -> None:
    if unraisable.exc_type is KeyboardInterrupt:
      threading.Timer(0.05, _thread.interrupt_main).start()
    else:
      report(unraisable)

  sys.unraisablehook = again
  for name in ("devices", "coordinator_address", "num_processes", "process_id"):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # --help shows them
  logging.set_verbosity(logging.ERROR)  # libraries tell below that what no user asked: devices not found, folders
  app.run(guarded, flags_parser=parse)


def _start() -> None:
  """Devices and other processes; nothing may have asked JAX for a device before."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "programs"))
  address, processes, number = flags.FLAGS.coordinator_address, flags.FLAGS.num_processes, flags.FLAGS.process_id
  told = address not in ("", "auto")
  if told != bool(processes) or told != (number >= 0):
    raise InputError(
      "coordinator_address: got only some of --coordinator_address=HOST:PORT, --num_processes and --process_id,"
      " accepted are all three, none, or --coordinator_address=auto"
    )
  if told and not address.rpartition(":")[2].isdigit():
    raise InputError(f"coordinator_address: got {address!r}, accepted are HOST:PORT and auto")
  if told and not number < processes:
    raise InputError(f"process_id: got {number}, accepted are 0 to num_processes - 1 = {processes - 1}")
  wanted = flags.FLAGS.devices
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", wanted or cores)
  # One of several tasks of a Slurm step, or of several hosts of a TPU pod; JAX finds the others.
  several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
  try:
    if told:
      print(f"process {number} of {processes} meets the others at {address}", file=sys.stderr, flush=True)
      jax.distributed.initialize(address, processes, number)
    elif several or address == "auto":
      jax.distributed.initialize()
  except (RuntimeError, ValueError) as error:
    raise InputError(
      f"coordinator_address: got {address or 'none'!r}, with which the processes did not find each other"
      f" ({str(error).splitlines()[0].rstrip('.')}); accepted is HOST:PORT of process 0"
    ) from error


def _one_line(error: flags.Error) -> str:
  """An absl flag error in our form: flag, what it got, what it takes."""
  if isinstance(error, flags.UnrecognizedFlagError):
    name, owners = error.flagname, (*algorithms.METHODS, *algorithms.WRAPPERS)
    own = [
      f"{owner}_{short}" for owner in owners if name.startswith(f"{owner}_") for short in algorithms.settings(owner)
    ]
    meant = near(name, own or flags.FLAGS)
    return f"{name}: no such flag{meant}, accepted are those of --helpfull" + (
      f", {', '.join(own)} among them" if own and not meant else ""
    )
  if isinstance(error, flags.CantOpenFlagFileError) and isinstance(error.__context__, OSError):
    why = error.__context__
    return f"flagfile: got {why.filename}: {why.strerror}, accepted is the flags.txt of a run"
  text = str(error).replace("\n", " ").removeprefix("ERROR:: ")
  if text.startswith("flag --") and "=" in text.split(":")[0]:
    name, _, value = text[len("flag --") :].split(": ")[0].partition("=")
    kind = flags.FLAGS[name].value if name in flags.FLAGS else None
    wants = {int: "a whole number", float: "a number", bool: "true or false"}.get(type(kind), "another value")
    return f"{name}: got {value!r}, accepted is {wants}"
  return text


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr, flush=True)
  sys.exit(2)
