"""Methods that break the contract end with one line each, before anything is compiled."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apfl_jax import algorithms, simulation, training
from apfl_jax.errors import InputError
from apfl_jax.types import Algorithm, Array, Download, Prediction, PyTree, Upload
from experiments import job
from experiments.config import Config
from tests import tasks

N, C, F = tasks.NUM_CLIENTS, tasks.NUM_CLASSES, 16


class Server(NamedTuple):
  weights: Array  # [F, C]
  momentum: Array  # [C]


def mymethod() -> Algorithm:
  """All that the contract has: client state, a row for each client, kept uploads; numbers where arrays may be."""

  def local_update(download, client, data, visit, key):
    upload = Upload({"step": download.shared, "one": 1}, 1.0, kept=(visit.work, 2))
    return client | {"visits": client["visits"] + 1}, upload

  def predict(model, images):
    features = images.reshape(len(images), -1)
    return Prediction(features @ model, features)

  return Algorithm(
    init=lambda key: Server(jax.random.normal(key, (F, C)), jnp.zeros(C)),
    download=lambda server: Download(server.weights, own={"row": jnp.arange(N)}),
    local_update=local_update,
    aggregate=lambda server, received, key: server._replace(weights=server.weights + received.mean["step"]),
    predict=predict,
    global_model=lambda server: server.weights,
    init_client=lambda download, key: {"visits": 0, "row": download.own["row"]},
    personalize=lambda download, client, data, visit, key: download.shared,
  )


def broken() -> dict[str, tuple[dict[str, Any], str]]:
  """Breach -> (the functions of `mymethod` in whose place others come, what is said of it)."""
  good, left = mymethod(), []

  def sends(**wrong):
    def local_update(*arguments):
      client, upload = good.local_update(*arguments)
      return client, upload._replace(**wrong)

    return {"local_update": local_update}

  def remembers(change):
    return {"local_update": lambda *arguments: (change(arguments[1]), good.local_update(*arguments)[1])}

  def answers(change):
    return {"predict": lambda model, images: change(good.predict(model, images))}

  def leaves(key):
    left.append(jax.random.normal(key, (F, C)))
    return good.init(key)

  same = "accepted is the same structure, shapes and dtypes"
  return {
    "no function": (
      {"global_model": None},
      "method: global_model: is None, accepted is a function (server)",
    ),
    "other arguments": (
      {"aggregate": lambda server, received: server},
      "broken: aggregate: takes (server, received), accepted is (server, received, key)",
    ),
    "other arguments of predict": (
      {"predict": lambda model: good.predict(model, jnp.zeros((1, 4, 4, 1)))},
      "broken: predict: takes (model), accepted is (model, images)",
    ),
    "no arrays": (
      {"init": lambda key: {"name": "mine", "weights": jnp.zeros(3)}},
      "broken: init: returns str at ['name'], accepted is a pytree of arrays",
    ),
    "no download": (
      {"download": lambda server: server.weights},
      "broken: download: returns float32 [16, 4], accepted is Download(shared) or Download(shared, own)",
    ),
    "rows of other clients": (
      {"download": lambda server: Download(server.weights, own={"row": jnp.arange(C)})},
      "broken: download: own['row'] is int32 [4], accepted is a row for each of N clients, [6, ...]",
    ),
    "no pair": (
      {"local_update": lambda *arguments: good.local_update(*arguments)[1]},
      "broken: local_update: returns Upload, accepted is (client, Upload(update, weight))",
    ),
    "client of another structure": (
      remembers(lambda client: {"row": client["row"]}),
      f"broken: local_update: client['visits'] is missing after a visit and int32 [] before, {same}",
    ),
    "client of another dtype": (
      remembers(lambda client: client | {"visits": client["visits"] * 0.5}),
      f"broken: local_update: client['visits'] is float32 [] after a visit and int32 [] before, {same}",
    ),
    "client of another container": (
      {"init_client": lambda download, key: [], "local_update": lambda *arguments: ((), Upload((), 1.0))},
      f"broken: local_update: client is PyTreeDef(()) after a visit and PyTreeDef([]) before, {same}",
    ),
    "weight of an array": (
      sends(weight=jnp.ones(2)),
      "broken: local_update: upload.weight is float32 [2], accepted is float32 []",
    ),
    "weight of a pytree": (
      sends(weight=()),
      "broken: local_update: upload.weight is (), accepted is float32 []",
    ),
    "weight of another dtype": (
      sends(weight=1),
      "broken: local_update: upload.weight is int32 [], accepted is float32 []",
    ),
    "server of another shape": (
      {"aggregate": lambda server, received, key: server._replace(momentum=received.kept[0])},
      f"broken: aggregate: server.momentum is float32 [3] after a round and float32 [4] before, {same}",
    ),
    "server of another type": (
      {"aggregate": lambda server, received, key: tuple(server)},
      f"broken: aggregate: server.weights is missing after a round and float32 [16, 4] before, {same}",
    ),
    "global model that does not fit": (
      {"global_model": lambda server: server},
      "broken: global_model: its model fails in line LINE of contract_test.py (TypeError: unsupported operand type",
    ),
    "personal model that does not fit": (
      {"personalize": lambda download, *_: download.shared.T},
      "broken: personalize: its model fails in line LINE of contract_test.py (TypeError: dot_general requires",
    ),
    "no prediction": (
      answers(lambda prediction: prediction.logits),
      "broken: predict: returns float32 [5, 4], accepted is Prediction(logits, features)",
    ),
    "logits the other way round": (
      answers(lambda prediction: prediction._replace(logits=prediction.logits.T)),
      "broken: predict: logits are float32 [4, 5], accepted is float [B, C], here float32 [5, 4]",
    ),
    "classes for logits": (
      answers(lambda prediction: prediction._replace(logits=prediction.logits.argmax(1))),
      "broken: predict: logits are int32 [5], accepted is float [B, C], here float32 [5, 4]",
    ),
    "features that are none": (
      answers(lambda prediction: prediction._replace(features=())),
      "broken: predict: features are (), accepted is float [B, F], here float32 [5, F]",
    ),
    "no names": (
      {"describe": lambda model: model.sum()},
      "broken: describe: returns float32 [], accepted is a dict, name -> array",
    ),
    "memory of its own": (
      {"init": leaves, "personalize": lambda download, *_: download.shared + left[-1]},
      "method: a function reads float32 [16, 4] that another call has left behind, accepted is what comes through its"
      " arguments",
    ),
    "a question to a traced number": (
      {"aggregate": lambda server, received, key: server if received.weight > 3 else good.init(key)},
      "broken: aggregate: line LINE of contract_test.py asks for a number that is known only when the program runs,"
      " accepted are jnp.where, jax.lax.cond and the like; settings that are whole numbers, bools or texts are known",
    ),
  }


def _simulator(build: Any) -> simulation.Simulator:
  inputs = tasks.inputs("fedavg")
  process = lambda settings: tasks.build("fedavg", N, settings)[1]
  options: dict[str, Any] = {"population_size": N, "cohort_size": 3, "how": "sequential"}
  return simulation.simulator(lambda settings: (build(settings), process(settings)), inputs, C, **options)


def _refusal(build: Any) -> str:
  tasks.inputs("fedavg")  # making these compiles
  with simulation.Stopwatch() as watch, pytest.raises(InputError) as error:
    _simulator(build)
  assert watch.read()["compilations"] == 0
  line = str(error.value)
  assert "\n" not in line and ", accepted " in line
  return line


@pytest.mark.parametrize("breach", broken())
def test_a_breach_is_one_line(breach):
  functions, said = broken()[breach]
  line = _refusal(lambda settings: mymethod()._replace(**functions))
  before, _, after = said.partition("LINE")
  assert line.startswith(before) and after in line
  assert after or line == said


def test_what_keeps_it_runs():
  with simulation.Stopwatch() as watch:
    simulator = _simulator(lambda settings: mymethod())
  assert watch.read()["compilations"] == 0 and simulator.has_global_model
  state = tasks.run(simulator, tasks.inputs("fedavg"), 2, chunk=2)
  visits = np.asarray(state.clients["visits"])
  np.testing.assert_array_equal(visits, state.times)
  assert visits.sum() == 6
  none = _simulator(lambda settings: mymethod()._replace(global_model=lambda server: None))
  assert not none.has_global_model


def test_settings_that_are_numbers_are_not_asked():
  def mine(settings):
    return mymethod() if settings["learning_rate"] > 0 else None

  assert _refusal(mine).startswith("method: line ")
  assert _refusal(lambda settings: None) == "method: got None, accepted is an Algorithm"


def failing() -> dict[str, tuple[Any, str]]:
  """Failure -> (settings -> the method, what is said of it)."""

  def raises(server, received, key):
    raise KeyError("mine")

  def claims(server, received, key):
    raise AssertionError

  def adds(server, received, key):
    return optax.apply_updates(server, (received.weight,))

  def forgets(download, client, data, visit, key):
    return client, Upload(download.shared)  # type: ignore[call-arg]

  def no_scalar(settings):
    task = tasks.task(N, settings)

    def local_update(download, client, data, visit, key):
      logits = lambda params, batch: training.predict(task.model, params, batch.images).logits
      each = lambda params, batch: training.batch_cross_entropy(logits(params, batch), batch)
      return client, Upload(training.local_sgd(task, each, download.shared, data, jnp.int32(1), key), jnp.float32(1))

    return algorithms.fedavg(task)._replace(local_update=local_update)

  mine = lambda **functions: lambda settings: mymethod()._replace(**functions)
  line = "fails in line LINE of contract_test.py"
  return {
    "an error": (mine(aggregate=raises), f"failing: aggregate: {line} (KeyError: 'mine')"),
    "a forgotten weight": (mine(local_update=forgets), f"failing: local_update: {line} (TypeError: "),
    # Nor in the library that is told to.
    "unlike trees": (mine(aggregate=adds), f"failing: aggregate: {line} (ValueError: "),
    "a claim of one's own": (
      mine(aggregate=claims),
      f"failing: aggregate: {line} (AssertionError: raise AssertionError)",
    ),
    "another name": (mine(aggregates=raises), f"method: {line} (ValueError: "),
    # Not where `local_sgd` takes its gradient, but where the method calls it.
    "a loss for each example": (no_scalar, f"failing: local_update: {line} (TypeError: "),
  }


@pytest.mark.parametrize("failure", failing())
def test_what_fails_inside_is_one_line_too(failure):
  build, said = failing()[failure]
  with pytest.raises(InputError) as error:
    _simulator(build)
  before, _, after = said.partition("LINE")
  assert str(error.value).startswith(before) and after in str(error.value) and "\n" not in str(error.value)
  assert type(error.value.__cause__).__name__ in after  # which a caller from Python sees whole


def test_it_is_said_who_wrote_the_function():
  def wrapper(algorithm):
    return algorithm._replace(local_update=lambda *arguments: (algorithm.local_update(*arguments)[1], ()))

  own = functools.partial(tasks.build, "fedavg", N)
  assert _refusal(lambda settings: wrapper(own(settings)[0])).startswith("test_it_is_said_who_wrote_the_function: ")


def test_it_is_said_whose_method_it_is(monkeypatch, tmp_path):
  """A method with a server of its own that keeps another one's `personalize`."""

  def mine(task):
    base = algorithms.fedavg(task)
    return base._replace(
      init=lambda key: (base.init(key), jnp.float32(0)),
      local_update=lambda download, *others: base.local_update(Download(download.shared[0]), *others),
      aggregate=lambda server, received, key: (base.aggregate(server[0], received, key), server[1]),
      global_model=lambda server: server[0],
    )

  monkeypatch.setitem(algorithms.METHODS, "mine", algorithms.Method(mine, "nobody", "global"))
  quick: PyTree = {"dataset": "fast", "model": "mlp", "dropout": "none", "monopolistic_classes": 0}
  said = r"^mine: personalize \(written in fedavg\): its model fails in line \d+ of \w+\.py \(.*\), accepted is"
  with pytest.raises(InputError, match=said):
    job.prepare(Config(algorithm="mine", workdir=str(tmp_path), **quick))


@pytest.mark.parametrize("clock", ["rounds", "asynchronous"])
def test_a_job_ends_with_it(clock, monkeypatch, tmp_path):
  """Before bytes are counted in an upload that is none."""

  def my_fedavg(task):
    return algorithms.fedavg(task)._replace(local_update=lambda download, client, *_: (client, download.shared))

  monkeypatch.setitem(algorithms.METHODS, "my_fedavg", algorithms.Method(my_fedavg, "nobody", "global"))
  options: PyTree = {"dataset": "fast", "model": "mlp", "dropout": "none", "monopolistic_classes": 0}
  with pytest.raises(InputError, match=r"^my_fedavg: local_update: returns \(\(\), Params\), accepted is"):
    job.prepare(Config(algorithm="my_fedavg", clock=clock, workdir=str(tmp_path), **options))
