"""What a run cost: operations and bytes, from the functions of the method alone; no method declares anything."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax.metrics import ledger
from apfl_jax.simulation.rounds import Inputs
from apfl_jax.simulation.run import Result
from apfl_jax.types import Algorithm, Data, Process, PyTree, Received, Span, Visit

_PRICED = 32  # client sizes that are priced; those between are interpolated


class Prices(NamedTuple):
  """What a method's functions cost, each once.

  Attributes:
    local_update: float [N], operations of a client's local training, by row.
    personalize: float [N], operations of making its personal model.
    aggregate: operations of the server on one round's uploads.
    upload: bytes that a client sends.
    read_locally: bytes of the download that local training reads.
    read_personally: bytes of the download that personalisation reads.
  """

  local_update: np.ndarray
  personalize: np.ndarray
  aggregate: float
  upload: int
  read_locally: int
  read_personally: int


class Cost(NamedTuple):
  """Totals of a run; operations count matrix products and convolutions, two for a multiplication and an addition.

  Attributes:
    local_flops: training on clients, all rounds.
    generator_flops: what the server computes in `aggregate`; None where it computes no matrix product. Rounds of a
      warm-up count as if they trained.
    personalize_flops: making the personal models of the clients scored at the end.
    bytes_up: uploads of all clients that started, lost ones included.
    bytes_down: what clients that started, and clients personalised at the end, read of the download.
  """

  local_flops: float
  generator_flops: float | None
  personalize_flops: float
  bytes_up: float
  bytes_down: float


def prices(
  build: Callable[[PyTree], tuple[Algorithm, Process]],
  inputs: Inputs,
  server: PyTree,
  wait: int = 0,
  num_offsets: int = 0,
) -> Prices:
  """Prices a method by tracing its functions; nothing is compiled or run.

  Args:
    build: as of the simulator.
    inputs: the run's.
    server: the method's; what is known of it (a count of rounds) decides which branches are priced.
    wait: idle local steps of a visit, which some methods use.
    num_offsets: length of `Data.logit_offset`, C; 0 for None.
  """
  arguments, local_update, personalize = _on_a_client(build, inputs, server, wait, num_offsets)
  settings, key = arguments(1, 1)[0], arguments(1, 1)[-1]
  federation = inputs.federation

  def aggregate(settings, server, received, key):
    return build(settings)[0].aggregate(server, received, key)

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
    kept=jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), upload.kept),
    ids=abstract((1,), jnp.int32),
    arrived=abstract((1,), bool),
    staleness=abstract((1,), jnp.int32),
  )
  read = lambda function: ledger.bytes_read(function, *arguments(1, 1), argnum=1)
  return Prices(
    local_update=each_client(local_update),
    personalize=each_client(personalize),
    aggregate=ledger.flops(aggregate, settings, server, received, key),
    upload=ledger.nbytes(upload),
    read_locally=read(local_update),
    read_personally=read(personalize),
  )


def traffic(
  build: Callable[[PyTree], tuple[Algorithm, Process]], inputs: Inputs, server: PyTree, num_offsets: int = 0
) -> tuple[int, int]:
  """Bytes of a visit: what local training reads of the download, and what is uploaded; arguments as of `prices`."""
  arguments, local_update, _ = _on_a_client(build, inputs, server, 0, num_offsets)
  _, upload = jax.eval_shape(local_update, *arguments(1, 1))
  return ledger.bytes_read(local_update, *arguments(1, 1), argnum=1), ledger.nbytes(upload)


def _on_a_client(
  build: Callable[[PyTree], tuple[Algorithm, Process]], inputs: Inputs, server: PyTree, wait: int, num_offsets: int
) -> tuple[Callable[[int, int], tuple], Callable, Callable]:
  """((train size, validation size) -> arguments, local_update, personalize), the functions of these arguments."""
  federation = inputs.federation
  shapes = lambda tree: jax.eval_shape(lambda x: x, tree)
  settings, store = shapes(inputs.settings), shapes(federation.store)
  key = jax.eval_shape(lambda: jax.random.key(0))
  algorithm = lambda settings: build(settings)[0]
  download = jax.eval_shape(lambda s, server: algorithm(s).download(server), settings, server)
  download = download._replace(own=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), download.own))
  client = jax.eval_shape(lambda s, d, k: algorithm(s).init_client(d, k), settings, download, key)

  def arguments(size: int, validation: int) -> tuple:
    # Numbers are known to the ledger; traced and abstract values are not.
    number: Any = np.int32
    zero, whole = number(0), np.float32(1)
    spans = Span(zero, number(size)), Span(zero, number(validation))
    visit = Visit(id=zero, round=zero, times=zero, staleness=zero, work=cast(Any, whole), wait=number(wait))
    offset: Any = jax.ShapeDtypeStruct((num_offsets,), jnp.float32) if num_offsets else None
    return settings, download, client, Data(store, *spans, offset), visit, key

  def local_update(settings, download, client, data, visit, key):
    return algorithm(settings).local_update(download, client, data, visit, key)

  def personalize(settings, download, client, data, visit, key):
    return algorithm(settings).personalize(download, client, data, visit, key)

  return arguments, local_update, personalize


def cost(prices: Prices, result: Result) -> Cost:
  """What a run cost in all."""
  times = np.asarray(result.state.times)
  visits, rounds = float(times.sum()), sum(n > 0 for n in result.record.arrived)
  return Cost(
    local_flops=float((prices.local_update * times).sum()),
    generator_flops=rounds * prices.aggregate or None,
    personalize_flops=float(prices.personalize[result.rows].sum()),
    bytes_up=visits * prices.upload,
    bytes_down=visits * prices.read_locally + len(result.rows) * prices.read_personally,
  )
