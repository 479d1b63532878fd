"""The pure round step and the functions around it that a run needs, each compiled once."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apfl_jax import metrics, population, random, training
from apfl_jax.errors import InputError
from apfl_jax.random import Purpose
from apfl_jax.settings import Limits, checked
from apfl_jax.simulation.batches import Batches, Cohort, Layout, blank_batches
from apfl_jax.simulation.client_map import client_map, lanes_of, resolve
from apfl_jax.simulation.cohort import draw_cohort
from apfl_jax.simulation.contract import Outline, outline
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


LOST, ARRIVED, BROKEN = 1, 2, 3  # what became of an upload; 0 is nobody's


class RoundMetrics(NamedTuple):
  """What happened in a round.

  Attributes:
    present: int32 [], clients that started.
    arrived: int32 [], uploads that the server got.
    ids: int32 [K], the cohort.
    status: uint8 [K], 0 nobody, 1 took part but its upload was lost, 2 arrived, 3 came and was not finite: not used.
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

  def reweighted(self, histogram: np.ndarray) -> np.ndarray:
    """float [R]: what recalls on the pooled examples come to on each client's mix of classes [R, C] (method 8.3)."""
    return metrics.fairness.reweighted(
      metrics.recall(self.pooled if isinstance(self.as_own, tuple) else self.as_own), histogram
    )


class Simulator(NamedTuple):
  """Compiled once per shape. `rows` are row numbers of the federation.

  Attributes:
    init: (inputs) -> State.
    compile: (shapes of a state, of inputs) -> `advance` compiled for them, once.
    advance: (state, inputs, work) -> (State, RoundMetrics [chunk, ...]); the state is donated. The work is a number of
      rounds int32 [] <= chunk; on a virtual clock it is `Batches`, and metrics are those of its batches, [D, ...].
    work: of the shapes that `advance` takes.
    cohorts: (presence, seed, settings, round, rounds <= chunk) -> (presence, ids int32 [chunk, K], ok [chunk, K]), the
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
    cohort_size: K; on a virtual clock the most clients that a round computes.
    population_size: N.
    num_classes: C.
    softmax_mask: one of `training.SOFTMAX_MASKS`.
    has_global_model: whether the method has one.
  """

  init: Callable[[Inputs], State]
  compile: Callable[[State, Inputs], Any]
  advance: Callable[[State, Inputs, Any], tuple[State, Any]]
  work: Any
  cohorts: Callable[[PyTree, Array, PyTree, Array, Array], tuple[PyTree, Array, Array]]
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
  layout: Layout | None = None,
  softmax_mask: str = "none",
  readout: str = "plain",
  how: str = "auto",
  mesh: Mesh | None = None,
  shapes: Outline | None = None,
) -> Simulator:
  """Makes the compiled functions of a simulation.

  Args:
    build: (settings) -> (algorithm, population process); called inside the trace with `inputs.settings`.
    inputs: of any seed; only their shapes count here.
    num_classes: C.
    population_size: N, ids run from 0 to N - 1.
    cohort_size: K, clients computed a round.
    chunk: rounds a dispatch, at most.
    versions: H, server versions kept; a client whose delay is not smaller does not arrive. A virtual clock's layout
      says how many it needs.
    layout: of the batches of a virtual clock, see `schedule`; None for rounds.
    softmax_mask: classes of the softmax in losses on a client's real data: 'none' all; 'present' its own and those that
      clients of the round's cohort hold, or, on a virtual clock, all clients that are there when its visit starts, and
      when it is personalised all that are there then; 'own' its own.
    readout: 'plain', or 'prior': these losses add the client's log label prior to the logits, and so do answers for its
      own test examples; those for pooled ones do not.
    how: see `client_map.resolve`.
    mesh: see `client_map`.
    shapes: of what the method returns; None to find them here.

  Raises:
    InputError: another mask or read-out, a layout without the classes that the mask needs, or a method that breaks the
      contract, see `outline`.
  """
  checked("softmax_mask", softmax_mask, str, Limits(choices=training.SOFTMAX_MASKS))
  checked("readout", readout, str, Limits(choices=training.READOUTS))
  alone = layout is not None and layout.alone
  if layout and softmax_mask == "present" and layout.classes != num_classes:
    raise InputError("softmax_mask: got 'present' with batches that lack classes, accepted is a plan with `held`")
  known = shapes or outline(
    build,
    inputs,
    num_classes,
    population_size=population_size,
    cohort_size=1 if alone else cohort_size,
    offsets=(softmax_mask, readout) != ("none", "plain"),
  )
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
    blank = lambda tree, count: jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), tree)
    like = jax.eval_shape(lambda x: x, download)
    if layout is not None and alone:
      history: PyTree = Download(
        # The first version is in the first slot; after the last is one that nobody reads.
        jax.tree.map(lambda h, x: h.at[0].set(x), blank(like.shared, layout.versions + 1), download.shared),
        blank(jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), like.own), layout.seats),
      )
    else:
      history = blank(like.shared, versions)
    return State(
      round=jnp.int32(0),
      server=server,
      clients=blank(known.client, rows),  # what a row holds before its client's first visit means nothing
      times=jnp.zeros(rows, jnp.int32),
      population=population.start(process, inputs.seed),
      history=history,
    )

  # All that a client's function reads comes through its arguments: what it would close over is not on every device.
  def client(shared, item):
    """One visit -> (weight * update, weight, client, kept, arrived); the first two and `kept` 0 if nothing arrived."""
    inputs, history = shared
    algorithm, _ = build(inputs.settings)
    slot, own, row, visit, number, client, arrives, present = item
    download = Download(jax.tree.map(lambda h: h[slot], history), own)
    new = algorithm.init_client(download, random.key(inputs.seed, Purpose.CLIENT, visit.id))
    client = jax.tree.map(lambda a, b: jnp.where(visit.times == 0, a, b), new, client)
    key = random.key(inputs.seed, Purpose.LOCAL_UPDATE, number, visit.id)
    data = data_of(inputs.federation, row, present)
    client, upload = algorithm.local_update(download, client, data, visit, key)
    arrived = arrives & _finite((upload.update, upload.weight, upload.kept))
    weight = jnp.where(arrived, upload.weight, 0.0)
    total = jax.tree.map(lambda u: jnp.where(arrived, weight * u, jnp.zeros_like(u)), upload.update)
    kept = jax.tree.map(lambda k: jnp.where(arrived, k, jnp.zeros_like(k)), upload.kept)
    return total, weight, client, kept, arrived

  def summed(shared, item):
    total, weight, *each = client(shared, item)
    return (total, weight), each

  def compute(
    state: State, inputs: Inputs, row_of: Array, cohort: Cohort, history: PyTree, own: PyTree
  ) -> tuple[State, tuple, Cohort, Array]:
    """Runs a cohort's clients; `history` and `own` are what they downloaded from.

    Returns:
      (the state with their rows written; (total, weight, kept, arrived), of which the first two are sums over the
      cohort, or [K, ...] where each upload is aggregated by itself; the cohort in the order of these results; int32
      [K], where in it those stand that were first, second and so on)
    """
    federation = inputs.federation
    row = row_of[cohort.ids]
    # Clients of like work lie together, so that a chunk under vmap waits for few, and none is left for long alone.
    by_work = jnp.argsort(jnp.where(cohort.ok, -federation.train.size[row] * cohort.work, jnp.inf))
    cohort, row = jax.tree.map(lambda x: x[by_work], (cohort, row))
    ids, ok = cohort.ids, cohort.ok
    visit = Visit(
      id=ids,
      round=cohort.round,
      times=state.times[row],
      staleness=cohort.staleness,
      work=cohort.work,
      wait=cohort.wait,
    )
    mine = jax.tree.map(lambda x: x[row], state.clients)
    own = jax.tree.map(lambda x: x[cohort.own], own)
    items = (cohort.slot, own, row, visit, cohort.number, mine, cohort.arrives, cohort.present)
    shared = inputs, history
    if alone:
      _, (total, weight, mine, kept, arrived) = over_clients(lambda s, i: ((), client(s, i)))(shared, items, ok)
    else:
      (total, weight), (mine, kept, arrived) = over_clients(summed)(shared, items, ok)
    place = jnp.where(ok, row, federation.id.shape[0])  # out of range: not written
    state = state._replace(
      clients=jax.tree.map(lambda all, x: all.at[place].set(x, mode="drop"), state.clients, mine),
      times=state.times.at[place].add(1, mode="drop"),
    )
    return state, (total, weight, kept, arrived), cohort, jnp.argsort(by_work)

  def aggregated(algorithm: Algorithm, server: PyTree, received: Received, seed: Array, number: Array) -> PyTree:
    return jax.lax.cond(
      jnp.any(received.arrived) & (received.weight > 0),
      algorithm.aggregate,
      lambda server, received, key: server,
      server,
      received,
      random.key(seed, Purpose.AGGREGATE, number),
    )

  def together(state: State, inputs: Inputs, row_of: Array, cohort: Cohort) -> tuple[State, RoundMetrics]:
    """A cohort whose uploads are aggregated as one group; then the round is over."""
    algorithm, _ = build(inputs.settings)
    now, download = state.round, algorithm.download(state.server)
    history = jax.tree.map(lambda h, x: h.at[now % versions].set(x), state.history, download.shared)
    state, results, cohort, drawn = compute(state, inputs, row_of, cohort, history, download.own)
    total, weight, kept, arrived = results
    # In the order in which the cohort was drawn: what a server does one after another must not begin with the largest.
    in_order = jax.tree.map(lambda x: x[drawn], (kept, cohort.ids, arrived, cohort.staleness))
    server = aggregated(algorithm, state.server, Received(total, weight, *in_order), inputs.seed, now)
    status = _status(cohort, arrived)
    happened = RoundMetrics(jnp.sum(cohort.ok), jnp.sum(arrived), cohort.ids, status)
    return state._replace(round=now + 1, server=server, history=history), happened

  def one_by_one(
    state: State, inputs: Inputs, row_of: Array, done: Array, work: Batches, batch: Array
  ) -> tuple[State, Array, RoundMetrics]:
    """A batch whose uploads are aggregated one after another; `done` of the call's starts have begun."""
    algorithm, _ = build(inputs.settings)
    cohort, written, upto = jax.tree.map(lambda x: x[batch], (work.cohort, work.written, work.upto))
    count, history = jnp.sum(cohort.ok), state.history
    state, results, cohort, place = compute(state, inputs, row_of, cohort, history.shared, history.own)

    def arrival(i, carry):
      server, history, done = carry
      total, weight, kept, arrived = results
      one = lambda tree: jax.tree.map(lambda x: x[place[i]][None], tree)
      received = Received(
        total=jax.tree.map(lambda x: x[place[i]], total),
        weight=weight[place[i]],
        kept=one(kept),
        ids=one(cohort.ids),
        arrived=one(arrived),
        staleness=one(cohort.staleness),
      )
      server = aggregated(algorithm, server, received, inputs.seed, work.first[batch] + i)
      download = algorithm.download(server)
      write = lambda h, x: jax.lax.dynamic_update_index_in_dim(h, x.astype(h.dtype), written[i], 0)
      history = history._replace(shared=jax.tree.map(write, history.shared, download.shared))
      history, done = seated(history, download, work, done, upto[i])
      return server, history, done

    server, history, done = jax.lax.fori_loop(0, count, arrival, (state.server, history, done))
    arrived = results[-1]
    status = _status(cohort, arrived)[place]
    happened = RoundMetrics(count, jnp.sum(arrived), cohort.ids[place], status)
    state = state._replace(round=state.round + work.ends[batch], server=server, history=history)
    return state, done, happened

  def seated(history: Download, download: Download, work: Batches, done: Array, until: Array) -> tuple[Download, Array]:
    """The rows of `Download.own` of the clients that now begin go to their seats."""
    if not jax.tree.leaves(history.own):
      return history, until

    def sit(i, own):
      write = lambda h, x: jax.lax.dynamic_update_index_in_dim(h, x[work.starts[i]], work.seats[i], 0)
      return jax.tree.map(write, own, download.own)

    return history._replace(own=jax.lax.fori_loop(done, until, sit, history.own)), until

  def round_step(state: State, inputs: Inputs, row_of: Array) -> tuple[State, RoundMetrics]:
    _, process = build(inputs.settings)
    seed, now = inputs.seed, state.round
    presence = population.step(process, state.population, now, seed)
    ids, ok = draw_cohort(process, presence, now, seed, population_size, cohort_size)
    there = population.look(process, presence, now, ids, seed)
    delay = jnp.minimum(there.delay, now)
    held = classes_held(inputs.federation, row_of[ids], ok)
    cohort = Cohort(
      ids=ids,
      ok=ok,
      round=jnp.broadcast_to(now, ids.shape),
      number=jnp.broadcast_to(now, ids.shape),
      staleness=delay,
      work=there.work,
      wait=there.wait,
      arrives=there.arrives & (delay < versions),
      slot=(now - delay) % versions,
      own=ids,
      present=None if held is None else jnp.broadcast_to(held, (cohort_size, num_classes)),
    )
    return together(state._replace(population=presence), inputs, row_of, cohort)

  @partial(compiled, donate_argnums=0)
  def advance(state: State, inputs: Inputs, work: Any) -> tuple[State, RoundMetrics]:
    ids = inputs.federation.id
    row_of = jnp.zeros(population_size, jnp.int32).at[ids].set(jnp.arange(ids.shape[0], dtype=jnp.int32))

    def step(i: Array, state: State, done: Array) -> tuple[State, Array, RoundMetrics]:
      if alone:
        return one_by_one(state, inputs, row_of, done, work, i)
      if layout:
        state, happened = together(state, inputs, row_of, jax.tree.map(lambda x: x[i], work.cohort))
      else:
        state, happened = round_step(state, inputs, row_of)
      return state, done, happened

    done = jnp.int32(0)
    if alone:
      algorithm, _ = build(inputs.settings)
      history, done = seated(state.history, algorithm.download(state.server), work, done, work.before)
      state = state._replace(history=history)
    steps = layout.batches if layout else chunk
    # Written out: to ask for the shapes would be to trace a round once more.
    width = work.cohort.ids.shape[1] if layout else cohort_size
    number, each = jnp.zeros(steps, jnp.int32), jnp.zeros((steps, width), jnp.int32)
    record = RoundMetrics(present=number, arrived=number, ids=each, status=each.astype(jnp.uint8))

    def body(i, carry):
      state, done, record = carry
      state, done, happened = step(i, state, done)
      return state, done, jax.tree.map(lambda all, x: all.at[i].set(x), record, happened)

    count = work.count if layout else work
    state, _, record = jax.lax.fori_loop(0, count, body, (state, done, record))
    return state, record

  @compiled
  def cohorts(
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

  work = blank_batches(layout) if layout else np.int32(0)

  @functools.cache
  def compiled_for(structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    return advance.lower(*jax.tree.unflatten(structure, shapes)).compile()

  def compile(state: State, inputs: Inputs) -> Any:
    shapes, structure = jax.tree.flatten(shaped((state, inputs, work)))
    return compiled_for(structure, tuple(shapes))

  return Simulator(
    init=compiled(init),
    compile=compile,
    advance=advance,
    work=work,
    cohorts=cohorts,
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
    has_global_model=known.global_model is not None,
  )


def _verified(answer: Callable[[Array], Any], inputs: Inputs) -> Array | tuple[()]:
  return training.verify(answer, inputs.held_out) if isinstance(inputs.held_out, HeldOut) else ()


def _at(span: Span, row: Array) -> Span:
  return Span(span.start[row], span.size[row])


def _status(cohort: Cohort, arrived: Array) -> Array:
  """See `RoundMetrics`."""
  came = jnp.where(arrived, ARRIVED, jnp.where(cohort.arrives, BROKEN, LOST))
  return jnp.where(cohort.ok, came, 0).astype(jnp.uint8)


def _finite(tree: PyTree) -> Array:
  """Whether all numbers are finite: 0 * x is NaN where x is not. Sums run along rows first, which is fast."""
  leaves = [x for x in map(jnp.asarray, jax.tree.leaves(tree)) if jnp.issubdtype(x.dtype, jnp.inexact)]
  zeros = [jnp.sum(jnp.sum(0 * x, axis=0)) if x.ndim else 0 * x for x in leaves]
  return jnp.isfinite(sum(x.astype(jnp.float32) for x in zeros)) if zeros else jnp.bool_(True)
