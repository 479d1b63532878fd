"""Chunks of rounds one after another, the rows of each staged while the one before it runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apfl_jax.simulation.rounds import Inputs, RoundMetrics, Simulator
from apfl_jax.simulation.staging import Staging
from apfl_jax.types import State


class Chunks:
  """A run in progress: its state and the inputs that go with it."""

  def __init__(self, simulator: Simulator, staging: Staging, state: State, inputs: Inputs, compiled: Any = None):
    """Args: what the state came from, see `Staging.begin`; `simulator.advance` compiled, if it was."""
    self.state, self.inputs = state, inputs
    self._simulator, self._staging = simulator, staging
    self._advance = compiled or simulator.advance
    # A copy, for the state is donated while its successors are scheduled.
    self._presence = jax.tree.map(jnp.copy, state.population)
    self._scheduled = int(state.round)  # rounds whose cohorts are known
    self._incoming: Any = None

  def run(self, rounds: int, then: int) -> RoundMetrics:
    """The next rounds, at most a chunk of them, and what happened in each; `then` as many will follow, or 0."""
    if self._scheduled == int(self.state.round):
      self._incoming = self._gather(self._schedule(rounds))
    self.state, self.inputs = self._staging.swap(self.state, self.inputs, self._incoming)
    # Who comes next is asked before the devices are busy, and what they need is gathered while they are.
    expected = self._schedule(then)
    self.state, happened = self._advance(self.state, self.inputs, self._simulator.place(np.int32(rounds)))
    self._incoming = self._gather(expected)
    return jax.tree.map(lambda x: np.asarray(x)[:rounds], happened)

  def _schedule(self, rounds: int) -> Any:
    """The cohorts of so many more rounds; None where all rows are on the devices anyhow."""
    if self._staging.resident or not rounds:
      return None
    numbers = self._simulator.place((np.int32(self._scheduled), np.int32(rounds)))
    self._presence, ids, ok = self._simulator.schedule(self._presence, self.inputs.seed, self.inputs.settings, *numbers)
    self._scheduled += rounds
    return np.asarray(ids), np.asarray(ok)

  def _gather(self, cohorts: Any) -> Any:
    return None if cohorts is None else self._staging.coming(*cohorts)
