"""When a run was as good as wanted: virtual seconds, bytes or rounds to a target, from the lines of metrics.jsonl."""

from collections.abc import Iterable, Mapping
from typing import Any


def to_target(
  lines: Iterable[Mapping[str, Any]], target: float, *, of: str = "pooled_accuracy", by: str = "virtual_seconds"
) -> float | None:
  """What the first evaluated round had cost that reached the target; None where none did, or where it is not known.

  Args:
    lines: as they are written, a round each.
    target: the least value that is enough, in [0, 1].
    of: the key of what is to reach it.
    by: the key of what it costs: 'virtual_seconds', 'bytes' or 'round'.
  """
  reached = (line for line in lines if line.get(of) is not None and line[of] >= target)
  return next((line.get(by) for line in reached), None)
