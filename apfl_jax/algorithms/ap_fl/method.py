"""AP-FL as an `Algorithm`: rounds over survivors, generator steps on the server, personalisation from one download.

Steps follow method: 2.5 the rounds, 2.6 the generator, 2.8 the returning client, 2.9 the interpolation. Where the
pilots of its sections 7 and 8 contradict the reconstruction they win: the friend learns from the generator's labels
alone (no distillation), and the coefficients are the plain minimum on a 6 x 6 grid with rho = .3.

`--softmax_mask` and `--readout` come on top of the method's own mask (`mask_softmax`): `none` leaves that as it is, and
with `present` or `own` the softmax of real data runs over the classes that both keep. They reach every loss on real
data, the validation examples that choose the coefficients included, and none on synthetic data.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from apfl_jax import nn, random, training
from apfl_jax.algorithms.ap_fl import generation
from apfl_jax.algorithms.ap_fl.interpolation import by_size, choose, interpolate
from apfl_jax.algorithms.ap_fl.state import Answering, Sent, Server, Shared
from apfl_jax.algorithms.ap_fl.statistics import Moments, moments
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.errors import InputError
from apfl_jax.settings import Count, Limits, Positive, Share, Weight
from apfl_jax.types import Algorithm, Array, Download, Key, Task, Upload

INTERPOLATIONS = ("grid", "size", "fixed")
_MANY_VALIDATION = 20  # examples under which the grid is not trusted (method 2.9 c)
# Folded into a key that is also used as it is: the children of a split are fold_in of 0, 1, ..., so no small number.
_APART = 0x41502D46
_LEFT_OUT = 1000.0  # what the logits of classes left out are lowered by
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
  friend_steps: Count = 100,
  beta: Share = 0.5,
  synthetic_examples: Annotated[int, Limits(least=1)] = 512,
  interpolation: Annotated[str, Limits(choices=INTERPOLATIONS)] = "grid",
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
    friend_steps: how many of the personal steps train the friend model; the rest train the local model.
    beta: share of the synthetic loss in the friend's.
    synthetic_examples: synthetic images a client trains its friend on; a quarter more is held out to choose lambdas.
    interpolation: 'grid', 'size' or 'fixed'.
    grid_points: coefficients an axis of the grid.
    rho: weight of the held-out synthetic loss in the choice of coefficients.
    lambda_base: the base's coefficient where 'fixed': 1 is the local model, 0 the friend.
    lambda_head: the head's.
  """
  if friend_steps > task.sgd.personal_steps:
    raise InputError(
      f"ap_fl_friend_steps: got {friend_steps}, accepted is 0 to personal_steps={task.sgd.personal_steps}"
    )
  model, num_classes = task.model, task.num_classes
  generator = nn.generator(task.image_shape, task.embeddings.shape[1])
  weights = generation.Weights(lambda_statistics, lambda_diversity, lambda_semantic, lambda_variation)
  schedule = optax.exponential_decay(generator_learning_rate, max(generator_steps, 1), 0.98)
  optimizer = optax.adam(schedule, b1=0.5)
  held_out = max(1, synthetic_examples // 4)
  warmup = jnp.floor(generator_warmup * task.rounds).astype(jnp.int32)

  def own_classes(shared, data):
    """The client's label histogram, the classes that it can answer with, and those of its softmax (None for all)."""
    histogram = training.label_histogram(data.store, data.train, num_classes)
    classes = shared.seen | (histogram > 0)
    return histogram, classes, classes if mask_softmax else None

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
    )

  def download(server):
    return Download(Shared(server.params, server.counts > 0, server.average, server.trust))

  def local_update(download, client, data, visit, key):
    shared = download.shared
    histogram, _, softmax = own_classes(shared, data)
    loss = training.classification_loss(task, softmax)
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    params = training.local_sgd(task, loss, shared.params, data, steps, key)
    delta = jax.tree.map(lambda new, old: new - old, params, shared.params)
    statistics: tuple[Moments, ...] = ()
    if layer_statistics:
      # One batch as it is, without augmentation, of what can be many examples [O].
      apart = jax.random.fold_in(key, _APART)
      batch = training.draw(data.store, data.train, jnp.int32(0), task.sgd.batch_size, num_classes, apart)
      statistics = moments(model.base(params.base, batch.images)[1], batch.mask)
    weight = training.weight(task.sgd, data.train.size)
    return client, Upload(update=Sent(delta, statistics), weight=weight, kept=histogram)

  def aggregate(server, received, key):
    new = received.arrived & ~server.counted[received.ids]
    mean = received.mean
    server = server._replace(
      params=jax.tree.map(lambda w, d: w + d, server.params, mean.delta),
      rounds=server.rounds + 1,
      counts=server.counts + jnp.sum(jnp.where(new[:, None], received.kept, 0.0), axis=0),
      counted=server.counted.at[received.ids].max(new),
      statistics=mean.statistics,
    )
    if not generator_steps:
      return server
    # Uploads that are aggregated one by one train it once in as many of them as make a round.
    due = (server.rounds // task.aggregations > warmup) & (server.rounds % task.aggregations == 0)
    return jax.lax.cond(due, train_generator, lambda server, key: server, server, key)

  # --- the generator --------------------------------------------------------------------------------------------------

  def train_generator(server: Server, key: Key) -> Server:
    step_key, trust_key = jax.random.split(key)
    seen = server.counts > 0
    # A free head's logits of unseen classes were never trained: asking it for them would be asking for noise.
    rounds = server.rounds // task.aggregations
    unseen_on = (rounds > unseen_warmup * task.rounds) & (model.semantics is not None)
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
      age = (rounds - warmup - 1) * generator_steps + i
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

  # --- the returning client -------------------------------------------------------------------------------------------

  def personalize(download, client, data, visit, key):
    del client, visit
    shared = download.shared
    # The local model takes the key as fine-tuning does: the two are then the same model to the bit.
    friend_key, label_key, sample_key = jax.random.split(jax.random.fold_in(key, _APART), 3)
    histogram, classes, softmax = own_classes(shared, data)
    loss = training.classification_loss(task, softmax)
    local = training.fine_tune(task, loss, shared.params, data, task.sgd.personal_steps - friend_steps, key)

    # Synthetic examples: half by the client's own labels, half uniform, as far as they are trusted (2.8).
    own = jnp.sqrt(histogram) / jnp.maximum(jnp.sum(jnp.sqrt(histogram)), 1e-12)
    request = shared.trust * (0.5 * own + 0.5 / jnp.sum(classes))
    request = jnp.where(jnp.sum(request) > 0, request, classes.astype(jnp.float32))
    label = random.categorical(label_key, request, (synthetic_examples + held_out,))
    images = generation.sample(generator, shared.generator, task.embeddings, label, sample_key)
    synthetic = training.Batch(images, jax.nn.one_hot(label, num_classes), shared.trust[label])

    real_batch = training.batches(task, data, data.train, friend_key)
    batch_size = task.sgd.batch_size
    # With nothing to be trusted the friend learns from real data alone, at the full rate.
    share = jnp.where(jnp.any(shared.trust > 0), beta, 0.0)

    def friend_loss(params, step):
      real = real_batch(step)
      rows = (step * batch_size + jnp.arange(batch_size)) % synthetic_examples
      made = jax.tree.map(lambda x: x[rows], synthetic)
      both = jnp.concatenate([real.images, made.images])  # one pass through the model
      logits = jnp.split(training.predict(model, params, both).logits, 2)
      own, trusted = (training.batch_cross_entropy(x, b, softmax) for x, b in zip(logits, (real, made), strict=True))
      trusted = jnp.where(made.mask > 0, made.mask * trusted, 0.0)
      return (1 - share) * training.batch_mean(own, real) + share * jnp.mean(trusted)

    steps = jnp.where(data.train.size > 0, friend_steps, 0)
    friend = training.descend(friend_loss, shared.params, steps, task.sgd.learning_rate, cosine=True)

    if interpolation == "fixed":
      return answering(interpolate(local, friend, lambda_base, lambda_head), classes)
    personal = choose(
      selection(data, softmax, jax.tree.map(lambda x: x[synthetic_examples:], synthetic)),
      local,
      friend,
      shared.params,
      points=grid_points,
      on_grid=(interpolation == "grid") & (data.validation.size >= _MANY_VALIDATION),
      pair=by_size(data.train.size),
      guarded=data.validation.size > 0,
    )
    return answering(personal, classes)

  def answering(params, classes):
    return Answering(params, jnp.ones_like(classes) if answer_unseen else classes)

  def predict(chosen, images):
    prediction = training.predict(model, chosen.params, images)
    # Lowered and not removed: among the classes left out the order stays, for the restricted score.
    return prediction._replace(logits=prediction.logits - _LEFT_OUT * ~chosen.answers)

  def selection(data, softmax, synthetic):
    """J(base, heads) = CE on real validation examples + rho * trusted CE on held-out synthetic ones, [P]."""
    block = 64

    def summed(base, heads, batch):
      features, _ = model.base(base, batch.images)
      logits = jax.vmap(lambda head: model.head(head, features))(heads)
      each = jax.vmap(lambda x: training.batch_cross_entropy(x, batch, softmax))(logits)
      return jnp.where(batch.mask > 0, each, 0.0) @ batch.mask

    def objective(base, heads):
      def add(i, total):
        batch = training.gather(data.store, data.validation, i * block + jnp.arange(block), num_classes)
        return total + summed(base, heads, batch._replace(logit_offset=data.logit_offset))

      points = jax.tree.leaves(heads)[0].shape[0]
      blocks = (data.validation.size + block - 1) // block
      real = jax.lax.fori_loop(0, blocks, add, jnp.zeros(points)) / jnp.maximum(data.validation.size, 1)
      return real + rho * summed(base, heads, synthetic) / held_out

    return objective

  return fedavg(task)._replace(
    init=init,
    download=download,
    local_update=local_update,
    aggregate=aggregate,
    predict=predict,
    global_model=lambda server: answering(server.params, server.counts > 0),
    personalize=personalize,
  )


def samples(task: Task, server: Server, key: Key, count: int) -> Array:
  """Generated images float32 [C, count, height, width, channels] in [0, 1], all classes, from the averaged weights."""
  generator = nn.generator(task.image_shape, task.embeddings.shape[1])
  label = jnp.repeat(jnp.arange(task.num_classes), count)
  images = generation.sample(generator, server.average, task.embeddings, label, key)
  return images.reshape(task.num_classes, count, *task.image_shape)
