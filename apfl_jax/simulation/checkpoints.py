"""Checkpoints of the whole state with everything measured so far, written atomically by orbax."""

import json
from pathlib import Path
from typing import Any

import jax

from apfl_jax.types import State

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

  def save(self, state: State, record: dict[str, Any]) -> None:
    """Writes the state and a JSON-able record under the number of rounds done."""
    args = self._ocp.args
    items = args.Composite(state=args.StandardSave(state._asdict()), record=args.JsonSave(record))
    self._manager.save(int(state.round), args=items)

  def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
    """The newest readable (state, record), or None. `like` gives shapes and dtypes."""
    args = self._ocp.args
    shapes = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, like._asdict())
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        items = args.Composite(state=args.StandardRestore(shapes), record=args.JsonRestore())
        found = self._manager.restore(step, args=items)
      except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        print(f"checkpoint of round {step} is unreadable and is passed over: {str(error).splitlines()[0]}", flush=True)
        self._manager.delete(step)
      else:
        return State(**found.state), found.record
    return None

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.close()
