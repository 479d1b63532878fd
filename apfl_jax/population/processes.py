"""Availability processes: pure, seeded, looked at pointwise.

Four things are kept apart: *absent* does not start (`present`), *dropped* starts and loses its upload
(`arrives`), *late* trains on an old download (`delay`), *stale* is what its update then is.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from apfl_jax import random
from apfl_jax.types import Array, Availability, Key, Process, PyTree


def _available(ids: Array) -> Availability:
  shape = jnp.shape(ids)
  return Availability(
    present=jnp.ones(shape, bool),
    arrives=jnp.ones(shape, bool),
    delay=jnp.zeros(shape, jnp.int32),
    work=jnp.ones(shape, jnp.float32),
    speed=jnp.ones(shape, jnp.float32),
    gone=jnp.zeros(shape, bool),
    wait=jnp.zeros(shape, jnp.int32),
  )


def _keep(state: PyTree, round: Array, key: Key) -> PyTree:
  del round, key
  return state


def everyone() -> Process:
  """Everyone is present in every round and every upload arrives."""
  return Process(
    init=lambda key: (),
    step=_keep,
    look=lambda state, round, ids, key: _available(ids),
  )


def cold(num_clients: int, rate: Array | float) -> Process:
  """`round(rate * N)` clients, drawn once, never take part: the case in which their classes are lost.

  Source: method 2.2, regime `cold` [O].

  Args:
    num_clients: N; ids run from 0 to N - 1.
    rate: share of clients that is gone, in [0, 1]; may be traced.
  """
  lost = jnp.round(jnp.asarray(rate) * num_clients).astype(jnp.int32)

  def look(state, round, ids, key):
    del round, key
    gone = random.permute(state, ids, num_clients) < lost
    return _available(ids)._replace(present=~gone, gone=gone)

  return Process(init=random.permutation_key, step=_keep, look=look)


def bernoulli(rate: Array | float) -> Process:
  """Each present client loses its upload with probability `rate`, independently in every round.

  Source: method 2.2, regime `bernoulli`: the client trains and its upload is lost, as PFLlib's
  `client_drop_rate` [C].
  """

  def look(state, round, ids, key):
    del state, round
    draw = lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 1.0 - rate)
    return _available(ids)._replace(arrives=jax.vmap(draw)(ids.reshape(-1)).reshape(ids.shape))

  return Process(init=lambda key: (), step=_keep, look=look)


def waiting(steps: Array | int) -> Process:
  """Every client is idle for so many local steps after each upload, until the server answers.

  Source: method 3.3, the server's latency L_r [O].

  Args:
    steps: int32 [], may be traced.
  """

  def look(state, round, ids, key):
    del state, round, key
    return _available(ids)._replace(wait=jnp.full(jnp.shape(ids), steps, jnp.int32))

  return Process(init=lambda key: (), step=_keep, look=look)


def chain(*processes: Process) -> Process:
  """All of them at once: booleans are and-ed (`gone` or-ed), delays and waits add, work and speed multiply."""

  def keys(key):
    return [jax.random.fold_in(key, i) for i in range(len(processes))]

  def init(key):
    return tuple(p.init(k) for p, k in zip(processes, keys(key), strict=True))

  def step(state, round, key):
    return tuple(p.step(s, round, k) for p, s, k in zip(processes, state, keys(key), strict=True))

  def look(state, round, ids, key):
    result = _available(ids)
    for p, s, k in zip(processes, state, keys(key), strict=True):
      a = p.look(s, round, ids, k)
      result = Availability(
        present=result.present & a.present,
        arrives=result.arrives & a.arrives,
        delay=result.delay + a.delay,
        work=result.work * a.work,
        speed=result.speed * a.speed,
        gone=result.gone | a.gone,
        wait=result.wait + a.wait,
      )
    return result

  return Process(init, step, look)


PROCESSES: dict[str, Callable[[int, Array | float], Process]] = {
  "none": lambda num_clients, rate: everyone(),
  "cold": cold,
  "bernoulli": lambda num_clients, rate: bernoulli(rate),
}


def make(names: Sequence[str], num_clients: int, rates: Array, *others: Process) -> Process:
  """The chain of the named processes, each with its own rate, and of others, which change no draw of theirs.

  Args:
    names: of `PROCESSES`.
    num_clients: N.
    rates: float32 [len(names)], may be traced.
    *others: any processes.
  """
  return chain(*(PROCESSES[name](num_clients, rates[i]) for i, name in enumerate(names)), *others)


def start(process: Process, seed: Array | int) -> PyTree:
  """The process's state before round 0."""
  return process.init(random.key(seed, random.Purpose.POPULATION_START))


def step(process: Process, state: PyTree, round: Array, seed: Array | int) -> PyTree:
  """The process's state of `round`, from that of the round before."""
  return process.step(state, round, random.key(seed, random.Purpose.POPULATION, round, 0))


def look(process: Process, state: PyTree, round: Array | int, ids: Array, seed: Array | int) -> Availability:
  """Availability of `ids` in `round`, whose state has been stepped."""
  return process.look(state, jnp.asarray(round), ids, random.key(seed, random.Purpose.POPULATION, round, 1))


def departed(process: Process, seed: Array | int, rounds: Array | int, num_clients: int) -> Array:
  """bool [N]: clients that never took part or left for good, as seen in the last of `rounds` rounds.

  Args:
    process: the population.
    seed: the run's seed; the schedule is a pure function of it, so this can be known before the run.
    rounds: T >= 1, may be traced.
    num_clients: N.
  """
  state = jax.lax.fori_loop(0, rounds, lambda t, s: step(process, s, t, seed), start(process, seed))
  return look(process, state, rounds - 1, jnp.arange(num_clients), seed).gone
