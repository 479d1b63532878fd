"""Speed, measured side by side: `python -m experiments.benchmark --suites=local_training,round --json=FILE`.

The cases of a suite are built first and then timed in turns, so that whatever else the machine does falls on all of
them. Shares are of the rate of a 2048 x 2048 float32 matrix product, measured in the same turns. Images are noise:
speed does not depend on what they show. With `--peers`, other simulators do the same work in the same turns
(`experiments/peers`), one process at a time; their ratios are medians over the turns of our speed over theirs.
"""

import contextlib
import dataclasses
import fnmatch
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from apfl_jax import data, simulation
from apfl_jax.errors import InputError
from apfl_jax.files import replacing
from apfl_jax.settings import Limits, checked
from apfl_jax.types import Data, Received, Span, Visit
from experiments import config, job, peers
from experiments.config import Config
from experiments.peers import Peer, PeerError

_SIDE = 2048  # of the matrix product that rates are compared with
_REPEATS = 5
_ROUNDS = 5  # of a call of `local_training`: what a run does between two evaluations
_TRAIN_SHARE = 0.6  # of a client's examples, as `data.build` divides them


class Case(NamedTuple):
  """One thing to time.

  Attributes:
    name: e.g. 'cnn_small/K=32'.
    call: does it once, and returns arrays to wait for.
    samples: examples trained on or made by a call, those read twice counted twice.
    clients: client updates of a call; None where no client takes part.
    flops: matrix products and convolutions of a call, as the ledger counts them; None where it was not asked.
    extra: (), called after the last turn -> more fields of the row, by name.
    times: how often a peer does its spec for a call of ours.
    peer: the spec of the same work for other simulators (see `experiments.peers`); None where they have no twin of it.
  """

  name: str
  call: Callable[[], Any]
  samples: int
  clients: int | None = None
  flops: float | None = None
  peer: dict[str, Any] | None = None
  times: int = 1
  extra: Callable[[], dict[str, Any]] = dict


class Rounds:
  """A job on noise that goes from state to state, one call after another."""

  def __init__(
    self,
    image_shape: tuple[int, int, int],
    examples: int = 5000,
    *,
    all_visited: bool = False,
    batch_width: int = 0,
    **settings: Any,
  ):
    """Nobody drops, nothing is augmented; `settings` are fields of `Config`.

    With `all_visited` every client's row is written beforehand, as if it had taken part. `batch_width` is that of
    `job.prepare`.
    """
    self._all_visited = all_visited
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, *image_shape), np.uint8)
    labels = (np.arange(examples) % 10).astype(np.int32)
    noise = data.Dataset("noise", images, labels, images[:500], labels[:500], tuple("0123456789"))
    plain = Config(
      algorithm="fedavg",
      partition="iid",
      monopolistic_classes=0,
      dropout="none",
      augment="none",
      embeddings="onehot",
      min_size=2,
    )
    self.config = dataclasses.replace(plain, **{"settings": {}, **settings})
    self.job = job.prepare(self.config, noise, batch_width=batch_width)
    self.simulator = self.job.simulator
    self.inputs = self.job.inputs
    self._chunks: simulation.Chunks | None = None
    self.planned: int | None = None

  @property
  def chunks(self) -> simulation.Chunks:
    """The run, begun when it is first asked for; `planned` is then what the memory plan said."""
    if self._chunks is None:
      places = job.places(self.config)
      directory = Path(tempfile.gettempdir()) if "disk" in places.values() else None
      staging = simulation.Staging(self.simulator, self.inputs, directory=directory, **places)
      plan, compiled = simulation.plan(staging, self.config.rounds)
      self.planned = plan.host
      snapshot = None
      if self._all_visited:
        count = self.config.num_clients
        rows = staging.shapes()[0].clients
        blank = jax.tree.map(lambda x: np.broadcast_to(x.dtype.type(0), (count, *x.shape[1:])), rows)
        snapshot = simulation.Snapshot(np.arange(count), np.ones(count, np.int32), blank)
      begun = staging.begin(snapshot)
      self._chunks = simulation.Chunks(self.simulator, staging, *begun, compiled, self.job.clock)
    return self._chunks

  def advance(self, rounds: int = 1) -> Any:
    """The next rounds; as many are taken to follow them."""
    return self.chunks.run(rounds, rounds)

  def score(self, function: Callable[..., Any]) -> Any:
    """`score_global` or `score_personal` of all clients, in the blocks of a run."""
    count, place = self.config.num_clients, self.simulator.place
    block = min(count, self.simulator.block)
    rows = [np.arange(start, start + block) for start in range(0, count, block)]
    return [function(self.chunks.state, self.chunks.inputs, *place((r % count, r < count))) for r in rows]

  def memory(self) -> dict[str, Any]:
    """What the memory plan said, and the peak, which is the case's own where the process does nothing else."""
    return {"planned_memory_bytes": self.planned, "peak_resident_bytes": simulation.peak_resident_bytes()}

  def prices(self) -> simulation.Prices:
    """What the method's functions cost."""
    server = jax.eval_shape(self.simulator.init, self.inputs).server
    return simulation.prices(self.job.build, self.inputs, server)

  def peer(self, case: str, samples: int, *, scored: bool = False) -> dict[str, Any]:
    """The spec of a round for other simulators; `scored` if a call scores the clients' tests too."""
    federation = self.inputs.federation
    return {
      "case": case,
      "model": self.config.model,
      "image_shape": list(federation.store.images.shape[1:]),
      "classes": 10,
      "examples": len(federation.store.images),
      "train": np.asarray(federation.train.size).tolist(),
      "test": np.asarray(federation.test.size).tolist() if scored else [],
      "steps": self.config.local_steps,
      "batch": self.config.batch_size,
      "learning_rate": self.config.learning_rate,
      "seed": self.config.seed,
      "samples": samples,
    }


Wanted = Callable[[str], bool]  # whether a case is asked for, by its name: building one takes time and memory


def local_training(wanted: Wanted) -> Iterator[Case]:
  """SGD on clients alone: FedAvg rounds in which all take part, nothing evaluated.

  Training sets are whole batches, so that no step is short. `pfl_cifar10` is one epoch of the cross-device setting of
  pfl-research's benchmark (50 clients of 50 examples, batches of 10), with our `cnn` in place of its network.
  """
  for label, model, shape, clients, steps, batch, size in (
    ("mlp/K=128", "mlp", (8, 8, 1), 128, 20, 16, 64),
    ("cnn_small/K=32", "cnn_small", (28, 28, 1), 32, 4, 32, 128),
    ("cnn/K=8", "cnn", (28, 28, 1), 8, 4, 32, 128),
    ("pfl_cifar10/K=50", "cnn", (32, 32, 3), 50, 5, 10, 50),
  ):
    for how in ("sequential", "vmap"):
      name = label + ("" if how == "sequential" else f"/{how}")
      if not wanted(name):
        continue
      rounds = Rounds(
        shape,
        model=model,
        num_clients=clients,
        examples_per_client=round(size / _TRAIN_SHARE),
        local_steps=steps,
        batch_size=batch,
        client_map=how,
      )
      samples = clients * steps * batch
      flops = _ROUNDS * float(rounds.prices().local_update.sum())
      spec = rounds.peer(label, samples) if how == "sequential" else None
      call = partial(rounds.advance, _ROUNDS)
      yield Case(name, call, _ROUNDS * samples, _ROUNDS * clients, flops, spec, _ROUNDS)


def whole_round(wanted: Wanted) -> Iterator[Case]:
  """A FedAvg round on 60,000 images of 28 x 28 among 100 skewed clients, one epoch, all clients' tests scored."""
  name = "fedavg/cnn_small/N=100"
  if not wanted(name):
    return
  rounds = Rounds(
    (28, 28, 1),
    60_000,
    model="cnn_small",
    num_clients=100,
    partition="dirichlet",
    local_steps=0,
    batch_size=32,
  )
  trained = int(rounds.inputs.federation.train.size.sum())
  call = lambda: (rounds.advance(), rounds.score(rounds.simulator.score_global))
  flops = float(rounds.prices().local_update.sum())
  yield Case(name, call, trained, 100, flops, rounds.peer(name, trained, scored=True))


def uneven(wanted: Wanted) -> Iterator[Case]:
  """Clients of 1 to 500 examples, batches of 16, one epoch: what is computed for nobody."""
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 501, 100).astype(np.int32)
  for how in filter(lambda how: wanted(f"fedavg/mlp/{how}"), ("sequential", "vmap", "vmap:100")):
    rounds = Rounds(
      (28, 28, 1), model="mlp", num_clients=100, examples_per_client=834, local_steps=0, batch_size=16, client_map=how
    )
    federation = rounds.inputs.federation
    size: Any = np.minimum(np.asarray(federation.train.size), sizes)
    train = federation.train._replace(size=size)
    rounds.inputs = rounds.inputs._replace(federation=federation._replace(train=train))
    steps = -(-size // 16)
    executed = simulation.executed_steps(steps, how, jax.device_count())
    shares = {
      "masked_share": 1 - float(steps.sum()) / executed,
      "short_batch_share": 1 - float(size.sum() / (16 * steps.sum())),
    }
    yield Case(f"fedavg/mlp/{how}", rounds.advance, int(size.sum()), 100, extra=partial(dict, shares))


def population(wanted: Wanted) -> Iterator[Case]:
  """Ten rounds with a cohort of 100, whatever the population; it should not matter."""
  settings: dict[str, Any] = {
    "model": "mlp",
    "cohort_size": 100,
    "examples_per_client": 20,
    "local_steps": 0,
    "batch_size": 16,
    "rounds": 1_000_000,
  }
  for clients in (1_000, 10_000, 100_000, 1_000_000):
    name = f"fedavg/mlp/N={clients}"
    if not wanted(name):
      continue
    rounds = Rounds((8, 8, 1), num_clients=clients, **settings)
    trained = 10 * 100 * int(rounds.inputs.federation.train.size[0])
    yield Case(name, partial(rounds.advance, 10), trained, 1000, extra=rounds.memory)


def staged(wanted: Wanted) -> Iterator[Case]:
  """Ten rounds of a method with client state, a cohort of 100: rows in host memory and on disk against the device.

  Every row is written beforehand, as if all clients had been there: at N = 100,000 they are 6 GB.
  """
  for clients, place in ((1_000, "device"), (1_000, "host"), (1_000, "disk"), (100_000, "host"), (100_000, "disk")):
    name = f"scaffold/mlp/N={clients}/{place}"
    if not wanted(name):
      continue
    rounds = Rounds(
      (8, 8, 1),
      algorithm="scaffold",
      model="mlp",
      num_clients=clients,
      cohort_size=100,
      examples_per_client=20,
      local_steps=0,
      batch_size=16,
      rounds=1_000_000,
      client_state=place,
      all_visited=True,
    )
    trained = 10 * 100 * int(rounds.inputs.federation.train.size[0])
    yield Case(name, partial(rounds.advance, 10), trained, 1000, extra=rounds.memory)


def generator(wanted: Wanted) -> Iterator[Case]:
  """The generator's steps of one round of AP-FL (beside one SGD step of one client)."""
  for shape in ((8, 8, 1), (28, 28, 1), (32, 32, 3)):
    name = "ap_fl/" + "x".join(map(str, shape))
    if not wanted(name):
      continue
    rounds = Rounds(
      shape,
      algorithm="ap_fl",
      num_clients=1,
      examples_per_client=40,
      local_steps=1,
      settings={"generator_warmup": 0.0},
    )
    made = rounds.config.settings["generator_steps"] * rounds.config.settings["generator_batch"]
    yield Case(name, rounds.advance, made, flops=rounds.prices().aggregate)


def personalize(wanted: Wanted) -> Iterator[Case]:
  """Personal models of 16 clients, made and scored on their own tests and 500 pooled examples."""
  for algorithm in ("fedavg_ft", "ap_fl"):
    name = f"{algorithm}/cnn_small/N=16"
    if not wanted(name):
      continue
    rounds = Rounds((28, 28, 1), algorithm=algorithm, num_clients=16, examples_per_client=150, pooled_examples=500)
    steps = rounds.config.personal_steps + rounds.config.settings.get("friend_steps", 0)
    samples = 16 * steps * rounds.config.batch_size
    call = partial(rounds.score, rounds.simulator.score_personal)
    yield Case(name, call, samples, 16, float(rounds.prices().personalize.sum()))


def scaling(wanted: Wanted) -> Iterator[Case]:
  """More clients of the same size in a round."""
  for clients in (10, 100, 1000):
    name = f"fedavg/mlp/K={clients}"
    if not wanted(name):
      continue
    rounds = Rounds((28, 28, 1), model="mlp", num_clients=clients, examples_per_client=60, local_steps=4, batch_size=32)
    flops = float(rounds.prices().local_update.sum())
    yield Case(name, rounds.advance, clients * 4 * 32, clients, flops)


def clock(wanted: Wanted) -> Iterator[Case]:
  """FedAsync on the asynchronous clock: 10,000 clients in the shape of `fast`, 1000 at work, two small steps a visit.

  A call is 5000 visits of a schedule of 100,000. `one` computes the same in batches of one visit; `events` plays the
  schedule in Python, a compiled call for each visit and one for each upload, as a simulator without batches does.
  """
  settings: dict[str, Any] = {
    "algorithm": "fedasync",
    "settings": {"max_staleness": 100_000},  # all that arrives is mixed in
    "model": "mlp",
    "num_clients": 10_000,
    "cohort_size": 1000,
    "examples_per_client": 20,
    "local_steps": 2,
    "batch_size": 8,
    "rounds": 100,
    "clock": "asynchronous",
    "speed": "lognormal",
  }
  for label, visits, values in (
    ("vmap:32", 5000, {"client_map": "vmap:32"}),
    ("sequential", 5000, {"client_map": "sequential"}),
    ("one", 1000, {"batch_width": 1}),
    ("events", 1000, {}),
  ):
    name = f"fedasync/mlp/N=10000/{label}"
    if not wanted(name):
      continue
    start = time.perf_counter()
    rounds = Rounds((4, 4, 1), **settings, **values)
    prepared = time.perf_counter() - start
    plan = rounds.job.clock
    assert plan is not None
    call = _events(rounds.job, visits) if label == "events" else partial(rounds.advance, visits // 1000)
    told = {"prepare_seconds": prepared, "mean_batch": 1.0 if label == "events" else float(plan.sizes.mean())}
    yield Case(name, call, 16 * visits, visits, extra=partial(dict, told))


def _events(prepared: job.Job, visits: int) -> Callable[[], Any]:
  """Plays the first visits of a schedule one by one; a method whose clients keep nothing."""
  inputs, made = prepared.inputs, prepared.clock.schedule if prepared.clock else None
  assert made is not None

  @jax.jit
  def start(inputs):
    return prepared.build(inputs.settings)[0].init(jax.random.key(0))

  @jax.jit
  def download(inputs, server):
    return prepared.build(inputs.settings)[0].download(server)

  @jax.jit
  def update(inputs, download, row, visit):
    train, validation = (
      Span(span.start[row], span.size[row]) for span in (inputs.federation.train, inputs.federation.validation)
    )
    key = jax.random.fold_in(jax.random.key(inputs.seed), visit.id)
    given = Data(inputs.federation.store, train, validation)
    return prepared.build(inputs.settings)[0].local_update(download, (), given, visit, key)[1]

  @jax.jit
  def aggregate(inputs, server, upload, visit):
    row = lambda x: x[None]
    kept = jax.tree.map(row, upload.kept)
    ids, staleness = row(visit.id), row(visit.staleness)
    received = Received(upload.update, upload.weight, kept, ids, jnp.ones(1, bool), staleness)
    return prepared.build(inputs.settings)[0].aggregate(server, received, jax.random.key(visit.round))

  def play() -> Any:
    server, first = start(inputs), jnp.int32(0)
    order = np.argsort(np.where(made.group < 0, len(made.group), made.group), kind="stable")
    waiting = iter(np.arange(len(made.client)))  # in the order in which they start
    downloads = {next(waiting): download(inputs, server) for _ in range(made.places)}
    for number in order[:visits]:
      visit = Visit(
        id=made.client[number],
        round=made.round[number],
        times=first,
        staleness=made.staleness[number],
        work=made.work[number],
        wait=made.wait[number],
      )
      upload = update(inputs, downloads.pop(number), made.client[number], visit)
      server = aggregate(inputs, server, upload, visit)
      downloads[next(waiting)] = download(inputs, server)
    return server

  return play


SUITES: dict[str, Callable[[Wanted], Iterator[Case]]] = {
  "local_training": local_training,
  "round": whole_round,
  "uneven": uneven,
  "population": population,
  "staged": staged,
  "generator": generator,
  "personalize": personalize,
  "scaling": scaling,
  "clock": clock,
}


class _Timed(NamedTuple):
  """A case and the seconds of its turns, ours and by peer."""

  case: Case
  compile_seconds: float
  seconds: list[float]
  peers: dict[str, list[float]]


def measure(
  suite: str, repeats: int, others: Sequence[Peer] = (), wanted: Wanted = lambda name: True
) -> list[dict[str, Any]]:
  """A row for each case of a suite, then one for each peer that did a case.

  Times are medians over `repeats` turns, after a first call that compiles. A peer that cannot do a case costs a line.
  """
  found = {peer.name: peer for peer in others}

  def ask(timed: _Timed, name: str) -> float | None:
    try:
      return sum(found[name].turn(timed.case.peer or {}) for _ in range(timed.case.times))
    except PeerError as error:
      timed.peers.pop(name, None)
      print(f"{suite} {timed.case.name}: {name} left out: {error}", file=sys.stderr, flush=True)
      return None

  cases: list[_Timed] = []
  for case in SUITES[suite](wanted):
    with simulation.Stopwatch() as watch:
      jax.block_until_ready(case.call())
    timed = _Timed(case, watch.read()["compile_seconds"], [], {})
    timed.peers.update({name: [] for name in found if case.peer and ask(timed, name) is not None})
    cases.append(timed)
  square = jnp.ones((_SIDE, _SIDE))
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(square, square))
  products = []
  for _ in range(repeats):
    products.append(_seconds(lambda: product(square, square)))
    for timed in cases:
      timed.seconds.append(_seconds(timed.case.call))
      for name in tuple(timed.peers):
        seconds = ask(timed, name)
        if seconds is not None:
          timed.peers[name].append(seconds)
  rate = 2 * _SIDE**3 / statistics.median(products)
  device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  return [_own_row(suite, timed, rate, device) for timed in cases] + [
    _peer_row(suite, timed, found[name], device) for timed in cases for name in timed.peers
  ]


def _times(suite: str, case: Case, times: Sequence[float]) -> dict[str, Any]:
  seconds = statistics.median(times)
  return {
    "suite": suite,
    "case": case.name,
    "seconds": seconds,
    "seconds_min": min(times),
    "seconds_max": max(times),
    "repeats": len(times),
    "samples_per_second": case.samples / seconds,
    "clients_per_second": None if case.clients is None else case.clients / seconds,
  }


def _own_row(suite: str, timed: _Timed, rate: float, device: str) -> dict[str, Any]:
  times = _times(suite, timed.case, timed.seconds)
  flops = None if timed.case.flops is None else timed.case.flops / times["seconds"]
  return times | {
    "peer": None,
    "compile_seconds": timed.compile_seconds,
    "flops_per_second": flops,
    "matmul_flops_per_second": rate,
    "share_of_matmul_rate": None if flops is None else flops / rate,
    "peak_memory_bytes": simulation.peak_memory_bytes(),
    "device": device,
    "versions": job.versions(),
    **timed.case.extra(),
  }


def _peer_row(suite: str, timed: _Timed, peer: Peer, device: str) -> dict[str, Any]:
  """`ratio` is our speed over the peer's; `device` is what we ran on in these turns."""
  theirs = timed.peers[peer.name]
  ratios = [b / a for a, b in zip(timed.seconds, theirs, strict=True)]
  return _times(suite, timed.case, theirs) | {
    "peer": peer.name,
    "ratio": statistics.median(ratios),
    "ratio_min": min(ratios),
    "ratio_max": max(ratios),
    "device": device,
    "versions": peer.versions,
  }


def _seconds(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def line(row: dict[str, Any]) -> str:
  """A row as a line for people."""
  who = f"{row['case']} {row['peer']}" if row["peer"] else row["case"]
  parts = [
    f"{row['suite']} {who}: {row['seconds']:.4g} s ({row['seconds_min']:.4g} to {row['seconds_max']:.4g})",
    f"{row['samples_per_second']:,.0f} samples/s",
  ]
  if row["peer"]:
    ratio = f"ours / {row['peer']} {row['ratio']:.3g} ({row['ratio_min']:.3g} to {row['ratio_max']:.3g})"
    return ", ".join([*parts, ratio])
  if row["clients_per_second"] is not None:
    parts.append(f"{row['clients_per_second']:,.1f} clients/s")
  if row.get("masked_share") is not None:
    parts.append(f"{100 * row['masked_share']:.0f} % masked, {100 * row['short_batch_share']:.0f} % in short batches")
  if row.get("mean_batch") is not None:
    parts.append(f"batches of {row['mean_batch']:.0f}, prepared in {row['prepare_seconds']:.1f} s")
  if row.get("planned_memory_bytes") is not None:
    planned = row["planned_memory_bytes"]
    parts.append(f"{row['peak_resident_bytes'] / 1e9:.2f} GB taken of {planned / 1e9:.2f} planned")
  if row["share_of_matmul_rate"] is not None:
    parts.append(f"{100 * row['share_of_matmul_rate']:.0f} % of the matmul rate")
  return ", ".join(
    [*parts, f"compiled in {row['compile_seconds']:.1f} s", f"peak {row['peak_memory_bytes'] / 1e9:.2f} GB"]
  )


def main(arguments: Sequence[str]) -> None:
  """Prints a line for each case and writes them all as JSON if asked to."""
  del arguments
  repeats = checked("repeats", flags.FLAGS.repeats, int, Limits(least=1))
  for name in flags.FLAGS.suites:
    checked("suites", name, str, Limits(choices=tuple(SUITES)))
  for name in flags.FLAGS.peers:
    checked("peers", name, str, Limits(choices=peers.PEERS))
  parts = flags.FLAGS.cases
  wanted = lambda name: not parts or any(fnmatch.fnmatch(name, part) for part in parts)
  rows: list[dict[str, Any]] = []
  with contextlib.ExitStack() as stack:
    others = []
    for name in flags.FLAGS.peers:
      try:
        others.append(peers.start(name))
        stack.callback(others[-1].close)
      except PeerError as error:
        print(f"{name} left out: {error}", file=sys.stderr, flush=True)
    for name in flags.FLAGS.suites:
      found = measure(name, repeats, others, wanted)
      if not found:
        continue
      if not rows:
        versions = ", ".join(f"{key} {value}" for key, value in found[0]["versions"].items())
        print(f"{found[0]['device']}, {versions}", flush=True)
      print(*map(line, found), sep="\n", flush=True)
      rows += found
  if not rows:
    raise InputError(f"cases: got {', '.join(parts)}, which no case of the suites is called")
  if flags.FLAGS.json:
    with replacing(Path(flags.FLAGS.json)) as path:
      path.write_text(json.dumps(rows, indent=2) + "\n")


class _Names(flags.ListParser):
  """A flag's list of names; the flag alone stands for all of them."""

  def parse(self, argument: Any) -> list[str]:
    """'true' and 'false' are what absl makes of `--peers` and `--nopeers`."""
    return {"true": list(peers.PEERS), "false": []}.get(str(argument)) or super().parse(argument)


if __name__ == "__main__":
  usual = [name for name in SUITES if name != "staged"]  # which takes 7 GB of memory and as much of disk
  flags.DEFINE_list("suites", usual, f"what to measure: {', '.join(SUITES)}")
  flags.DEFINE_list("cases", [], "patterns of the names of cases to measure, e.g. '*/N=1000'; empty for all")
  flags.DEFINE_string("json", "", "file for the results, a list of objects")
  text = f"other simulators that do the same in turns, alone for all: {', '.join(peers.PEERS)}"
  flags.DEFINE_flag(flags.Flag(_Names(), flags.CsvListSerializer(","), "peers", [], text, boolean=True))
  flags.DEFINE_integer("repeats", _REPEATS, "turns; figures are medians over them")
  config.main(main)
