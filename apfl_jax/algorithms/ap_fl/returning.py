"""The returning client: one download, no round; a local model, a friend model, and what lies between them.

Method 2.8 and 2.9 [O], where the pilots of 8.3 contradict them as these say [P] (no distillation, rho = .3):

  local   w_L: SGD from theta on the client's own examples, + proximal_weight / 2 |w - theta|^2
  friend  w_F: SGD from w_L on (1 - beta) CE(real) + beta (trust_c CE(synthetic) + lambda_kd tau^2 KL(theta || w)),
          with the same proximal term
          `synthetic`: on the bracket alone; `peer`: another client's model, see `peers`; `global`: theta
  w_P     between the two, see `interpolation`, where J = CE(validation) + rho s CE(synthetic, held out) is the least; s
          is how much of these labels the friend learnt, so that labels without a meaning do not count [O]
          all clients do the same, also those that never took part

Budget parity [O]: local and friend steps are `personal_steps` together, and the local model takes them all where the
friend is not trained. The friend goes on from the local model, where the reconstruction has both start from theta: so
no step on real data is lost to it, and it knows more of its own classes and of all (experiments/results/ap_fl.md).
Steps of coefficients by gradient are not among them: they train no weight but two numbers, or one for each layer, and
read validation examples only. The ledger counts their operations.

An upload of w_L on return is not here: a client that is there again takes part in rounds as any other.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from apfl_jax import random, training
from apfl_jax.algorithms.ap_fl import peers
from apfl_jax.algorithms.ap_fl.interpolation import (
  STARTED,
  Choice,
  Losses,
  by_gradient,
  by_size,
  choose,
  choose_share,
  for_each_layer,
  interpolate,
)
from apfl_jax.algorithms.ap_fl.server import APART, own_classes
from apfl_jax.algorithms.ap_fl.sources import Source
from apfl_jax.algorithms.ap_fl.state import Answering, Pair, Shared
from apfl_jax.algorithms.ap_fl.unseen import LEFT_OUT, Reading, for_client, placed
from apfl_jax.types import Array, Data, Download, Key, Model, Params, Prediction, PyTree, Task, Visit

FRIENDS = ("mix", "synthetic", "peer", "global")
STARTS = ("local", "global")
REQUESTS = ("own_and_seen", "own", "seen")
INTERPOLATIONS = ("grid", "grad", "size", "layer", "output", "fixed")

_MANY_VALIDATION = 20  # examples under which neither a coefficient nor the global model is chosen by them (2.9 c)
_BLOCK = 64  # validation examples at once

Features = Callable[[PyTree], Array]  # (base) -> float32 [B, F]


class Settings(NamedTuple):
  """Those settings of `ap_fl` that its clients read on return; they are explained there."""

  mask_softmax: bool
  friend: str
  friend_start: str
  friend_steps: int
  proximal_weight: Array | float
  beta: Array | float
  distill: bool
  lambda_kd: Array | float
  temperature: Array | float
  request: str
  synthetic_examples: int
  interpolation: str
  coupled: bool
  one_standard_error: bool
  grid_points: int
  rho: Array | float
  lambda_base: Array | float
  lambda_head: Array | float


def requested(request: str, shared: Shared, histogram: Array) -> Array:
  """float32 [C], the weights of classes in a client's synthetic examples (2.8).

  Half follows its own labels, half is uniform over the classes that it asks for (2.7 e), as far as they are trusted;
  where none of these is, what it holds or somebody taught.

  Args:
    request: one of `REQUESTS`.
    shared: its download.
    histogram: float32 [C], its training examples of each class.
  """
  held = histogram > 0
  asked = {"own_and_seen": shared.seen | held, "own": held, "seen": shared.seen}[request]
  own = jnp.sqrt(histogram) / jnp.maximum(jnp.sum(jnp.sqrt(histogram)), 1e-12)
  weights = jnp.where(asked, shared.trust * (0.5 * own + 0.5 / jnp.sum(asked)), 0.0)
  return jnp.where(jnp.sum(weights) > 0, weights, (shared.seen | held).astype(jnp.float32))


def predict(model: Model, chosen: Answering, images: Array) -> Prediction:
  """What a global or personal model says of images float32 [B, ...]."""
  params = chosen.params
  if isinstance(params, Pair):
    local, friend = (training.predict(model, p, images) for p in (params.local, params.friend))
    features = jnp.concatenate([local.features, friend.features], axis=-1)
    prediction = Prediction(mixed_answers(local.logits, friend.logits, params.share, chosen.answers), features)
  else:
    prediction = training.predict(model, params, images)
  if isinstance(chosen.reading, Reading):
    return placed(model, chosen.reading, prediction, chosen.answers)
  # Lowered and not removed: among the classes left out the order stays, for the restricted score.
  return prediction._replace(logits=prediction.logits - LEFT_OUT * ~chosen.answers)


def mixed_answers(local: Array, friend: Array, share: Array, classes: Array) -> Array:
  """Logits [B, C] of share softmax(local) + (1 - share) softmax(friend), both over bool [C] classes.

  The logits of other classes compare with each other only.
  """
  kept = classes | ~jnp.any(classes)
  softmax = lambda logits: jax.nn.softmax(jnp.where(kept, logits, -jnp.inf))
  mixed = share * softmax(local) + (1.0 - share) * softmax(friend)
  return jnp.where(kept, jnp.log(jnp.maximum(mixed, 1e-12)), share * local + (1.0 - share) * friend)


def describe(chosen: Answering) -> dict[str, Array]:
  """What a personal model's client chose, by name; see `Choice`."""
  if not isinstance(chosen.choice, Choice):
    return {}
  return {name: value for name, value in chosen.choice._asdict().items() if not isinstance(value, tuple)}


def client(task: Task, source: Source, settings: Settings) -> Callable[..., Answering]:
  """The function `personalize` of AP-FL; `source` is the one of what clients download."""
  model, num_classes = task.model, task.num_classes
  trained = settings.friend in ("mix", "synthetic")
  local_steps = task.sgd.personal_steps - (settings.friend_steps if trained else 0)
  examples = settings.synthetic_examples if trained else 0  # of the friend; `held_out` more choose the coefficients
  held_out = max(1, settings.synthetic_examples // 4)

  def personalize(download: Download, client: PyTree, data: Data, visit: Visit, key: Key) -> Answering:
    del client
    shared: Shared = download.shared
    # The local model takes the key as fine-tuning does: the two are then the same model to the bit.
    friend_key, label_key, sample_key = jax.random.split(jax.random.fold_in(key, APART), 3)
    histogram, classes = own_classes(task, shared, data)
    softmax = classes if settings.mask_softmax else None
    loss = training.proximal(training.classification_loss(task, softmax), shared.start, settings.proximal_weight)
    local = training.fine_tune(task, loss, shared.start, data, local_steps, key)

    label = random.categorical(label_key, requested(settings.request, shared, histogram), (examples + held_out,))
    # Of a source of features these are in the place of images.
    made = source.sample(shared.source, label, sample_key)
    synthetic = training.Batch(made, jax.nn.one_hot(label, num_classes), shared.trust[label])
    taught, apart = (jax.tree.map(cut, synthetic) for cut in (lambda x: x[:examples], lambda x: x[examples:]))

    if settings.friend == "global":
      friend = shared.start
    elif isinstance(shared.peers, peers.Peers):
      friend = peers.nearest(shared.peers, shared.start, local, visit.id)
    else:
      start = local if settings.friend_start == "local" else shared.start
      friend = trained_friend(start, shared, data, taught, softmax, friend_key)
    params, choice = interpolated(local, friend, shared.start, data, apart, classes)
    reading = shared.reading
    if isinstance(reading, Reading):
      assert isinstance(params, Params)
      reading = for_client(model, reading, partial(training.predict, model, params), data, classes)
    return Answering(params, classes, reading, choice)

  def trained_friend(
    start: Params, shared: Shared, data: Data, synthetic: training.Batch, softmax: Array | None, key: Key
  ) -> Params:
    real_batch = training.batches(task, data, data.train, key)
    batch_size = task.sgd.batch_size
    # With nothing to be trusted the friend learns from real data alone, at the full rate.
    share = jnp.where(jnp.any(shared.trust > 0), settings.beta, 0.0)

    def logits_of(params, made):
      return model.head(params.head, source.features(model, params.base, made.images))

    def bracket(logits, made):
      each = training.batch_cross_entropy(logits, made, softmax)
      each = jnp.where(made.mask > 0, made.mask * each, 0.0)
      return jnp.mean(each + distillation(logits, made) if settings.distill else each)

    def distillation(logits, made):
      """lambda_kd tau^2 KL(theta || w) up to a constant, of seen classes and over them: theta knows no other."""
      tau, seen = settings.temperature, shared.seen | ~jnp.any(shared.seen)
      theta = logits_of(shared.start, made)
      soft = jax.nn.softmax(jnp.where(seen, theta, -jnp.inf) / tau)
      each = settings.lambda_kd * tau**2 * training.cross_entropy(logits / tau, soft, seen)
      return jnp.where(jnp.sum(jnp.where(shared.seen, made.targets, 0.0), axis=-1) > 0, each, 0.0)

    def friend_loss(params, step):
      rows = (step * batch_size + jnp.arange(batch_size)) % examples
      made = jax.tree.map(lambda x: x[rows], synthetic)
      if settings.friend == "synthetic":
        return bracket(logits_of(params, made), made)
      real = real_batch(step)
      own, others = source.logits(model, params, real.images, made.images)
      own = training.batch_mean(training.batch_cross_entropy(own, real, softmax), real)
      return (1 - share) * own + share * bracket(others, made)

    steps = jnp.where(data.train.size > 0, settings.friend_steps, 0)
    held = training.proximal(friend_loss, shared.start, settings.proximal_weight)
    return training.descend(held, start, steps, task.sgd.learning_rate, cosine=True)

  def interpolated(
    local: Params, friend: Params, start: Params, data: Data, synthetic: training.Batch, classes: Array
  ) -> tuple[Params | Pair, Choice]:
    prior = Params(settings.lambda_base, settings.lambda_head)
    if settings.interpolation == "fixed":
      fixed = jax.tree.map(jnp.asarray, prior)
      return interpolate(local, friend, fixed), Choice(fixed.base, fixed.head, jnp.int32(0))
    softmax = classes if settings.mask_softmax else None
    means = over_examples(data, synthetic)
    # Fewer choose no coefficients, nor the global model, which may be far worse, in place of what was trained.
    many = data.validation.size >= _MANY_VALIDATION
    guarded = data.validation.size > 0
    sizes = by_size(data.train.size, coupled=settings.coupled or settings.interpolation == "output")
    rho = settings.rho * learnable(friend, synthetic, classes)

    def each(logits: Array, batch: training.Batch) -> Array:
      """The cross-entropy of each row, weighted by its trust."""
      return jnp.where(batch.mask > 0, batch.mask * training.batch_cross_entropy(logits, batch, softmax), 0.0)

    def losses(logits_of: Callable[[Features], Array]) -> Losses:
      """J, [P]; `logits_of` what `over_examples` gives are [P, B, C]."""

      def sums(batch, features):
        values = jax.vmap(lambda logits: each(logits, batch))(logits_of(features))
        return jnp.sum(values, axis=-1), jnp.sum(values**2, axis=-1)

      (real, real_square), (made, made_square) = means(sums)
      spread = (real_square - real**2) / jnp.maximum(data.validation.size - 1, 1)
      spread += rho**2 * (made_square - made**2) / held_out
      return Losses(real + rho * made, real, spread)

    if settings.interpolation == "output":
      shares = jnp.append(jnp.linspace(0.0, 1.0, settings.grid_points), sizes.head)

      def logits_of(features):
        ours, theirs, first = (model.head(p.head, features(p.base)) for p in (local, friend, start))
        mixed = jax.vmap(lambda share: mixed_answers(ours, theirs, share, classes))(shares)
        return jnp.concatenate([mixed, first[None]])

      choice = choose_share(losses(logits_of).total, on_grid=many, given=sizes.head, guarded=guarded, with_start=many)
      local, friend = (
        jax.tree.map(lambda a, b: jnp.where(choice.guard == STARTED, a, b), start, p) for p in (local, friend)
      )
      return Pair(local, friend, choice.lambda_base), choice

    def objective(base: PyTree, heads: PyTree) -> Losses:
      def logits_of(features):
        found = features(base)
        return jax.vmap(lambda head: model.head(head, found))(heads)

      return losses(logits_of)

    given = sizes
    if settings.interpolation in ("grad", "layer"):
      free: PyTree = prior
      if settings.interpolation == "layer":
        free = prior._replace(base=for_each_layer(local.base, prior.base))
      elif settings.coupled:
        free = 0.5 * (prior.base + prior.head)
      whole = lambda free: Params(free, free) if settings.coupled else free

      def slope(free):
        def gradient(batch, features):
          def total(free):
            mixed = interpolate(local, friend, whole(free))
            return jnp.sum(each(model.head(mixed.head, features(mixed.base)), batch))

          return jax.grad(total)(free)

        real, made = means(gradient)
        return jax.tree.map(lambda a, b: a + rho * b, real, made)

      found = whole(by_gradient(slope, jax.tree.map(jnp.asarray, free)))
      if settings.interpolation == "layer":
        sizes = sizes._replace(base=for_each_layer(local.base, sizes.base))
      given = jax.tree.map(lambda a, b: jnp.where(many, a, b), found, sizes)
    return choose(
      objective,
      local,
      friend,
      start,
      points=settings.grid_points,
      on_grid=(settings.interpolation == "grid") & many,
      given=given,
      guarded=guarded,
      with_start=many,
      coupled=settings.coupled,
      prior=(prior.base, prior.head) if settings.one_standard_error else None,
    )

  def learnable(friend: Params, synthetic: training.Batch, classes: Array) -> Array:
    """float32 []: the share of held-out labels that the friend answers beyond guessing; 0 if there is nothing in them.

    Where it can only learn such labels by heart, as of noise, the loss on others says who is least sure, and no more.
    """
    logits = model.head(friend.head, source.features(model, friend.base, synthetic.images))
    right = jnp.argmax(jnp.where(classes, logits, -jnp.inf), axis=-1) == jnp.argmax(synthetic.targets, axis=-1)
    chance = 1.0 / jnp.maximum(jnp.sum(classes), 2)
    return jnp.clip((jnp.mean(right) - chance) / (1.0 - chance), 0.0, 1.0)

  def over_examples(data: Data, synthetic: training.Batch) -> Callable:
    """(sums) -> its means over real validation examples and over synthetic ones.

    `sums(batch, features)` adds up over its rows; `features(base)` are theirs, float32 [B, F].
    """

    def means(sums: Callable[[training.Batch, Features], PyTree]) -> tuple[PyTree, PyTree]:
      def add(i, total):
        batch = training.gather(data.store, data.validation, i * _BLOCK + jnp.arange(_BLOCK), num_classes)
        new = sums(batch._replace(logit_offset=data.logit_offset), lambda base: model.base(base, batch.images)[0])
        return jax.tree.map(jnp.add, total, new)

      made = sums(synthetic, lambda base: source.features(model, base, synthetic.images))
      blocks = (data.validation.size + _BLOCK - 1) // _BLOCK
      real = jax.lax.fori_loop(0, blocks, add, jax.tree.map(jnp.zeros_like, made))
      real = jax.tree.map(lambda x: x / jnp.maximum(data.validation.size, 1), real)
      return real, jax.tree.map(lambda x: x / held_out, made)

    return means

  return personalize
