"""Checkpoints of the whole state with everything measured so far, written atomically by orbax.

Of the clients only the rows that exist are kept: a million clients of whom a few were visited make a small checkpoint.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from apfl_jax.errors import InputError
from apfl_jax.simulation.staging import Snapshot
from apfl_jax.types import PyTree, State

_KEPT = 2


class Checkpoints:
  """The checkpoints of one run directory.

  A run killed at any moment continues from the newest complete one; a damaged newest one is passed over, aloud.
  """

  def __init__(self, directory: Path):
    """Args: an absolute path; made if missing."""
    import orbax.checkpoint as ocp  # here: slow to import, and only runs with a directory need it

    self._ocp = ocp
    # Synchronous: the next chunk is given this very state to overwrite.
    options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, enable_async_checkpointing=False)
    self._manager = ocp.CheckpointManager(directory, options=options)

  def save(self, state: State, snapshot: Snapshot, record: dict[str, Any]) -> None:
    """Writes the state, with the clients of `snapshot`, and a JSON-able record under the number of rounds done.

    A damaged checkpoint of that number goes.
    """
    args, step = self._ocp.args, int(state.round)
    if step in self._manager.all_steps():
      self._manager.delete(step)
    items = args.Composite(
      state=args.StandardSave(_tree(state, snapshot)),
      record=args.JsonSave({"visited": len(snapshot.rows), **record}),
    )
    try:
      self._manager.save(step, args=items)
    except (OSError, ValueError, RuntimeError) as error:
      reason = "no space left on device" if "No space left" in str(error) else str(error).splitlines()[0][:120]
      raise InputError(
        f"workdir: the checkpoint of round {step} cannot be written ({reason}); free it or name another"
      ) from error

  def restore(self, like: State) -> tuple[State, Snapshot, dict[str, Any]] | None:
    """The newest readable (state, snapshot, record), or None where there is none yet.

    `like` gives shapes and dtypes, of clients all but the first axis. The state's own `clients` and `times` are ().

    Raises:
      InputError: there are checkpoints and none fits; they are left alone.
    """
    args = self._ocp.args
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        record = dict(self._manager.restore(step, args=args.Composite(record=args.JsonRestore())).record)
        count = record.pop("visited")
        shapes = _tree(like, _snapshot_like(like.clients, count))
        found = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(shapes))).state
      except (ValueError, OSError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
        print(f"checkpoint of round {step} is unreadable and is passed over: {reason}", flush=True)
      else:
        state, snapshot = found["state"], found["snapshot"]
        return State(**state, clients=(), times=()), Snapshot(**snapshot), record  # type: ignore[arg-type]
    if steps:
      raise InputError(
        f"workdir: none of the checkpoints in {self._manager.directory} can be read (see above);"
        " accepted is another folder, or this one without its checkpoints to start anew"
      )
    return None

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.close()


def _tree(state: State, snapshot: Snapshot) -> dict[str, Any]:
  """What is written: the state without its clients, and the rows of those that exist."""
  # As NumPy arrays, which are of no device: a run may go on with another number of them.
  own = {name: part for name, part in state._asdict().items() if name not in ("clients", "times")}
  return {"state": jax.tree.map(_plain, own), "snapshot": snapshot._asdict()}


def _plain(x: Any) -> np.ndarray:
  return np.empty(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else np.asarray(x)


def _snapshot_like(clients: PyTree, count: int) -> Snapshot:
  """The shapes of a snapshot of so many clients."""
  rows = np.zeros(count, np.int32)
  return Snapshot(rows, rows, jax.tree.map(lambda x: np.empty((count, *x.shape[1:]), x.dtype), clients))
