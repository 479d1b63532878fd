"""What a run cost: operations and bytes, from the functions of the method alone; no method declares anything.

The split is that of method 6.1 [O]: local training, the generator (or whatever else the server computes),
personalisation, evaluation. Seconds and memory are measured, in timings.jsonl: rounds are one program, so that their
seconds cannot be told apart by part.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax.metrics import ledger
from apfl_jax.simulation.rounds import Inputs
from apfl_jax.simulation.run import Result
from apfl_jax.training.evaluation import BATCH
from apfl_jax.types import Algorithm, Data, Process, PyTree, Received, Span, Visit

_PRICED = 32  # client sizes that are priced; those between are interpolated
_FOLLOWED = 1000  # aggregations, one after another, or several that are alike


class Prices(NamedTuple):
  """What a method's functions cost, each once.

  Attributes:
    local_update: float [N], operations of a client's local training, by row.
    personalize: float [N], operations of making its personal model.
    aggregate: operations of the server on one round's uploads, where nothing known tells that it does less.
    server: (uploads that arrived in each round) -> operations of the server. One that counts its rounds, or is told
      them, does not pay for those in which a branch leaves its generator as it is (warm-up, cadence): the count is
      followed from `init` on. Branches that hang on data count as the dearest.
    score_global: operations of the global model's answers to a batch of `BATCH` images; 0 without a global model.
    score_personal: those of a personal model's.
    upload: bytes that a client sends.
    read_locally: bytes of the download that local training reads.
    read_personally: bytes of the download that personalisation reads.
  """

  local_update: np.ndarray
  personalize: np.ndarray
  aggregate: float
  server: Callable[[Sequence[int]], float]
  score_global: float
  score_personal: float
  upload: int
  read_locally: int
  read_personally: int


class Cost(NamedTuple):
  """Totals of a run; operations count matrix products and convolutions, two for a multiplication and an addition.

  No operation counts twice: their sum is the run's.

  Attributes:
    local_flops: training on clients, all visits that began, each whole.
    generator_flops: what a server that learns to draw examples or features computes in `aggregate`, in the rounds in
      which it does; None for other methods.
    server_flops: what any other server computes there; None where it computes no matrix product.
    personalize_flops: making the personal models of the clients scored at the end.
    evaluation_flops: scoring models, and making personal models before the end, which are made to be scored.
    bytes_up: uploads, lost ones included; of visits that were cut off or not over there is none.
    bytes_down: what clients that started, and clients personalised at the end, read of the download.
    generator_share: of the operations without evaluation; None without a generator.
    break_even_rounds: bytes that a returning client reads to personalise, in rounds of its traffic: if it is spared
      more rounds than that, personalising from one download is the cheaper way. None where rounds have no traffic.
  """

  local_flops: float
  generator_flops: float | None
  server_flops: float | None
  personalize_flops: float
  evaluation_flops: float
  bytes_up: float
  bytes_down: float
  generator_share: float | None
  break_even_rounds: float | None


class PerClient(NamedTuple):
  """The clients' share of a run's cost, [N] by row; what the server computes is not in it.

  Attributes:
    local_flops: float.
    personalize_flops: float; 0 for clients that were not scored.
    bytes_up: float.
    bytes_down: float.
  """

  local_flops: np.ndarray
  personalize_flops: np.ndarray
  bytes_up: np.ndarray
  bytes_down: np.ndarray


def prices(
  build: Callable[[PyTree], tuple[Algorithm, Process]],
  inputs: Inputs,
  server: PyTree,
  wait: int = 0,
  num_offsets: int = 0,
  cohort_size: int = 1,
  aggregations: int = 0,
) -> Prices:
  """Prices a method by tracing its functions; nothing is compiled or run.

  Args:
    build: as of the simulator.
    inputs: the run's.
    server: the method's, or its shapes.
    wait: idle local steps of a visit, which some methods use.
    num_offsets: length of `Data.logit_offset`, C; 0 for None.
    cohort_size: K, uploads that the server gets in a call of `aggregate`.
    aggregations: how many calls of it make a round where each upload is aggregated by itself; 0 where a round is one.
  """
  arguments, local_update, personalize, global_model = _on_a_client(build, inputs, server, wait, num_offsets)
  settings, key = arguments(1, 1)[0], arguments(1, 1)[-1]
  server, federation = _shapes(server), inputs.federation

  @jax.jit
  def aggregate(settings, *rest):
    return build(settings)[0].aggregate(*rest)

  @jax.jit
  def answer(settings, model, images):
    return build(settings)[0].predict(model, images)

  train, validation = np.asarray(federation.train.size), np.asarray(federation.validation.size)
  sizes, first = np.unique(train, return_index=True)
  chosen = np.unique(np.linspace(0, len(sizes) - 1, _PRICED).round().astype(int))

  def each_client(function: Callable) -> np.ndarray:
    """float [N]: operations of one call for every client."""
    price = ledger.pricer(function, *arguments(1, 1))
    known = [price(*arguments(sizes[i], validation[first[i]])) for i in chosen]
    return np.interp(train, sizes[chosen], known)

  _, upload = jax.eval_shape(local_update, *arguments(1, 1))
  abstract: Any = jax.ShapeDtypeStruct
  received = Received(
    total=upload.update,
    weight=upload.weight,
    kept=jax.tree.map(lambda x: jax.ShapeDtypeStruct((cohort_size, *x.shape), x.dtype), upload.kept),
    ids=abstract((cohort_size,), jnp.int32),
    arrived=abstract((cohort_size,), bool),
    staleness=abstract((cohort_size,), jnp.int32),
  )

  told = ledger.follower(lambda *given: local_update(*given)[1].kept, *arguments(1, 1))
  in_round = lambda round: jax.tree.leaves(told(*arguments(1, 1, round))[1])
  by_round = [not _same(*pair) for pair in zip(in_round(0), in_round(1), strict=True)]

  def received_in(round: int) -> Received:
    """Of what the server gets client by client, known is what hangs on the round."""
    if not any(by_round):
      return received
    rows, structure = jax.tree.flatten(received.kept)
    given = zip(rows, in_round(round), by_round, strict=True)
    values = [np.broadcast_to(x, row.shape) if known else row for row, x, known in given]
    return received._replace(kept=jax.tree.unflatten(structure, values))

  def served(arrived: Sequence[int]) -> float:
    follow = ledger.follower(aggregate, inputs.settings, server, received, key)
    init = ledger.follower(lambda settings, key: build(settings)[0].init(key), inputs.settings, key)
    _, known = init(inputs.settings, key)
    alike = _alike(np.asarray(arrived) if aggregations else np.minimum(arrived, 1), max(aggregations, 1))
    each: list[float] = []
    for round, count in alike[:_FOLLOWED]:
      operations, after = follow(inputs.settings, known, received_in(round), key)
      each += [operations] * count
      if _same(after, known) and not any(by_round):
        return sum(each) + (sum(count for _, count in alike) - len(each)) * operations
      known = _further(known, after, count)
    # The rest cost what the later half of these did: by then warm-ups are over.
    rest = sum(count for _, count in alike[_FOLLOWED:])
    return sum(each) + rest * float(np.mean(each[len(each) // 2 :] or 0.0))

  images = jax.ShapeDtypeStruct((BATCH, *federation.store.images.shape[1:]), jnp.float32)
  score = lambda model: 0.0 if model is None else ledger.flops(answer, settings, model, images)
  read = lambda function: ledger.bytes_read(function, *arguments(1, 1), argnum=1)
  return Prices(
    local_update=each_client(local_update),
    personalize=each_client(personalize),
    aggregate=ledger.flops(aggregate, settings, server, received, key),
    server=served,
    score_global=score(global_model),
    score_personal=score(jax.eval_shape(personalize, *arguments(1, 1))),
    upload=ledger.nbytes(upload),
    read_locally=read(local_update),
    read_personally=read(personalize),
  )


def traffic(
  build: Callable[[PyTree], tuple[Algorithm, Process]], inputs: Inputs, server: PyTree, num_offsets: int = 0
) -> tuple[int, int]:
  """Bytes of a visit: what local training reads of the download, and what is uploaded; arguments as of `prices`."""
  arguments, local_update, _, _ = _on_a_client(build, inputs, server, 0, num_offsets)
  _, upload = jax.eval_shape(local_update, *arguments(1, 1))
  return ledger.bytes_read(local_update, *arguments(1, 1), argnum=1), ledger.nbytes(upload)


def _on_a_client(
  build: Callable[[PyTree], tuple[Algorithm, Process]], inputs: Inputs, server: PyTree, wait: int, num_offsets: int
) -> tuple[Callable[..., tuple], Callable, Callable, PyTree]:
  """((train size, validation size, round) -> arguments, local_update, personalize, shapes of the global model)."""

  # Under jit each is traced once, however often the ledger asks.
  @jax.jit
  def local_update(settings, *rest):
    return build(settings)[0].local_update(*rest)

  @jax.jit
  def personalize(settings, *rest):
    return build(settings)[0].personalize(*rest)

  settings, store = _shapes(inputs.settings), _shapes(inputs.federation.store)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def around(settings, server, key):
    algorithm, _ = build(settings)
    download = algorithm.download(server)
    own = download._replace(own=jax.tree.map(lambda x: x[0], download.own))
    return own, algorithm.init_client(own, key), algorithm.global_model(server)

  download, client, global_model = jax.eval_shape(around, settings, _shapes(server), key)

  def arguments(size: int, validation: int, round: int = 0) -> tuple:
    # Numbers are known to the ledger; traced and abstract values are not.
    number: Any = np.int32
    zero, whole = number(0), np.float32(1)
    spans = Span(zero, number(size)), Span(zero, number(validation))
    visit = Visit(id=zero, round=number(round), times=zero, staleness=zero, work=cast(Any, whole), wait=number(wait))
    offset: Any = jax.ShapeDtypeStruct((num_offsets,), jnp.float32) if num_offsets else None
    return settings, download, client, Data(store, *spans, offset), visit, key

  return arguments, local_update, personalize, global_model


def _shapes(tree: PyTree) -> PyTree:
  return jax.eval_shape(lambda x: x, tree)


def _same(a: PyTree, b: PyTree) -> bool:
  """Whether the same is known of both."""
  unknown = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(unknown(x) and unknown(y) or not unknown(x) and not unknown(y) and np.array_equal(x, y) for x, y in pairs)


def _alike(calls: Iterable[int], whole: int) -> list[tuple[int, int]]:
  """Calls of `aggregate` in each round -> (round, how many) of those one after another that do the same.

  A server may do something else in a call that begins a round, or that ends `whole` calls since its first.
  """
  runs, done = [], 0
  for round, count in enumerate(calls):
    first, end = done, done + int(count)
    while done < end:
      left = whole - 1 - done % whole  # until the last of them
      runs.append((round, 1 if done == first or not left else min(left, end - done)))
      done += runs[-1][1]
  return runs


def _further(before: PyTree, after: PyTree, times: int) -> PyTree:
  """What is known after as many calls, from before the first and after it: what it counted, they all count."""

  def each(a: Any, b: Any) -> Any:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in (a, b)) or b.dtype == bool or np.array_equal(a, b):
      return b
    return (b + (times - 1) * (b - a)).astype(b.dtype)

  return jax.tree.map(each, before, after)


def cost(prices: Prices, result: Result, inputs: Inputs, *, generates: bool) -> Cost:
  """What a run cost in all.

  Args:
    prices: of the method.
    result: the run's.
    inputs: the run's.
    generates: whether the server trains a generator.
  """
  arrived = result.record.arrived
  server = prices.server(arrived)
  each = cost_per_client(prices, result)
  batches = lambda size: (np.asarray(size) + BATCH - 1) // BATCH
  tests, pooled = int(batches(inputs.federation.test.size)[result.rows].sum()), int(batches(inputs.pooled.size))
  # Two read-outs of the pooled examples where they are not one.
  pooled_personally = len(result.rows) * pooled * (1 if isinstance(result.personal_scores.as_own, tuple) else 2)
  lines = result.record.metrics
  personally = sum(line["personal_pooled_accuracy"] is not None for line in lines)
  evaluation = len(lines) * prices.score_global * (tests + pooled)
  evaluation += personally * prices.score_personal * (tests + pooled_personally)
  evaluation += (personally - 1) * each.personalize_flops.sum()
  local, personal = float(each.local_flops.sum()), float(each.personalize_flops.sum())
  total = local + server + personal
  traffic = prices.upload + prices.read_locally
  return Cost(
    local_flops=local,
    generator_flops=server if generates else None,
    server_flops=None if generates else server or None,
    personalize_flops=personal,
    evaluation_flops=float(evaluation),
    bytes_up=float(each.bytes_up.sum()),
    bytes_down=float(each.bytes_down.sum()),
    generator_share=server / total if generates and total else None,
    break_even_rounds=prices.read_personally / traffic if traffic else None,
  )


def cost_per_client(prices: Prices, result: Result) -> PerClient:
  """What each client's part was, by row."""
  times, starts = np.asarray(result.state.times).astype(float), np.asarray(result.starts).astype(float)
  scored = np.zeros(len(times))
  scored[result.rows] = 1.0
  return PerClient(
    local_flops=prices.local_update * starts,
    personalize_flops=prices.personalize * scored,
    bytes_up=prices.upload * times,
    bytes_down=prices.read_locally * starts + prices.read_personally * scored,
  )
