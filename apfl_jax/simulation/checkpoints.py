"""Checkpoints of the whole state with everything measured so far, written atomically by orbax."""

from pathlib import Path
from typing import Any

import jax

from apfl_jax.errors import InputError
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
    """Writes the state and a JSON-able record under the number of rounds done; a damaged one of that number goes."""
    args, step = self._ocp.args, int(state.round)
    if step in self._manager.all_steps():
      self._manager.delete(step)
    items = args.Composite(state=args.StandardSave(state._asdict()), record=args.JsonSave(record))
    try:
      self._manager.save(step, args=items)
    except (OSError, ValueError, RuntimeError) as error:
      reason = "no space left on device" if "No space left" in str(error) else str(error).splitlines()[0][:120]
      raise InputError(
        f"workdir: the checkpoint of round {step} cannot be written ({reason}); free it or name another"
      ) from error

  def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
    """The newest readable (state, record), or None where there is none yet. `like` gives shapes and dtypes.

    Raises:
      InputError: there are checkpoints and none fits; they are left alone.
    """
    args = self._ocp.args
    shapes = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, like._asdict())
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        items = args.Composite(state=args.StandardRestore(shapes), record=args.JsonRestore())
        found = self._manager.restore(step, args=items)
      except (ValueError, OSError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
        print(f"checkpoint of round {step} is unreadable and is passed over: {reason}", flush=True)
      else:
        return State(**found.state), found.record
    if steps:
      raise InputError(
        f"workdir: none of the checkpoints in {self._manager.directory} can be read by this version;"
        " accepted is another folder, or this one without its checkpoints to start anew"
      )
    return None

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.close()
