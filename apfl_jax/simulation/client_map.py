"""The one way to run a function for many clients: training, personalisation and evaluation all go through it."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from apfl_jax.errors import InputError
from apfl_jax.types import Array, PyTree

AXIS = "clients"
LANES = 8  # sums are kept apart in so many lanes, whatever the number of devices, and added in lane order

ClientFunction = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]  # (shared, one row) -> (to sum, to stack)


def resolve(how: str) -> tuple[str, int]:
  """('sequential' or 'vmap', clients a chunk; 0 for all) from 'auto', 'sequential', 'vmap' or 'vmap:CHUNK'.

  `auto` is sequential on a CPU, where per-client matrix products already fill the cores and absent clients then cost
  nothing (measured: half again as fast as vmap on a small CNN), and vmap elsewhere, which is not measured yet.
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
  """A mesh over all local devices, at most `LANES` of them and a divisor of it; None for a single device."""
  devices = jax.local_devices()
  count = max(d for d in range(1, LANES + 1) if LANES % d == 0 and d <= len(devices))
  return Mesh(np.array(devices[:count]), (AXIS,)) if count > 1 else None


def client_map(fn: ClientFunction, how: str = "auto", mesh: Mesh | None = None) -> Callable[..., tuple[Any, Any]]:
  """Maps one client's function over rows.

  Row r belongs to lane r % LANES and to device r % devices, so a lane never leaves its device and neither the chunk
  nor the number of devices changes the order in which contributions are added.

  Args:
    fn: (shared, row) -> (contribution, output), for one client.
    how: see `resolve`. Sequential is a loop in which absent rows cost nothing; vmap computes and masks them.
    mesh: over the axis `clients`; its size divides `LANES`. None for one device.

  Returns:
    (shared, rows [K, ...], ok bool [K]) -> (the sum of contributions over ok rows, outputs [K, ...] with zeros
    where not ok).
  """
  kind, chunk = resolve(how)
  devices = mesh.size if mesh else 1
  if LANES % devices:
    raise InputError(f"client_map: got a mesh of {devices} devices, accepted are divisors of {LANES}")
  lanes = LANES // devices

  def masked(shared, row, ok):
    return jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), fn(shared, row))

  def local(shared, rows, ok):
    rows, ok = jax.tree.map(lambda x: x[0], (rows, ok))  # this device's, [P, ...]
    count = ok.shape[0]
    shapes = jax.eval_shape(fn, shared, jax.tree.map(lambda x: x[0], rows))
    contribution, output = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums = jax.tree.map(lambda x: jnp.zeros((lanes, *x.shape), x.dtype), contribution)
    if kind == "sequential":

      def one(sums, item):
        row, present, lane = item
        added, out = jax.lax.cond(present, fn, lambda shared, row: (contribution, output), shared, row)
        return jax.tree.map(lambda s, a: s.at[lane].add(a), sums, added), out

      sums, outputs = jax.lax.scan(one, sums, (rows, ok, jnp.arange(count) % lanes))
    else:
      # Whole turns of the lanes in a chunk, unless one chunk holds everything.
      size = count if not chunk or chunk >= count else -(-chunk // lanes) * lanes
      blocks = -(-count // size)
      turns = -(-size // lanes)
      fold = lambda x, n: _pad(x, n * size).reshape(n, size, *x.shape[1:])

      def block(sums, item):
        added, out = jax.vmap(masked, in_axes=(None, 0, 0))(shared, *item)
        turned = jax.tree.map(lambda x: _pad(x, turns * lanes).reshape(turns, lanes, *x.shape[1:]), added)
        for turn in range(turns):
          sums = jax.tree.map(lambda s, t, turn=turn: s + t[turn], sums, turned)
        return sums, out

      sums, outputs = jax.lax.scan(block, sums, jax.tree.map(lambda x: fold(x, blocks), (rows, ok)))
      outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], outputs)
    return jax.tree.map(lambda x: x[None], (sums, outputs))

  def mapped(shared: PyTree, rows: PyTree, ok: Array) -> tuple[PyTree, PyTree]:
    count = ok.shape[0]
    each = -(-count // devices)
    # Dealt like cards: row r goes to device r % devices, at place r // devices.
    deal = lambda x: _pad(x, each * devices).reshape(each, devices, *x.shape[1:]).swapaxes(0, 1)
    rows, ok = jax.tree.map(deal, (rows, ok))
    run = local
    if mesh:
      split, whole = PartitionSpec(AXIS), PartitionSpec()
      run = jax.shard_map(local, mesh=mesh, in_specs=(whole, split, split), out_specs=(split, split), check_vma=False)
    sums, outputs = run(shared, rows, ok)  # [devices, lanes, ...], [devices, each, ...]
    in_order = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(LANES, *x.shape[2:]), sums)
    total = jax.tree.map(lambda x: reduce(jnp.add, [x[lane] for lane in range(LANES)]), in_order)
    return total, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:count], outputs)

  return mapped


def _pad(x: Array, count: int) -> Array:
  return jnp.pad(x, [(0, count - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
