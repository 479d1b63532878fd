"""AP-FL as an `Algorithm`: its settings, and its parts put together.

`server` has the rounds and the generator (method 2.5, 2.6, 8.2), `sources` where synthetic examples come from; 2.8 is
the returning client, 2.9 the interpolation. Where the pilots of sections 7 and 8 contradict the reconstruction they
win: the friend learns from the generator's labels alone (no distillation), and the coefficients are the plain minimum
on a 6 x 6 grid with rho = .3.

`--softmax_mask` and `--readout` come on top of the method's own mask (`mask_softmax`): `none` leaves that as it is, and
with `present` or `own` the softmax of real data runs over the classes that both keep. They reach every loss on real
data, the validation examples that choose the coefficients included, and none on synthetic data.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from apfl_jax import random, training
from apfl_jax.algorithms.ap_fl import generation, server, sources
from apfl_jax.algorithms.ap_fl.interpolation import by_size, choose, interpolate
from apfl_jax.algorithms.ap_fl.server import APART
from apfl_jax.algorithms.ap_fl.state import Answering, Server
from apfl_jax.algorithms.ap_fl.statistics import TIERS
from apfl_jax.algorithms.ap_fl.unseen import KINDS, Reading, Settings, for_client, placed
from apfl_jax.errors import InputError
from apfl_jax.settings import Count, Limits, Positive, Share, Weight
from apfl_jax.types import Algorithm, Array, Key, Task

INTERPOLATIONS = ("grid", "size", "fixed")
_MANY_VALIDATION = 20  # examples under which the grid is not trusted (method 2.9 c)
_LEFT_OUT = 1000.0  # what the logits of classes left out are lowered by
_Many = Annotated[int, Limits(least=1)]


def ap_fl(
  task: Task,
  *,
  source: Annotated[str, Limits(choices=sources.SOURCES)] = "image",
  tier: Annotated[str, Limits(choices=TIERS)] = "s1",
  n_min: _Many = 1,
  generator_schedule: Annotated[str, Limits(choices=server.SCHEDULES)] = "round",
  generator_steps: Count = 20,
  generator_final_steps: Count = 500,
  generator_batch: Annotated[int, Limits(least=10)] = 128,
  generator_learning_rate: Positive = 1e-3,
  generator_warmup: Share = 0.1,
  unseen_warmup: Share = 0.5,
  generator_decay: Share = 0.99,
  lambda_statistics: Weight = 1.0,
  lambda_class: Weight = 1.0,
  lambda_diversity: Weight = 0.02,
  lambda_semantic: Weight = 0.5,
  lambda_variation: Weight = 1.0,
  adversary: bool = False,
  lambda_adversarial: Weight = 1.0,
  early_stop: bool = False,
  film_refresh: bool = False,
  film_after: Share = 0.5,
  ship: Annotated[str, Limits(choices=server.SHIPPED)] = "generator",
  bank_size: _Many = 64,
  memory: Annotated[str, Limits(choices=server.MEMORIES)] = "none",
  memory_patience: _Many = 3,
  lambda_memory: Weight = 1.0,
  mask_softmax: bool = True,
  unseen: Annotated[str, Limits(choices=KINDS)] = "none",
  unseen_gate: Share = 0.55,
  unseen_keep: Share = 0.8,
  unseen_penalty: Positive = 0.3,
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
    source: where synthetic examples come from: 'image', the semantic generator; 'feature', one of what the head reads;
      'class_means', images drawn around the means of classes, without a generator, tier s2; 'untrained' and 'noise',
      controls; 'none'.
    tier: what leaves a client beside its model: 's0', nothing; 's1', label histogram and channel moments of its
      pre-activations, for L_st; 's2', also sums of images and features by class, for L_class.
    n_min: training examples that make a class seen; under tier s0, updates that show it.
    generator_schedule: 'round', the generator is trained every round; 'final', once, in the last round.
    generator_steps: Adam steps of the generator a round.
    generator_final_steps: of it in the last round; with schedule 'final'.
    generator_batch: rows of its batch.
    generator_learning_rate: of Adam (beta1 .5), falling by 2 % a round as FedGen's does [C]; to 0 along half a cosine
      with schedule 'final'.
    generator_warmup: share of the run's rounds before the generator is trained; with schedule 'round'.
    unseen_warmup: share of the run's rounds before it is asked for unseen classes.
    generator_decay: of the moving average of its parameters.
    lambda_statistics: weight of L_st; tiers s1 and s2.
    lambda_class: weight of L_class; tier s2.
    lambda_diversity: weight of L_div.
    lambda_semantic: weight of L_sem; needs an anchored head.
    lambda_variation: weight of total variation beyond .16; images only.
    adversary: whether the server distils a student, for L_adv: samples that the teacher knows and it does not.
    lambda_adversarial: weight of L_adv; with `adversary`.
    early_stop: whether training of the generator rests while its samples are recognised and its loss does not fall.
    film_refresh: whether only FiLM and W of u = tanh(W e) are trained late in the run.
    film_after: share of the run's rounds after which; with `film_refresh`.
    ship: what clients download of the source: 'generator', its weights; 'bank', samples as bytes.
    bank_size: samples of a class in the bank.
    memory: what keeps classes whose holders left, none of whom says so: 'none'; 'average', the server answers with the
      mean of its model and the last one made with them; 'distil', with its head distilled on samples in the last round;
      'both'. All but 'none' also keep such classes in the generator.
    memory_patience: aggregations without a holder after which a class has left.
    lambda_memory: weight of L_mem; with a memory.
    mask_softmax: softmax in clients' training only over classes seen so far and the client's own (2.4).
    unseen: how models answer with classes that nobody taught, if the table of classes is trusted: 'none', never;
      'prototypes', by cosine with prototypes that a ridge map makes of embeddings (8.1); 'anchored', by their anchored
      logits (2.7 a); 'generator_head', by those of the global model's head after training on samples (2.7 b).
    unseen_gate: accuracy on three seen classes left out, at least, at which the table is trusted; chance is a third.
    unseen_keep: share of its accuracy on seen classes that the global model keeps when it answers so.
    unseen_penalty: of the ridge map.
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
  if source == "class_means" and tier != "s2":
    raise InputError(f"ap_fl_source: got 'class_means' with tier {tier}, accepted is it with ap_fl_tier=s2")
  if memory != "none" and tier == "s0":
    raise InputError(f"ap_fl_memory: got {memory!r} with tier s0, accepted is it with ap_fl_tier=s1 or s2")
  if unseen in ("anchored", "generator_head") and task.model.semantics is None:
    raise InputError(f"ap_fl_unseen: got {unseen!r} with a free head, accepted is it with head anchored or cosine")
  if unseen != "none" and tier != "s2" and source in ("untrained", "noise", "none"):
    raise InputError(
      f"ap_fl_unseen: got {unseen!r} with source {source} and tier {tier}, which know nothing of seen classes;"
      " accepted is it with another source or ap_fl_tier=s2"
    )
  if unseen == "generator_head" and (source not in ("image", "feature") or tier == "s2"):
    raise InputError(
      "ap_fl_unseen: got 'generator_head', accepted is it with source image or feature and tier s0 or s1"
    )
  model, num_classes = task.model, task.num_classes
  origin = sources.source(task, source)
  offered = sources.banked(origin) if ship == "bank" else origin
  held_out = max(1, synthetic_examples // 4)
  rounds = server.federated(
    task,
    origin,
    server.Settings(
      tier=tier,
      n_min=n_min,
      schedule=generator_schedule,
      steps=generator_final_steps if generator_schedule == "final" else generator_steps,
      batch=generator_batch,
      learning_rate=generator_learning_rate,
      warmup=generator_warmup,
      unseen_warmup=unseen_warmup,
      decay=generator_decay,
      weights=generation.Weights(
        statistics=lambda_statistics,
        diversity=lambda_diversity,
        semantic=lambda_semantic,
        variation=lambda_variation,
        by_class=lambda_class,
        adversarial=lambda_adversarial,
        memory=lambda_memory,
      ),
      adversary=adversary,
      early_stop=early_stop,
      film_refresh=film_refresh,
      film_after=film_after,
      ship=ship,
      bank_size=bank_size,
      memory=memory,
      memory_patience=memory_patience,
      mask_softmax=mask_softmax,
      unseen=Settings(unseen, unseen_gate, unseen_keep, unseen_penalty),
    ),
  )

  # --- the returning client -------------------------------------------------------------------------------------------

  def personalize(download, client, data, visit, key):
    del client, visit
    shared = download.shared
    # The local model takes the key as fine-tuning does: the two are then the same model to the bit.
    friend_key, label_key, sample_key = jax.random.split(jax.random.fold_in(key, APART), 3)
    histogram, classes = server.own_classes(task, shared, data)
    softmax = classes if mask_softmax else None
    loss = training.classification_loss(task, softmax)
    local = training.fine_tune(task, loss, shared.start, data, task.sgd.personal_steps - friend_steps, key)

    # Synthetic examples: half by the client's own labels, half uniform, as far as they are trusted (2.8).
    own = jnp.sqrt(histogram) / jnp.maximum(jnp.sum(jnp.sqrt(histogram)), 1e-12)
    request = shared.trust * (0.5 * own + 0.5 / jnp.sum(classes))
    request = jnp.where(jnp.sum(request) > 0, request, classes.astype(jnp.float32))
    label = random.categorical(label_key, request, (synthetic_examples + held_out,))
    made = offered.sample(shared.source, label, sample_key)
    synthetic = training.Batch(made, jax.nn.one_hot(label, num_classes), shared.trust[label])

    real_batch = training.batches(task, data, data.train, friend_key)
    batch_size = task.sgd.batch_size
    # With nothing to be trusted the friend learns from real data alone, at the full rate.
    share = jnp.where(jnp.any(shared.trust > 0), beta, 0.0)

    def friend_loss(params, step):
      real = real_batch(step)
      rows = (step * batch_size + jnp.arange(batch_size)) % synthetic_examples
      made = jax.tree.map(lambda x: x[rows], synthetic)
      logits = offered.logits(model, params, real.images, made.images)
      own, trusted = (training.batch_cross_entropy(x, b, softmax) for x, b in zip(logits, (real, made), strict=True))
      trusted = jnp.where(made.mask > 0, made.mask * trusted, 0.0)
      return (1 - share) * training.batch_mean(own, real) + share * jnp.mean(trusted)

    steps = jnp.where(data.train.size > 0, friend_steps, 0)
    friend = training.descend(friend_loss, shared.start, steps, task.sgd.learning_rate, cosine=True)

    if interpolation == "fixed":
      return personal_answers(shared, interpolate(local, friend, lambda_base, lambda_head), data, classes)
    personal = choose(
      selection(data, softmax, jax.tree.map(lambda x: x[synthetic_examples:], synthetic)),
      local,
      friend,
      shared.start,
      points=grid_points,
      on_grid=(interpolation == "grid") & (data.validation.size >= _MANY_VALIDATION),
      pair=by_size(data.train.size),
      guarded=data.validation.size > 0,
    )
    return personal_answers(shared, personal, data, classes)

  def personal_answers(shared, params, data, classes):
    reading = shared.reading
    if isinstance(reading, Reading):
      reading = for_client(model, reading, lambda images: training.predict(model, params, images), data, classes)
    return Answering(params, classes, reading)

  def predict(chosen, images):
    prediction = training.predict(model, chosen.params, images)
    if isinstance(chosen.reading, Reading):
      return placed(model, chosen.reading, prediction, chosen.answers)
    # Lowered and not removed: among the classes left out the order stays, for the restricted score.
    return prediction._replace(logits=prediction.logits - _LEFT_OUT * ~chosen.answers)

  def selection(data, softmax, synthetic):
    """J(base, heads) = CE on real validation examples + rho * trusted CE on held-out synthetic ones, [P]."""
    block = 64

    def summed(features, heads, batch):
      logits = jax.vmap(lambda head: model.head(head, features))(heads)
      each = jax.vmap(lambda x: training.batch_cross_entropy(x, batch, softmax))(logits)
      return jnp.where(batch.mask > 0, each, 0.0) @ batch.mask

    def objective(base, heads):
      def add(i, total):
        batch = training.gather(data.store, data.validation, i * block + jnp.arange(block), num_classes)
        features, _ = model.base(base, batch.images)
        return total + summed(features, heads, batch._replace(logit_offset=data.logit_offset))

      points = jax.tree.leaves(heads)[0].shape[0]
      blocks = (data.validation.size + block - 1) // block
      real = jax.lax.fori_loop(0, blocks, add, jnp.zeros(points)) / jnp.maximum(data.validation.size, 1)
      return real + rho * summed(offered.features(model, base, synthetic.images), heads, synthetic) / held_out

    return objective

  return rounds._replace(
    predict=predict,
    global_model=lambda held: Answering(server.answer_of(held), held.counts >= n_min, held.reading),
    personalize=personalize,
  )


def samples(task: Task, held: Server, key: Key, count: int, **settings: Any) -> Array | None:
  """Samples float32 [C, count, height, width, channels] in [0, 1] of all classes, as clients get them.

  Args:
    task: the task.
    held: the server's state.
    key: consumed.
    count: samples of each class.
    **settings: of the method that made the state, as far as they are not defaults.

  Returns:
    None if the source makes no images.
  """
  source = sources.source(task, settings.get("source", "image"))
  if not source.images:
    return None
  label = jnp.repeat(jnp.arange(task.num_classes), count)
  if isinstance(held.bank, sources.Bank):
    images = sources.banked(source).sample(held.bank, label, key)
  else:
    images = source.sample(source.ship(server.weights(held), held.statistics), label, key)
  return images.reshape(task.num_classes, count, *task.image_shape)
