"""Chunks of rounds one after another, the rows of each staged while the one before it runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax.simulation.batches import Plan
from apfl_jax.simulation.rounds import ARRIVED, Inputs, RoundMetrics, Simulator
from apfl_jax.simulation.staging import Staging
from apfl_jax.types import State


class Chunks:
  """A run in progress: its state and the inputs that go with it."""

  def __init__(
    self,
    simulator: Simulator,
    staging: Staging,
    state: State,
    inputs: Inputs,
    compiled: Any = None,
    plan: Plan | None = None,
  ):
    """Args: what the state came from, see `Staging.begin`; `simulator.advance` compiled, if it was; of a clock."""
    self.state, self.inputs = state, inputs
    self._simulator, self._staging, self._plan = simulator, staging, plan
    self._advance = compiled or simulator.advance
    # A copy, for the state is donated while its successors are scheduled.
    self._presence = jax.tree.map(jnp.copy, state.population)
    self._scheduled = int(state.round)  # rounds whose cohorts are known
    self._incoming: Any = None

  def run(self, rounds: int, then: int) -> RoundMetrics:
    """The next rounds, at most a chunk of them, and what happened in each; `then` as many will follow, or 0."""
    begin = int(self.state.round)
    if self._scheduled == begin:
      self._incoming = self._gather(self._schedule(rounds))
    self.state, self.inputs = self._staging.swap(self.state, self.inputs, self._incoming)
    # Who comes next is asked before the devices are busy, and what they need is gathered while they are.
    expected = self._schedule(then)
    calls: list[Any] = [np.int32(rounds)] if self._plan is None else self._plan.calls(begin, begin + rounds)
    records = []
    for work in calls:
      self.state, happened = self._advance(self.state, self.inputs, self._simulator.place(work))
      records.append(happened)
    self._incoming = self._gather(expected)
    if self._plan is None:
      return jax.tree.map(lambda x: np.asarray(x)[:rounds], records[0])
    counts = [int(work.count) for work in calls]
    done = [jax.tree.map(lambda x, n=n: np.asarray(x)[:n], r) for n, r in zip(counts, records, strict=True)]
    return _by_round(self._plan, jax.tree.map(lambda *x: np.concatenate(x), *done), begin, begin + rounds)

  def _schedule(self, rounds: int) -> Any:
    """The cohorts of so many more rounds; None where all rows are on the devices anyhow."""
    if self._staging.resident or not rounds:
      return None
    begin = self._scheduled
    self._scheduled += rounds
    if self._plan is not None:
      return self._plan.cohorts(begin, begin + rounds)
    numbers = self._simulator.place((np.int32(begin), np.int32(rounds)))
    self._presence, ids, ok = self._simulator.cohorts(self._presence, self.inputs.seed, self.inputs.settings, *numbers)
    return np.asarray(ids), np.asarray(ok)

  def _gather(self, cohorts: Any) -> Any:
    return None if cohorts is None else self._staging.coming(*cohorts)


def _by_round(plan: Plan, happened: RoundMetrics, begin: int, end: int) -> RoundMetrics:
  """What happened in each batch of some rounds -> in each of the rounds, [rounds, most visits of a round]."""
  ids = np.zeros((end - begin, plan.per_round), np.int32)
  status = np.zeros(ids.shape, np.uint8)
  edges = plan.offsets[begin : end + 1] - plan.offsets[begin]
  for number, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
    there = happened.status[first:last] > 0
    count = np.count_nonzero(there)
    ids[number, :count] = happened.ids[first:last][there]
    status[number, :count] = happened.status[first:last][there]
  return RoundMetrics(np.sum(status > 0, axis=1), np.sum(status == ARRIVED, axis=1), ids, status)  # type: ignore[arg-type]
