"""Availability processes: pure, seeded, looked at pointwise.

Four things are kept apart: *absent* does not start (`present`), *dropped* starts and loses its upload
(`arrives`), *late* trains on an old download (`delay`), *stale* is what its update then is.

What a client is for the whole run (whether it leaves, its time zone, its region) comes from the key that a process
starts with, or a permutation made of it; what happens in a round from that round's key. No process here does work that
grows with N, nor keeps a state that does.
"""

import jax
import jax.numpy as jnp

from apfl_jax import random
from apfl_jax.types import Array, Availability, Key, Process, PyTree


def available(ids: Array) -> Availability:
  """Everyone there, nothing lost, nothing late."""
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


def keep(state: PyTree, round: Array, key: Key) -> PyTree:
  """The `step` of a process whose state stays as it was."""
  del round, key
  return state


def _uniform(key: Key, ids: Array) -> Array:
  """float32 [...] in [0, 1), one for each of the ids int32 [...], whoever else is asked about."""
  return jnp.vectorize(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(ids)


def everyone() -> Process:
  """Everyone is present in every round and every upload arrives."""
  return Process(
    init=lambda key: (),
    step=keep,
    look=lambda state, round, ids, key: available(ids),
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
    return available(ids)._replace(present=~gone, gone=gone)

  return Process(init=random.permutation_key, step=keep, look=look)


def late(num_clients: int, rate: Array | float, leave: Array | int) -> Process:
  """`round(rate * N)` clients, drawn once, take part before round `leave` and never again.

  Classes that they alone hold are seen once and then left: the case that tests forgetting. Source: method 2.2, regime
  `late` [O].

  Args:
    num_clients: N.
    rate: share of clients that leaves, in [0, 1]; may be traced.
    leave: int32 [], t_d, the first round without them; may be traced.
  """
  leavers = jnp.round(jnp.asarray(rate) * num_clients).astype(jnp.int32)

  def look(state, round, ids, key):
    del key
    gone = (random.permute(state, ids, num_clients) < leavers) & (round >= leave)
    return available(ids)._replace(present=~gone, gone=gone)

  return Process(init=random.permutation_key, step=keep, look=look)


def arrive(num_clients: int, rate: Array | float, rounds: Array | int) -> Process:
  """`round(rate * N)` clients, drawn once, join at an even pace in rounds 1 to `rounds // 2`, and then stay.

  Which of these rounds is a client's own is uniform over them [O].

  Args:
    num_clients: N.
    rate: share of clients that joins, in [0, 1]; may be traced.
    rounds: T of the run; may be traced. In a run of one round everyone is there.
  """
  joiners = jnp.round(jnp.asarray(rate) * num_clients).astype(jnp.int32)
  last = jnp.asarray(rounds) // 2

  def look(state, round, ids, key):
    del key
    rank = random.permute(state, ids, num_clients)
    share = rank / jnp.maximum(joiners, 1)
    joins = jnp.minimum(1 + jnp.floor(share * last).astype(jnp.int32), last)
    return available(ids)._replace(present=(rank >= joiners) | (round >= joins))

  return Process(init=random.permutation_key, step=keep, look=look)


def markov(rate: Array | float, off_rounds: Array | float) -> Process:
  """Each client is an on/off Markov chain in its stationary law: away with probability `rate`, for L rounds on average.

  A client comes back with probability 1 / L and leaves with probability rate / (L (1 - rate)). Their sum r is the
  chance with which a round forgets the past: with probability r the state is drawn anew, away with probability `rate`,
  else it stays. So a client's state is what it drew at its last such round, which `look` finds by going back, about
  1 / r rounds: no table of N states, no work for those whom nobody asks about. Source: method 2.2, regime `markov` [O].

  Args:
    rate: stationary probability of absence, in [0, 1 - 1 / L]; at its end all rounds are independent. May be traced.
    off_rounds: L >= 1, mean length of an absence in rounds; may be traced.
  """
  anew = 1.0 / (off_rounds * (1.0 - jnp.asarray(rate)))

  def look(state, round, ids, key):
    del key  # of this round alone
    key = jax.random.wrap_key_data(state)

    def away(client):
      own = jax.random.fold_in(key, client)

      def back(carry):
        t, _, _ = carry
        change, place = jax.random.uniform(jax.random.fold_in(own, t), (2,))
        return t - 1, (change < anew) | (t == 0), place < rate

      start = jnp.asarray(round, jnp.int32), jnp.asarray(False), jnp.asarray(False)
      return jax.lax.while_loop(lambda carry: ~carry[1], back, start)[2]

    return available(ids)._replace(present=~jnp.vectorize(away)(ids))

  return Process(init=jax.random.key_data, step=keep, look=look)


def label(rate: Array | float, rank: Array) -> Process:
  """Who holds small labels is rarely there: present with probability 1 - rate * (1 - rank), independently each round.

  MIFA's adversarial availability p_min + (p_max - p_min) * min(labels) / (C - 1), with p_min = 1 - rate and p_max = 1.
  It tells clients apart as far as their smallest labels differ: under `pathological` much, where all hold all classes
  not at all. Source: method 2.2 [C]; that each round is drawn anew and p_max is 1 [O].

  Args:
    rate: absence of the clients that hold class 0, in [0, 1]; may be traced.
    rank: float32 [N] in [0, 1], the smallest label that a client holds for training / (C - 1).
  """

  def look(state, round, ids, key):
    del state, round
    return available(ids)._replace(present=_uniform(key, ids) < 1.0 - rate * (1.0 - rank[ids]))

  return Process(init=lambda key: (), step=keep, look=look)


def diurnal(rate: Array | float, day_rounds: Array | float) -> Process:
  """The chance of absence is a sine over the day around its mean `rate`, each client in a time zone of its own.

  Absent with probability rate + min(rate, 1 - rate) * sin(2 pi (round / day_rounds + zone)), drawn anew each round; the
  zone is uniform in [0, 1), drawn once. Up to a rate of a half a client's best hour has no absence at all [O].

  Args:
    rate: mean absence, in [0, 1]; may be traced.
    day_rounds: length of a day in rounds, above 0; may be traced.
  """
  swing = jnp.minimum(rate, 1.0 - jnp.asarray(rate))

  def look(state, round, ids, key):
    zone = _uniform(jax.random.wrap_key_data(state), ids)
    hour = jnp.mod(jnp.asarray(round, jnp.float32), day_rounds) / day_rounds
    away = rate + swing * jnp.sin(2 * jnp.pi * (hour + zone))
    return available(ids)._replace(present=_uniform(key, ids) >= away)

  return Process(init=jax.random.key_data, step=keep, look=look)


def regional(num_clients: int, rate: Array | float, regions: Array | int) -> Process:
  """Clients live in regions of equal size, and in each round a region is away as a whole with probability `rate`.

  Absences of clients of a region are one event, a shared cause; regions and rounds are independent [O].

  Args:
    num_clients: N.
    rate: probability of absence, in [0, 1]; may be traced.
    regions: int32 [] >= 1; may be traced.
  """

  def look(state, round, ids, key):
    del round
    region = random.permute(state, ids, num_clients) % regions
    return available(ids)._replace(present=_uniform(key, region) >= rate)

  return Process(init=random.permutation_key, step=keep, look=look)


def bernoulli(rate: Array | float) -> Process:
  """Each present client loses its upload with probability `rate`, independently in every round.

  Source: method 2.2, regime `bernoulli`: the client trains and its upload is lost, as PFLlib's
  `client_drop_rate` [C].
  """

  def look(state, round, ids, key):
    del state, round
    return available(ids)._replace(arrives=_uniform(key, ids) < 1.0 - rate)

  return Process(init=lambda key: (), step=keep, look=look)


def waiting(steps: Array | int) -> Process:
  """Every client is idle for so many local steps after each upload, until the server answers.

  Source: method 3.3, the server's latency L_r [O].

  Args:
    steps: int32 [], may be traced.
  """

  def look(state, round, ids, key):
    del state, round, key
    return available(ids)._replace(wait=jnp.full(jnp.shape(ids), steps, jnp.int32))

  return Process(init=lambda key: (), step=keep, look=look)


SPEEDS = ("constant", "uniform", "lognormal", "pareto")


def speeds(law: str, spread: Array | float) -> Process:
  """Each client's speed, drawn once, as a factor with mean 1.

  With s = `spread`, u uniform in (0, 1], z standard normal:
    constant: 1.
    uniform: 1 + s (1 - 2 u), s < 1.
    lognormal: exp(s z - s^2 / 2); s is the standard deviation of its logarithm.
    pareto: (1 + s) u^s. The time that a step takes, its inverse, has a Pareto law with tail index 1 / s: a few clients
      are very slow, none is much faster than the mean; from s = 1 on their mean time is infinite.

  Args:
    law: one of `SPEEDS`.
    spread: s >= 0, 0 being constant; may be traced.
  """

  def look(state, round, ids, key):
    del round, key
    key = jax.random.wrap_key_data(state)
    if law == "uniform":
      speed = 1.0 + spread * (2.0 * _uniform(key, ids) - 1.0)
    elif law == "lognormal":
      z = jnp.vectorize(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(ids)
      speed = jnp.exp(spread * z - spread**2 / 2)
    elif law == "pareto":
      speed = (1.0 + spread) * (1.0 - _uniform(key, ids)) ** spread
    else:
      speed = jnp.ones(jnp.shape(ids))
    return available(ids)._replace(speed=speed)

  return Process(init=jax.random.key_data, step=keep, look=look)


def chain(*processes: Process) -> Process:
  """All of them at once: booleans are and-ed (`gone` or-ed), delays and waits add, work and speed multiply."""

  def keys(key):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(processes)))

  def init(key):
    return tuple(p.init(k) for p, k in zip(processes, keys(key), strict=True))

  def step(state, round, key):
    return tuple(p.step(s, round, k) for p, s, k in zip(processes, state, keys(key), strict=True))

  def look(state, round, ids, key):
    result = available(ids)
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
