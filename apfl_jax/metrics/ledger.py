"""The cost ledger: what one call computes and what it reads, from its jaxpr alone; nothing is compiled.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trip count, so it cannot price local training;
this walk multiplies. Totals, splits and derived figures (method 6.1 [O]) are the caller's.

Counted: matrix products and convolutions, two operations for a multiplication and its addition. Not counted: all else
(elementwise operations, reductions, random numbers, factorisations), little beside them in training a network. Zeros
count: padding, dilation and masks cost what they cost the device. Repeated subexpressions count each time.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.extend.core as jex
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from apfl_jax.types import Array, PyTree

_KNOWN_SIZE = 64  # elements; a loop bound is a scalar, or under vmap one number a client
# Primitives that run one jaxpr, once, on their own inputs; and the parameter that holds it.
_CALLS = {
  "jit": "jaxpr",
  "remat2": "jaxpr",
  "closed_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
}

_Atom = jex.Var | jex.Literal


class _Application:
  """A primitive on known values, computed when a result is asked for: most are not, and each costs a dispatch."""

  def __init__(self, eqn: jex.JaxprEqn, values: "Sequence[_Value]") -> None:
    self._eqn, self._values = eqn, values
    self._results: list[np.ndarray | Array] | None = None

  def result(self, number: int) -> np.ndarray | Array:
    waiting = [self]  # not by recursion: a chain may be long
    while waiting:
      one = waiting[-1]
      if one._results is None:
        earlier = [x.of for x in one._values if isinstance(x, _Result) and x.of._results is None]
        if earlier:
          waiting += earlier
          continue
        results = one._eqn.primitive.bind(*map(_computed, one._values), **one._eqn.params)
        one._results = list(results) if one._eqn.primitive.multiple_results else [results]
        one._values = ()
      waiting.pop()
    assert self._results is not None
    return self._results[number]


class _Result(NamedTuple):
  of: _Application
  number: int


_Value = np.ndarray | _Result | None  # None: not known before the run


def _computed(value: _Value) -> Any:
  return value.of.result(value.number) if isinstance(value, _Result) else value


def flops(fn: Callable[..., PyTree], *args: PyTree) -> float:
  """Floating-point operations of one call `fn(*args)`: its matrix products and convolutions.

  A loop counts as often as it runs. Where its bound is traced (`fori_loop(0, steps, ...)`), the bound must follow from
  known values: those of `args` that are concrete and hold at most 64 numbers. A `ShapeDtypeStruct` is unknown. Under
  vmap a loop runs as often as its longest row. Of branches that nothing known chooses from, the dearest counts.

  Args:
    fn: any function that `jax.make_jaxpr` takes.
    *args: pytrees of arrays, numbers or `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: counted operations lie in a loop whose trip count does not follow from known values, or in a function
      that is run in a way not understood here (`shard_map`, `pallas_call`).
  """
  return pricer(fn, *args)(*args)


def pricer(fn: Callable[..., PyTree], *args: PyTree) -> Callable[..., float]:
  """`flops` for many calls whose arguments differ in their known values only: `fn` is traced once, here."""
  walk, _ = _walker(fn, *args)
  return lambda *args: float(walk(*args)[0])


def follower(fn: Callable[..., PyTree], *args: PyTree) -> Callable[..., tuple[float, PyTree]]:
  """`pricer` that also tells what is known of the result: arrays, and a `ShapeDtypeStruct` for what is not.

  Fed back into the arguments it prices a state that changes from call to call, as a count of rounds does.
  """
  walk, shape = _walker(fn, *args)
  shapes, structure = jax.tree.flatten(shape)

  def follow(*args: PyTree) -> tuple[float, PyTree]:
    operations, results = walk(*args)
    known = [s if x is None else np.asarray(_computed(x)) for x, s in zip(results, shapes, strict=True)]
    return float(operations), jax.tree.unflatten(structure, known)

  return follow


def _walker(fn: Callable[..., PyTree], *args: PyTree) -> tuple[Callable[..., tuple[int, list[_Value]]], PyTree]:
  """((*args) -> (operations, what is known of the result's leaves), shapes of the result)."""
  closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)

  def walk(*args: PyTree) -> tuple[int, list[_Value]]:
    leaves = zip(jax.tree.leaves(args), closed.jaxpr.invars, strict=True)
    return _walk(closed, [None if isinstance(x, jax.ShapeDtypeStruct) else _known(x, var) for x, var in leaves])

  return walk, shape


def read_leaves(fn: Callable[..., PyTree], *args: PyTree, argnum: int) -> PyTree:
  """Which leaves of `args[argnum]` the result of `fn(*args)` depends on, found by dead-code elimination.

  A leaf that only passes unchanged into the result is read; one of which only the shape matters is not.

  Args:
    fn: any function that `jax.make_jaxpr` takes.
    *args: pytrees of arrays, numbers or `jax.ShapeDtypeStruct`.
    argnum: the position of the argument asked about.

  Returns:
    pytree of bool, with the structure of `args[argnum]`.
  """
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  start = len(jax.tree.leaves(args[:argnum]))
  leaves, structure = jax.tree.flatten(args[argnum])
  return jax.tree.unflatten(structure, used[start : start + len(leaves)])


def nbytes(tree: PyTree) -> int:
  """Bytes of a pytree of arrays, numbers or `jax.ShapeDtypeStruct`, in its own dtypes and not compressed."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda x: x, tree)))


def bytes_read(fn: Callable[..., PyTree], *args: PyTree, argnum: int) -> int:
  """Bytes of those leaves of `args[argnum]` that `fn` reads; of a `Download`, what the client must be sent."""
  read = jax.tree.leaves(read_leaves(fn, *args, argnum=argnum))
  return nbytes([x for x, needed in zip(jax.tree.leaves(args[argnum]), read, strict=True) if needed])


def _aval(atom: _Atom) -> jax.core.ShapedArray:
  return cast(jax.core.ShapedArray, atom.aval)


def _known(value: Any, atom: _Atom) -> np.ndarray | None:
  """The concrete value of an atom, if it is numbers and few."""
  aval = _aval(atom)
  numbers = any(jax.dtypes.issubdtype(aval.dtype, kind) for kind in (np.number, np.bool_))
  return np.asarray(value, aval.dtype) if numbers and aval.size <= _KNOWN_SIZE else None


def _walk(closed: jex.ClosedJaxpr | jex.Jaxpr, values: Sequence[_Value]) -> tuple[int, list[_Value]]:
  """Operations of a jaxpr on these inputs, and what is known of its outputs."""
  jaxpr, consts = (closed.jaxpr, closed.consts) if isinstance(closed, jex.ClosedJaxpr) else (closed, ())
  known: dict[_Atom, _Value] = {}
  known.update((var, _known(x, var)) for var, x in zip(jaxpr.constvars, consts, strict=False))  # an open one has none
  known.update(zip(jaxpr.invars, values, strict=True))

  def read(atoms: Sequence[_Atom]) -> list[_Value]:
    return [_known(x.val, x) if isinstance(x, jex.Literal) else known.get(x) for x in atoms]

  total = 0
  for eqn in jaxpr.eqns:
    operations, results = _equation(eqn, read(eqn.invars))
    total += operations
    known.update(zip(eqn.outvars, results, strict=True))
  return total, read(jaxpr.outvars)


def _equation(eqn: jex.JaxprEqn, values: list[_Value]) -> tuple[int, list[_Value]]:
  """Operations of one equation, and what is known of its results."""
  name, params = eqn.primitive.name, eqn.params
  if name in _CALLS:
    return _walk(params[_CALLS[name]], values)
  if name == "cond":
    return _cond(params["branches"], values[0], values[1:])
  if name == "scan":
    return _scan(eqn, values)
  if name == "while":
    return _while(params, values)
  unknown: list[_Value] = [None] * len(eqn.outvars)
  size = max((_aval(x).size for x in eqn.outvars), default=0)
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    return 2 * size * math.prod(_aval(eqn.invars[0]).shape[i] for i in contracted), unknown
  if name == "conv_general_dilated":
    kernel, features = _aval(eqn.invars[1]).shape, params["dimension_numbers"].rhs_spec[0]
    return 2 * size * math.prod(n for i, n in enumerate(kernel) if i != features), unknown  # `kernel` is one group's
  if inner := list(jex.jaxprs_in_params(params)):
    if any(_walk(x, [None] * len(x.invars))[0] for x in inner):
      raise ValueError(f"{name}: cannot tell how often the operations of the function that it runs are done")
    return 0, unknown
  if eqn.effects or size > _KNOWN_SIZE or any(x is None for x in values):
    return 0, unknown
  application = _Application(eqn, values)
  return 0, [_Result(application, i) for i in range(len(eqn.outvars))]


def _cond(branches: Sequence[jex.ClosedJaxpr], index: _Value, values: list[_Value]) -> tuple[int, list[_Value]]:
  if index is not None:
    return _walk(branches[int(np.clip(_computed(index), 0, len(branches) - 1))], values)
  return max(_walk(branch, values)[0] for branch in branches), [None] * len(branches[0].jaxpr.outvars)


def _unchanged(body: jex.Jaxpr, constants: int, carry: list[_Value]) -> list[_Value]:
  """What is known of a loop's carry in every trip: the entries that the body hands on as they are."""
  pairs = zip(carry, body.invars[constants:], body.outvars, strict=False)  # a scan's other inputs and outputs follow
  return [value if new is old else None for value, old, new in pairs]


def _scan(eqn: jex.JaxprEqn, values: list[_Value]) -> tuple[int, list[_Value]]:
  body = eqn.params["jaxpr"]

  def whole(outer: Sequence[_Atom], inner: Sequence[_Atom]) -> int:
    return sum(_aval(x).ndim == _aval(y).ndim for x, y in zip(outer, inner, strict=True))

  # Constants, carry and rows go in, carry and rows come out; rows alone have one axis less inside. The parameters
  # that tell the numbers of each differ between versions of JAX.
  size, rows = whole(eqn.outvars, body.jaxpr.outvars), whole(eqn.invars, body.jaxpr.invars)
  constants = rows - size
  carry = _unchanged(body.jaxpr, constants, values[constants:rows])
  operations = _fixed(body.jaxpr)
  if operations is None:
    operations, _ = _walk(body, values[:constants] + carry + [None] * (len(values) - rows))
  return eqn.params["length"] * operations, carry + [None] * (len(eqn.outvars) - size)


_FIXED: weakref.WeakKeyDictionary[jex.Jaxpr, int | None] = weakref.WeakKeyDictionary()


def _fixed(jaxpr: jex.Jaxpr) -> int | None:
  """Operations that follow from shapes alone, walked once; None where a branch or a bound has a say in them."""

  def decided(jaxpr: jex.Jaxpr) -> bool:
    inner = (x for eqn in jaxpr.eqns for x in jex.jaxprs_in_params(eqn.params))
    return any(eqn.primitive.name in ("cond", "while") for eqn in jaxpr.eqns) or any(map(decided, inner))

  if jaxpr not in _FIXED:
    _FIXED[jaxpr] = None if decided(jaxpr) else _walk(jaxpr, [None] * len(jaxpr.invars))[0]
  return _FIXED[jaxpr]


def _while(params: dict[str, Any], values: list[_Value]) -> tuple[int, list[_Value]]:
  cond, body = params["cond_jaxpr"], params["body_jaxpr"]
  split, constants = params["cond_nconsts"], params["body_nconsts"]
  outer, start = values[:split], values[split + constants :]
  carry = _unchanged(body.jaxpr, constants, start)
  once = _walk(body, values[split : split + constants] + carry)[0]
  test = _walk(cond, outer + carry)[0]
  if not once + test:
    return 0, carry  # however often it runs, as the walk of a keyed permutation
  trips = None
  if counted := _counter_and_bound(cond.jaxpr, split, body.jaxpr, constants):
    index, bound = counted
    _, (limit,) = _walk(cond.replace(jaxpr=cond.jaxpr.replace(outvars=[bound])), outer + carry)
    if limit is not None and start[index] is not None:
      first, end = (np.asarray(_computed(x), float) for x in (start[index], limit))
      trips = max(0, math.ceil(np.max(end - first)))
  if trips is None:
    raise ValueError(f"loop {body.jaxpr.debug_info.func_src_info}: its trip count does not follow from known values")
  return trips * once + (trips + 1) * test, carry


def _counter_and_bound(cond: jex.Jaxpr, split: int, body: jex.Jaxpr, constants: int) -> tuple[int, _Atom] | None:
  """Of `while counter < bound: counter += 1`, as `fori_loop` makes it: the counter's place in the carry, the bound."""
  made: dict[_Atom, jex.JaxprEqn] = {var: eqn for jaxpr in (cond, body) for eqn in jaxpr.eqns for var in eqn.outvars}
  test = made.get(cond.outvars[0])
  if test is None or test.primitive.name != "lt" or test.invars[0] not in cond.invars[split:]:
    return None
  index = cond.invars.index(test.invars[0]) - split
  step = made.get(body.outvars[index])
  if step is None or step.primitive.name != "add" or step.invars[0] is not body.invars[constants + index]:
    return None
  by_one = isinstance(step.invars[1], jex.Literal) and step.invars[1].val == 1
  return (index, test.invars[1]) if by_one else None
