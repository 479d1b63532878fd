"""The `fast` task among a few clients, with any method of the registry: what the tests of whole rounds share."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from apfl_jax import algorithms, data, nn, population, semantics, simulation
from apfl_jax.simulation import Inputs, RoundMetrics, Scores, Simulator
from apfl_jax.types import Algorithm, Data, Download, Federation, LocalSGD, Process, PyTree, Span, State, Task, Visit

NUM_CLIENTS, COHORT_SIZE, CHUNK = 6, 4, 5
ROUNDS = 10  # what schedules are told, however many are run
NUM_CLASSES, IMAGE_SHAPE = 4, (4, 4, 1)
BATCH_SIZE, STEPS, LEARNING_RATE = 16, 5, 0.1

# What a method needs changed to compile and run quickly; one that is not here is taken as it comes.
_SMALL: dict[str, dict[str, Any]] = {
  "ap_fl": {
    "generator_steps": 2,
    "generator_batch": 20,
    "generator_warmup": 0.1,
    "unseen_warmup": 0.2,
    "friend_steps": 10,
    "synthetic_examples": 16,
    "grid_points": 2,
  },
  "dense": {"warmup": 0.2, "epochs": 2, "generator_steps": 2, "generator_batch": 8},
  "fedasync": {"alpha": 1.0, "exponent": 1.0},
  "fedbuff": {"buffer_size": 3},
  "fedftg": {"iterations": 2, "model_steps": 2, "generator_batch": 8},
  "krum": {"selected": 3},
  "fedgen": {"generator_steps": 10, "generator_batch": 8, "generator_learning_rate": 0.01},
}


def _settings(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """The settings of a method or wrapper: floats, which are traced, and the others."""
  values = {key: setting.default for key, setting in algorithms.settings(name).items()} | _SMALL.get(name, {})
  traced = {key: value for key, value in values.items() if isinstance(value, float)}
  return traced, {key: value for key, value in values.items() if key not in traced}


def task(num_clients: int, settings: PyTree, mesh: Mesh | None = None, aggregations: int = 1) -> Task:
  """The multilayer perceptron on `fast`."""
  model = nn.classifier("mlp", IMAGE_SHAPE, NUM_CLASSES)
  sgd = LocalSGD(
    learning_rate=settings["learning_rate"],
    batch_size=BATCH_SIZE,
    epochs=1,
    steps=STEPS,
    personal_steps=20,
    weighting="examples",
    augment="none",
  )
  spread, embeddings = simulation.spread(mesh), settings["embeddings"]
  return Task(num_clients, NUM_CLASSES, IMAGE_SHAPE, embeddings, model, sgd, settings["rounds"], spread, aggregations)


def build(
  name: str, num_clients: int, settings: PyTree, mesh: Mesh | None = None, aggregations: int = 1
) -> tuple[Algorithm, Process]:
  """A method on the `task`; some clients never come and uploads get lost, at `drop_rates`.

  `name` may go on with wrappers, as in 'fedavg|krum'.
  """
  name, *wrappers = name.split("|")
  made_for = task(num_clients, settings, mesh, aggregations)
  algorithm = algorithms.METHODS[name].make(made_for, **_settings(name)[1], **settings["method"])
  for wrapper in wrappers:
    static = _settings(wrapper)[1]
    algorithm = algorithms.WRAPPERS[wrapper].make(algorithm, made_for, **static, **settings["wrappers"][wrapper])
  return algorithm, population.make(("cold", "bernoulli"), num_clients, settings["drop_rates"])


@functools.cache
def inputs(name: str, num_clients: int = NUM_CLIENTS) -> Inputs:
  """Seed 0, nobody drops, classes shared out unevenly, 40 examples a client at least."""
  name, *wrappers = name.split("|")
  traced = lambda owner: {key: np.float32(value) for key, value in _settings(owner)[0].items()}
  dataset = data.load("fast")
  rng = np.random.default_rng(0)
  partition = data.partition.dirichlet(dataset.labels, num_clients, rng=rng, alpha=0.5, min_size=40)
  federation, pooled = data.build(dataset, partition, rng=rng, pooled_examples=64)
  if algorithms.METHODS[name].pools:
    federation = data.pooled(federation)
  settings: PyTree = {
    "learning_rate": np.float32(LEARNING_RATE),
    "drop_rates": np.zeros(2, np.float32),
    "rounds": np.int32(ROUNDS),
    "embeddings": semantics.embeddings("onehot", dataset.class_names, dataset.name, rng=rng),
    "method": traced(name),
    "wrappers": {wrapper: traced(wrapper) for wrapper in wrappers},
  }
  return Inputs(jnp.uint32(0), *jax.tree.map(jnp.asarray, (federation, pooled, settings)))


def with_settings(inputs: Inputs, **settings: Any) -> Inputs:
  """The inputs with other settings."""
  return inputs._replace(settings=inputs.settings | {key: jnp.float32(value) for key, value in settings.items()})


def with_sizes(inputs: Inputs, **sizes: Sequence[int]) -> Inputs:
  """The inputs with the first clients' spans cut to these sizes, e.g. `train=[1, 0]`."""
  federation = inputs.federation
  for part, values in sizes.items():
    span = getattr(federation, part)
    cut: Any = Span(span.start, span.size.at[: len(values)].set(jnp.int32(values)))
    federation = federation._replace(**{part: cut})
  return inputs._replace(federation=federation)


@functools.cache
def simulator(
  name: str, num_clients: int = NUM_CLIENTS, cohort_size: int = COHORT_SIZE, how: str = "sequential"
) -> Simulator:
  """The same one for all tests that ask for the same: compiling is what takes time."""
  return simulation.simulator(
    functools.partial(build, name, num_clients),
    inputs(name, num_clients),
    NUM_CLASSES,
    population_size=num_clients,
    cohort_size=min(cohort_size, num_clients),
    chunk=CHUNK,
    how=how,
  )


def run(simulator: Simulator, inputs: Inputs, rounds: int, chunk: int = CHUNK) -> State:
  """The state after some rounds."""
  state = simulator.init(inputs)
  for start in range(0, rounds, chunk):
    state, _ = simulator.advance(state, inputs, jnp.int32(min(chunk, rounds - start)))
  return state


def each_round(simulator: Simulator, inputs: Inputs, rounds: int) -> Iterator[tuple[State, RoundMetrics]]:
  """The state after each round, in host memory, and what happened in it."""
  state = simulator.init(inputs)
  for _ in range(rounds):
    state, metrics = simulator.advance(state, inputs, jnp.int32(1))
    yield on_host(state), jax.tree.map(lambda x: np.asarray(x)[0], metrics)


def personal(simulator: Simulator, state: State, inputs: Inputs) -> Scores:
  """All clients' personal models, scored."""
  rows = inputs.federation.id.shape[0]
  return simulator.score_personal(state, inputs, jnp.arange(rows), jnp.ones(rows, bool))


def first_visit(
  algorithm: Algorithm,
  federation: Federation,
  keys: Sequence[Any],
  work: Any = 1.0,
  call: Callable[..., Any] = lambda function, *arguments: function(*arguments),
) -> tuple[PyTree, tuple, tuple]:
  """The first client's, without the engine.

  Args:
    algorithm: the method.
    federation: who holds what.
    keys: of `init`, `init_client` and `local_update`.
    work: the share of its steps that the client does.
    call: (function, *arguments) -> result, what calls the method's functions.

  Returns:
    (the server, the arguments of `local_update`, what it returns)
  """
  server = call(algorithm.init, keys[0])
  download = call(algorithm.download, server)
  download = Download(download.shared, jax.tree.map(lambda x: x[0], download.own))
  client = call(algorithm.init_client, download, keys[1])
  data = Data(federation.store, *(Span(s.start[0], s.size[0]) for s in (federation.train, federation.validation)))
  zero = jnp.int32(0)
  arguments = download, client, data, Visit(zero, zero, zero, zero, jnp.float32(work), zero), keys[2]
  return server, arguments, call(algorithm.local_update, *arguments)


def ignored(traced: ClosedJaxpr, names: Sequence[str], results: Sequence[bool]) -> list[str]:
  """Which of its first arguments, by name, a traced function does not need for these of its results.

  By what flows into them: an argument that does, but changes nothing, as times 0, is not found.
  """
  with pytest.MonkeyPatch.context() as rules:
    rules.setitem(partial_eval.dce_rules, lax.while_p, _needed_by_loop)  # JAX takes all that enters one as needed
    _, needed = partial_eval.dce_jaxpr(traced.jaxpr, list(results))
  return [name for name, read in zip(names, needed, strict=False) if not read]


def _needed_by_loop(results: list[bool], loop: Any) -> tuple[list[bool], Any]:
  if not any(results):
    return [False] * len(loop.invars), None
  of = loop.params
  _, by_end = partial_eval.dce_jaxpr(of["cond_jaxpr"].jaxpr, [True])
  constants, carried = by_end[: of["cond_nconsts"]], by_end[of["cond_nconsts"] :]
  carry: list[bool] = []
  more = [result or read for result, read in zip(results, carried, strict=True)]
  while carry != more:  # what one step needs of the carry, the step before it must have made
    carry = more
    _, by_step = partial_eval.dce_jaxpr(of["body_jaxpr"].jaxpr, carry)
    more = [a or b for a, b in zip(carry, by_step[of["body_nconsts"] :], strict=True)]
  return [*constants, *by_step[: of["body_nconsts"]], *carry], loop


def on_host(tree: PyTree) -> PyTree:
  """A copy that outlives the donation of the original."""
  return jax.tree.map(np.array, tree)


def assert_same(actual: PyTree, expected: PyTree) -> None:
  """To the bit."""
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_finite(tree: PyTree) -> None:
  """Every number in it."""
  for path, leaf in jax.tree.leaves_with_path(tree):
    assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
