"""The processes that have a name: values of `--dropout`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from apfl_jax.population.processes import (
  arrive,
  bernoulli,
  chain,
  cold,
  diurnal,
  everyone,
  label,
  late,
  markov,
  regional,
)
from apfl_jax.population.traces import trace
from apfl_jax.types import Array, Process, PyTree


class Facts(NamedTuple):
  """What processes read besides their rate; all may be traced.

  Attributes:
    rounds: int32 [], T of the run.
    leave_at: float32 [], share of the rounds after which the leavers of `late` are gone.
    off_rounds: float32 [], mean length of an absence of `markov`, in rounds.
    day_rounds: float32 [], length of a day of `diurnal`, in rounds.
    regions: int32 [], of `regional`.
    label_rank: float32 [N], of `label`, the smallest label that a client holds / (C - 1); () where nobody asks.
    trace: Trace of `trace`; () where nobody asks.
  """

  rounds: Array | int = 40
  leave_at: Array | float = 0.5
  off_rounds: Array | float = 5.0
  day_rounds: Array | float = 24.0
  regions: Array | int = 4
  label_rank: PyTree = ()
  trace: PyTree = ()


class Named(NamedTuple):
  """A process that has a name.

  Attributes:
    make: (num_clients, rate, facts) -> Process.
    text: what it is, in half a line.
    endless: whether at rate 1 no upload would ever arrive.
  """

  make: Callable[[int, Array | float, Facts], Process]
  text: str
  endless: bool = False


FACTS = Facts()
PROCESSES: dict[str, Named] = {
  "none": Named(lambda n, rate, facts: everyone(), "everyone, always"),
  "cold": Named(lambda n, rate, facts: cold(n, rate), "a share of clients is never there"),
  "late": Named(
    lambda n, rate, facts: late(n, rate, jnp.round(facts.leave_at * facts.rounds).astype(jnp.int32)),
    "a share leaves for good",
  ),
  "arrive": Named(lambda n, rate, facts: arrive(n, rate, facts.rounds), "a share joins in the first half of the run"),
  "bernoulli": Named(lambda n, rate, facts: bernoulli(rate), "uploads get lost", endless=True),
  "markov": Named(lambda n, rate, facts: markov(rate, facts.off_rounds), "each client goes and comes back"),
  "label": Named(lambda n, rate, facts: label(rate, facts.label_rank), "who holds small labels is rarely there"),
  "diurnal": Named(lambda n, rate, facts: diurnal(rate, facts.day_rounds), "by the hour of the day", endless=True),
  "regional": Named(lambda n, rate, facts: regional(n, rate, facts.regions), "whole regions are away", endless=True),
  "trace": Named(lambda n, rate, facts: trace(facts.trace), "as a file says, whatever the rate"),
}


def make(names: Sequence[str], num_clients: int, rates: Array, *others: Process, facts: Facts = FACTS) -> Process:
  """The chain of the named processes, each with its own rate, and of others, which change no draw of theirs.

  Args:
    names: of `PROCESSES`.
    num_clients: N.
    rates: float32 [len(names)], may be traced.
    *others: any processes.
    facts: what named processes read besides.
  """
  named = (PROCESSES[name].make(num_clients, rates[i], facts) for i, name in enumerate(names))
  return chain(*named, *others)
