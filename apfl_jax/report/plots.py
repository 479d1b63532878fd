"""The figures of a run, and of a comparison of methods.

One colour a group of clients and one line style a model, in all figures; the colours are Okabe and Ito's, told apart by
people who do not see red and green. Every figure of a run is a function that draws onto an empty figure and returns
False if the run left nothing for it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from apfl_jax import metrics
from apfl_jax.algorithms import GROUPS
from apfl_jax.algorithms.ap_fl.interpolation import STARTED
from apfl_jax.errors import InputError
from apfl_jax.report import tables
from apfl_jax.report.run import Run

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

DROPPED, PRESENT, ALL = "#D55E00", "#0072B2", "#444444"
_COLORS = (PRESENT, DROPPED, "#009E73", "#CC79A7", ALL, "#E69F00")  # of groups of methods
_LOST, _BROKEN, _ABSENT, _GRID = "#F0C64A", "#5B2333", "#ECECEC", "#DDDDDD"
_STYLE: dict[Any, Any] = {
  "font.family": "DejaVu Sans",
  "font.size": 10,
  "axes.titlesize": 11,
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.axisbelow": True,
  "axes.edgecolor": "#777777",
  "grid.color": _GRID,
  "legend.frameon": False,
  "hatch.linewidth": 1.5,
  "text.parse_math": False,  # a class may be called "$"
}
_FAR = (7, 12, 20, 30, 45, 60, 80, 110, 150)  # of a name from its point, in typographic points
_MANY = 100  # clients in a figure, at most
_LABELLED = 40  # rows or columns that each get a label, at most


def draw(run: Run) -> dict[str, bytes]:
  """Draws what there is to draw.

  Args:
    run: the run.

  Returns:
    PNG files by the name of the figure, a key of `FIGURES`.

  Raises:
    InputError: matplotlib is not installed.
  """
  drawn = {}
  with _styled() as new:
    for name, onto in FIGURES.items():
      figure = new()
      if onto(figure, run):
        drawn[name] = _png(figure)
  return drawn


class Point(NamedTuple):
  """A method in `compare`.

  Attributes:
    name: the method.
    group: what gives it its colour and marker.
    x: values in [0, 1], a run each.
    y: values in [0, 1], of the same runs.
  """

  name: str
  group: str
  x: Sequence[float]
  y: Sequence[float]


def compare(points: Sequence[Point], xlabel: str, ylabel: str) -> bytes:
  """A PNG with a point for each method at its means, bars of one standard deviation, its name beside it.

  Raises:
    InputError: matplotlib is not installed.
  """
  with _styled() as new:
    figure = new()
    figure.set_size_inches(8.5, max(4.5, 0.17 * len(points) + 1.5))
    axes = figure.subplots()
    groups = dict.fromkeys([*GROUPS, *(point.group for point in points)])  # so that a group looks the same everywhere
    looks = {group: (_COLORS[i % len(_COLORS)], "osD^vP"[i % 6]) for i, group in enumerate(groups)}
    means = 100 * np.array([[np.mean(point.x), np.mean(point.y)] for point in points])
    deviations = 100 * np.array(
      [[np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in (point.x, point.y)] for point in points]
    )
    labelled = set()
    for point, (x, y), (dx, dy) in zip(points, means, deviations, strict=True):
      color, marker = looks[point.group]
      bars: dict[str, Any] = {"xerr": dx, "yerr": dy, "elinewidth": 0.8, "alpha": 0.85} if len(point.x) > 1 else {}
      label = point.group if point.group not in labelled else None
      labelled.add(point.group)
      axes.errorbar(x, y, fmt=marker, color=color, ms=6, mec="white", label=label, **bars)
    axes.margins(0.08)  # room for names
    axes.set(xlabel=f"{xlabel} (%)", ylabel=f"{ylabel} (%)")
    axes.grid()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=6, fontsize=9)
    _name_points(axes, [point.name for point in points], [looks[point.group][0] for point in points], means, deviations)
    return _png(figure)


def _name_points(
  axes: Axes, names: Sequence[str], colors: Sequence[str], means: np.ndarray, deviations: np.ndarray
) -> None:
  """Names beside points, which lie at means [P, 2] and have bars of deviations [P, 2] to both sides.

  One name after another takes the place around its point that is near and covers little; a line leads to those that
  are not right beside it.
  """
  figure = axes.get_figure(root=True)
  assert figure is not None
  figure.draw_without_rendering()  # where points are is known once things are laid out
  pixels = figure.dpi / 72  # lengths below are in typographic points, boxes are [left, bottom, right, top]
  at, low, high = (axes.transData.transform(data) / pixels for data in (means, means - deviations, means + deviations))
  frame = np.array(axes.get_window_extent().extents) / pixels
  markers = np.concatenate([at - 4, at + 4], axis=1)
  across = np.stack([low[:, 0], at[:, 1] - 1, high[:, 0], at[:, 1] + 1], axis=1)
  upright = np.stack([at[:, 0] - 1, low[:, 1], at[:, 0] + 1, high[:, 1]], axis=1)
  placed = np.empty((0, 4))
  far, turn = (grid.reshape(-1, 1) for grid in np.meshgrid(_FAR, np.pi / 12 * np.arange(24)))
  way = np.concatenate([np.cos(turn), np.sin(turn)], axis=1)
  for name, color, mean, point in zip(names, colors, means, at, strict=True):
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
    label = axes.annotate(name, mean, (0, 0), textcoords="offset points", **look)
    half = np.array(label.get_window_extent().size) / pixels / 2 + 1
    offset = way * (far + half)
    boxes = np.concatenate([point + offset - half, point + offset + half], axis=1)
    line = point + np.linspace(0, 1, 12)[:, None, None] * offset
    crossed = sum(_overlaps(np.tile(part, 2), placed) for part in line)
    outside = ((boxes[:, :2] < frame[:2]) | (boxes[:, 2:] > frame[2:])).any(1)
    covered = _overlaps(boxes, np.concatenate([markers, placed]))
    barred = _overlaps(boxes, np.concatenate([across, upright]))
    best = int(np.argmin(far[:, 0] + 1000 * outside + 300 * covered + 40 * (crossed > 0) + 12 * barred))
    label.set_position(tuple(offset[best]))
    placed = np.concatenate([placed, boxes[[best]]])
    if far[best, 0] > _FAR[0]:
      arrow = {"arrowstyle": "-", "color": "#999999", "lw": 0.5, "shrinkA": 0, "shrinkB": 3}
      axes.annotate("", mean, tuple(way[best] * far[best]), textcoords="offset points", arrowprops=arrow)


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
  """How many of the others [O, 4] each box overlaps, [B, 4] -> [B]."""
  a, b = boxes[:, None], others[None]
  return ((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(-1).sum(1)


class Front(NamedTuple):
  """A method in `fronts`.

  Attributes:
    name: the method.
    x: in [0, 1], of each variant.
    y: in [0, 1].
    best: whether no other variant of the method beats it in both.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]
  best: Sequence[bool]


def fronts(methods: Sequence[Front], xlabel: str, ylabel: str) -> bytes:
  """A PNG with a line through the best variants of each method; the others are pale points.

  What is more than 5 points below the best y would hide how the rest differ; a line of text counts it.

  Raises:
    InputError: matplotlib is not installed.
  """
  with _styled() as new:
    figure = new()
    figure.set_size_inches(8.5, 5.5)
    axes = figure.subplots()
    for i, method in enumerate(methods):
      color, marker = _COLORS[i % len(_COLORS)], "osD^vPX<>*"[i % 10]
      x, y, best = 100 * np.asarray(method.x), 100 * np.asarray(method.y), np.asarray(method.best, bool)
      order, style = np.argsort(x[best]), ("-", "--", ":")[i // len(_COLORS) % 3]
      axes.plot(x[~best], y[~best], marker, color=color, ms=4, alpha=0.35)
      look: dict[str, Any] = {"marker": marker, "color": color, "ms": 6, "lw": 1.5}
      axes.plot(x[best][order], y[best][order], style, label=method.name, **look)
    every = 100 * np.concatenate([np.asarray(method.y) for method in methods])
    low = max(every.min(), every.max() - 5)
    axes.set(xlabel=f"{xlabel} (%)", ylabel=f"{ylabel} (%)", ylim=(low - 0.3, every.max() + 0.3))
    if below := int(np.sum(every < low)):
      axes.set_title(f"{below} more below {low:.0f} %", loc="left", fontsize=9)
    axes.grid()
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9)
    return _png(figure)


class Curve(NamedTuple):
  """A line in a panel of `curves`.

  Attributes:
    name: what gives it its colour and marker; curves of one name are a run each.
    x: ascending.
    y: of the same length.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]


class Panel(NamedTuple):
  """What `curves` shows side by side.

  Attributes:
    title: above it.
    xlabel: with its unit.
    ylabel: with its unit.
    curves: its lines.
    log: whether x is logarithmic.
    level: y of a dotted line; None for none.
    spans: (from, to) in x of periods, by their names.
  """

  title: str
  xlabel: str
  ylabel: str
  curves: Sequence[Curve]
  log: bool = False
  level: float | None = None
  spans: Mapping[str, tuple[float, float]] = {}


def curves(panels: Sequence[Panel]) -> bytes:
  """A PNG of panels side by side: a thick line for each name, the mean of its runs, which are thin beside it.

  A single run, and runs of different length, have no mean: all are drawn alike.

  Raises:
    InputError: matplotlib is not installed.
  """
  with _styled() as new:
    figure = new()
    figure.set_size_inches(4.6 * len(panels), 4.2)
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
      for name in dict.fromkeys(curve.name for curve in panel.curves):
        i, some = names.index(name), [curve for curve in panel.curves if curve.name == name and len(curve.x)]
        look: dict[str, Any] = {"color": _COLORS[i % len(_COLORS)], "ls": ("-", "--", ":")[i // len(_COLORS) % 3]}
        mean = mean_curve(some)
        for number, curve in enumerate(some):
          label = name if number == 0 and mean is None else None
          axes.plot(curve.x, curve.y, lw=0.7 if mean else 1.4, alpha=0.3 if mean else 0.85, label=label, **look)
        if mean:
          axes.plot(mean.x, mean.y, lw=2.2, label=name, **look)
      for number, (name, (start, end)) in enumerate(panel.spans.items()):
        axes.axvspan(start, end, color=_ABSENT, alpha=(0.0, 0.8)[number % 2], lw=0)
        axes.text((start + end) / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
      if panel.level is not None:
        axes.axhline(panel.level, color=ALL, ls=":", lw=1)
      axes.set_title(panel.title, pad=18 if panel.spans else None)
      axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, xscale="log" if panel.log else "linear")
      if panel.log:
        axes.xaxis.set_major_formatter("{x:g}")  # powers of ten are set as mathematics
        axes.xaxis.set_minor_formatter("")
      axes.grid(axis="y")
      if panel.curves:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8)
    return _png(figure)


def mean_curve(some: Sequence[Curve]) -> Curve | None:
  """Of several runs with as many points, measured in the same rounds at different times: the mean point by point."""
  if len(some) < 2 or len({len(curve.x) for curve in some}) != 1:
    return None
  mean = lambda values: np.mean(np.asarray(values, float), axis=0).tolist()
  return Curve(some[0].name, mean([curve.x for curve in some]), mean([curve.y for curve in some]))


@contextlib.contextmanager
def _styled() -> Iterator[Callable[[], Figure]]:
  """Within it, figures look alike, whatever a notebook has set; gives what makes an empty one."""
  try:
    import matplotlib
    from matplotlib.figure import Figure
  except ImportError as error:
    raise InputError("a report needs matplotlib: pip install 'apfl_jax[report]'") from error
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    yield lambda: Figure(layout="constrained")


def _png(figure: Figure) -> bytes:
  file = io.BytesIO()
  figure.savefig(file, format="png", dpi=150, facecolor="white", bbox_inches="tight")
  return file.getvalue()


def _curves(figure: Figure, run: Run) -> bool:
  """Accuracy over rounds: on clients' own test examples by group, and on the pooled test set."""
  rounds = np.array([line["round"] for line in run.metrics])

  def plot(axes: Axes, key: str, color: str, style: str, label: str, size: float = 7) -> bool:
    values = 100 * np.array([np.nan if line.get(key) is None else line[key] for line in run.metrics], float)
    known = ~np.isnan(values)
    if known.any():
      # Personal models are often scored once, at the end: a lone point must tell itself from the global model's.
      marker, grown = ("D", size) if style == "-" else ("o", 0.7 * size)
      look: dict[str, Any] = {"marker": marker, "ms": grown, "mfc": "none", "mew": 1.5} if known.sum() <= 25 else {}
      line = style if known.sum() > 1 else ""
      axes.plot(rounds[known], values[known], ls=line, color=color, lw=1.8, label=label, clip_on=False, **look)
    return bool(known.any())

  models = [
    ("personal", "-", "personal_pooled_accuracy", "personal, mean"),
    ("global", ":", "pooled_accuracy", "global"),
  ]
  if tables.one_model(run.summary):
    del models[0]
  own, pooled = figure.subplots(1, 2, sharex=True, sharey=True, width_ratios=[3, 2])
  # Hollow, each inside the one before it: where groups score alike all can be seen.
  groups = (("", ALL, "all clients", 12), ("_dropped", DROPPED, "dropped", 8.5), ("_present", PRESENT, "present", 5))
  found = [
    plot(own, f"{model}_accuracy{group}", color, style, f"{model}, {name}", size)
    for model, style, _, _ in models
    for group, color, name, size in groups
  ]
  found += [plot(pooled, key, ALL, style, label) for _, style, key, label in models]
  if not any(found):
    return False
  figure.set_size_inches(9, 4.2)
  own.set(title="Own test examples", ylabel="accuracy (%)", ylim=(0, 102), xlim=(0, 1.02 * rounds.max()))
  pooled.set(title="Pooled test set")
  for axes in (own, pooled):
    axes.set_xlabel("round")
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.grid(axis="y")
    if axes.lines:
      axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9, labelspacing=0.9)
    else:
      axes.text(0.5, 0.5, "not evaluated", transform=axes.transAxes, ha="center", color="#777777")
  return True


def _time(figure: Figure, run: Run) -> bool:
  """Accuracy over virtual time, and how stale uploads were."""
  told = run.summary.get("time")
  if not told:
    return False
  figure.set_size_inches(9, 3.6)
  curve, bars = figure.subplots(1, 2, width_ratios=[3, 2])
  own = "global" if tables.one_model(run.summary) else "personal"
  for key, style, label in (
    (f"{own}_accuracy", "-", f"{own}, own tests"),
    ("pooled_accuracy", ":", "global, pooled"),
  ):
    points = [(line["virtual_seconds"], 100 * line[key]) for line in run.metrics if line.get(key) is not None]
    if points:
      marker = "" if len(points) > 25 else "D" if style == "-" else "o"
      curve.plot(*zip(*points, strict=True), style, color=ALL, marker=marker, ms=5, mec="white", lw=1.8, label=label)
  curve.set(title="Accuracy over virtual time", xlabel="virtual seconds", ylabel="accuracy (%)", ylim=(0, 102))
  curve.set_xlim(0, 1.02 * told["virtual_seconds"])
  curve.grid(axis="y")
  if curve.lines:
    curve.legend(loc="lower right", fontsize=9)
  edges, counts = np.array(told["staleness"]["edges"]), np.array(told["staleness"]["counts"])
  bars.bar(edges[:-1], counts, np.diff(edges), align="edge", color=PRESENT, edgecolor="white", lw=0.5)
  bars.set(title="Staleness of uploads", xlabel="uploads aggregated since the download", ylabel="uploads")
  bars.locator_params(axis="x", integer=True, nbins=6)
  bars.grid(axis="y")
  return True


def marks_global(run: Run) -> bool:
  """Whether the bars of clients have a mark each: where there is a global model that they do not show themselves."""
  return not (tables.one_model(run.summary) or np.isnan(run.clients.global_accuracy).all())


def _clients(figure: Figure, run: Run) -> bool:
  """A bar a client, dropped ones first, the global model's accuracy marked on each."""
  clients = run.clients
  known = ~(np.isnan(clients.personal_accuracy) & np.isnan(clients.global_accuracy))
  if not known.any():
    return False
  figure.set_size_inches(9, 3.8)
  # Without personal accuracies the global ones decide the order; -1 never meets a client that has one.
  height = np.where(np.isnan(clients.personal_accuracy), clients.global_accuracy, clients.personal_accuracy)
  order = _order(clients.dropped, np.argsort(-height, kind="stable"), known)
  axes = figure.subplots()
  x = np.arange(order.size)
  gone, monopolist = clients.dropped[order], clients.monopolist[order]
  bars = axes.bar(
    x, 100 * clients.personal_accuracy[order], 0.78, color=np.where(gone, DROPPED, PRESENT), edgecolor="white", lw=0
  )
  for bar, hatched in zip(bars, monopolist, strict=True):
    bar.set_hatch("///" if hatched else "")
  if marks_global(run):
    size = min(60.0, 400 / order.size)
    axes.plot(x, 100 * clients.global_accuracy[order], "_", color="black", ms=size, mew=2.2, ls="", clip_on=False)
    axes.plot([], [], "_", color="black", ms=12, mew=2.2, ls="", label="global model")
  if monopolist.any():
    axes.bar([0], [np.nan], color="#888888", edgecolor="white", lw=0, hatch="///", label="holds a monopolistic class")
  axes.set(ylabel="accuracy (%)", ylim=(0, 102), xlim=(-0.7, order.size - 0.3))
  axes.grid(axis="y")
  _label_clients(axes, run, order)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(loc="upper right", bbox_to_anchor=(1, -0.1), ncols=2, fontsize=9)
  _name_groups(axes, clients.dropped[known], gone)
  return True


def _partition(figure: Figure, run: Run) -> bool:
  """Training examples of every class at every client."""
  histogram = run.arrays.get("histogram")
  if histogram is None or not histogram.size or run.clients.dropped.size != len(histogram):
    return False
  from matplotlib.colors import PowerNorm

  order = _order(run.clients.dropped, np.arange(len(histogram)), np.ones(len(histogram), bool))
  counts = np.ma.masked_equal(histogram[order].T, 0)
  figure.set_size_inches(9, min(1.6 + 0.26 * len(counts), 9))
  axes = figure.subplots()
  image = axes.imshow(counts, aspect="auto", cmap=_counts_map(), norm=PowerNorm(0.5, 0), interpolation="nearest")
  figure.colorbar(image, ax=axes, pad=0.015, label="training examples", fraction=0.05, aspect=30)
  _label_classes(axes, run, set(run.summary.get("monopolistic_classes") or ()))
  _label_clients(axes, run, order)
  _name_groups(axes, run.clients.dropped, run.clients.dropped[order])
  return True


def _presence(figure: Figure, run: Run) -> bool:
  """Which client took part in which round."""
  presence, ids = run.arrays.get("presence"), run.arrays.get("presence_clients")
  if presence is None or ids is None or not presence.size:
    return False
  from matplotlib.colors import to_rgb

  dropped = np.isin(ids, run.clients.id[run.clients.dropped])
  order = np.concatenate([np.flatnonzero(dropped), np.flatnonzero(~dropped)])
  figure.set_size_inches(9, np.clip(1.8 + 0.16 * ids.size, 3, 6.5))
  axes = figure.subplots()
  colors = np.array([to_rgb(color) for color in (_ABSENT, _LOST, PRESENT, _BROKEN)])
  # As colours, not as values: where rounds or clients outnumber pixels, a pixel is the mean of what it covers.
  axes.imshow(colors[presence.T[order]], aspect="auto", extent=(0.5, len(presence) + 0.5, ids.size - 0.5, -0.5))
  boundary = dropped.sum() - 0.5
  if 0 < dropped.sum() < ids.size:
    axes.axhline(boundary, color="black", lw=1)
  if ids.size <= _LABELLED:
    axes.set_yticks(np.arange(ids.size), [str(i) for i in ids[order]], fontsize=7)
    for tick, gone in zip(axes.get_yticklabels(), dropped[order], strict=True):
      tick.set_color(DROPPED if gone else PRESENT)
  else:
    axes.set_yticks([])
  axes.tick_params(length=0)
  axes.locator_params(axis="x", integer=True)
  total = run.clients.id.size
  axes.set(xlabel="round", ylabel=f"client ({ids.size} of {total:,})" if ids.size < total else "client")
  right = axes.get_yaxis_transform()
  for shown, y, align, color, name in (
    (dropped.any(), -0.5, "top", DROPPED, f"{dropped.sum()} dropped"),
    ((~dropped).any(), ids.size - 0.5, "bottom", PRESENT, f"{(~dropped).sum()} present"),
  ):
    if shown:
      axes.text(1.01, y, name, transform=right, color=color, rotation=270, va=align, weight="bold", fontsize=9)
  for color, label in (
    (PRESENT, "took part"),
    (_LOST, "took part, upload lost"),
    *([(_BROKEN, "upload not finite, not used")] if (presence == 3).any() else []),
    (_ABSENT, "nothing due" if run.summary.get("time") else "did not take part"),
  ):
    axes.bar([0], [np.nan], color=color, label=label)
  axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=9)
  return True


def _samples(figure: Figure, run: Run) -> bool:
  """Real training images beside generated ones, a row a class."""
  samples = run.arrays.get("samples")
  if samples is None or not samples.size:
    return False
  seen = run.arrays.get("seen", np.ones(len(samples), bool)).astype(bool)
  missing = _thin(np.flatnonzero(~seen), 10)
  chosen = np.sort(np.concatenate([missing, _thin(np.flatnonzero(seen), 20 - missing.size)]))
  blocks = [("Generated by the server", samples)]
  real = run.arrays.get("real")
  if real is not None and real.size:
    blocks.insert(0, ("Real training images", real))
  shown = [(name, block[chosen, :10]) for name, block in blocks]
  tiles = sum(block.shape[1] for _, block in shown)
  tile = min(0.6, 7.6 / tiles)
  figure.set_size_inches(max(4.0, tile * tiles + 1.6), tile * len(chosen) + 0.6)
  grid = figure.subplots(1, len(shown), width_ratios=[block.shape[1] for _, block in shown], squeeze=False)[0]
  for axes, (name, block) in zip(grid, shown, strict=True):
    axes.imshow(_mosaic(block), interpolation="nearest")
    axes.set_title(name)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
  pitch = block.shape[2] + _gap(block)
  counts = run.arrays.get("pooled_confusion")
  recall = np.full(len(samples), np.nan) if counts is None else metrics.recall(counts)

  def name_of(c: int) -> str:
    known = "" if np.isnan(recall[c]) else f" ({100 * recall[c]:.0f} %)"
    return run.class_names[c] + (known if seen[c] else "\nunseen")

  grid[0].set_yticks(block.shape[2] / 2 + pitch * np.arange(len(chosen)), [name_of(c) for c in chosen])
  grid[0].tick_params(length=0)
  for label, c in zip(grid[0].get_yticklabels(), chosen, strict=True):
    label.set(color="black" if seen[c] else DROPPED, weight="normal" if seen[c] else "bold", fontsize=9)
  return True


def _confusion(figure: Figure, run: Run) -> bool:
  """What the global model takes each class for, on the pooled test set."""
  counts = run.arrays.get("pooled_confusion")
  if counts is None or not counts.sum():
    return False
  examples = counts.sum(1, keepdims=True)
  share = 100 * counts / np.maximum(examples, 1)
  classes = len(counts)
  side = np.clip(2.2 + 0.42 * classes, 3.5, 7.5)
  figure.set_size_inches(side + 0.9, side)
  axes = figure.subplots()
  image = axes.imshow(np.ma.masked_equal(share, 0), cmap=_counts_map(), vmin=0, vmax=100, interpolation="nearest")
  figure.colorbar(image, ax=axes, pad=0.02, fraction=0.045, label="of the true class (%)")
  if classes <= 12:
    for (row, column), value in np.ndenumerate(share):
      if value >= 0.5:
        axes.text(
          column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 45 else "black"
        )
  seen = run.arrays.get("seen", np.ones(classes, bool))
  _label_classes(axes, run, set(np.flatnonzero(~seen.astype(bool))))
  ticks = axes.get_yticks()
  axes.set_xticks(ticks, [label.get_text() for label in axes.get_yticklabels()], rotation=90)
  for across, down in zip(axes.get_xticklabels(), axes.get_yticklabels(), strict=True):
    across.set(color=down.get_color(), weight=down.get_fontweight(), fontsize=down.get_fontsize())
  axes.set(xlabel="predicted class", ylabel="true class")
  return True


def _trust(figure: Figure, run: Run) -> bool:
  """What the server trusts in samples of each class, against what a judge says of them."""
  trust, agreement = run.arrays.get("trust"), run.arrays.get("agreement")
  if trust is None or agreement is None or not trust.size:
    return False
  seen = run.arrays.get("seen", np.ones(trust.size, bool)).astype(bool)
  figure.set_size_inches(5, 4.6)
  axes = figure.subplots()
  axes.plot([0, 100], [0, 100], color=_GRID, lw=1.5)
  for some, color, label in ((seen, PRESENT, "seen classes"), (~seen, DROPPED, "unseen classes")):
    if some.any():
      axes.plot(100 * trust[some], 100 * agreement[some], "o", color=color, label=label, clip_on=False)
  axes.set(xlabel="trust (%)", ylabel="samples that the judge agrees on (%)", xlim=(-4, 104), ylim=(-4, 104))
  axes.grid()
  axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=9)
  if trust.size <= _LABELLED:
    named = np.flatnonzero(seen)  # the others would lie upon each other: they are not trusted
    names = [run.class_names[c] if c < len(run.class_names) else str(c) for c in named]
    at = 100 * np.stack([trust[named], agreement[named]], axis=1)
    _name_points(axes, names, ["#333333"] * len(names), at, np.zeros_like(at))
  return True


def _surface(figure: Figure, run: Run) -> bool:
  """The objective over both coefficients, mean over clients, and what each client chose."""
  surface = run.arrays.get("surface")
  if surface is None or not np.isfinite(surface).all():
    return False
  figure.set_size_inches(6.2, 4.8)
  axes = figure.subplots()
  # What a pair costs beyond the best one; the first axis of the array is the base's.
  cost = surface.T - surface.min()
  side = 0.5 / (len(surface) - 1)
  image = axes.imshow(
    cost,
    origin="lower",
    extent=(-side, 1 + side, -side, 1 + side),
    cmap=_counts_map(),
    vmax=max(float(np.quantile(cost, 0.9)), 1e-6),  # a corner far off would hide all else
    aspect="auto",
  )
  figure.colorbar(image, ax=axes, pad=0.02, label="J beyond the best pair's, mean over clients", extend="max")
  clients = run.clients
  pairs = np.stack([clients.lambda_base, clients.lambda_head], axis=-1)
  known = np.isfinite(pairs).all(axis=1) & (clients.guard != STARTED)
  taken: set[tuple[float, ...]] = set()
  for gone, color, label in ((True, DROPPED, "dropped"), (False, PRESENT, "present")):
    for pair, count in zip(
      *np.unique(pairs[known & (clients.dropped == gone)], axis=0, return_counts=True), strict=True
    ):
      x, y = pair
      if tuple(pair) in taken:  # both groups chose it: they stand beside each other, the second nearer to the middle
        x += 0.07 if x < 0.5 else -0.07
      taken.add(tuple(pair))
      if count == 1:
        axes.plot(x, y, "o", color=color, mec="white", ms=7)
      else:
        box = {"boxstyle": "circle,pad=0.3", "facecolor": color, "edgecolor": "white"}
        axes.text(x, y, f"{count:,}", color="white", ha="center", va="center", fontsize=8, weight="bold", bbox=box)
    if (known & (clients.dropped == gone)).any():
      axes.plot([], [], "o", color=color, mec="white", ms=7, label=label)
  axes.set(xlabel="coefficient of the base: 0 friend, 1 local", ylabel="coefficient of the head: 0 friend, 1 local")
  if known.any():
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9)
  return True


FIGURES: dict[str, Callable[[Figure, Run], bool]] = {
  "curves": _curves,
  "time": _time,
  "clients": _clients,
  "partition": _partition,
  "presence": _presence,
  "samples": _samples,
  "trust": _trust,
  "confusion": _confusion,
  "surface": _surface,
}


def _thin(values: np.ndarray, limit: int) -> np.ndarray:
  """At most `limit` of the values, evenly spaced, the first and the last among them."""
  if values.size <= limit:
    return values
  return values[np.linspace(0, values.size - 1, limit).round().astype(int)]


def _order(dropped: np.ndarray, order: np.ndarray, known: np.ndarray) -> np.ndarray:
  """The known clients in this order, dropped ones first; each group thinned alike, to `_MANY` in all."""
  groups = [order[known[order] & (dropped[order] == gone)] for gone in (True, False)]
  total = max(sum(group.size for group in groups), 1)
  return np.concatenate([_thin(group, max(2, round(_MANY * group.size / total))) for group in groups])


def _label_clients(axes: Axes, run: Run, order: np.ndarray) -> None:
  """Client ids along the horizontal axis, as long as they can be read."""
  total = run.clients.id.size
  few = order.size <= _LABELLED
  axes.set_xticks(np.arange(order.size) if few else [], run.clients.id[order].astype(str) if few else [], fontsize=8)
  axes.tick_params(axis="x", length=0)
  thinned = order.size < total and order.size >= _MANY - 1
  axes.set_xlabel(f"client ({order.size} of {total:,}, evenly picked)" if thinned else "client")


def _name_groups(axes: Axes, dropped: np.ndarray, shown: np.ndarray) -> None:
  """The groups above the axes; dropped clients stand left. `dropped` counts them, `shown` says what is drawn."""
  if 0 < shown.sum() < shown.size:
    axes.axvline(shown.sum() - 0.5, color="black", lw=1)
  if dropped.any():
    axes.text(0, 1.02, f"{dropped.sum():,} dropped", transform=axes.transAxes, color=DROPPED, weight="bold")
  if (~dropped).any():
    axes.text(
      1, 1.02, f"{(~dropped).sum():,} present", transform=axes.transAxes, color=PRESENT, weight="bold", ha="right"
    )


def _label_classes(axes: Axes, run: Run, marked: set[int]) -> None:
  """Class names along the vertical axis, the marked ones with a star; the marked ones only if there are many."""
  names = run.class_names
  ticks = [c for c in range(len(names)) if len(names) <= _LABELLED or c in marked]
  axes.set_yticks(ticks, [f"★ {names[c]}" if c in marked else names[c] for c in ticks])
  axes.tick_params(length=0)
  for label, c in zip(axes.get_yticklabels(), ticks, strict=True):
    label.set(color=DROPPED if c in marked else "black", weight="bold" if c in marked else "normal")
    label.set_fontsize(9 if len(names) <= 20 else 7 if len(names) <= _LABELLED else 5.5)
  axes.set_ylabel("class")


def _counts_map() -> Any:
  """Pale to dark in a hue that no group has, white where there is nothing (masked)."""
  from matplotlib.colors import LinearSegmentedColormap

  return LinearSegmentedColormap.from_list("counts", ["#EAE6F4", "#7A68B3", "#2B1460"]).with_extremes(bad="white")


def _gap(images: np.ndarray) -> int:
  return max(1, images.shape[2] // 12)


def _mosaic(images: np.ndarray) -> np.ndarray:
  """uint8 [R, n, h, w, c], c being 1 or 3, -> uint8 [height, width, 3] with white gaps between the images."""
  rows, columns, height, width, _ = images.shape
  gap = _gap(images)
  canvas = np.full((rows, height + gap, columns, width + gap, 3), 255, np.uint8)
  canvas[:, :height, :, :width] = images.transpose(0, 2, 1, 3, 4)
  return canvas.reshape(rows * (height + gap), columns * (width + gap), 3)[:-gap, :-gap]
