"""AP-FL's returning client in NumPy: what its friend learns, what it asks for, between what it chooses and by what."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import algorithms, nn, training
from apfl_jax.algorithms.ap_fl import Shared, peers, returning
from apfl_jax.algorithms.ap_fl.sources import Source
from apfl_jax.algorithms.ap_fl.state import Pair
from apfl_jax.errors import InputError
from apfl_jax.types import Data, Download, LocalSGD, Model, Params, Span, Task
from tests import linear, tasks

# A client with three examples of class 0 and three of class 1; class 2 was not taught, so softmax and answers leave it.
CLIENT, SEEN, TRUST = 3, (True, True, False), (0.0, 0.7, 0.0)
STEPS, FRIEND_STEPS, BETA, RHO, TAU, LAMBDA_KD = 8, 4, 0.6, 1.0, 2.0, 0.8
HELD = [0, 1]

_rng = np.random.default_rng(1)
START = Params({"a": _rng.normal(size=(4, 5)) / 2, "b": _rng.normal(size=(5, 5)) / 2}, _rng.normal(size=(5, 3)) / 2)
PICTURES = np.float32(_rng.uniform(size=(3, *linear.IMAGE_SHAPE)))  # what the source has of each class
FEATURES = np.float32(_rng.uniform(size=(3, linear.FEATURES)))  # what one of features has
MODEL = Model(
  init=lambda key: as_float32(START),
  base=lambda base, images: (images.reshape(len(images), -1) @ base["a"] @ base["b"], ()),
  head=lambda head, features: features @ head,
)
SOURCE = Source(
  images=True,
  generator=None,
  learns=False,
  trusted="wholly",
  init=lambda key: (),
  ship=lambda weights, statistics: (),
  sample=lambda shipped, label, key: jnp.asarray(PICTURES)[label],
)
OF_FEATURES = SOURCE._replace(images=False, sample=lambda shipped, label, key: jnp.asarray(FEATURES)[label])
TASK = linear.task(personal_steps=STEPS)._replace(model=MODEL)


def as_float32(tree):
  return jax.tree.map(jnp.float32, tree)


@functools.cache
def compiled(source, **static):
  """`personalize` with these settings that are not numbers; the numbers are traced."""

  def run(floats, shared, data, key):
    personalize = returning.client(TASK, source, returning.Settings(**static, **floats))
    return personalize(Download(shared), (), data, linear.visit(CLIENT), key)

  return jax.jit(run)


def personal(
  *, source=SOURCE, trust=TRUST, seen=SEEN, kept=(), examples=None, few=False, judge=None, judged_by=None, **settings
):
  """The personal model of the client that downloaded `START`; all examples of all clients validate it.

  With `few`, its own examples validate it, of which it has only the first `examples`; or those of client `judge`; or
  what `judged_by` makes of its data.
  """
  values = {name: algorithms.settings("ap_fl")[name].default for name in returning.Settings._fields}
  values |= {"friend_steps": FRIEND_STEPS, "beta": BETA, "rho": RHO, "temperature": TAU, "lambda_kd": LAMBDA_KD}
  values |= {"synthetic_examples": 8, "friend_start": "global"} | settings
  floats = {name: values.pop(name) for name in list(values) if isinstance(values[name], float)}
  data = linear.data(CLIENT, examples)
  if judge is not None:
    data = data._replace(validation=linear.data(judge).train)
  elif judged_by is not None:
    data = judged_by(data)
  elif not few:
    data = data._replace(validation=Span(jnp.int32(0), jnp.int32(sum(linear.SIZES))))
  shared = Shared(as_float32(START), (), jnp.asarray(seen), (), jnp.float32(trust), kept)
  return compiled(source, **values)(as_float32(floats), shared, data, jax.random.key(0))


def fixed(share, **settings):
  """The local model or the friend alone."""
  return personal(interpolation="fixed", lambda_base=share, lambda_head=share, **settings).params


# --- the same in NumPy ------------------------------------------------------------------------------------------------


def logits(params, x):
  """Of flat images, or of features."""
  return (x if x.shape[1] == linear.FEATURES else x @ params.base["a"] @ params.base["b"]) @ params.head


def chances(params, x, tau=1.0):
  """Probabilities of the classes that the softmax is over."""
  powers = np.exp(logits(params, x)[:, HELD] / tau)
  return powers / powers.sum(1, keepdims=True)


def entropies(params, x, y):
  """The cross-entropy of each example, 0 of one whose class the softmax leaves out."""
  return -(y[:, HELD] * np.log(chances(params, x))).sum(1)


REAL = linear.oracle(CLIENT)
EVERYBODY = [np.concatenate(parts) for parts in zip(*map(linear.oracle, range(len(linear.SIZES))), strict=True)]
MADE = np.float64(PICTURES[1:2]).reshape(1, -1), np.eye(3)[1:2]  # of the one trusted class
MADE_FEATURES = np.float64(FEATURES[1:2]), np.eye(3)[1:2]


def friend_loss(params, friend, distill, made):
  bracket = TRUST[1] * entropies(params, *made).mean()
  if distill:
    theta, own = chances(START, made[0], TAU), chances(params, made[0], TAU)
    bracket += LAMBDA_KD * TAU**2 * (theta * np.log(theta / own)).sum()
  return bracket if friend == "synthetic" else (1 - BETA) * entropies(params, *REAL).mean() + BETA * bracket


def slope(function, tree, step=1e-5):
  """The gradient of a function of a pytree of numbers, by central differences."""
  leaves, structure = jax.tree.flatten(jax.tree.map(np.float64, tree))
  result = [np.zeros(leaf.shape) for leaf in leaves]
  for part, leaf in enumerate(leaves):
    for place in np.ndindex(leaf.shape):
      values = []
      for sign in (1, -1):
        moved = [np.array(x) for x in leaves]
        moved[part][place] += sign * step
        values.append(function(jax.tree.unflatten(structure, moved)))
      result[part][place] = (values[0] - values[1]) / (2 * step)
  return jax.tree.unflatten(structure, result)


def descended(loss, steps, start=START):
  """The rate falls to 0 along a cosine."""
  params = start
  for step in range(steps):
    rate = linear.LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / steps))
    params = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, slope(loss, params))
  return params


@functools.cache
def local(steps=STEPS - FRIEND_STEPS):
  return descended(lambda params: entropies(params, *REAL).mean(), steps)


@functools.cache
def friend(kind="mix", distill=False, images=True):
  made = MADE if images else MADE_FEATURES
  return descended(lambda params: friend_loss(params, kind, distill, made), FRIEND_STEPS)


def between(shares, other=None, own=None):
  """The model at coefficients, one in the place of any part."""
  mix = lambda share, a, b: jax.tree.map(lambda x, y: share * x + (1 - share) * y, a, b)
  return jax.tree.map(mix, shares, own or local(), other or friend())


def objective(params):
  """J."""
  return entropies(params, *EVERYBODY).mean() + RHO * TRUST[1] * entropies(params, *MADE).mean()


def close(actual, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


# --- friends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "distill"), [("mix", False), ("synthetic", True)])
def test_a_trained_friend_descends_on_its_loss(kind, distill):
  request = {"request": "seen"} if kind == "synthetic" else {}  # what the client holds was taught
  close(fixed(0.0, friend=kind, distill=distill, **request), friend(kind, distill))


def test_the_friend_goes_on_from_the_local_model():
  expected = descended(lambda params: friend_loss(params, "mix", False, MADE), FRIEND_STEPS, local())
  close(fixed(0.0, friend_start="local"), expected)
  close(fixed(1.0, friend_start="local"), local())


def test_a_proximal_term_holds_both_models_near_the_global_one():
  weight = 0.7

  def near(params):
    squares = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), params, Params(*START))
    return 0.5 * weight * sum(jax.tree.leaves(squares))

  own = descended(lambda params: entropies(params, *REAL).mean() + near(params), STEPS - FRIEND_STEPS)
  expected = descended(lambda params: friend_loss(params, "mix", False, MADE) + near(params), FRIEND_STEPS, own)
  close(fixed(1.0, friend_start="local", proximal_weight=weight), own)
  close(fixed(0.0, friend_start="local", proximal_weight=weight), expected)


def test_from_features_the_friend_learns_with_its_head_alone_and_the_objective_knows_them():
  taught = friend(distill=True, images=False)
  tasks.assert_same(friend("synthetic", images=False).base, START.base)
  model = personal(source=OF_FEATURES, distill=True)
  corner = lambda params: (
    entropies(params, *EVERYBODY).mean() + RHO * TRUST[1] * entropies(params, *MADE_FEATURES).mean()
  )
  surface = model.choice.surface
  np.testing.assert_allclose((surface[0, 0], surface[-1, -1]), (corner(taught), corner(local())), rtol=1e-4)
  assert int(model.choice.guard) == 0
  b, h = np.unravel_index(np.argmin(surface), surface.shape)
  close(model.params, between(Params(GRID[b], GRID[h]), taught))


def test_without_trust_the_mixed_friend_learns_from_real_data_alone_and_the_synthetic_one_stays():
  close(fixed(0.0, trust=(0.0, 0.0, 0.0)), local(FRIEND_STEPS))
  close(fixed(0.0, trust=(0.0, 0.0, 0.0), friend="synthetic", distill=True), START)


def test_the_local_model_has_the_steps_that_no_friend_takes():
  close(fixed(1.0), local())
  close(fixed(1.0, friend="global"), local(STEPS))
  close(fixed(0.0, friend="global"), START)


def test_a_peer_is_the_most_similar_known_model_of_another():
  rng = np.random.default_rng(0)
  others = jax.tree.map(lambda x: x + rng.normal(size=(6, *x.shape)), START)
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  one = lambda j: jax.tree.map(lambda x: x[j], others)
  moved = flat(local(STEPS)) - flat(START)
  cosine = [(d := flat(one(j)) - flat(START)) @ moved / np.linalg.norm(d) for j in range(6)]
  best = np.argsort(cosine)[::-1]
  compared = jax.jit(peers.nearest)
  nearest = lambda known, id: compared(
    peers.Peers(as_float32(others), jnp.asarray(known)), as_float32(START), as_float32(local(STEPS)), jnp.int32(id)
  )
  everybody = np.ones(6, bool)
  tasks.assert_same(nearest(everybody, best[1]), as_float32(one(best[0])))
  tasks.assert_same(nearest(everybody, best[0]), as_float32(one(best[1])))
  tasks.assert_same(nearest(np.arange(6) == best[4], best[0]), as_float32(one(best[4])))
  tasks.assert_same(nearest(np.arange(6) == best[4], best[4]), as_float32(START))
  kept = peers.Peers(as_float32(others), jnp.asarray(np.arange(6) != CLIENT))
  expected = next(j for j in best if j != CLIENT)
  close(fixed(0.0, friend="peer", kept=kept), one(expected))


def test_the_server_keeps_the_last_model_of_each_client_that_arrived():
  settings = {"friend": "peer", "source": "none", "tier": "s0", "mask_softmax": False}
  rounds = linear.Rounds(algorithms.ap_fl(linear.task(), friend_steps=0, **settings))
  rounds.advance([0, 1, 2], lost=[1])
  kept = rounds.server.peers
  assert kept.known.tolist() == [True, False, True, False]
  for id in (0, 2):
    linear.close(jax.tree.map(lambda x, id=id: x[id], kept.models), linear.descend(id, linear.start()))
  before = Params(*map(np.float64, rounds.params.params))
  rounds.advance([0, 1], lost=[0])
  after = rounds.server.peers
  assert after.known.tolist() == [True, True, True, False]
  tasks.assert_same(jax.tree.map(lambda x: x[0], after.models), jax.tree.map(lambda x: x[0], kept.models))
  linear.close(jax.tree.map(lambda x: x[1], after.models), linear.descend(1, before))


def test_what_an_update_counts_falls_with_its_staleness():
  settings = {"source": "none", "tier": "s0", "mask_softmax": False, "friend_steps": 0}
  algorithm = algorithms.ap_fl(linear.task(), mixing=0.6, staleness_exponent=0.5, **settings)
  download = Download(Shared(as_float32(linear.START), (), jnp.asarray(SEEN), (), jnp.float32(TRUST)))

  @jax.jit
  def delta(staleness):
    visit = linear.visit(0)._replace(staleness=staleness)
    return algorithm.local_update(download, (), linear.data(0), visit, jax.random.key(1))[1].update.delta

  moved = linear.plus(linear.descend(0, linear.start()), (-1, linear.start()))
  for tau in (0, 3):
    linear.close(delta(jnp.int32(tau)), jax.tree.map(lambda x, tau=tau: 0.6 * (1 + tau) ** -0.5 * x, moved))


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("request_", "asked"), [("own_and_seen", "abc"), ("own", "ab"), ("seen", "ac")])
def test_synthetic_examples_are_asked_for_by_own_labels_and_evenly_as_far_as_trusted(request_, asked):
  """Classes a: held and seen; b: held; c: seen; d: neither."""
  trust, histogram = np.array([0.5, 1.0, 0.8, 0.6]), np.array([4.0, 1.0, 0.0, 0.0])
  shared = Shared((), (), jnp.array([True, False, True, False]), (), jnp.float32(trust))
  inside = np.array([c in asked for c in "abcd"])
  own = np.sqrt(histogram) / np.sqrt(histogram).sum()
  expected = np.where(inside, trust * (0.5 * own + 0.5 / inside.sum()), 0)
  np.testing.assert_allclose(returning.requested(request_, shared, jnp.float32(histogram)), expected, rtol=1e-6)
  nothing = shared._replace(trust=jnp.zeros(4))
  np.testing.assert_array_equal(returning.requested(request_, nothing, jnp.float32(histogram)), [1, 1, 1, 0])


def test_the_friend_learns_from_samples_that_are_asked_for_and_no_others():
  """Somebody taught class 2, the client holds class 1: samples of both are believed, those of class 2 are requested."""
  seen, trust = (False, False, True), (0.0, 0.7, 0.7)
  picture = np.float64(PICTURES[2:]).reshape(1, -1)

  def loss(params):
    [z] = logits(params, picture)
    return trust[2] * (np.log(np.exp(z).sum()) - z[2])

  without = {"distill": True, "lambda_kd": 0.0}  # as if it were not asked for, in a program that is compiled anyway
  model = fixed(0.0, friend="synthetic", request="seen", **without, seen=seen, trust=trust)
  close(model, descended(loss, FRIEND_STEPS))


def test_a_class_that_nobody_taught_is_not_answered_however_its_samples_are_believed():
  assert personal(interpolation="fixed", trust=(0.0, 0.7, 0.2)).answers.tolist() == [True, True, False]


# --- coefficients -----------------------------------------------------------------------------------------------------

GRID = np.linspace(0, 1, 6)
UNTRAINED = {"friend": "global"}  # a friend that takes no time to compile
away = functools.partial(between, other=START, own=local(STEPS))


def test_the_surface_is_the_objective_and_the_choice_its_least():
  model = personal()
  surface = np.array([[objective(between(Params(b, h))) for h in GRID] for b in GRID])
  np.testing.assert_allclose(model.choice.surface, surface, rtol=1e-4)
  b, h = np.unravel_index(surface.argmin(), surface.shape)
  close(model.params, between(Params(GRID[b], GRID[h])))
  real = [entropies(between(Params(s, s)), *EVERYBODY).mean() for s in (0, 0.5, 1)]
  np.testing.assert_allclose(model.choice.barrier, real[1] - (real[0] + real[2]) / 2, atol=1e-5)


def test_synthetic_examples_count_as_far_as_the_friend_learnt_their_labels():
  learnt = {}
  for c in HELD:
    trust = np.eye(3)[c] * 0.7
    with_rho, without = (personal(friend="global", trust=tuple(trust), rho=rho) for rho in (RHO, 0.0))
    answer = np.argmax(logits(START, np.float64(PICTURES[c : c + 1]).reshape(1, -1))[0, HELD])
    learnt[c] = float(answer == c)
    share = np.max(np.abs(with_rho.choice.surface - without.choice.surface)) > 1e-3
    assert share == learnt[c], (c, answer)
  assert sorted(learnt.values()) == [0.0, 1.0]  # both happen here


def test_one_standard_error_is_that_of_the_validation_loss_and_the_synthetic_one():
  choice = personal(one_standard_error=True, **UNTRAINED).choice
  surface = np.array([[objective(away(Params(b, h))) for h in GRID] for b in GRID])
  best = away(Params(*GRID[list(np.unravel_index(surface.argmin(), surface.shape))]))
  values = entropies(best, *EVERYBODY)  # all synthetic examples are the same here and add nothing
  error = values.std(ddof=1) / np.sqrt(len(values))
  prior = algorithms.settings("ap_fl")["lambda_base"].default, algorithms.settings("ap_fl")["lambda_head"].default
  near = [
    (round((b - prior[0]) ** 2 + (h - prior[1]) ** 2, 6), surface[i, j], b, h)
    for (i, b) in enumerate(GRID)
    for (j, h) in enumerate(GRID)
    if surface[i, j] <= surface.min() + error
  ]
  *_, b, h = min(near)
  np.testing.assert_allclose((choice.lambda_base, choice.lambda_head), (b, h), rtol=1e-6)


@pytest.mark.parametrize("kind", ["grad", "coupled", "layer"])
def test_coefficients_by_gradient_are_those_of_adam_in_numpy(kind):
  prior = {"grad": (0.3, 0.7), "coupled": (0.5,), "layer": (0.3, 0.3, 0.7)}[kind]
  whole = {
    "grad": lambda s: Params(s[0], s[1]),
    "coupled": lambda s: Params(s[0], s[0]),
    "layer": lambda s: Params({"a": s[0], "b": s[1]}, s[2]),
  }[kind]
  prior = np.array(prior)
  s, first, second = np.log(prior / (1 - prior)), np.zeros(prior.shape), np.zeros(prior.shape)
  for t in range(1, 51):
    share = 1 / (1 + np.exp(-s))
    gradient = slope(lambda x: objective(away(whole(x))), share) + 2 * 0.02 * (share - prior)
    gradient *= share * (1 - share)
    first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
    s -= 0.1 * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
  share = 1 / (1 + np.exp(-s))
  assert np.abs(share - prior).max() > 0.015  # far more than what follows tolerates
  settings = {"interpolation": "layer" if kind == "layer" else "grad", "coupled": kind == "coupled"}
  model = personal(**settings, **UNTRAINED)
  assert int(model.choice.guard) == 0
  np.testing.assert_allclose(model.choice.lambda_base, share[:2].mean() if kind == "layer" else share[0], atol=2e-3)
  np.testing.assert_allclose(model.choice.lambda_head, share[-1], atol=2e-3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), model.params, away(whole(share)))


def test_mixed_answers_have_the_best_share_and_leave_out_what_nobody_taught():
  model = personal(interpolation="output", **UNTRAINED)

  def mixed(share, x):
    return share * chances(local(STEPS), x) + (1 - share) * chances(START, x)

  def cost(share):
    nll = lambda x, y: -(y[:, HELD] * np.log(mixed(share, x))).sum(1).mean()
    return nll(*EVERYBODY) + RHO * TRUST[1] * nll(*MADE)

  best = GRID[np.argmin([cost(share) for share in GRID])]
  np.testing.assert_allclose(model.params.share, best, rtol=1e-6)
  np.testing.assert_allclose(model.choice.lambda_base, best, rtol=1e-6)
  images = np.float32(linear.IMAGES / 255)
  prediction = returning.predict(MODEL, model, images)
  got = np.exp(prediction.logits)
  np.testing.assert_allclose(got[:, HELD], mixed(best, images.reshape(len(images), -1)), rtol=1e-3)
  assert (got[:, 2] == 0).all() and np.isfinite(prediction.logits).all()


def test_with_few_validation_examples_the_number_of_examples_decides():
  n = linear.SIZES[CLIENT]
  for kind, base, head in (
    ("grid", n / (n + 200), n / (n + 12.5)),
    ("layer", n / (n + 200), n / (n + 12.5)),
    ("output", n / (n + 50), n / (n + 50)),
  ):
    choice = personal(interpolation=kind, few=True, **({} if kind == "grid" else UNTRAINED)).choice
    if int(choice.guard) == 0:
      np.testing.assert_allclose((choice.lambda_base, choice.lambda_head), (base, head), rtol=1e-5)
    else:
      assert float(choice.lambda_base) in (0.0, 1.0)


@pytest.mark.parametrize("kind", ["grid", "output"])
def test_few_validation_examples_do_not_bring_the_global_model_back(kind):
  other = 1
  x, y = linear.oracle(other)
  cost = lambda params: entropies(params, x, y).mean() + RHO * TRUST[1] * entropies(params, *MADE).mean()
  assert len(x) < 20 and cost(START) < min(cost(local()), cost(friend()))
  assert int(personal(interpolation=kind, judge=other).choice.guard) in (0, 1, 2)


@pytest.mark.parametrize("kind", ["grid", "output"])
@pytest.mark.parametrize(("winner", "guard", "many"), [("local", 1, False), ("friend", 2, False), ("start", 3, True)])
def test_an_end_or_the_global_model_takes_the_place_of_a_choice_that_validates_worse(winner, guard, many, kind):
  """Validated by 16 copies of an example that somebody else has, which is chosen so; if `many`, and by its own."""
  n, others = linear.SIZES[CLIENT], linear.STARTS[CLIENT]
  weights = lambda base, head: functools.partial(chances, between(Params(base, head)))
  answers = lambda share: lambda x: share * chances(local(), x) + (1 - share) * chances(friend(), x)
  ends = {"local": local(), "friend": friend()} | ({"start": START} if many else {})
  rivals = [functools.partial(chances, model) for name, model in ends.items() if name != winner]
  if kind == "grid":
    pairs = itertools.product(GRID, GRID) if many else [(n / (n + 200), n / (n + 12.5))]
    rivals += [weights(*pair) for pair in pairs if pair not in ((0, 0), (1, 1))]
  else:
    rivals += map(answers, GRID[1:-1] if many else [n / (n + 50)])

  def lead(example):
    """By how much the winner is better than all else at this image and label."""
    image, label = example
    x, y = np.float64(linear.IMAGES[image : image + 1]).reshape(1, -1) / 255, np.eye(3)[[label]]
    x, y = (np.concatenate([np.repeat(a, others, axis=0), b[: n * many]]) for a, b in zip((x, y), REAL, strict=True))
    cost = lambda answer: -(y[:, HELD] * np.log(answer(x))).sum(1).mean()
    return min(map(cost, rivals)) - cost(functools.partial(chances, ends[winner]))

  image, label = best = max(itertools.product(range(others), HELD), key=lead)
  assert lead(best) > 1e-3

  def judged_by(data):
    index, labels = data.store.index.at[:others].set(image), data.store.labels.at[image].set(label)
    span = Span(jnp.int32(0), jnp.int32(others + n * many))
    return data._replace(store=data.store._replace(index=index, labels=labels), validation=span)

  model = personal(interpolation=kind, judged_by=judged_by, rho=0.0)
  assert int(model.choice.guard) == guard
  params = model.params
  if isinstance(params, Pair):
    assert guard == 3 or float(params.share) == (winner == "local")
    params = params.friend if winner == "friend" else params.local
  close(params, ends[winner])


@pytest.mark.parametrize(
  "settings",
  [
    *({"interpolation": kind} for kind in ("grid", "fixed")),
    *({"interpolation": kind} | UNTRAINED for kind in ("grad", "size", "layer", "output")),
    {"one_standard_error": True} | UNTRAINED,
    {"interpolation": "fixed", "distill": True, "friend": "synthetic"},
  ],
)
def test_a_client_without_examples_before_anything_was_taught_gets_the_global_model(settings):
  nothing = {"trust": (0.0, 0.0, 0.0), "seen": (False, False, False), "examples": 0, "few": True}
  model = personal(**nothing, **settings)
  tasks.assert_finite(model)
  params = model.params
  for part in (params.local, params.friend) if isinstance(params, Pair) else (params,):
    close(part, START)


def test_interpolation_protects_from_a_friend_that_learned_wrong_labels():
  """Two clients on `fast`; what they trust are pictures of the next class. Claim A7 of method 5, made harder."""
  inputs = tasks.inputs("fedavg", 2)
  federation, classes = inputs.federation, tasks.NUM_CLASSES
  store = federation.store
  means = jnp.stack([jnp.mean(store.images[store.labels == c] / 255, axis=0) for c in range(classes)])

  def sample(shipped, label, key):
    noise = 0.1 * jax.random.normal(key, (*label.shape, *tasks.IMAGE_SHAPE))
    return jnp.clip(means[(label + 1) % classes] + noise, 0, 1)

  model = nn.classifier("mlp", tasks.IMAGE_SHAPE, classes)
  sgd = LocalSGD(jnp.float32(tasks.LEARNING_RATE), tasks.BATCH_SIZE, 1, tasks.STEPS, 100, "examples", "none")
  task = Task(2, classes, tasks.IMAGE_SHAPE, inputs.settings["embeddings"], model, sgd, jnp.int32(5))
  everything = jnp.ones(classes)

  at = lambda span, id: Span(span.start[id], span.size[id])
  own = lambda id: Data(store, at(federation.train, id), at(federation.validation, id))

  @jax.jit
  def averaged(params):
    """A round of FedAvg of two clients that weigh alike."""
    loss, steps = training.classification_loss(task), jnp.int32(tasks.STEPS)
    each = jax.vmap(lambda id: training.local_sgd(task, loss, params, own(id), steps, jax.random.key(0)))
    return jax.tree.map(lambda x: x.mean(0), each(jnp.arange(2)))

  params = jax.jit(model.init)(jax.random.key(0))
  for _ in range(5):
    params = averaged(params)
  shared = Shared(params, (), everything > 0, (), everything)
  values = {name: algorithms.settings("ap_fl")[name].default for name in returning.Settings._fields}

  def accuracy(id, **settings):
    settings = returning.Settings(**values | {"friend_steps": 50} | settings)
    personalize = returning.client(task, SOURCE._replace(sample=sample), settings)
    personal = personalize(Download(shared), (), own(id), linear.visit(0), jax.random.key(0))
    answer = functools.partial(returning.predict, model, personal)
    counts = training.evaluate(answer, store, at(federation.test, id), classes).confusion
    return jnp.trace(counts) / jnp.sum(counts)

  alone = jax.jit(lambda id, share: accuracy(id, interpolation="fixed", lambda_base=share, lambda_head=share))
  chosen = jax.jit(accuracy)
  for id in range(2):
    local, friend = (float(alone(jnp.int32(id), jnp.float32(share))) for share in (1, 0))
    assert friend < local - 0.1
    assert float(chosen(jnp.int32(id))) >= local - 0.04


@pytest.mark.parametrize("interpolation", ["layer", "output", "fixed"])
def test_one_coefficient_for_both_is_refused_where_there_are_not_two(interpolation):
  with pytest.raises(InputError, match="coupled"):
    algorithms.ap_fl(linear.task(), friend_steps=0, coupled=True, interpolation=interpolation)


def test_peers_are_refused_where_they_are_too_many():
  with pytest.raises(InputError, match="peer"):
    algorithms.ap_fl(linear.task(num_clients=100_000), friend_steps=0, friend="peer")
