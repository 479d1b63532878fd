"""How many clients run at once, and how a run goes on from round to round."""

from apfl_jax.simulation.client_map import client_map, default_mesh, resolve
from apfl_jax.simulation.cost import Cost, Prices, cost, prices
from apfl_jax.simulation.rounds import Inputs, RoundMetrics, Scores, Simulator, simulator
from apfl_jax.simulation.run import Record, Result, Stopwatch, peak_memory_bytes, run

__all__ = [
  "Cost",
  "Inputs",
  "Prices",
  "Record",
  "Result",
  "RoundMetrics",
  "Scores",
  "Simulator",
  "Stopwatch",
  "client_map",
  "cost",
  "default_mesh",
  "peak_memory_bytes",
  "prices",
  "resolve",
  "run",
  "simulator",
]
