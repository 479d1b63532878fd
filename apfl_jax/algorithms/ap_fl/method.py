"""AP-FL as an `Algorithm`: its settings, and its parts put together.

`server` has the rounds and the generator (method 2.5, 2.6, 8.2), `sources` where synthetic examples come from,
`returning` the returning client (2.8) with its interpolation (2.9). Where the pilots of sections 7 and 8 contradict the
reconstruction they win: the friend learns from the generator's labels alone (no distillation), and the coefficients are
the plain minimum on a 6 x 6 grid with rho = .3.

`--softmax_mask` and `--readout` come on top of the method's own mask (`mask_softmax`): `none` leaves that as it is, and
with `present` or `own` the softmax of real data runs over the classes that both keep. They reach every loss on real
data, the validation examples that choose the coefficients included, and none on synthetic data.
"""

from functools import partial
from typing import Annotated, Any

import jax.numpy as jnp

from apfl_jax.algorithms.ap_fl import generation, matching, peers, returning, server, sources
from apfl_jax.algorithms.ap_fl.state import Answering, Server
from apfl_jax.algorithms.ap_fl.statistics import TIERS
from apfl_jax.algorithms.ap_fl.unseen import KINDS
from apfl_jax.algorithms.ap_fl.unseen import Settings as UnseenSettings
from apfl_jax.errors import InputError
from apfl_jax.settings import Count, Limits, Personal, Positive, Share, Weight
from apfl_jax.types import Algorithm, Array, Key, Task

_Many = Annotated[int, Limits(least=1)]


def ap_fl(
  task: Task,
  *,
  source: Annotated[str, Limits(choices=sources.SOURCES)] = "image",
  tier: Annotated[str, Limits(choices=TIERS)] = "s1",
  image_moments: bool = False,
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
  lambda_covariance: Weight = 1.0,
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
  matching_steps: Count = 100,
  matching_learning_rate: Positive = 3e-3,
  lambda_teacher: Weight = 1.0,
  memory: Annotated[str, Limits(choices=server.MEMORIES)] = "none",
  memory_patience: _Many = 3,
  lambda_memory: Weight = 1.0,
  mask_softmax: bool = True,
  unseen: Annotated[str, Limits(choices=KINDS)] = "none",
  unseen_p_value: Share = 0.05,
  unseen_keep: Share = 0.8,
  unseen_penalty: Positive = 0.3,
  mixing: Share = 1.0,
  staleness_exponent: Weight = 0.0,
  friend: Annotated[str, Limits(choices=returning.FRIENDS)] = "mix",
  friend_start: Personal[Annotated[str, Limits(choices=returning.STARTS)]] = "local",
  friend_steps: Personal[Count] = 100,
  proximal_weight: Personal[Weight] = 0.0,
  beta: Personal[Share] = 0.5,
  distill: Personal[bool] = False,
  lambda_kd: Personal[Weight] = 1.0,
  temperature: Personal[Positive] = 2.0,
  request: Personal[Annotated[str, Limits(choices=returning.REQUESTS)]] = "own_and_seen",
  synthetic_examples: Personal[Annotated[int, Limits(least=1)]] = 512,
  interpolation: Personal[Annotated[str, Limits(choices=returning.INTERPOLATIONS)]] = "grid",
  coupled: Personal[bool] = False,
  one_standard_error: Personal[bool] = False,
  grid_points: Personal[Annotated[int, Limits(least=2)]] = 6,
  rho: Personal[Weight] = 0.3,
  lambda_base: Personal[Share] = 0.3,
  lambda_head: Personal[Share] = 0.7,
) -> Algorithm:
  """The server learns a generator from the global model; a client mixes a model of its data with one of both [O].

  Args:
    task: the task. With an anchored head and embeddings that say something, unseen classes have logits and samples.
    source: where synthetic examples come from: 'image', the semantic generator; 'feature', one of what the head reads;
      'class_means', images drawn around the means of classes, and 'matched', `bank_size` images of each class moved in
      the last round until sums of their features are those of clients', both without a generator, tier s2; 'untrained'
      and 'noise', controls; 'none'.
    tier: what leaves a client beside its model: 's0', nothing, though updates tell which classes it holds; 's1', label
      histogram and channel moments of its pre-activations, for L_st; 's2', also sums by class, of a single example its
      image, of images, features, pre-activations and their squares, for L_class, 'class_means' and 'matched'; with the
      sources 'image' and 'matched' of products of images' lowest cosine coefficients, with 'matched' of features under
      networks that nobody trained.
    image_moments: whether the moments are also of images, pixel by pixel and all classes together, as of a first layer;
      source 'image', tiers s1 and s2. Of a client with a single class that is the mean image of a class.
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
    lambda_covariance: weight of L_cov, how pixels vary together class by class; source 'image', tier s2, whose clients
      send what it needs also where this is 0.
    lambda_diversity: weight of L_div.
    lambda_semantic: weight of L_sem; needs an anchored head.
    lambda_variation: weight of total variation beyond .16; images only.
    adversary: whether the server distils a student, for L_adv: samples that the teacher knows and it does not.
    lambda_adversarial: weight of L_adv; with `adversary`.
    early_stop: whether training of the generator rests while its samples are recognised and its loss does not fall.
    film_refresh: whether only FiLM and W of u = tanh(W e) are trained late in the run.
    film_after: share of the run's rounds after which; with `film_refresh`.
    ship: what clients download of the source: 'generator', its weights; 'bank', samples as bytes.
    bank_size: samples of a class in the bank, or matched.
    matching_steps: of Adam, that move the images of source 'matched'; 0 leaves them as they are drawn, each class from
      a normal distribution of its lowest cosine coefficients.
    matching_learning_rate: of Adam, falling to 0 along a cosine; with source 'matched'.
    lambda_teacher: weight of the global model's cross-entropy on images of source 'matched'.
    memory: what keeps classes whose holders left, none of whom says so: 'none'; 'average', the server answers with the
      mean of its model and the last one made with them; 'distil', with its head distilled on samples in the last round;
      'both'. All but 'none' also keep such classes in the generator.
    memory_patience: rounds without a holder after which a class has left.
    lambda_memory: weight of L_mem; with a memory.
    mask_softmax: softmax in clients' training only over classes seen so far and the client's own (2.4).
    unseen: how models answer with classes that nobody taught, if the table of classes is trusted: 'none', never;
      'prototypes', by cosine with prototypes that a ridge map makes of embeddings (8.1); 'anchored', by their anchored
      logits (2.7 a); 'generator_head', by those of the global model's head after training on samples (2.7 b).
    unseen_p_value: the largest at which the table is trusted, 1 for always: the share of tables with seen classes
      interchanged that find those alike that the model does.
    unseen_keep: share of its accuracy on seen classes that the global model keeps when it answers so.
    unseen_penalty: of the ridge map.
    mixing: alpha, what the server takes of an update that is not stale.
    staleness_exponent: a; of an update computed tau versions ago the server takes alpha (1 + tau)^-a.
    friend: the model mixed with the local one: 'mix', trained on real and synthetic examples; 'synthetic', on synthetic
      ones alone; 'peer', the most similar model of another client; 'global', the global model.
    friend_start: where training of the friends 'mix' and 'synthetic' starts: 'local', it goes on from the local model;
      'global', from the global one.
    friend_steps: how many of the personal steps train the friend model; the rest train the local model, which takes
      them all with the friends 'peer' and 'global'.
    proximal_weight: of half the squared distance from the global model in the losses of local model and trained
      friends, as Ditto has it; 0 for none.
    beta: share of the synthetic loss in the loss of the friend 'mix'.
    distill: whether the trained friends are also held to the global model's answers on synthetic images.
    lambda_kd: weight of that; with `distill`.
    temperature: tau, at which answers are compared; with `distill`.
    request: the classes of a client's synthetic examples, as far as they are trusted: 'own_and_seen', those that it
      holds or somebody taught; 'own', 'seen'. No client learns from samples of unseen classes (2.7 d).
    synthetic_examples: synthetic images a client trains its friend on; a quarter more is held out to choose lambdas.
    interpolation: how the coefficients are found: 'grid'; 'grad', by gradient; 'layer', so and one for each layer;
      'size', from the number of examples; 'output', one, for probabilities and not for weights, by grid; 'fixed'.
    coupled: whether base and head have the same coefficient, for 'grid', 'grad' and 'size'.
    one_standard_error: whether the point of the grid nearest to `lambda_base`, `lambda_head` is taken among those as
      good as the best within a standard error.
    grid_points: coefficients an axis of the grid.
    rho: weight of the held-out synthetic loss in the choice of coefficients, as far as the friend learnt the labels.
    lambda_base: the base's coefficient where 'fixed', and what 'grad', 'layer' and `one_standard_error` lean to: 1 is
      the local model, 0 the friend.
    lambda_head: the head's.
  """
  if coupled and interpolation in ("layer", "output", "fixed"):
    raise InputError(
      f"ap_fl_coupled: got true with --ap_fl_interpolation={interpolation}; accepted are"
      " --ap_fl_interpolation=grid, grad or size"
    )
  if friend == "peer" and task.num_clients > peers.MOST:
    raise InputError(
      f"ap_fl_friend: got 'peer' with --num_clients={task.num_clients}, of each of which the server keeps a model;"
      f" accepted are at most {peers.MOST}"
    )
  if friend_steps > task.sgd.personal_steps:
    raise InputError(
      f"ap_fl_friend_steps: got {friend_steps}, accepted is 0 to --personal_steps={task.sgd.personal_steps}"
    )
  if source in ("class_means", "matched") and tier != "s2":
    raise InputError(f"ap_fl_source: got {source!r} with --ap_fl_tier={tier}; accepted is --ap_fl_tier=s2")
  if image_moments and (source != "image" or tier == "s0"):
    raise InputError(
      f"ap_fl_image_moments: got true with --ap_fl_source={source} --ap_fl_tier={tier}; accepted are"
      " --ap_fl_source=image and --ap_fl_tier=s1 or s2"
    )
  if source == "matched" and ship == "bank":
    raise InputError(
      "ap_fl_ship: got 'bank' with --ap_fl_source=matched, which ships its images as bytes by itself; accepted is"
      " --ap_fl_ship=generator"
    )
  if tier == "s0" and task.model.semantics is not None:
    raise InputError(
      "ap_fl_tier: got 's0' with a head made of embeddings, whose changes do not tell which classes a client"
      " holds; accepted is --ap_fl_tier=s1 or s2, or --head=free"
    )
  if tier == "s0" and task.sgd.augment == "full" and not mask_softmax:
    raise InputError(
      "ap_fl_tier: got 's0' with --augment=full and no mask of the softmax, with which labels are smoothed over classes"
      " that nobody holds; accepted is --ap_fl_mask_softmax=true, or --augment=none or shift"
    )
  if memory != "none" and tier == "s0":
    raise InputError(f"ap_fl_memory: got {memory!r} with --ap_fl_tier=s0; accepted is --ap_fl_tier=s1 or s2")
  if unseen in ("anchored", "generator_head") and task.model.semantics is None:
    raise InputError(f"ap_fl_unseen: got {unseen!r} with a free head; accepted is --head=anchored or cosine")
  if unseen != "none" and tier != "s2" and source in ("untrained", "noise", "none"):
    raise InputError(
      f"ap_fl_unseen: got {unseen!r} with --ap_fl_source={source} --ap_fl_tier={tier}, which know nothing of seen"
      " classes; accepted is --ap_fl_source=image, feature, class_means or matched, or --ap_fl_tier=s2"
    )
  if unseen == "generator_head" and (source not in ("image", "feature") or tier == "s2"):
    raise InputError(
      f"ap_fl_unseen: got 'generator_head' with --ap_fl_source={source} --ap_fl_tier={tier}; accepted are"
      " --ap_fl_source=image or feature and --ap_fl_tier=s1"
    )
  if unseen != "none" and interpolation == "output":
    raise InputError(
      f"ap_fl_unseen: got {unseen!r} with --ap_fl_interpolation=output, whose models have two bases; accepted"
      f" is --ap_fl_interpolation={', '.join(kind for kind in returning.INTERPOLATIONS if kind != 'output')}"
    )
  origin = sources.source(
    task,
    source,
    matching.Settings(bank_size, matching_steps, matching_learning_rate, lambda_teacher),
    image_moments=image_moments,
  )
  offered = sources.banked(origin) if ship == "bank" else origin
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
        covariance=lambda_covariance,
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
      mixing=mixing,
      staleness_exponent=staleness_exponent,
      keep_models=friend == "peer",
      unseen=UnseenSettings(unseen, unseen_p_value, unseen_keep, unseen_penalty),
    ),
  )
  settings = returning.Settings(
    mask_softmax=mask_softmax,
    friend=friend,
    friend_start=friend_start,
    friend_steps=friend_steps,
    proximal_weight=proximal_weight,
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
  return rounds._replace(
    predict=partial(returning.predict, task.model),
    global_model=lambda held: Answering(server.answer_of(held), held.counts >= n_min, held.reading),
    personalize=returning.client(task, offered, settings),
    describe=returning.describe,
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
