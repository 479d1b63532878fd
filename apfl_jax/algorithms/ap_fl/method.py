"""AP-FL as an `Algorithm`: rounds over survivors, generator steps on the server, personalisation from one download.

Steps follow method: 2.5 the rounds, 2.6 the generator; `returning` has 2.8, the returning client, and 2.9, the
interpolation. Where the pilots of its sections 7 and 8 contradict the reconstruction they win: the friend learns from
the generator's labels alone (no distillation), and the coefficients are the plain minimum on a 6 x 6 grid with
rho = .3.

`--softmax_mask` and `--readout` come on top of the method's own mask (`mask_softmax`): `none` leaves that as it is, and
with `present` or `own` the softmax of real data runs over the classes that both keep. They reach every loss on real
data, the validation examples that choose the coefficients included, and none on synthetic data.
"""

from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from apfl_jax import nn, training
from apfl_jax.algorithms.ap_fl import generation, peers, returning
from apfl_jax.algorithms.ap_fl.state import Kept, Sent, Server, Shared
from apfl_jax.algorithms.ap_fl.statistics import Moments, moments
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.algorithms.staleness import polynomial
from apfl_jax.errors import InputError
from apfl_jax.settings import Count, Limits, Positive, Share, Weight
from apfl_jax.types import Algorithm, Array, Download, Key, Task, Upload

# As in `returning`, folded into a key that is also used as it is.
_APART = 0x41502D46
_TRUST_SAMPLES = 16  # a class, for the mean teacher probability


def ap_fl(
  task: Task,
  *,
  generator_steps: Count = 20,
  generator_batch: Annotated[int, Limits(least=10)] = 128,
  generator_learning_rate: Positive = 1e-3,
  generator_warmup: Share = 0.1,
  unseen_warmup: Share = 0.5,
  generator_decay: Share = 0.99,
  layer_statistics: bool = True,
  lambda_statistics: Weight = 1.0,
  lambda_diversity: Weight = 0.02,
  lambda_semantic: Weight = 0.5,
  lambda_variation: Weight = 1.0,
  mask_softmax: bool = True,
  answer_unseen: bool = False,
  mixing: Share = 1.0,
  staleness_exponent: Weight = 0.0,
  friend: Annotated[str, Limits(choices=returning.FRIENDS)] = "mix",
  friend_steps: Count = 100,
  beta: Share = 0.5,
  distill: bool = False,
  lambda_kd: Weight = 1.0,
  temperature: Positive = 2.0,
  request: Annotated[str, Limits(choices=returning.REQUESTS)] = "own_and_seen",
  synthetic_examples: Annotated[int, Limits(least=1)] = 512,
  interpolation: Annotated[str, Limits(choices=returning.INTERPOLATIONS)] = "grid",
  coupled: bool = False,
  one_standard_error: bool = False,
  grid_points: Annotated[int, Limits(least=2)] = 6,
  rho: Weight = 0.3,
  lambda_base: Share = 0.3,
  lambda_head: Share = 0.7,
) -> Algorithm:
  """AP-FL, reconstructed [O].

  Args:
    task: the task. With an anchored head and embeddings that say something, unseen classes have logits and samples.
    generator_steps: Adam steps of the generator a round.
    generator_batch: rows of its batch.
    generator_learning_rate: of Adam (beta1 .5), falling by 2 % a round as FedGen's does [C].
    generator_warmup: share of the run's rounds before the generator is trained.
    unseen_warmup: share of the run's rounds before it is asked for unseen classes.
    generator_decay: of the moving average of its parameters.
    layer_statistics: whether clients send channel moments of their pre-activations (tier S1) and L_st uses them.
    lambda_statistics: weight of L_st.
    lambda_diversity: weight of L_div.
    lambda_semantic: weight of L_sem; needs an anchored head.
    lambda_variation: weight of total variation beyond .16.
    mask_softmax: softmax in clients' training only over classes seen so far and the client's own (2.4).
    answer_unseen: whether models answer with classes that nobody taught, by their anchored logits (2.7 a).
    mixing: alpha, what the server takes of an update that is not stale.
    staleness_exponent: a; of an update computed tau versions ago the server takes alpha (1 + tau)^-a.
    friend: the model mixed with the local one: 'mix', trained on real and synthetic examples; 'synthetic', on synthetic
      ones alone; 'peer', the most similar model of another client; 'global', the global model.
    friend_steps: how many of the personal steps train the friend model; the rest train the local model, which takes
      them all with the friends 'peer' and 'global'.
    beta: share of the synthetic loss in the loss of the friend 'mix'.
    distill: whether the trained friends are also held to the global model's answers on synthetic images.
    lambda_kd: weight of that; with `distill`.
    temperature: tau, at which answers are compared; with `distill`.
    request: the classes of a client's synthetic examples, as far as they are trusted: 'own_and_seen', those that it
      holds or somebody taught; 'own', 'seen'; 'all', unseen ones too.
    synthetic_examples: synthetic images a client trains its friend on; a quarter more is held out to choose lambdas.
    interpolation: how the coefficients are found: 'grid'; 'grad', by gradient; 'layer', so and one for each layer;
      'size', from the number of examples; 'output', one, for probabilities and not for weights, by grid; 'fixed'.
    coupled: whether base and head have the same coefficient, for 'grid', 'grad' and 'size'.
    one_standard_error: whether the point of the grid nearest to `lambda_base`, `lambda_head` is taken among those as
      good as the best within a standard error.
    grid_points: coefficients an axis of the grid.
    rho: weight of the held-out synthetic loss in the choice of coefficients.
    lambda_base: the base's coefficient where 'fixed', and what 'grad', 'layer' and `one_standard_error` lean to: 1 is
      the local model, 0 the friend.
    lambda_head: the head's.
  """
  if coupled and interpolation in ("layer", "output", "fixed"):
    raise InputError(
      f"ap_fl_coupled: got true with interpolation={interpolation}, accepted is it with grid, grad, size"
    )
  if friend == "peer" and task.num_clients > peers.MOST:
    raise InputError(
      f"ap_fl_friend: got 'peer' with num_clients={task.num_clients}, accepted are at most {peers.MOST}: the server"
      " keeps a model of each"
    )
  if friend_steps > task.sgd.personal_steps:
    raise InputError(
      f"ap_fl_friend_steps: got {friend_steps}, accepted is 0 to personal_steps={task.sgd.personal_steps}"
    )
  model, num_classes = task.model, task.num_classes
  generator = nn.generator(task.image_shape, task.embeddings.shape[1])
  weights = generation.Weights(lambda_statistics, lambda_diversity, lambda_semantic, lambda_variation)
  schedule = optax.exponential_decay(generator_learning_rate, max(generator_steps, 1), 0.98)
  optimizer = optax.adam(schedule, b1=0.5)
  warmup = jnp.floor(generator_warmup * task.rounds).astype(jnp.int32)

  settings = returning.Settings(
    mask_softmax=mask_softmax,
    answer_unseen=answer_unseen,
    friend=friend,
    friend_steps=friend_steps,
    beta=beta,
    distill=distill,
    lambda_kd=lambda_kd,
    temperature=temperature,
    request=request,
    synthetic_examples=synthetic_examples,
    interpolation=interpolation,
    coupled=coupled,
    one_standard_error=one_standard_error,
    grid_points=grid_points,
    rho=rho,
    lambda_base=lambda_base,
    lambda_head=lambda_head,
  )

  # --- rounds ---------------------------------------------------------------------------------------------------------

  def init(key):
    params = model.init(key)  # every method's model starts alike under one seed
    drawn = generator.init(jax.random.fold_in(key, _APART))
    statistics: tuple[Moments, ...] = ()
    if layer_statistics:
      blank = jax.ShapeDtypeStruct((1, *task.image_shape), jnp.float32)
      shapes = jax.eval_shape(lambda images: moments(model.base(params.base, images)[1], jnp.ones(1)), blank)
      statistics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return Server(
      params=params,
      rounds=jnp.int32(0),
      counts=jnp.zeros(num_classes),
      counted=jnp.zeros(task.num_clients, bool),
      statistics=statistics,
      generator=drawn,
      average=jax.tree.map(jnp.copy, drawn),
      optimizer=optimizer.init(drawn),
      trust=jnp.zeros(num_classes),
      peers=peers.nobody(params, task.num_clients) if friend == "peer" else (),
    )

  def download(server):
    return Download(Shared(server.params, server.counts > 0, server.average, server.trust, server.peers))

  def local_update(download, client, data, visit, key):
    shared = download.shared
    histogram, classes = returning.own_classes(task, shared, data)
    loss = training.classification_loss(task, classes if mask_softmax else None)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, shared.params, data, steps, key)
    counts = mixing * polynomial(visit.staleness, staleness_exponent)
    delta = jax.tree.map(lambda new, old: counts * (new - old), params, shared.params)
    statistics: tuple[Moments, ...] = ()
    if layer_statistics:
      # One batch as it is, without augmentation, of what can be many examples [O].
      apart = jax.random.fold_in(key, _APART)
      batch = training.draw(data.store, data.train, jnp.int32(0), task.sgd.batch_size, num_classes, apart)
      statistics = moments(model.base(params.base, batch.images)[1], batch.mask)
    weight = training.weight(task.sgd, data.train.size)
    kept = Kept(histogram, params if friend == "peer" else ())
    return client, Upload(update=Sent(delta, statistics), weight=weight, kept=kept)

  def aggregate(server, received, key):
    new = received.arrived & ~server.counted[received.ids]
    mean = received.mean
    server = server._replace(
      params=jax.tree.map(lambda w, d: w + d, server.params, mean.delta),
      rounds=server.rounds + 1,
      counts=server.counts + jnp.sum(jnp.where(new[:, None], received.kept.histogram, 0.0), axis=0),
      counted=server.counted.at[received.ids].max(new),
      statistics=mean.statistics,
    )
    if isinstance(server.peers, peers.Peers):
      kept = peers.remember(server.peers, received.kept.params, received.ids, received.arrived)
      server = server._replace(peers=kept)
    if not generator_steps:
      return server
    return jax.lax.cond(server.rounds > warmup, train_generator, lambda server, key: server, server, key)

  # --- the generator --------------------------------------------------------------------------------------------------

  def train_generator(server: Server, key: Key) -> Server:
    step_key, trust_key = jax.random.split(key)
    seen = server.counts > 0
    # A free head's logits of unseen classes were never trained: asking it for them would be asking for noise.
    unseen_on = (server.rounds > unseen_warmup * task.rounds) & (model.semantics is not None)
    classes = seen | unseen_on

    def step(i, carry):
      params, state, average = carry
      rows_key, loss_key = jax.random.split(jax.random.fold_in(step_key, i))
      rows = generation.draw_rows(task.embeddings, server.counts, unseen_on, generator_batch, rows_key)
      gradient = jax.grad(
        lambda p: generation.generator_loss(
          task,
          generator,
          p,
          server.params,
          rows,
          loss_key,
          weights=weights,
          statistics=server.statistics,
          classes=classes,
        )
      )(params)
      updates, state = optimizer.update(gradient, state)
      params = optax.apply_updates(params, updates)
      # A young average forgets faster, or it would remember the untrained generator.
      age = (server.rounds - warmup - 1) * generator_steps + i
      decay = jnp.minimum(generator_decay, (1.0 + age) / (10.0 + age))
      average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
      return params, state, average

    carry = (server.generator, server.optimizer, server.average)
    params, state, average = jax.lax.fori_loop(0, generator_steps, step, carry)

    label = jnp.tile(jnp.arange(num_classes), _TRUST_SAMPLES)
    images = generation.sample(generator, average, task.embeddings, label, trust_key)
    logits = jnp.where(classes, training.predict(model, server.params, images).logits, -jnp.inf)
    probability = jnp.take_along_axis(jax.nn.softmax(logits), label[:, None], axis=1)
    trust = jnp.where(seen, jnp.mean(probability.reshape(_TRUST_SAMPLES, num_classes), axis=0), 0.0)
    return server._replace(generator=params, optimizer=state, average=average, trust=trust)

  return fedavg(task)._replace(
    init=init,
    download=download,
    local_update=local_update,
    aggregate=aggregate,
    predict=partial(returning.predict, model),
    global_model=lambda server: returning.answering(server.params, server.counts > 0, (), settings),
    personalize=returning.client(task, generator, settings),
    describe=returning.describe,
  )


def samples(task: Task, server: Server, key: Key, count: int) -> Array:
  """Generated images float32 [C, count, height, width, channels] in [0, 1], all classes, from the averaged weights."""
  generator = nn.generator(task.image_shape, task.embeddings.shape[1])
  label = jnp.repeat(jnp.arange(task.num_classes), count)
  images = generation.sample(generator, server.average, task.embeddings, label, key)
  return images.reshape(task.num_classes, count, *task.image_shape)
