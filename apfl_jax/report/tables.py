"""Tables: a run's results, as values and as text for a terminal; any grid of text as Markdown."""

from collections.abc import Sequence
from typing import Any, NamedTuple

GROUPS = (("own test examples", 5), ("pooled test", 2))
COLUMNS = ("all", "dropped", "present", "monopolists", "worst 10 %", "all", "dropped")
PRIOR = (  # under every table of such a run
  "Own test examples are read out with the client's log label prior (--readout=prior), so that prior\n"
  "must be known at test time; pooled ones are read out without it."
)
_OWN_KEYS = ("mean", "dropped", "present", "monopolists", "worst_decile")
_WIDEST = 100
_WIDEST_NAME = 30


class Row(NamedTuple):
  """One model's accuracies.

  Attributes:
    name: which model.
    values: one for each of `COLUMNS`, in [0, 1], or None.
  """

  name: str
  values: list[float | None]


def rows(summary: dict[str, Any]) -> list[Row]:
  """The rows of the table: the global model and, where there are others than it, the personal models.

  Args:
    summary: `summary.json` of a run; what is null or missing there is None here.
  """
  shared = summary.get("global_accuracy") or {}
  personal = summary.get("personal_accuracy") or {}
  pooled = summary.get("pooled_accuracy") or {}
  dropped = pooled.get("personal_dropped")
  # The global model is the same for every client, so dropped ones have its pooled accuracy, if there are such clients.
  shared_pooled = [pooled.get("global_model"), None if dropped is None else pooled.get("global_model")]
  both = [
    Row("global model" if shared else "global model (none)", [shared.get(key) for key in _OWN_KEYS] + shared_pooled),
    Row(
      f"personal models ({summary['algorithm']})",
      [personal.get(key) for key in _OWN_KEYS] + [pooled.get("personal_mean"), dropped],
    ),
  ]
  shown = [[percent(value) for value in row.values] for row in both]
  free = (summary.get("cost") or {}).get("personalize_flops") == 0
  return both[:1] if free and shown[0] == shown[1] and shown[0][0] != percent(None) else both


def one_model(summary: dict[str, Any]) -> bool:
  """Whether the personal models of a run are the global model: made by no computation, with the same accuracies."""
  return len(rows(summary)) == 1


class Grid(NamedTuple):
  """A table of text.

  Attributes:
    header: the names of the columns.
    rows: a cell for each column; a row of one cell is a heading of the rows below it.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[str]]


def markdown(grid: Grid) -> str:
  """The lines of a Markdown table, without a newline at the end."""
  width = len(grid.header)
  filled = [row if len(row) == width else [f"**{row[0]}**", *[""] * (width - 1)] for row in grid.rows]
  escaped = [[cell.replace("|", "\\|") for cell in row] for row in (grid.header, *filled)]
  lines = ["| " + " | ".join(row) + " |" for row in escaped]
  return "\n".join([lines[0], "|" + "---|" * width, *lines[1:]])


def percent(value: float | None, missing: str = "-") -> str:
  """A share in percent with one decimal, or `missing` for None and nan."""
  return missing if value is None or value != value else f"{round(100 * value, 6):.1f}"


def counted(number: int, noun: str) -> str:
  """A number with its noun, e.g. '1 client' or '2,000 clients'."""
  return f"{number:,} {noun}" + ("" if number == 1 else "s")


def absence(name: str, rate: float | None) -> str:
  """A process of availability with its rate, where it reads one and it is known, e.g. 'cold at rate 0.6'."""
  return name if rate is None or name in ("none", "trace") else f"{name} at rate {rate:g}"


def title(summary: dict[str, Any]) -> str:
  """The method on the data set, e.g. 'ap_fl on digits' or 'fedavg with krum on digits'."""
  around = f" with {', '.join(wrappers)}" if (wrappers := summary.get("wrappers")) else ""
  return f"{summary['algorithm']}{around} on {summary['dataset']}"


def table(summary: dict[str, Any]) -> str:
  """The plain-text table that ends a run: test accuracies in percent, a dash where there is none.

  Args:
    summary: `summary.json` of a run, as `experiments.job` writes it.

  Returns:
    Lines of at most 100 characters, without a newline at the end.
  """
  found = rows(summary)
  names = [row.name if len(row.name) <= _WIDEST_NAME else row.name[: _WIDEST_NAME - 4] + "...)" for row in found]
  label = max(map(len, names))
  widths = [max(len(column), 7) for column in COLUMNS]

  def line(name: str, cells: list[str]) -> str:
    return "  ".join([name.ljust(label), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])

  header, start = [" " * label], 0
  for group, size in GROUPS:
    width = sum(widths[start : start + size]) + 2 * (size - 1)
    header.append(f" {group} ".center(width, "-"))
    start += size
  verified = verification(summary)
  setting = f"{title(summary)}, {counted(summary['num_clients'], 'client')}, {counted(summary['rounds'], 'round')}"
  return "\n".join(
    [
      f"Test accuracy in percent: {setting}"[:_WIDEST],
      "  ".join(header),
      line("", list(COLUMNS)),
      *(line(name, [percent(value) for value in row.values]) for name, row in zip(names, found, strict=True)),
      *([PRIOR] if summary.get("readout") == "prior" else []),
      *([f"Held-out classes, {verified}"] if verified else []),
    ]
  )


def verification(summary: dict[str, Any]) -> str:
  """Equal error rates and TAR in percent, in words; empty where nothing was verified."""
  section = summary.get("verification")
  if not section:
    return ""
  models = {"personal models": "personal_mean", "global model": "global_model"}
  both = lambda key: " / ".join(percent(section[name][key]) for name in ("eer", "tar"))
  told = [f"{name} {both(key)}" for name, key in models.items() if section["eer"][key] is not None]
  return f"EER / TAR at FAR {100 * section['far']:g} %: {', '.join(told)}"
