"""How many clients run at once, and how a run goes on from round to round."""

from apfl_jax.simulation import batches, schedule
from apfl_jax.simulation.chunks import Chunks
from apfl_jax.simulation.client_map import client_map, default_mesh, executed_steps, resolve, spread
from apfl_jax.simulation.contract import Outline, outline
from apfl_jax.simulation.cost import Cost, PerClient, Prices, cost, cost_per_client, prices, traffic
from apfl_jax.simulation.memory import MemoryPlan, check, peak_resident_bytes, plan
from apfl_jax.simulation.rounds import Inputs, RoundMetrics, Scores, Simulator, simulator
from apfl_jax.simulation.run import Record, Result, Stopwatch, peak_memory_bytes, run
from apfl_jax.simulation.schedule import CLOCKS
from apfl_jax.simulation.staging import PLACES, Snapshot, Staging

__all__ = [
  "CLOCKS",
  "PLACES",
  "Chunks",
  "Cost",
  "Inputs",
  "MemoryPlan",
  "Outline",
  "PerClient",
  "Prices",
  "Record",
  "Result",
  "RoundMetrics",
  "Scores",
  "Simulator",
  "Snapshot",
  "Staging",
  "Stopwatch",
  "batches",
  "check",
  "client_map",
  "cost",
  "cost_per_client",
  "default_mesh",
  "executed_steps",
  "outline",
  "peak_memory_bytes",
  "peak_resident_bytes",
  "plan",
  "prices",
  "resolve",
  "run",
  "schedule",
  "simulator",
  "spread",
  "traffic",
]
