"""AP-FL's rounds: FedAvg over survivors, and what the server learns meanwhile without any example.

Steps follow method 2.5 (rounds), 2.6 (the generator), 8.2 (a memory of classes whose holders left). What clients do
with their download is theirs; they meet this file in `Shared` and in `Source.sample`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from apfl_jax import training
from apfl_jax.algorithms.ap_fl import generation, peers, sources, statistics, unseen
from apfl_jax.algorithms.ap_fl.sources import Source
from apfl_jax.algorithms.ap_fl.state import Kept, Memory, Sent, Server, Shared, Trained
from apfl_jax.algorithms.ap_fl.statistics import ByClass, Moments, Statistics
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.algorithms.staleness import polynomial
from apfl_jax.types import Algorithm, Array, Data, Download, Key, Model, Params, PyTree, Task, Upload

SCHEDULES = ("round", "final")
SHIPPED = ("generator", "bank")
MEMORIES = ("none", "average", "distil", "both")
# Folded into a key that is also used as it is: the children of a split are fold_in of 0, 1, ..., so no small number.
APART = 0x41502D46
_READ_SAMPLES = 30  # a class, drawn around real mean features
_TRUST_SAMPLES = 16  # a class, for the mean teacher probability
_CONFIDENT, _PATIENCE = 0.95, 5  # early stop (method 6.2): mean trust, and rounds without a smaller loss
_MODULATION = ("encode", "film")  # the parts of a generator that say what a class is
_STUDENT_RATE = 0.01  # of its SGD, as of the global model's in DFRD [C]
_REMEMBERED = 128  # samples a class that the memory is distilled on (method 8.2 [P])
_MEMORY_STEPS, _MEMORY_RATE, _MEMORY_SOFT = 60, 0.01, 2.0  # method 8.2 [P]; the rate is Adam's


class Settings(NamedTuple):
  """The server's settings, see `ap_fl`."""

  tier: str
  n_min: int
  schedule: str
  steps: int
  batch: int
  learning_rate: Array | float
  warmup: Array | float
  unseen_warmup: Array | float
  decay: Array | float
  weights: generation.Weights
  adversary: bool
  early_stop: bool
  film_refresh: bool
  film_after: Array | float
  ship: str
  bank_size: int
  memory: str
  memory_patience: int
  mask_softmax: bool
  mixing: Array | float
  staleness_exponent: Array | float
  keep_models: bool
  unseen: unseen.Settings


def own_classes(task: Task, shared: Shared, data: Data) -> tuple[Array, Array]:
  """A client's label histogram float32 [C], and bool [C], the classes that it can answer with."""
  histogram = training.label_histogram(data.store, data.train, task.num_classes)
  return histogram, shared.seen | (histogram > 0)


def federated(task: Task, source: Source, settings: Settings) -> Algorithm:
  """The rounds; a personal model is the global one."""
  model, num_classes, tier = task.model, task.num_classes, settings.tier
  optimizer = _optimizer(settings)
  warmup = jnp.floor(settings.warmup * task.rounds).astype(jnp.int32)
  patience = settings.memory_patience * task.aggregations
  sums_of = {"products": source.products, "untrained": source.match is not None}
  remembers, reads = settings.memory != "none", settings.unseen.kind != "none"

  copied = partial(jax.tree.map, jnp.copy)

  def seen(server: Server) -> Array:
    return server.counts >= settings.n_min

  def rounds_of(server: Server) -> Array:
    """int32 []: rounds' worth of aggregations so far."""
    return server.rounds // task.aggregations

  # --- rounds ---------------------------------------------------------------------------------------------------------

  def init(key):
    params = model.init(key)  # every method's model starts alike under one seed
    drawn = source.init(jax.random.fold_in(key, APART))
    if source.learns:
      student = model.init(jax.random.fold_in(key, APART + 1)) if settings.adversary else ()
      zero = jnp.int32(0)
      drawn = Trained(
        drawn, copied(drawn), optimizer.init(drawn), student, zero, jnp.float32(jnp.finfo(jnp.float32).max), zero
      )
    known = Statistics(
      layers=() if tier == "s0" else statistics.no_moments(task, source.layers),
      classes=statistics.no_sums(task, **sums_of) if tier == "s2" else (),
      weight=() if tier == "s0" else jnp.float32(0),
    )
    server = Server(
      params=params,
      rounds=jnp.int32(0),
      counts=jnp.zeros(num_classes),
      counted=jnp.zeros(task.num_clients, bool),
      statistics=known,
      source=drawn,
      bank=(),
      trust=jnp.zeros(num_classes),
      memory=(),
      reading=unseen.nothing_read(task, settings.unseen, params.head) if reads else (),
      peers=peers.nobody(params, task.num_clients) if settings.keep_models else (),
    )
    if remembers:
      average = copied(drawn.average) if source.learns else ()
      nothing = jnp.zeros(num_classes, jnp.int32)
      memory = Memory(nothing, jnp.int32(0), copied(params), nothing > 0, average, copied(params))
      server = server._replace(memory=memory)
    return filled(server, jax.random.fold_in(key, APART + 2))

  def download(server):
    shipped = server.bank if settings.ship == "bank" else source.ship(weights(server), server.statistics)
    answer = answer_of(server) if remembers else ()
    return Download(Shared(server.params, answer, seen(server), shipped, server.trust, server.peers, server.reading))

  def local_update(download, client, data, visit, key):
    shared = download.shared
    histogram, classes = own_classes(task, shared, data)
    loss = training.classification_loss(task, classes if settings.mask_softmax else None)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, shared.params, data, steps, key)
    discount = settings.mixing * polynomial(visit.staleness, settings.staleness_exponent)
    delta = jax.tree.map(lambda new, old: discount * (new - old), params, shared.params)
    weight = training.weight(task.sgd, data.train.size)
    layers: tuple[Moments, ...] = ()
    by_class: ByClass | tuple[()] = ()
    if tier == "s0":
      # What the server reads off the update. Said here because the whole update is not kept client by client.
      histogram = statistics.held_classes(task, delta).astype(jnp.float32)
    else:
      # One batch as it is, without augmentation, of what can be many examples [O].
      apart = jax.random.fold_in(key, APART)
      batch = training.draw(data.store, data.train, jnp.int32(0), task.sgd.batch_size, num_classes, apart)
      features, taps = model.base(params.base, batch.images)
      layers = statistics.moments(source.layers(batch.images, features, taps), batch.mask)
    if tier == "s2":
      sums = statistics.sums_by_class(task, params, data, **sums_of)
      by_class = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-12), sums)
    kept = Kept(histogram, visit.round, params if settings.keep_models else ())
    return client, Upload(Sent(delta, layers, by_class), weight, kept)

  def aggregate(server, received, key):
    new = received.arrived & ~server.counted[received.ids]
    mean, counts, known, each = received.mean, received.kept.histogram, server.statistics, task.aggregations
    if not isinstance(known.weight, tuple):
      layers, weight = statistics.fading(known.layers, known.weight, received.total.layers, received.weight, each)
      known = known._replace(layers=layers, weight=weight)
    if isinstance(known.classes, ByClass):
      known = known._replace(classes=statistics.merge(known.classes, received.total.classes, each))
    # Of tier s0 every update counts: a class may show in a later one only.
    counted = jnp.where(new[:, None] | (tier == "s0"), counts, 0.0)
    server = server._replace(
      params=jax.tree.map(lambda w, d: w + d, server.params, mean.delta),
      rounds=server.rounds + 1,
      counts=server.counts + jnp.sum(counted, axis=0),
      counted=server.counted.at[received.ids].max(new),
      statistics=known,
    )
    if isinstance(server.peers, peers.Peers):
      kept = peers.remember(server.peers, received.kept.params, received.ids, received.arrived)
      server = server._replace(peers=kept)
    last = jnp.max(received.kept.round) + 1 >= task.rounds
    if remembers:
      server = remember(server, jnp.any(counts > 0, axis=0))
    # Of uploads that are aggregated one by one the last of as many as make a round is its end.
    over, same = server.rounds % task.aggregations == 0, lambda server, key: server
    if source.match is not None:
      due = last & ~server.source.made
      server = jax.lax.cond(due, match, same, server, key)
      server = jax.lax.cond(over & ~due, renew, same, server, key)
    elif source.learns and settings.steps:
      first = last & (server.source.rounds == 0)
      due = first if settings.schedule == "final" else over & (rounds_of(server) > warmup)
      server = jax.lax.cond(due, work, same, server, key)
    elif not source.learns:
      server = jax.lax.cond(over, renew, same, server, key)
    if settings.memory in ("distil", "both"):
      now = last & jnp.any(gone(server))
      server = jax.lax.cond(now, distil, same, server, jax.random.fold_in(key, APART))
    return server

  def match(server: Server, key: Key) -> Server:
    """Makes the images, and renews trust for them."""
    assert source.match is not None
    match_key, renew_key = jax.random.split(key)

    def teacher_loss(samples, label):
      logits = teacher_logits(model.frozen, server, samples, label)
      return training.cross_entropy(logits, jax.nn.one_hot(label, num_classes), seen(server))

    return renew(server._replace(source=source.match(server.statistics, teacher_loss, match_key)), renew_key)

  # --- the generator --------------------------------------------------------------------------------------------------

  def asked(server: Server) -> Array:
    """bool []: whether the generator is asked for unseen classes."""
    # A free head's logits of unseen classes were never trained: asking it for them would be asking for noise.
    return (rounds_of(server) > settings.unseen_warmup * task.rounds) & (model.semantics is not None)

  def work(server: Server, key: Key) -> Server:
    """A round's training, whole or in part, or none."""
    if settings.film_refresh:
      late = rounds_of(server) > settings.film_after * task.rounds
      some = lambda server, key: jax.lax.cond(late, partial(train, refresh=True), train, server, key)
    else:
      some = train
    return jax.lax.cond(stopped(server), renew, some, server, key) if settings.early_stop else some(server, key)

  def train(server: Server, key: Key, refresh: bool = False) -> Server:
    """Steps of the generator; with `refresh` only of FiLM and W."""
    step_key, renew_key = jax.random.split(key)
    trained, known, unseen_on = server.source, seen(server), asked(server)
    counts = jnp.where(known, 1.0 if tier == "s0" else server.counts, 0.0)
    past = generation.Past(gone(server), _memory(server).params, _memory(server).average) if remembers else ()

    def step(i, carry):
      params, state, average, student, total = carry
      rows_key, loss_key = jax.random.split(jax.random.fold_in(step_key, i))
      rows = generation.draw_rows(task.embeddings, counts, unseen_on, settings.batch, rows_key)
      moving = {name: part for name, part in params.items() if not refresh or name.startswith(_MODULATION)}
      value, gradient = jax.value_and_grad(
        lambda moving, still=params: generation.generator_loss(
          task,
          source,
          still | moving,
          server.params,
          rows,
          loss_key,
          weights=settings.weights,
          statistics=server.statistics,
          classes=known | unseen_on,
          student=student,
          past=past,
        )
      )(moving)
      # Adam moves also what has no gradient, by what it remembers.
      updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params) | gradient, state)
      params = params | optax.apply_updates(moving, {name: updates[name] for name in moving})
      # A young average forgets faster, or it would remember the untrained generator.
      age = trained.rounds * settings.steps + i
      decay = jnp.minimum(settings.decay, (1.0 + age) / (10.0 + age))
      average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
      if settings.adversary:
        sample = source.sample(average, rows.label, jax.random.fold_in(loss_key, APART))
        target = teacher_logits(model, server, sample, rows.label)
        student = taught(student, sample, target, rows.seen, known)
      return params, state, average, student, total + value

    carry = (trained.params, trained.optimizer, trained.average, trained.student, jnp.float32(0))
    params, state, average, student, total = jax.lax.fori_loop(0, settings.steps, step, carry)
    better = total < trained.least
    stale = jnp.where(better, 0, trained.stale + 1)
    least = jnp.minimum(total, trained.least)
    trained = Trained(params, average, state, student, trained.rounds + 1, least, stale)
    return renew(server._replace(source=trained), renew_key)

  def taught(student: Params, samples: Array, target: Array, counted: Array, classes: Array) -> Params:
    """The student after a step of distillation on samples; `target` the teacher's logits, `counted` float32 [B]."""
    answer = lambda params: model.head(params.head, source.features(model, params.base, samples))
    apart = lambda params: jnp.sum(counted * generation.divergence(answer(params), target, classes)) / jnp.sum(counted)
    return jax.tree.map(lambda w, g: w - _STUDENT_RATE * g, student, jax.grad(apart)(student))

  def stopped(server: Server) -> Array:
    """bool []: whether its samples are recognised and its loss no longer falls (method 6.2)."""
    known = seen(server)
    mean = jnp.sum(jnp.where(known, server.trust, 0.0)) / jnp.maximum(jnp.sum(known), 1)
    return (mean > _CONFIDENT) & (server.source.stale >= _PATIENCE)

  def renew(server: Server, key: Key) -> Server:
    """Trust, and the bank, for the source as it is."""
    known = seen(server)
    if source.trusted == "measured":
      label = jnp.tile(jnp.arange(num_classes), _TRUST_SAMPLES)
      samples = source.sample(source.ship(weights(server), server.statistics), label, key)
      logits = jnp.where(known | asked(server), teacher_logits(model, server, samples, label), -jnp.inf)
      probability = jnp.take_along_axis(jax.nn.softmax(logits), label[:, None], axis=1)
      there = known if source.match is None else known & server.source.made
      trust = jnp.where(there, jnp.mean(probability.reshape(_TRUST_SAMPLES, num_classes), axis=0), 0.0)
    else:
      samples = None
      trust = known.astype(jnp.float32) if source.trusted == "wholly" else jnp.zeros(num_classes)
    if reads:
      server = server._replace(reading=read(server, samples, jax.random.fold_in(key, APART + 1)))
    return filled(server._replace(trust=trust), jax.random.fold_in(key, APART))

  def teacher_logits(model: Model, server: Server, samples: Array, label: Array) -> Array:
    """The teacher's logits [B, C] of samples: of classes that left, as the memory has it; `model` may be frozen."""
    answer = lambda params: model.head(params.head, source.features(model, params.base, samples))
    if not remembers:
      return answer(server.params)
    return jnp.where(gone(server)[label][:, None], answer(_memory(server).params), answer(server.params))

  def read(server: Server, samples: Array | None, key: Key) -> unseen.Reading:
    """What the server makes of unseen classes: from real features where it has them, else from samples."""
    known, params = seen(server), answer_of(server)
    classes = server.statistics.classes
    if isinstance(classes, statistics.ByClass):
      measured, real = classes.estimated.features, True
      features, means = unseen.around(measured.mean, measured.square, _READ_SAMPLES, key), measured.mean
    else:
      real = False
      assert samples is not None
      features = source.features(model, params.base, samples).reshape(_TRUST_SAMPLES, num_classes, -1)
      features = features.transpose(1, 0, 2)
      means = jnp.mean(features, axis=1)
    return unseen.fit(task, settings.unseen, params.head, features, means, known, real=real)

  def filled(server: Server, key: Key) -> Server:
    """With a bank of the source as it is, if clients download one."""
    if settings.ship != "bank":
      return server
    shipped = source.ship(weights(server), server.statistics)
    return server._replace(bank=sources.fill(source, shipped, num_classes, settings.bank_size, key))

  # --- the memory of classes that left --------------------------------------------------------------------------------

  def gone(server: Server) -> Array:
    """bool [C]: classes in the memory that no client which arrived has held for a while; nobody tells the server."""
    return _memory(server).classes & (_memory(server).absent >= patience)

  def remember(server: Server, held: Array) -> Server:
    """Notes who is there, and keeps the model while all classes seen so far are; `held` bool [C]."""
    memory, known = _memory(server), seen(server)
    absent = jnp.where(held, 0, memory.absent + 1)
    # Best when all are there at once. Where cohorts are small that may never be: then now and then while none is gone.
    due = jnp.all(held | ~known) | (memory.age + 1 >= patience)
    take = due & jnp.all((absent < patience) | ~known)
    pick = lambda new, old: jax.tree.map(lambda a, b: jnp.where(take, a, b), new, old)
    server = server._replace(
      memory=Memory(
        absent=absent,
        age=jnp.where(take, 0, memory.age + 1),
        params=pick(server.params, memory.params),
        classes=pick(known, memory.classes),
        average=pick(server.source.average, memory.average) if source.learns else (),
        answer=server.params,
      )
    )
    if settings.memory not in ("average", "both"):
      return server
    share = jnp.where(jnp.any(gone(server)), 0.5, 0.0)
    answer = jax.tree.map(lambda w, old: (1 - share) * w + share * old, server.params, _memory(server).params)
    return server._replace(memory=_memory(server)._replace(answer=answer))

  def distil(server: Server, key: Key) -> Server:
    """The answering head after distillation on samples: classes that left from the old model, others from the new."""
    memory, known = _memory(server), seen(server)
    label = jnp.repeat(jnp.arange(num_classes), _REMEMBERED)
    samples = source.sample(source.ship(weights(server), server.statistics), label, key)
    answer = lambda params: model.head(params.head, source.features(model, params.base, samples))
    left = gone(server)[label][:, None]
    target = jnp.where(left, answer(memory.params), answer(server.params)) / _MEMORY_SOFT
    features, counted = source.features(model, memory.answer.base, samples), known[label]

    def apart(head):
      each = generation.divergence(model.head(head, features) / _MEMORY_SOFT, target, known)
      return _MEMORY_SOFT**2 * jnp.sum(jnp.where(counted, each, 0.0)) / jnp.maximum(jnp.sum(counted), 1)

    adam = optax.adam(_MEMORY_RATE)

    def step(_, carry):
      head, state = carry
      updates, state = adam.update(jax.grad(apart)(head), state)
      return optax.apply_updates(head, updates), state

    head, _ = jax.lax.fori_loop(0, _MEMORY_STEPS, step, (memory.answer.head, adam.init(memory.answer.head)))
    return server._replace(memory=memory._replace(answer=Params(memory.answer.base, head)))

  return fedavg(task)._replace(
    init=init,
    download=download,
    local_update=local_update,
    aggregate=aggregate,
    global_model=answer_of,
    personalize=lambda download, client, data, visit, key: download.shared.start,
  )


def answer_of(server: Server) -> Params:
  """The model that the server answers with."""
  return server.memory.answer if isinstance(server.memory, Memory) else server.params


def _memory(server: Server) -> Memory:
  assert isinstance(server.memory, Memory)
  return server.memory


def weights(server: Server) -> PyTree:
  """What the source ships of its weights: of those in training the average."""
  return server.source.average if isinstance(server.source, Trained) else server.source


def _optimizer(settings: Settings) -> optax.GradientTransformation:
  steps = max(settings.steps, 1)
  if settings.schedule == "final":
    rate = optax.cosine_decay_schedule(settings.learning_rate, steps)
  else:
    rate = optax.exponential_decay(settings.learning_rate, steps, 0.98)
  return optax.adam(rate, b1=0.5)
