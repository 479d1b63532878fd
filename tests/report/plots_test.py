"""The figures: what they show is compared with the run's files, read again."""

import csv
import io
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from apfl_jax.report import plots, run


def draw(name, path):
  figure = Figure()
  assert plots.FIGURES[name](figure, run.read(path))
  return figure


def client_rows(path):
  with (path / "clients.csv").open() as file:
    return list(csv.DictReader(file))


def hexadecimal(color):
  return "#" + "".join(f"{round(255 * part):02X}" for part in color[:3])


@pytest.mark.parametrize(
  ("kind", "missing"),
  [
    ("ap_fl", set()),
    ("fedavg", {"samples", "time", "trust", "surface"}),
    ("unevaluated", {"curves", "clients", "samples", "trust", "confusion", "surface"}),
  ],
)
def test_draws_what_the_run_left(kind, missing, request):
  drawn = plots.draw(run.read(request.getfixturevalue(kind)))
  assert drawn.keys() == plots.FIGURES.keys() - missing
  for png in drawn.values():
    height, width, _ = imread(io.BytesIO(png)).shape
    assert 300 < width < 1600 and 200 < height < 1600


_OTHER_SIZES = [pytest.param(*size, marks=pytest.mark.slow) for size in ((1, 100), (2, 2), (2, 100), (1500, 2))]


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (1500, 100), *_OTHER_SIZES])
def test_draws_runs_of_any_size(clients, classes, make_run):
  names = [str(i) for i in range(classes)]
  path = make_run("sized", clients=clients, rounds=2 if clients < 3 else 600, names=names)
  assert plots.draw(run.read(path)).keys() == plots.FIGURES.keys()


def test_trust_is_drawn_against_the_judge_class_by_class(ap_fl):
  axes = draw("trust", ap_fl).axes[0]
  with np.load(ap_fl / "arrays.npz") as file:
    trust, agreement, seen = (file[name] for name in ("trust", "agreement", "seen"))
  for line, some, color in zip(axes.lines[1:], (seen, ~seen), (plots.PRESENT, plots.DROPPED), strict=True):
    np.testing.assert_allclose(line.get_xydata() / 100, np.stack([trust, agreement], 1)[some])
    assert line.get_color() == color
  assert len(axes.texts) == seen.sum()


def test_a_front_is_a_line_through_its_best_points():
  some = plots.Front("some", [0.5, 0.2, 0.4], [0.8, 0.9, 0.7], [True, True, False])
  lone = plots.Front("lone", [0.6], [0.6], [True])
  assert plots.fronts([some, lone], "x", "y").startswith(b"\x89PNG")


def test_curves_take_shared_and_own_axes_and_nothing():
  shared = [plots.Curve("a", [1, 2, 3], [1.0, 2.0, np.nan]), plots.Curve("a", [1, 2, 3], [3.0, 2.0, 1.0])]
  own = [plots.Curve("a", [1, 20], [1.0, 2.0]), plots.Curve("b", [5, 6, 700], [3.0, 2.0, 1.0])]
  panels = [
    plots.Panel("both", "x", "y", shared, spans={"first": (1, 2), "then": (2, 3)}),
    plots.Panel("", "x", "y", own, log=True, level=1.5),
    plots.Panel("none", "x", "y", []),
  ]
  assert plots.curves(panels).startswith(b"\x89PNG")


def test_the_mean_of_runs_is_point_by_point():
  runs = [plots.Curve("a", [0, 2, 4], [0, 2, 4]), plots.Curve("a", [1, 3, 7], [5, 5, 9])]
  assert plots.mean_curve(runs) == plots.Curve("a", [0.5, 2.5, 5.5], [2.5, 3.5, 6.5])
  assert plots.mean_curve([*runs, plots.Curve("a", [0, 1], [0, 1])]) is None
  assert plots.mean_curve(runs[:1]) is None and plots.mean_curve([]) is None


def test_a_bar_a_client_dropped_first_best_first(ap_fl):
  axes = draw("clients", ap_fl).axes[0]
  bars = [bar for bar in axes.patches if np.isfinite(bar.get_height())]
  want = sorted(
    (-int(row["dropped"]), -float(row["personal_accuracy"]), int(row["client"])) for row in client_rows(ap_fl)
  )
  np.testing.assert_allclose([bar.get_height() / 100 for bar in bars], [-accuracy for _, accuracy, _ in want])
  assert [int(label.get_text()) for label in axes.get_xticklabels()] == [client for *_, client in want]
  colors = [hexadecimal(bar.get_facecolor()) for bar in bars]
  assert colors == [plots.DROPPED if dropped else plots.PRESENT for dropped, *_ in want]
  holders = {int(row["client"]) for row in client_rows(ap_fl) if {"8", "9"} & set(row["classes"].split())}
  assert {client for (*_, client), bar in zip(want, bars, strict=True) if bar.get_hatch()} == holders
  marks = {int(row["client"]): float(row["global_accuracy"]) for row in client_rows(ap_fl)}
  np.testing.assert_allclose(axes.lines[0].get_ydata() / 100, [marks[client] for *_, client in want])


def test_many_clients_are_thinned_but_the_worst_of_each_group_stays(make_run):
  path = make_run("many", clients=2000)
  heights = [bar.get_height() / 100 for bar in draw("clients", path).axes[0].patches if np.isfinite(bar.get_height())]
  assert len(heights) <= 102
  rows = client_rows(path)
  for dropped in "01":
    values = [float(row["personal_accuracy"]) for row in rows if row["dropped"] == dropped]
    for extreme in (min(values), max(values)):
      assert np.isclose(heights, extreme).any()


def test_clients_without_test_examples_have_no_bar(ap_fl):
  rows = client_rows(ap_fl)
  rows[4]["personal_accuracy"] = rows[4]["global_accuracy"] = ""
  with (ap_fl / "clients.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  labels = [label.get_text() for label in draw("clients", ap_fl).axes[0].get_xticklabels()]
  assert len(labels) == 19 and "4" not in labels


def test_curves_join_the_rounds_that_were_evaluated(ap_fl):
  own = draw("curves", ap_fl).axes[0]
  lines = {line.get_label(): line for line in own.lines}
  assert lines.keys() == {
    f"{model}, {who}" for model in ("personal", "global") for who in ("all clients", "dropped", "present")
  }
  records = run.read(ap_fl).metrics
  for label, key in (
    ("personal, dropped", "personal_accuracy_dropped"),
    ("global, present", "global_accuracy_present"),
  ):
    want = np.array([(record["round"], 100 * record[key]) for record in records if record[key] is not None])
    np.testing.assert_allclose(lines[label].get_xydata(), want)


def test_groups_that_score_alike_once_at_the_end_are_all_seen_and_have_no_line(ap_fl):
  file = ap_fl / "metrics.jsonl"
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  for line in lines:
    for key in [key for key in line if key.startswith("personal_")]:
      line[key] = 0.9 if line is lines[-1] else None
  file.write_text("\n".join(map(json.dumps, lines)))
  axes = draw("curves", ap_fl).axes[0]
  personal = [line for line in axes.lines if line.get_label().startswith("personal")]
  assert [line.get_xydata().tolist() for line in personal] == [[[40, 90]]] * 3
  sizes = [line.get_markersize() for line in personal]
  assert sizes == sorted(set(sizes), reverse=True) and {line.get_markerfacecolor() for line in personal} == {"none"}
  drawn = {line.get_label(): line.get_linestyle() for line in axes.get_legend().get_lines()}
  assert {style for label, style in drawn.items() if label.startswith("personal")} == {"None"}
  assert {style for label, style in drawn.items() if label.startswith("global")} == {":"}


def test_over_virtual_time_a_model_has_its_own_name(make_run):
  path = make_run("timed", algorithm="fedavg", generator=False)
  labels = lambda: [line.get_label() for line in draw("time", path).axes[0].lines]
  assert labels() == ["personal, own tests", "global, pooled"]
  summary = json.loads((path / "summary.json").read_text())
  pooled = {"global_model": 0.6, "personal_mean": 0.6, "personal_dropped": 0.6}
  same = {"personal_accuracy": summary["global_accuracy"], "pooled_accuracy": pooled}
  (path / "summary.json").write_text(json.dumps(summary | same | {"cost": {"personalize_flops": 0.0}}))
  assert labels() == ["global, own tests", "global, pooled"]
  own = draw("time", path).axes[0].lines[0].get_xydata()
  records = run.read(path).metrics
  np.testing.assert_allclose(own[:, 1], [100 * record["global_accuracy"] for record in records])


def test_partition_shows_the_histogram_and_marks_monopolistic_classes(ap_fl):
  axes = draw("partition", ap_fl).axes[0]
  histogram = np.load(ap_fl / "arrays.npz")["histogram"]
  order = [int(label.get_text()) for label in axes.get_xticklabels()]
  np.testing.assert_array_equal(axes.images[0].get_array().filled(0), histogram[order].T)
  starred = [label.get_text() for label in axes.get_yticklabels() if "★" in label.get_text()]
  assert starred == ["★ <b>eight</b>", "★ $nine$"]


def test_presence_has_a_row_a_client_and_a_column_a_round(ap_fl):
  axes = draw("presence", ap_fl).axes[0]
  arrays = np.load(ap_fl / "arrays.npz")
  shown = axes.images[0].get_array()
  colors = {}
  for row, client in enumerate(int(label.get_text()) for label in axes.get_yticklabels()):
    for column, kind in enumerate(arrays["presence"][:, list(arrays["presence_clients"]).index(client)]):
      colors.setdefault(int(kind), set()).add(hexadecimal(shown[row, column]))
  assert colors[2] == {plots.PRESENT}
  assert sorted(map(len, colors.values())) == [1, 1, 1, 1] and len(set.union(*colors.values())) == 4
  assert "upload not finite, not used" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_stand_in_their_class_row_beside_real_ones(ap_fl, channels):
  rng = np.random.default_rng(1)
  arrays = dict(np.load(ap_fl / "arrays.npz"))
  arrays["samples"], arrays["real"] = rng.integers(0, 255, (2, 10, 5, 12, 16, channels), dtype=np.uint8)
  np.savez(ap_fl / "arrays.npz", **arrays)
  axes = draw("samples", ap_fl).axes
  for block, name in zip(axes, ("real", "samples"), strict=True):
    mosaic = block.images[0].get_array()
    for (c, i), _ in np.ndenumerate(np.zeros((10, 5))):
      image = mosaic[c * 13 : c * 13 + 12, i * 17 : i * 17 + 16]
      np.testing.assert_array_equal(image, np.broadcast_to(arrays[name][c, i], image.shape))
  labels = [label.get_text() for label in axes[0].get_yticklabels()]
  counts = arrays["pooled_confusion"]
  assert labels[7] == f"seven ({100 * counts[7, 7] / counts[7].sum():.0f} %)" and labels[9] == "$nine$\nunseen"
  del arrays["pooled_confusion"]
  np.savez(ap_fl / "arrays.npz", **arrays)
  assert draw("samples", ap_fl).axes[0].get_yticklabels()[7].get_text() == "seven"


def test_confusion_rows_are_percent_of_the_true_class(ap_fl):
  axes = draw("confusion", ap_fl).axes[0]
  counts = np.load(ap_fl / "arrays.npz")["pooled_confusion"].astype(float)
  want = np.array([100 * row / row.sum() for row in counts])
  np.testing.assert_allclose(axes.images[0].get_array().filled(0), want)
  assert axes.get_ylabel() == "true class" and axes.get_xlabel() == "predicted class"


def test_the_surface_is_palest_at_its_least_and_counts_what_clients_chose(ap_fl):
  axes = draw("surface", ap_fl).axes[0]
  shown = axes.images[0].get_array()
  assert axes.images[0].origin == "lower" and axes.get_xlabel().startswith("coefficient of the base")
  assert np.unravel_index(shown.argmin(), shown.shape) == (4, 2)  # head .8 upwards, base .4 to the right
  want, shared = {}, set()
  for row in client_rows(ap_fl):
    if row["guard"] != "3":
      pair = float(row["lambda_base"]), float(row["lambda_head"])
      want[pair, row["dropped"] == "1"] = want.get((pair, row["dropped"] == "1"), 0) + 1
  shared = {pair for pair, gone in want if gone and (pair, False) in want}
  assert shared and max(want.values()) > 1 and 1 in want.values()
  numbers = [(text.get_position(), int(text.get_text()), text.get_bbox_patch().get_facecolor()) for text in axes.texts]
  dots = [
    (line.get_xydata()[0], 1, line.get_color())
    for line in axes.lines
    if len(line.get_xdata())  # not of the legend alone
  ]
  found = {}
  for (x, y), count, color in numbers + dots:
    assert 0 <= x <= 1 and 0 <= y <= 1
    gone = (color if isinstance(color, str) else hexadecimal(color)) == plots.DROPPED
    # Of those that share a pair the present ones stand beside it, nearer to the middle.
    pair = next(
      pair
      for pair, of in want
      if of == gone and y == pair[1] and np.isclose(abs(x - pair[0]), 0.07 * (pair in shared and not gone))
    )
    found[pair, gone] = count
  assert found == want


def test_names_stand_beside_their_points_and_cover_nothing():
  figure = Figure(figsize=(8, 6))
  axes = figure.subplots()
  crowd = [[20 + 0.1 * i, 95] for i in range(12)]
  means = np.array([*crowd, [90.0, 40.0], [99.0, 99.0], [55.0, 60.0]])
  axes.plot(*means.T, "o")
  names = [f"a_method_{i}" for i in range(len(means))]
  plots._name_points(axes, names, ["black"] * len(means), means, np.zeros_like(means))
  figure.draw_without_rendering()
  boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
  frame, points = axes.get_window_extent(), axes.transData.transform(means)
  far = []
  for i, box in enumerate(boxes):
    assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    assert not any(box.contains(*point) for point in points)
    assert not any(box.overlaps(other) for other in boxes[:i])
    far.append(np.hypot(*(np.clip(points[i], box.min, box.max) - points[i])))
  lone = far[len(crowd) :]
  assert [text.get_text() for text in axes.texts if text.get_text()] == names and max(lone) < 15  # pixels
  assert max(far) < 150
  lines = [text.xy for text in axes.texts if not text.get_text()]
  assert lines and all(tuple(xy) in map(tuple, means[: len(crowd)]) for xy in lines)  # lone names have none
