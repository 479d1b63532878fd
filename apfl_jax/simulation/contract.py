"""A method held against the contract, `types.Algorithm`: once through a round, on shapes alone, before it is compiled.

JAX would notice most breaches too, but inside the engine, where its messages name nothing that the method's author
wrote; and some not at all: a client state of another dtype would be cast into its row.
"""

import collections
import inspect
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

import apfl_jax
from apfl_jax import algorithms
from apfl_jax.errors import InputError
from apfl_jax.types import Algorithm, Data, Download, Prediction, Process, PyTree, Received, Span, Upload, Visit

_TAKES = {
  "init": "(key)",
  "download": "(server)",
  "init_client": "(download, key)",
  "local_update": "(download, client, data, visit, key)",
  "aggregate": "(server, received, key)",
  "global_model": "(server)",
  "personalize": "(download, client, data, visit, key)",
  "predict": "(model, images)",
  "describe": "(model)",
}
_UNKNOWN = (  # until the program runs
  jax.errors.ConcretizationTypeError,
  jax.errors.NonConcreteBooleanIndexError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerIntegerConversionError,
)


class _Failure(InputError):
  """What fails inside a function; the cause is its own error."""


class Outline(NamedTuple):
  """Shapes of what a method's functions return.

  Attributes:
    server: of `init`.
    client: of `init_client`.
    global_model: of `global_model`, or None.
  """

  server: PyTree
  client: PyTree
  global_model: PyTree


def outline(
  build: Callable[[PyTree], tuple[Algorithm, Process]],
  inputs: Any,
  num_classes: int,
  *,
  population_size: int,
  cohort_size: int,
  offsets: bool = False,
  name: str = "",
) -> Outline:
  """Traces the functions of a method in the order of a round; nothing is compiled or computed.

  Args:
    build: as of the simulator.
    inputs: as of the simulator.
    num_classes: C.
    population_size: N.
    cohort_size: K, uploads that `aggregate` gets.
    offsets: whether clients' data have a `logit_offset`.
    name: of the method in what is refused; empty for that of the function in which the refused one was written.

  Raises:
    InputError: a function takes or returns something else than the contract says, is not a function of its arguments,
      or fails, which is then the cause; with the method's name, its own, and another method's if that made it.
  """

  def once(inputs: Any) -> Outline:
    with _readable(name or "method"):
      algorithm, _ = build(inputs.settings)
    if not isinstance(algorithm, Algorithm):
      raise InputError(f"{name or 'method'}: got {_spec(algorithm)}, accepted is an Algorithm")
    call, refused = partial(_call, name, algorithm), partial(_refused, name, algorithm)
    store, key, zero = inputs.federation.store, jax.random.key(0), jnp.int32(0)

    server = call("init", key)
    download = call("download", server)
    if not isinstance(download, Download):
      raise refused("download", f"returns {_spec(download)}", "Download(shared) or Download(shared, own)")
    for path, rows in jax.tree.leaves_with_path(download.own):
      if rows.shape[:1] != (population_size,):
        accepted = f"a row for each of N clients, [{population_size}, ...]"
        raise refused("download", f"own{jax.tree_util.keystr(path)} is {_spec(rows)}", accepted)
    download = Download(download.shared, jax.tree.map(lambda x: x[0], download.own))

    client = call("init_client", download, key)
    span, offset = Span(zero, zero), jnp.zeros(num_classes) if offsets else None
    visit = Visit(id=zero, round=zero, times=zero, staleness=zero, work=jnp.float32(1), wait=zero)
    circumstances = Data(store, span, span, offset), visit, key
    result = call("local_update", download, client, *circumstances)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Upload)):
      raise refused("local_update", f"returns {_spec(result)}", "(client, Upload(update, weight))")
    after, upload = result
    if difference := _difference("client", client, after, "a visit"):
      raise refused("local_update", difference, "the same structure, shapes and dtypes")
    if _spec(upload.weight) != "float32 []":
      raise refused("local_update", f"upload.weight is {_spec(upload.weight)}", "float32 []")

    each = jnp.zeros(cohort_size, jnp.int32)
    received = Received(
      total=jax.tree.map(lambda u: upload.weight * u, upload.update),
      weight=upload.weight,
      kept=jax.tree.map(lambda x: jnp.broadcast_to(x, (cohort_size, *x.shape)), upload.kept),
      ids=each,
      arrived=each == 0,
      staleness=each,
    )
    after = call("aggregate", server, received, key)
    if difference := _difference("server", server, after, "a round"):
      raise refused("aggregate", difference, "the same structure, shapes and dtypes")

    shared = call("global_model", server)
    personal = call("personalize", download, client, *circumstances)
    # Not as many as classes, so that one is not taken for the other.
    images = jnp.zeros((num_classes + 1, *store.images.shape[1:]))
    if shared is not None:
      _predicted(name, algorithm, "global_model", shared, images, num_classes)
    _predicted(name, algorithm, "personalize", personal, images, num_classes)
    described = call("describe", personal)
    if not isinstance(described, dict):
      raise refused("describe", f"returns {_spec(described)}", "a dict, name -> array")
    return Outline(server, client, shared)

  traced, shapes = jax.make_jaxpr(once, return_shape=True)(inputs)
  for value in traced.consts:
    if isinstance(value, jax.core.Tracer):
      found = f"a function reads {_spec(value)} that another call has left behind"
      raise InputError(f"{name or 'method'}: {found}, accepted is what comes through its arguments")
  return shapes


def _predicted(name: str, algorithm: Algorithm, field: str, model: PyTree, images: jax.Array, num_classes: int) -> None:
  """Refuses a model, which `field` made, for which `predict` has no Prediction of a batch."""
  refused = partial(_refused, name, algorithm)
  try:
    prediction = _call(name, algorithm, "predict", model, images)
  except _Failure as error:
    cause = error.__cause__
    assert cause is not None
    raise refused(field, f"its model fails in {_where(cause)}", "what predict takes") from cause
  if not isinstance(prediction, Prediction):
    raise refused("predict", f"returns {_spec(prediction)}", "Prediction(logits, features)")
  for part, width in (("logits", num_classes), ("features", None)):
    found = getattr(prediction, part)
    floats = isinstance(found, jax.Array) and jnp.issubdtype(found.dtype, jnp.floating) and found.ndim == 2
    if not floats or found.shape != (len(images), width or found.shape[1]):
      accepted = f"float [B, {'C' if width else 'F'}], here float32 [{len(images)}, {width or 'F'}]"
      raise refused("predict", f"{part} are {_spec(found)}", accepted)


def _call(name: str, algorithm: Algorithm, field: str, *arguments: PyTree) -> Any:
  """What a function returns, traced apart from the others."""
  function, refused = getattr(algorithm, field), partial(_refused, name, algorithm, field)
  if not callable(function):
    raise refused(f"is {_spec(function)}", f"a function {_TAKES[field]}")
  signature = inspect.signature(function)
  try:
    signature.bind(*arguments)
  except TypeError as error:
    raise refused(f"takes {signature}", _TAKES[field]) from error

  @jax.jit
  def traced(*arguments):
    result = function(*arguments)
    for path, leaf in jax.tree.leaves_with_path(result):
      if not isinstance(leaf, get_args(jax.typing.ArrayLike)):
        place = jax.tree_util.keystr(path)
        raise refused(f"returns {_spec(leaf)}{place and f' at {place}'}", "a pytree of arrays")
    return result

  with _readable(_whose(name, algorithm, field)):
    return traced(*arguments)


@contextmanager
def _readable(who: str) -> Iterator[None]:
  """What fails in a function, in one line."""
  try:
    yield
  except InputError:
    raise
  except _UNKNOWN as error:
    found = f"{_place(error)} asks for a number that is known only when the program runs"
    accepted = "jnp.where, jax.lax.cond and the like; settings that are whole numbers, bools or texts are known"
    raise InputError(f"{who}: {found}, accepted are {accepted}") from error
  except Exception as error:
    raise _Failure(f"{who}: fails in {_where(error)}") from error


def _refused(name: str, algorithm: Algorithm, field: str, found: str, accepted: str) -> InputError:
  return InputError(f"{_whose(name, algorithm, field)}: {found}, accepted is {accepted}")


def _whose(name: str, algorithm: Algorithm, field: str) -> str:
  """A function of a method, and in which other method it was written if it was."""
  first, *_ = makers = _makers(getattr(algorithm, field))
  own = not name or not set(makers).isdisjoint(name.split())  # which may be that of a method with wrappers
  other = first in {getattr(method.make, "__name__", "") for method in algorithms.METHODS.values()}
  return f"{name or first}: {field}" + (f" (written in {first})" if other and not own else "")


def _makers(function: Any) -> list[str]:
  """The names of the functions in which a function was written, the outermost first: methods, wrappers, others."""
  while isinstance(function, partial):
    function = function.func
  return getattr(function, "__qualname__", "method").split(".<locals>.")


def _where(error: BaseException) -> str:
  """Where something went wrong, and what."""
  said = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line or ""
  return f"{_place(error)} ({type(error).__name__}: {textwrap.shorten(said, 300)})"


def _place(error: BaseException) -> str:
  """The last line of a method or of what calls it; where there is none, the last outside JAX."""
  folder = lambda module: Path(module.__file__ or "").parent
  below = lambda frame, *folders: any(Path(frame.filename).is_relative_to(one) for one in folders)
  frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not below(frame, folder(jax))]
  # What methods are made from: the other rooms, libraries, Python's own.
  parts = (folder(apfl_jax), folder(jax).parent, folder(collections).parent)
  own = [frame for frame in frames if below(frame, folder(algorithms)) or not below(frame, *parts)]
  last = (own or frames)[-1]
  return f"line {last.lineno} of {Path(last.filename).name}"


def _difference(name: str, before: PyTree, after: PyTree, what: str) -> str:
  """The first place in which a pytree is another one after `what`; '' where there is none."""
  specs = lambda tree: {jax.tree_util.keystr(path): _spec(x) for path, x in jax.tree.leaves_with_path(tree)}
  old, new = specs(before), specs(after)
  for path in old | new:
    if old.get(path) != new.get(path):
      return f"{name}{path} is {new.get(path, 'missing')} after {what} and {old.get(path, 'missing')} before"
  old, new = jax.tree.structure(before), jax.tree.structure(after)
  return f"{name} is {new} after {what} and {old} before" if old != new else ""


def _spec(x: Any) -> str:
  """What something is, in a word or two."""
  if isinstance(x, jax.Array):
    return f"{x.dtype} {list(x.shape)}"
  if type(x) is tuple:
    return f"({', '.join(map(_spec, x))})"
  return "None" if x is None else type(x).__name__
