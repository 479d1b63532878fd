"""The one way to run a function for many clients: training, personalisation and evaluation all go through it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apfl_jax.errors import InputError
from apfl_jax.types import Array, PyTree

AXIS = "clients"
LANES = 8  # sums are kept apart in so many lanes, on up to as many devices, and added in an order of lanes
_TURNS = 4  # of a plain vmap: clients lie sorted by work, so few wait for many; more turns would leave a device idle

ClientFunction = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]  # (shared, one row) -> (to sum, to stack)


def resolve(how: str) -> tuple[str, int]:
  """('sequential' or 'vmap', clients a chunk; 0 for a quarter of them) from 'auto', 'sequential', 'vmap', 'vmap:CHUNK'.

  `auto` is sequential on a CPU, where per-client matrix products already fill the cores and absent clients then cost
  nothing, and vmap elsewhere, seven times as fast on a GPU (measured: experiments/results/benchmark.md).
  """
  name, _, chunk = how.partition(":")
  if how == "auto":
    return ("sequential" if jax.default_backend() == "cpu" else "vmap"), 0
  if name == "vmap" and (not chunk or (chunk.isdigit() and int(chunk) > 0)) and how != "vmap:":
    return "vmap", int(chunk or 0)
  if how == "sequential":
    return "sequential", 0
  raise InputError(f"client_map: got {how!r}, accepted are auto, sequential, vmap and vmap:CHUNK with CHUNK >= 1")


def default_mesh() -> Mesh | None:
  """A mesh over the devices of all hosts, as many as `lanes` takes; None for a single one.

  Raises:
    InputError: several hosts with a number of devices that `lanes` does not take, which would leave some out.
  """
  devices = jax.devices()
  count = max(n for n in range(1, len(devices) + 1) if _fits(n))
  if jax.process_count() > 1 and count < len(devices):
    raise InputError(f"devices: {len(devices)} on all hosts, accepted are 1, 2, 4 and multiples of {LANES}")
  return Mesh(np.array(devices[:count]), (AXIS,)) if count > 1 else None


def spread(mesh: Mesh | None) -> Callable[[PyTree], PyTree]:
  """`Task.spread` for a mesh: arrays whose first axis its size divides are split over it, others stay whole."""

  def split(x: Array) -> Array:
    if not mesh or x.shape[0] % mesh.size:
      return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(AXIS)))

  return lambda batch: jax.tree.map(split, batch)


def lanes_of(mesh: Mesh | None) -> int:
  """How many lanes sums are kept in: `LANES`, or one a device where there are more devices.

  Raises:
    InputError: devices that neither divide `LANES` nor are a multiple of it.
  """
  devices = mesh.size if mesh else 1
  if not _fits(devices):
    raise InputError(f"client_map: got a mesh of {devices} devices, accepted are 1, 2, 4 and multiples of {LANES}")
  return max(LANES, devices)


def _fits(devices: int) -> bool:
  return LANES % devices == 0 or devices % LANES == 0


def executed_steps(steps: np.ndarray, how: str, devices: int = 1) -> int:
  """Steps that are computed, masked ones included, for a cohort of clients that need `steps` int [K], as it is dealt.

  What the cohort's largest step counts make others wait for is the difference from `steps.sum()`. The rows are sorted
  as a round sorts them; a row of 0 steps is an absent client.
  """
  kind, chunk = resolve(how)
  steps = -np.sort(-np.asarray(steps))
  total = 0
  for device in range(devices):
    mine = np.pad(steps[device::devices], (0, -(-len(steps) // devices) - len(steps[device::devices])))
    if kind == "sequential":
      total += int(mine.sum())
    else:
      size = _chunk(len(mine), chunk, max(LANES, devices) // devices)
      blocks = np.pad(mine, (0, -len(mine) % size)).reshape(-1, size)
      total += int((blocks.max(axis=1) * size).sum())
  return total


def _chunk(count: int, asked: int, lanes: int) -> int:
  """Rows under one vmap: whole turns of the lanes, unless one chunk holds everything."""
  asked = asked or -(-count // max(1, min(_TURNS, count // lanes)))
  return min(count, -(-asked // lanes) * lanes)


def client_map(fn: ClientFunction, how: str = "auto", mesh: Mesh | None = None) -> Callable[..., tuple[Any, Any]]:
  """Maps one client's function over rows.

  Row r belongs to lane r % lanes and to device r % devices, so a lane never leaves its device and neither the chunk
  nor the number of devices changes the order in which contributions are added.

  Args:
    fn: (shared, row) -> (contribution, output), for one client.
    how: see `resolve`. Sequential is a loop in which absent rows cost nothing; vmap computes and masks them.
    mesh: over the axis `clients`, see `lanes_of`. None for one device.

  Returns:
    (shared, rows [K, ...], ok bool [K]) -> (the sum of contributions over ok rows, outputs [K, ...] with zeros
    where not ok).
  """
  kind, chunk = resolve(how)
  fn = jax.jit(fn, inline=True)  # traced once, for its shapes and for its work
  devices, all_lanes = mesh.size if mesh else 1, lanes_of(mesh)
  lanes = all_lanes // devices

  def masked(shared, row, ok):
    return jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), fn(shared, row))

  def filled(rows, ok):
    """Absent rows as copies of the last present one before them: they then ask for no step that it does not."""
    last = jax.lax.cummax(jnp.where(ok, jnp.arange(ok.shape[0]), 0))
    return jax.tree.map(lambda x: x[last], rows)

  def local(shared, rows, ok):
    rows, ok = jax.tree.map(lambda x: x[0], (rows, ok))  # this device's, [P, ...]
    count = ok.shape[0]
    shapes = jax.eval_shape(fn, shared, jax.tree.map(lambda x: x[0], rows))
    zeros = lambda *axes: jax.tree.map(lambda s: jnp.zeros((*axes, *s.shape), s.dtype), shapes)
    sums, _ = zeros(lanes)
    if kind == "sequential":

      def one(sums, item):
        row, present, lane = item
        added, out = jax.lax.cond(present, fn, lambda *_: zeros(), shared, row)
        return jax.tree.map(lambda s, a: s.at[lane].add(a), sums, added), out

      sums, outputs = jax.lax.scan(one, sums, (rows, ok, jnp.arange(count) % lanes))
    else:
      size = _chunk(count, chunk, lanes)
      blocks = -(-count // size)
      turns = -(-size // lanes)
      fold = lambda x: _pad(x, blocks * size).reshape(blocks, size, *x.shape[1:])

      def block(sums, item):
        compute = jax.vmap(masked, in_axes=(None, 0, 0))
        added, out = jax.lax.cond(jnp.any(item[1]), compute, lambda *_: zeros(size), shared, *item)
        turned = jax.tree.map(lambda x: _pad(x, turns * lanes).reshape(turns, lanes, *x.shape[1:]), added)
        for turn in range(turns):
          sums = jax.tree.map(lambda s, t, turn=turn: s + t[turn], sums, turned)
        return sums, out

      sums, outputs = jax.lax.scan(block, sums, jax.tree.map(fold, (filled(rows, ok), ok)))
      outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], outputs)
    total = jax.tree.map(_folded, sums)
    if mesh:
      total = jax.tree.map(_folded, jax.lax.all_gather(total, AXIS))
    return total, jax.tree.map(lambda x: x[None], outputs)

  def mapped(shared: PyTree, rows: PyTree, ok: Array) -> tuple[PyTree, PyTree]:
    count = ok.shape[0]
    each = -(-count // devices)
    # Dealt like cards: row r goes to device r % devices, at place r // devices.
    deal = lambda x: _pad(x, each * devices).reshape(each, devices, *x.shape[1:]).swapaxes(0, 1)
    rows, ok = jax.tree.map(deal, (rows, ok))
    run = local
    if mesh:
      split, whole = PartitionSpec(AXIS), PartitionSpec()
      run = jax.shard_map(local, mesh=mesh, in_specs=(whole, split, split), out_specs=(whole, split), check_vma=False)
    total, outputs = run(shared, rows, ok)  # [...], [devices, each, ...]
    return total, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:count], outputs)

  return mapped


def _pad(x: Array, count: int) -> Array:
  return jnp.pad(x, [(0, count - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _folded(x: Array) -> Array:
  """The sum over the first axis, halves added until one is left.

  Device d of D holds the lanes d, d + D, d + 2 D and so on, so the halves of all lanes are halves of a device's until
  it has one left: the same additions for any D that divides the lanes, and little to send.
  """
  parts = list(x)
  while len(parts) > 1:
    half = len(parts) // 2
    rest = parts[2 * half :]
    parts = [a + b for a, b in zip(parts[:half], parts[half : 2 * half], strict=True)] + rest
  return parts[0]
