"""The pure round step and the functions around it that a run needs, each compiled once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apfl_jax import population, random, training
from apfl_jax.random import Purpose
from apfl_jax.settings import Limits, checked
from apfl_jax.simulation.client_map import client_map, lanes_of, resolve
from apfl_jax.simulation.cohort import draw_cohort
from apfl_jax.types import (
  Algorithm,
  Array,
  Data,
  Download,
  Federation,
  HeldOut,
  Prediction,
  Process,
  PyTree,
  Received,
  Span,
  State,
  Visit,
)

_SCORED, _SCORED_TOGETHER = 16, 256  # clients a dispatch: one after another, and under vmap


class Inputs(NamedTuple):
  """Everything traced that a run reads: changing any of it compiles nothing.

  Attributes:
    seed: uint32 [].
    federation: who holds what.
    pooled: Span [], the pooled test examples.
    settings: pytree of float32, whatever `build` reads (learning rate, class embeddings, drop rates, ...).
    held_out: what models are verified on, or () for nothing.
  """

  seed: Array
  federation: Federation
  pooled: Span
  settings: PyTree
  held_out: HeldOut | tuple[()] = ()


class RoundMetrics(NamedTuple):
  """What happened in a round.

  Attributes:
    present: int32 [], clients that started.
    arrived: int32 [], uploads that the server got.
    ids: int32 [K], the cohort.
    status: uint8 [K], 0 nobody, 1 took part but its upload was lost, 2 arrived.
  """

  present: Array
  arrived: Array
  ids: Array
  status: Array


class Scores(NamedTuple):
  """How R clients' models, or one model for R clients, do.

  Attributes:
    own: int32 [R, C, C], confusion matrices on each client's own test examples; where the read-out is `prior`, with the
      client's log label prior added to the logits.
    pooled: int32 [R, C, C], on the pooled test examples.
    verification: float32 [R, 2], see `metrics.verification.rates`; () where nothing is held out.
    described: arrays [R, ...] by name, see `Algorithm.describe`; of personal models only.
    as_own: int32 [R, C, C], on the pooled test examples, read out as own ones are; () where that is `pooled`.
  """

  own: Array
  pooled: Array
  verification: Array | tuple[()] = ()
  described: dict[str, Array] | tuple[()] = ()
  as_own: Array | tuple[()] = ()


class Simulator(NamedTuple):
  """Compiled once per shape. `rows` are row numbers of the federation.

  Attributes:
    init: (inputs) -> State.
    advance: (state, inputs, int32 [] rounds <= chunk) -> (State, RoundMetrics [chunk, ...]); the state is donated.
    schedule: (presence, seed, settings, round, rounds <= chunk) -> (presence, ids int32 [chunk, K], ok [chunk, K]), the
      cohorts of the coming rounds; `presence` is the state of the population process before and after them.
    score_global: (state, inputs, rows [R], ok [R]) -> Scores of the global model, `pooled` left at zeros.
    score_pooled: (state, inputs, classes bool [C]) -> float32 [C, C], the global model on the pooled test examples,
      answering with one of these classes only, ties shared out.
    score_personal: (state, inputs, rows [R], ok [R], classes bool [C] or None) -> Scores of the personal models, which
      are made and dropped. `classes` are those that clients present hold; only the softmax mask `present` needs them.
    present: (state of the population process, seed, settings, round) -> bool [N] by id, who is there; for scoring.
    place: pytree -> the same on all devices of the mesh, where `inputs` and a state of other origin must be.
    shaped: pytree -> the shapes of what `place` makes of it.
    mesh: see `client_map`.
    block: clients scored a dispatch.
    chunk: rounds a dispatch, at most.
    cohort_size: K.
    population_size: N.
    num_classes: C.
    softmax_mask: one of `training.SOFTMAX_MASKS`.
    has_global_model: whether the method has one.
  """

  init: Callable[[Inputs], State]
  advance: Any  # a jitted function: the memory plan lowers it
  schedule: Callable[[PyTree, Array, PyTree, Array, Array], tuple[PyTree, Array, Array]]
  score_global: Callable[[State, Inputs, Array, Array], Scores]
  score_pooled: Callable[[State, Inputs, Array], Array]
  score_personal: Callable[..., Scores]
  present: Callable[[PyTree, Array, PyTree, Array], Array]
  place: Callable[[PyTree], PyTree]
  shaped: Callable[[PyTree], PyTree]
  mesh: Mesh | None
  block: int
  chunk: int
  cohort_size: int
  population_size: int
  num_classes: int
  softmax_mask: str
  has_global_model: bool


def simulator(
  build: Callable[[PyTree], tuple[Algorithm, Process]],
  inputs: Inputs,
  num_classes: int,
  *,
  population_size: int,
  cohort_size: int,
  chunk: int = 10,
  versions: int = 1,
  softmax_mask: str = "none",
  readout: str = "plain",
  how: str = "auto",
  mesh: Mesh | None = None,
) -> Simulator:
  """Makes the compiled functions of a simulation.

  Args:
    build: (settings) -> (algorithm, population process); called inside the trace with `inputs.settings`.
    inputs: of any seed; only their shapes count here.
    num_classes: C.
    population_size: N, ids run from 0 to N - 1.
    cohort_size: K, clients computed a round.
    chunk: rounds a dispatch, at most.
    versions: H, server versions kept; a client whose delay is not smaller does not arrive.
    softmax_mask: classes of the softmax in losses on a client's real data: 'none' all; 'present' its own and those that
      clients of the round's cohort hold, or, when it is personalised, all clients that are there; 'own' its own.
    readout: 'plain', or 'prior': these losses add the client's log label prior to the logits, and so do answers for its
      own test examples; those for pooled ones do not.
    how: see `client_map.resolve`.
    mesh: see `client_map`.

  Raises:
    InputError: another mask or read-out.
  """
  checked("softmax_mask", softmax_mask, str, Limits(choices=training.SOFTMAX_MASKS))
  checked("readout", readout, str, Limits(choices=training.READOUTS))
  over_clients = partial(client_map, how=how, mesh=mesh)
  kind, width = resolve(how)
  everywhere = NamedSharding(mesh, PartitionSpec()) if mesh else None
  # Left to itself the compiler may split a result over devices, and the next call would compile for that.
  compiled = partial(jax.jit, out_shardings=everywhere) if mesh else jax.jit

  def place(tree: PyTree) -> PyTree:
    if jax.process_count() > 1 and everywhere:
      # As `device_put`, which would compare the hosts' values first.
      put = lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])
      return jax.tree.map(lambda x: x if isinstance(x, jax.Array) and x.committed else put(np.asarray(x)), tree)
    return jax.device_put(tree, everywhere) if mesh else jax.device_put(tree)

  def shaped(tree: PyTree) -> PyTree:
    like = lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=everywhere, weak_type=getattr(x, "weak_type", False)
    )
    return jax.tree.map(like, tree)

  def counts_of(federation: Federation, row: Array) -> Array:
    return training.label_histogram(federation.store, _at(federation.train, row), num_classes)

  def data_of(federation: Federation, row: Array, present: Array | None) -> Data:
    data = Data(federation.store, _at(federation.train, row), _at(federation.validation, row))
    if softmax_mask == "none" and readout == "plain":
      return data
    offset = training.logit_offset(counts_of(federation, row), present, softmax_mask, readout)
    return data._replace(logit_offset=offset)

  def classes_held(federation: Federation, rows: Array, ok: Array) -> Array | None:
    """bool [C]: what these clients hold together; None where nobody asks."""
    if softmax_mask != "present":
      return None
    held = lambda federation, row: ((counts_of(federation, row) > 0).astype(jnp.int32), ())
    return over_clients(held)(federation, rows, ok)[0] > 0

  def init(inputs: Inputs) -> State:
    algorithm, process = build(inputs.settings)
    server = algorithm.init(random.key(inputs.seed, Purpose.SERVER))
    download = algorithm.download(server)
    rows = inputs.federation.id.shape[0]
    # What a row holds before its client's first visit means nothing: only its shape is asked for.
    client = jax.eval_shape(algorithm.init_client, _own(download, 0), jax.random.key(0))
    return State(
      round=jnp.int32(0),
      server=server,
      clients=jax.tree.map(lambda s: jnp.zeros((rows, *s.shape), s.dtype), client),
      times=jnp.zeros(rows, jnp.int32),
      population=population.start(process, inputs.seed),
      history=jax.tree.map(lambda x: jnp.zeros((versions, *jnp.shape(x)), jnp.result_type(x)), download.shared),
    )

  def round_step(state: State, inputs: Inputs, row_of: Array) -> tuple[State, RoundMetrics]:
    algorithm, process = build(inputs.settings)
    federation, seed, now = inputs.federation, inputs.seed, state.round
    presence = population.step(process, state.population, now, seed)
    ids, ok = draw_cohort(process, presence, now, seed, population_size, cohort_size)
    there = population.look(process, presence, now, ids, seed)

    row = row_of[ids]
    # Clients of like work lie together, so that a chunk under vmap waits for few, and none is left for long alone.
    by_work = jnp.argsort(jnp.where(ok, -federation.train.size[row] * there.work, jnp.inf))
    ids, ok, row, there = jax.tree.map(lambda x: x[by_work], (ids, ok, row, there))

    download = algorithm.download(state.server)
    history = jax.tree.map(lambda h, x: h.at[now % versions].set(x), state.history, download.shared)
    delay = jnp.minimum(there.delay, now)
    fresh_enough = delay < versions

    # All that a client's function reads comes through `shared`: what it would close over is not on every device.
    def client(shared, item):
      inputs, history, present = shared
      algorithm, _ = build(inputs.settings)
      slot, own, row, visit, client, arrives = item
      download = Download(jax.tree.map(lambda h: h[slot], history), own)
      new = algorithm.init_client(download, random.key(inputs.seed, Purpose.CLIENT, visit.id))
      client = jax.tree.map(lambda a, b: jnp.where(visit.times == 0, a, b), new, client)
      key = random.key(inputs.seed, Purpose.LOCAL_UPDATE, visit.round, visit.id)
      data = data_of(inputs.federation, row, present)
      client, upload = algorithm.local_update(download, client, data, visit, key)
      arrived = arrives & _finite((upload.update, upload.weight, upload.kept))
      weight = jnp.where(arrived, upload.weight, 0.0)
      total = jax.tree.map(lambda u: jnp.where(arrived, weight * u, jnp.zeros_like(u)), upload.update)
      kept = jax.tree.map(lambda k: jnp.where(arrived, k, jnp.zeros_like(k)), upload.kept)
      return (total, weight), (client, kept, arrived)

    visit = Visit(
      id=ids,
      round=jnp.broadcast_to(now, ids.shape),
      times=state.times[row],
      staleness=delay,
      work=there.work,
      wait=there.wait,
    )
    mine = jax.tree.map(lambda x: x[row], state.clients)
    own = jax.tree.map(lambda x: x[ids], download.own)
    items = ((now - delay) % versions, own, row, visit, mine, there.arrives & fresh_enough)
    shared = inputs, history, classes_held(federation, row, ok)
    (total, weight), (mine, kept, arrived) = over_clients(client)(shared, items, ok)

    # In the order in which the cohort was drawn: what a server does one after another must not begin with the largest.
    drawn = jnp.argsort(by_work)
    received = Received(total, weight, *jax.tree.map(lambda x: x[drawn], (kept, ids, arrived, delay)))
    server = jax.lax.cond(
      jnp.any(arrived) & (weight > 0),
      algorithm.aggregate,
      lambda server, received, key: server,
      state.server,
      received,
      random.key(seed, Purpose.AGGREGATE, now),
    )
    place = jnp.where(ok, row, federation.id.shape[0])  # out of range: not written
    state = State(
      round=now + 1,
      server=server,
      clients=jax.tree.map(lambda all, x: all.at[place].set(x, mode="drop"), state.clients, mine),
      times=state.times.at[place].add(1, mode="drop"),
      population=presence,
      history=history,
    )
    status = ok.astype(jnp.uint8) + arrived
    return state, RoundMetrics(jnp.sum(ok), jnp.sum(arrived), ids, status.astype(jnp.uint8))

  @partial(compiled, donate_argnums=0)
  def advance(state: State, inputs: Inputs, rounds: Array) -> tuple[State, RoundMetrics]:
    ids = inputs.federation.id
    row_of = jnp.zeros(population_size, jnp.int32).at[ids].set(jnp.arange(ids.shape[0], dtype=jnp.int32))
    shape = jax.eval_shape(round_step, state, inputs, row_of)[1]
    record = jax.tree.map(lambda s: jnp.zeros((chunk, *s.shape), s.dtype), shape)

    def body(i, carry):
      state, record = carry
      state, metrics = round_step(state, inputs, row_of)
      return state, jax.tree.map(lambda all, x: all.at[i].set(x), record, metrics)

    return jax.lax.fori_loop(0, rounds, body, (state, record))

  @compiled
  def schedule(
    presence: PyTree, seed: Array, settings: PyTree, now: Array, rounds: Array
  ) -> tuple[PyTree, Array, Array]:
    _, process = build(settings)

    def body(i, carry):
      presence, all_ids, all_ok = carry
      presence = population.step(process, presence, now + i, seed)
      ids, ok = draw_cohort(process, presence, now + i, seed, population_size, cohort_size)
      return presence, all_ids.at[i].set(ids), all_ok.at[i].set(ok)

    nobody = jnp.zeros((chunk, cohort_size), jnp.int32), jnp.zeros((chunk, cohort_size), bool)
    return jax.lax.fori_loop(0, rounds, body, (presence, *nobody))

  def score(
    predict: Callable[[Any, Array], Any], federation: Federation, pooled: Span, model: PyTree, row: Array
  ) -> Scores:
    answer = partial(predict, model)
    prior = training.log_prior(counts_of(federation, row)) if readout == "prior" else None

    def own_answer(images: Array) -> Prediction:
      prediction = answer(images)
      return prediction if prior is None else prediction._replace(logits=prediction.logits + prior)

    own = training.evaluate(own_answer, federation.store, _at(federation.test, row), num_classes)
    others = training.evaluate(answer, federation.store, pooled, num_classes)
    if prior is None:
      return Scores(own.confusion, others.confusion)
    as_own = training.evaluate(own_answer, federation.store, pooled, num_classes)
    return Scores(own.confusion, others.confusion, as_own=as_own.confusion)

  @compiled
  def score_global(state: State, inputs: Inputs, rows: Array, ok: Array) -> Scores:
    algorithm, _ = build(inputs.settings)
    model = algorithm.global_model(state.server)

    def one(shared, row):
      inputs, model = shared
      nothing = Span(jnp.int32(0), jnp.int32(0))
      return (), score(build(inputs.settings)[0].predict, inputs.federation, nothing, model, row)

    verified = _verified(partial(algorithm.predict, model), inputs)
    everyone = jax.tree.map(lambda x: jnp.broadcast_to(x, (*rows.shape, *x.shape)), verified)
    return over_clients(one)((inputs, model), rows, ok)[1]._replace(verification=everyone)

  @compiled
  def score_pooled(state: State, inputs: Inputs, classes: Array) -> Array:
    algorithm, _ = build(inputs.settings)
    # In as many runs as there are lanes, so that all devices have work.
    parts = lanes_of(mesh)
    each = (inputs.pooled.size + parts - 1) // parts
    start = jnp.minimum(jnp.arange(parts) * each, inputs.pooled.size)
    runs = Span(inputs.pooled.start + start, jnp.minimum(each, inputs.pooled.size - start))

    def one(shared, run):
      inputs, model, classes = shared
      answer = partial(build(inputs.settings)[0].predict, model)
      return training.evaluate(answer, inputs.federation.store, run, num_classes, classes).confusion, ()

    shared = inputs, algorithm.global_model(state.server), classes
    return over_clients(one)(shared, runs, jnp.ones(parts, bool))[0]

  @compiled
  def score_personal(state: State, inputs: Inputs, rows: Array, ok: Array, classes: Array | None = None) -> Scores:
    algorithm, _ = build(inputs.settings)
    federation = inputs.federation
    download = algorithm.download(state.server)

    def one(shared, item):
      inputs, common, now, classes = shared
      own, row, id, times, client = item
      algorithm, _ = build(inputs.settings)
      download = Download(common, own)
      new = algorithm.init_client(download, random.key(inputs.seed, Purpose.CLIENT, id))
      client = jax.tree.map(lambda a, b: jnp.where(times == 0, a, b), new, client)
      nothing = jnp.int32(0)
      visit = Visit(id, now, times, nothing, jnp.float32(1.0), nothing)
      # The same key at every round: choosing when to return is not choosing luck.
      key = random.key(inputs.seed, Purpose.PERSONALIZE, id)
      model = algorithm.personalize(download, client, data_of(inputs.federation, row, classes), visit, key)
      scores = score(algorithm.predict, inputs.federation, inputs.pooled, model, row)
      verified = _verified(partial(algorithm.predict, model), inputs)
      return (), scores._replace(verification=verified, described=algorithm.describe(model))

    ids = federation.id[rows]
    mine = jax.tree.map(lambda x: x[rows], state.clients)
    own = jax.tree.map(lambda x: x[ids], download.own)
    items = (own, rows, ids, state.times[rows], mine)
    return over_clients(one)((inputs, download.shared, state.round, classes), items, ok)[1]

  @compiled
  def present(presence: PyTree, seed: Array, settings: PyTree, now: Array) -> Array:
    _, process = build(settings)
    return population.look(process, presence, now, jnp.arange(population_size), seed).present

  def has_global_model(inputs):
    algorithm, _ = build(inputs.settings)
    return algorithm.global_model(algorithm.init(random.key(inputs.seed, Purpose.SERVER)))

  return Simulator(
    init=compiled(init),
    advance=advance,
    schedule=schedule,
    score_global=score_global,
    score_pooled=score_pooled,
    score_personal=score_personal,
    present=present,
    place=place,
    shaped=shaped,
    mesh=mesh,
    block=_SCORED if kind == "sequential" else width or _SCORED_TOGETHER,
    chunk=chunk,
    cohort_size=cohort_size,
    population_size=population_size,
    num_classes=num_classes,
    softmax_mask=softmax_mask,
    has_global_model=jax.eval_shape(has_global_model, inputs) is not None,
  )


def _verified(answer: Callable[[Array], Any], inputs: Inputs) -> Array | tuple[()]:
  return training.verify(answer, inputs.held_out) if isinstance(inputs.held_out, HeldOut) else ()


def _at(span: Span, row: Array) -> Span:
  return Span(span.start[row], span.size[row])


def _own(download: Download, id: int) -> Download:
  return Download(download.shared, jax.tree.map(lambda x: x[id], download.own))


def _finite(tree: PyTree) -> Array:
  """Whether all numbers are finite: 0 * x is NaN where x is not. Sums run along rows first, which is fast."""
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  zeros = [jnp.sum(jnp.sum(0 * x, axis=0)) if x.ndim else 0 * x for x in leaves]
  return jnp.isfinite(sum(x.astype(jnp.float32) for x in zeros)) if zeros else jnp.bool_(True)
