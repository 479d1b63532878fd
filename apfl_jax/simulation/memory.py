"""What a run will need of memory, told before it begins, and refused if it is not there."""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from apfl_jax.errors import InputError
from apfl_jax.simulation.staging import Staging


class Need(NamedTuple):
  """A line of the plan.

  Attributes:
    where: 'device', on each of them, or 'host'.
    what: in words.
    bytes: how many.
    by_client: whether it grows with the population.
  """

  where: str
  what: str
  bytes: int
  by_client: bool


class MemoryPlan(NamedTuple):
  """What a run will hold at its fullest.

  Attributes:
    needs: the lines.
    devices: how many devices of this host hold the device lines.
    shared: whether device memory is host memory, as on a CPU.
    before: bytes that this process took at its fullest so far, as when the federation was built.
  """

  needs: tuple[Need, ...]
  devices: int
  shared: bool
  before: int = 0

  @property
  def device(self) -> int:
    """Bytes on each device."""
    return sum(need.bytes for need in self.needs if need.where == "device")

  @property
  def host(self) -> int:
    """Bytes in the memory of this host: on a CPU with the devices' share."""
    own = sum(need.bytes for need in self.needs if need.where == "host")
    return max(own + (self.device * self.devices if self.shared else 0), self.before)

  def __str__(self) -> str:
    """One line."""
    text = lambda where: ", ".join(
      f"{need.what} {human(need.bytes)}" for need in self.needs if need.where == where and need.bytes >= 2**19
    )
    devices = "the device" if self.devices == 1 else f"each of {self.devices} devices"
    return (
      f"memory at its fullest: {human(self.device)} on {devices} ({text('device') or 'each part under 1 MiB'}),"
      f" {human(self.host)} on the host{', devices included' if self.shared else ''} ({text('host')})"
    )


def plan(staging: Staging, rounds: int, keeping: bool = False, trained: bool = False) -> tuple[MemoryPlan, Any]:
  """Compiles the chunk of rounds and adds up what XLA's analysis of it, this process and the run's arrays say.

    device = examples + index, ids and spans + client rows + server and history, seed and settings
             + temporaries and results of the chunk (XLA) + the next chunk's rows, if rows move
    host   = what this process holds by now (Python, the federation, compiled programs) + as much as compiling took,
             for the programs of scoring + tables of client rows + a checkpoint's copy of them + rows being moved;
             or its peak so far (building a federation takes more than keeping it), if that is more

  Args:
    staging: of the run.
    rounds: T, which bounds how many client rows come to exist.
    keeping: whether the run writes checkpoints.
    trained: whether it takes all rounds from another run. Then none are compiled, and the plan has nothing for them
      nor, as what compiling takes is not seen, for the programs of scoring.

  Returns:
    (the plan, `simulator.compile(*staging.shapes())`, or None where `trained`)
  """
  state: Any
  inputs: Any
  state, inputs = staging.shapes()
  federation: Any = inputs.federation
  before = _resident()
  compiled = staging.simulator.compile(state, inputs) if not trained else None
  held = _resident()
  analysis = compiled.memory_analysis() if compiled else None
  moved = 0 if staging.resident else _bytes((state.clients, state.times, federation._replace(store=())))
  if not staging.resident and staging.data_on != "device":
    moved += _bytes(federation.store)
  visited = min(len(staging.times), rounds * staging.cohort_size)
  everyone = staging.resident
  row = _bytes(state.clients) // max(1, staging.size)
  device = (
    ("examples", _bytes((federation.store.images, federation.store.labels)), staging.data_on != "device" and everyone),
    ("index, ids and spans", _bytes((federation.store.index, federation._replace(store=()))), everyone),
    ("client rows", _bytes((state.clients, state.times)), everyone),
    (
      "server and history",
      _bytes(state._replace(clients=(), times=())) + _bytes(inputs._replace(federation=())),
      False,
    ),
    (
      "a chunk of rounds",
      analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes if analysis else 0,
      False,
    ),
    ("the next chunk's rows", moved, False),
  )
  host = (
    ("Python, federation and programs", held, False),
    ("programs of scoring", held - before, False),
    ("client rows", staging.table_bytes(visited), visited == len(staging.times)),
    ("a checkpoint's client rows", visited * row if keeping or trained else 0, visited == len(staging.times)),
    ("rows being moved", 2 * moved, False),
  )
  devices = jax.local_devices()
  needs = [Need("device", *line) for line in device] + [Need("host", *line) for line in host]
  local = len(staging.mesh.local_devices) if staging.mesh else 1
  return MemoryPlan(tuple(needs), local, devices[0].platform == "cpu", peak_resident_bytes()), compiled


def check(plan: MemoryPlan, num_clients: int, limit: int = 0) -> None:
  """Refuses a plan that the machine has no room for.

  Args:
    plan: what is needed.
    num_clients: N of the run.
    limit: bytes that host and each device may take; 0 for what there is.

  Raises:
    InputError: with the number of clients that would fit.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  rooms = [("host", plan.host, limit or _host_room(), plan.shared)]
  if not plan.shared:
    rooms.insert(0, ("device", plan.device, limit or int(stats.get("bytes_limit", 0)), True))
  for where, total, room, with_device in rooms:
    if not room or total <= room:
      continue
    everything = where == "host" and with_device
    counted = [
      (need.bytes * (plan.devices if everything and need.where == "device" else 1), need)
      for need in plan.needs
      if everything or need.where == where
    ]
    growing = sum(size for size, need in counted if need.by_client)
    fixed = total - growing
    fit = int(num_clients * (room - fixed) / growing) if growing and room > fixed else 0
    most = max(counted, key=lambda item: item[0])[1]
    advice = f"--num_clients={fit} would fit" if fit else "no number of clients would fit"
    move = {
      "client rows": "; --client_state=disk and a smaller --cohort_size keep client rows out of memory",
      "a checkpoint's client rows": "; --checkpoint_every=0 needs none",
      "examples": "; --data_on=disk and a smaller --cohort_size keep examples out of memory",
    }.get(most.what, "")
    raise InputError(
      f"memory: the run needs {human(total)} on the {where}, most of it for {most.what}, and"
      f" {'--memory_limit allows' if limit else 'there are'} {human(room)};"
      f" {advice}{move}"
    )


def human(count: float) -> str:
  """Bytes for people."""
  return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _bytes(tree: Any) -> int:
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x.dtype, "itemsize"))


def peak_resident_bytes() -> int:
  """Peak resident memory of this process; asks no device."""
  import resource

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def _resident() -> int:
  """Resident memory of this process now, or its peak where the system does not tell."""
  try:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except (OSError, ValueError):
    return peak_resident_bytes()


def _host_room() -> int:
  """Bytes of this machine, or of the container that this process is in; 0 where neither can be told."""
  try:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (ValueError, OSError, AttributeError):
    return 0
  for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
    try:
      total = min(total, int(Path(path).read_text()))
    except (OSError, ValueError):
      continue
  return total
