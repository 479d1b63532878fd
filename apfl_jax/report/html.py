"""Pages, of a run and of a comparison: one file that opens from disk, without network, fonts or scripts of others."""

import base64
import html
import itertools
import math
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from apfl_jax.algorithms.ap_fl.interpolation import STARTED
from apfl_jax.files import replacing
from apfl_jax.report import plots, tables
from apfl_jax.report import run as runs

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #62626a; --line: #d9d9de; --page: #fff; --card: #f5f5f7;
  --link: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --soft: #a0a0a8; --line: #3c3c42; --page: #161618; --card: #222226; --link: #56b4e9 }
}
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 56rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .5rem }
p, figcaption { max-width: 46rem }
a { color: var(--link) }
.lead { color: var(--soft); margin-top: 0; max-width: none }
.note { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem; color: var(--soft); font-size: .9rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem }
th, td { padding: .4rem .75rem; text-align: right; border-bottom: 1px solid var(--line) }
th { font-weight: 600 }
thead th { color: var(--soft) }
tr > :first-child { text-align: left; padding-left: 0; white-space: nowrap }
.group { text-align: center }
.wide { max-width: 68rem }
.wide .scroll { font-size: .9rem }
.wide .scroll th, .wide .scroll td { padding: .4rem .5rem }
.wide .scroll td { white-space: nowrap }
.wide .scroll tr > :first-child { position: sticky; left: 0; padding-left: 0; background: var(--page) }
.run tbody td:nth-child(7), .run thead tr:last-child th:nth-child(7) { padding-left: 2.2rem }
figure { margin: 0 }
figcaption { margin: 0 0 .8rem }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 8px;
  box-sizing: border-box; border: 1px solid var(--line) }
.facts td { text-align: left; vertical-align: top; overflow-wrap: anywhere }
.facts td:first-child { color: var(--soft) }
pre { background: var(--card); padding: .8rem 1rem; border-radius: 6px; overflow: auto; max-height: 24rem;
  font-size: .85rem }
summary { cursor: pointer }
"""

_CAPTIONS = {
  "curves": (
    "Accuracy over the rounds",
    "Mean over clients, as training goes on; colour tells the clients, line and mark the model. On its own test "
    "examples a personal model only has to tell apart the classes that its client holds, so that accuracy rises as the "
    "partition gets more skewed (smaller alpha): the local tasks get easier. Compare methods on the same partition. "
    "The pooled test set holds all classes, and shows what a model knows beyond its client.",
  ),
  "time": (
    "In virtual time",
    "Accuracy as the virtual clock runs, and how many uploads were aggregated between each one's download and its "
    "arrival. Slow clients hold up a synchronous round; on the asynchronous clock they hold up nobody, and what they "
    "send is stale.",
  ),
  "clients": (
    "Client by client",
    "One bar a client: its personal model on its own test examples, best first. Clients without test examples are "
    "left out.",
  ),
  "partition": (
    "Who holds what",
    "Training examples of each class at each client; white is none. A star marks the monopolistic classes: only "
    "dropped clients hold them, so the others cannot teach them to the global model.",
  ),
  "presence": (
    "Who was there when",
    "One line a client, one column a round. In a round without colour the client was away or was not picked; where its "
    "upload was lost it trained, but the server learned nothing from it.",
  ),
  "samples": (
    "What the generator draws",
    "Each row is a class: real training images and, beside them, samples. The server has no example: it draws what "
    "the global model takes for that class. Of a class marked unseen not even the global model met an example; its "
    "images come from the meaning of the class alone, so expect little of them. The images need not look real: they "
    "are to carry what the global model knows. A share in brackets is that of the class's pooled test images which the "
    "global model gets right; where it is small, so is the worth of the images.",
  ),
  "trust": (
    "What the server trusts",
    "One point a class: how far the server trusts its samples, and how many of them a classifier that was trained on "
    "real images takes for that class. On the line trust foretells what samples are. The judge is for this page alone, "
    "no method sees it.",
  ),
  "confusion": (
    "What the global model confuses",
    "Each row is the true class of pooled test images, each column what the global model said, in percent of the row. "
    "A good model is dark on the diagonal. A star marks classes that no client ever taught it.",
  ),
  "surface": (
    "Where clients stand between their two models",
    "A personal model lies between a local model, trained on the client's own examples, and a friend, which also "
    "learned from the server; one coefficient mixes their bases and another their heads. J is what clients choose by: "
    "the loss of the mixed model on the client's validation examples, plus a share of its loss on synthetic ones. The "
    "shade is by how much J is above that of the best pair, mean over clients: the paler the better. A dot is what a "
    "client chose, a number counts clients that chose the same; dropped and present ones that did stand side by side.",
  ),
}

_SHARED = {  # where all clients answer with the global model
  "curves": (
    "Accuracy over the rounds",
    "Of the global model, as training goes on: the mean over clients on their own test examples, colour tells which "
    "clients, and on the pooled test set, which holds all classes.",
  ),
  "clients": (
    "Client by client",
    "One bar a client: the global model on its own test examples, best first. Clients without test examples are left "
    "out.",
  ),
}

_HIGH_BARRIER = 0.2  # nats (method 2.9 [O])


def write(workdir: str | pathlib.Path) -> pathlib.Path:
  """Draws the figures of a run and its page into the run directory; the page last, each file whole or not at all.

  Args:
    workdir: the directory of a run.

  Returns:
    The path of `report.html`.

  Raises:
    InputError: the directory is not a run's or cannot be read, or matplotlib is not installed.
  """
  run = runs.read(pathlib.Path(workdir))
  images = plots.draw(run)
  for name in plots.FIGURES:
    path = run.path / f"{name}.png"
    if name in images:
      with replacing(path) as temporary:
        temporary.write_bytes(images[name])
    else:
      path.unlink(missing_ok=True)  # of an earlier report on other numbers
  path = run.path / "report.html"
  with replacing(path) as temporary:
    temporary.write_text(_page(run, images), encoding="utf-8")
  return path


class Section(NamedTuple):
  """A part of a page.

  Attributes:
    heading: its title.
    text: what stands above the content.
    content: a table, facts by name, or a picture as a PNG file.
  """

  heading: str
  text: str
  content: tables.Grid | Mapping[str, str] | bytes


def page(title: str, sections: Sequence[Section]) -> str:
  """A page of sections; all that is given is text, not HTML."""
  parts = [f"<h1>{html.escape(title)}</h1>"]
  for heading, text, content in sections:
    heading, text = html.escape(heading), html.escape(text)
    if isinstance(content, bytes):
      parts.append(_figure(heading, text, content))
      continue
    parts += [f"<h2>{heading}</h2>", f"<p>{text}</p>" if text else ""]
    parts.append(_grid(content) if isinstance(content, tables.Grid) else _facts(content))
  return _document(html.escape(title), parts, "wide")


def _grid(grid: tables.Grid) -> str:
  def row(cells: Sequence[str]) -> str:
    if len(cells) < len(grid.header):
      return f'<tr><th colspan="{len(grid.header)}">{html.escape(cells[0])}</th></tr>'
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"

  header = "".join(f"<th>{html.escape(name)}</th>" for name in grid.header)
  return (
    f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(map(row, grid.rows))}</tbody></table>'
    "</div>"
  )


def _page(run: runs.Run, images: Mapping[str, bytes]) -> str:
  title = html.escape(tables.title(run.summary))
  parts = [
    f"<h1>{title}</h1>",
    f'<p class="lead">{html.escape(_setting(run))}</p>',
    *_notes(run),
    "<h2>Test accuracy</h2>",
    _results(run.summary),
    _perspective(run.summary),
    "<p>In percent; means over clients. A dropped client never took part in training, whether it was away, not drawn, "
    "always cut off or not done in time, or left for good; a monopolist holds a class that only dropped clients hold; "
    "worst 10&nbsp;% is the mean over the tenth of the clients that is served worst. Own test examples have the "
    "classes of the client's own data; the pooled test set has all classes, and the global model, the same for all "
    "clients, has one accuracy on it.</p>",
    _unseen(run),
    _verification(run),
    _fairness(run),
    _judged(run),
    *(_figure(*_caption(name, run), image) for name, image in images.items()),
    "<h2>Cost</h2><p>Operations (FLOP) are counted from the programs as JAX traces them, not measured."
    f"{_whose_rounds(run)}</p>",
    _facts(_costs(run)),
    "<h2>Repeat this run</h2>",
    _repeat(run),
  ]
  return _document(title, parts)


def _caption(name: str, run: runs.Run) -> tuple[str, str]:
  """Heading and text of a picture."""
  captions = _CAPTIONS | _SHARED if tables.one_model(run.summary) else _CAPTIONS
  heading, text = captions[name]
  if name == "clients" and plots.marks_global(run):
    text += (
      " At each bar the black mark is the global model on the same examples: a bar above its mark is a client that "
      "personalisation helped."
    )
  if name == "surface":
    text += _chosen(run.clients)
  if name == "presence" and run.summary.get("time"):
    text = (
      "One line a client, one column a round. A visit is drawn in the round in which its upload was due; where that "
      "was lost, the server learned nothing from it. Without colour nothing was due: the client was away, was not "
      "picked, was still at work or was cut off."
    )
  if name == "presence" and (run.arrays["presence"] == 3).any():
    text += " Dark: an upload with numbers that are not finite, which was not used."
  return heading, text


def _chosen(clients: runs.Clients) -> str:
  """How many clients chose which of their two models; empty where none is known to have chosen."""
  base, head = clients.lambda_base, clients.lambda_head
  known = np.isfinite(base) & np.isfinite(head)
  started = known & (clients.guard == STARTED)
  friend, local = (known & ~started & (base == end) & (head == end) for end in (0, 1))
  if not known.any():
    return ""
  told = {
    "chose the friend alone (0, 0)": friend,
    "the local model alone (1, 1)": local,
    "something between": known & ~(friend | local | started),
    "neither, but the model both came from (not drawn)": started,
  }
  counts = [f"{some.sum():,} {what}" for what, some in told.items() if some is not started or some.any()]
  return f" <strong>Of {tables.counted(int(known.sum()), 'client')}, {', '.join(counts)}.</strong>"


def _document(title: str, parts: Sequence[str], kind: str = "") -> str:
  """A whole page of what is HTML already, its body of a class of `_STYLE`; empty parts are left out."""
  return (
    f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
    f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
    f'<body class="{kind}">\n' + "\n".join(filter(None, parts)) + "\n</body>\n</html>\n"
  )


def _setting(run: runs.Run) -> str:
  """One sentence on what was simulated."""
  replayed = (run.summary.get("time") or {}).get("replayed")
  summary, dropped = run.summary, int(run.clients.dropped.sum())
  scored = int((~np.isnan(run.clients.personal_accuracy) | ~np.isnan(run.clients.global_accuracy)).sum())
  others = " (or never drawn, or never done)" if summary.get("time") else ""
  flags = _flags(run)
  partition = summary.get("partition")
  if partition == "dirichlet" and "alpha" in flags:
    partition = f"dirichlet, alpha {flags['alpha']}"
  parts = [
    tables.counted(summary["num_clients"], "client") + (f", {dropped:,} of them dropped{others}" if dropped else ""),
    f"partition: {partition}" if partition else "",
    f"schedule: {summary['time']['replayed']}" if replayed else "",
    _dropout(summary) if summary.get("dropout") and not replayed else "",
    f"softmax mask: {summary['softmax_mask']}" if summary.get("softmax_mask", "none") != "none" else "",
    tables.counted(summary["rounds"], "round"),
    f"seed {summary['seed']}",
    f"accuracies of {scored:,} of the clients" if scored < run.clients.id.size else "",
  ]
  return "; ".join(filter(None, parts)) + "."


def _dropout(summary: Mapping[str, Any]) -> str:
  """Who was away, with the rates, one of which may stand for all."""
  names = [name.strip() for name in summary["dropout"].split(",")]
  told = summary.get("drop_rate")
  rates = [None] if told is None else [float(rate) for rate in str(told).split(",")]
  rates *= len(names) if len(rates) == 1 else 1
  return "dropout: " + ", ".join(itertools.starmap(tables.absence, zip(names, rates, strict=True)))


def _flags(run: runs.Run) -> dict[str, str]:
  """The run's settings by name; of one that is given twice the last."""
  return dict(line.removeprefix("--").split("=", 1) for line in run.flags if "=" in line)


_SENT = {
  "s0": "nothing, but from its update the server reads which classes it holds",
  "s1": "how many examples of each class it has, and means and second moments of its layers' channels",
  "s2": "how many examples of each class it has, and class by class sums of its images, features and layers' channels "
  "and of their squares, for the sources image and matched also of products of its images' cosine coefficients, for "
  "matched of features under untrained networks. Of a class with a single example the sum of images is that image, and "
  "nothing hides it",
}


def _notes(run: runs.Run) -> list[str]:
  notes, summary = [], run.summary
  if summary.get("finished") is False:
    notes.append(
      '<p class="note"><strong>This run did not finish</strong>; the numbers are those of its last evaluation.</p>'
    )
  if summary.get("readout") == "prior":
    notes.append(f'<p class="note">{html.escape(tables.PRIOR)}</p>')
  if tables.one_model(summary):
    notes.append(
      f'<p class="note">{html.escape(summary["algorithm"])} makes no personal models: all clients answer with the '
      "global model.</p>"
    )
  if hills := int((run.clients.barrier > _HIGH_BARRIER).sum()):
    notes.append(
      f'<p class="note"><strong>{tables.counted(hills, "client")}</strong> lost more than {_HIGH_BARRIER} of '
      "cross-entropy half-way between the two models that are mixed: their weights lie on two sides of a hill, and "
      "fewer personal steps would keep them nearer.</p>"
    )
  if summary["algorithm"] == "ap_fl":
    notes.append(
      '<p class="note">ap_fl is AP-FL, <a href="https://arxiv.org/abs/2503.00407">arXiv 2503.00407</a>: personal '
      "models for clients that dropped out, with a generator on the server. It is not APFL, the adaptive personalized "
      "federated learning of Deng et al. (2020).</p>"
    )
    flags = _flags(run)
    if (tier := flags.get("ap_fl_tier")) in _SENT:
      sent = f"Beside its model a client that takes part sends (<code>--ap_fl_tier={tier}</code>) {_SENT[tier]}."
      if flags.get("ap_fl_image_moments") == "true":
        sent += " It also sends the mean and the second moment of a batch of its images, all classes together."
      notes.append(f'<p class="note">{sent}</p>')
  return notes


def _results(summary: dict[str, Any]) -> str:
  groups = "".join(f'<th class="group" colspan="{size}">{name}</th>' for name, size in tables.GROUPS)
  columns = "".join(f"<th>{column}</th>" for column in tables.COLUMNS)
  shared, *others = tables.rows(summary)
  cell = lambda value: f"<td>{tables.percent(value, missing='–')}</td>"
  # The last two of the global model are one number: it is everybody's.
  both = f'<td class="group" colspan="2">{tables.percent(shared.values[-2], missing="–")}</td>'
  body = f"<tr><td>{html.escape(shared.name)}</td>{''.join(map(cell, shared.values[:-2]))}{both}</tr>"
  body += "".join(f"<tr><td>{html.escape(row.name)}</td>{''.join(map(cell, row.values))}</tr>" for row in others)
  return (
    f'<div class="scroll"><table class="run"><thead><tr><th></th>{groups}</tr><tr><th></th>{columns}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def _perspective(summary: dict[str, Any]) -> str:
  """What personal models are to be compared with; empty for what is compared with and where there are none."""
  plain = ("fedavg_ft", "local")
  if summary["algorithm"] in plain or tables.one_model(summary):
    return ""
  first, second = (f"<code>--algorithm={name}</code>" for name in plain)
  return (
    "<p>On own test examples nearly any personal model beats the global one, for it only has to tell apart its "
    "client's classes: fine-tuning the global model and training alone often come as high. Compare with "
    f"{first} and {second} on the same seed.</p>"
  )


def _unseen(run: runs.Run) -> str:
  unseen = run.summary.get("unseen") or {}
  classes = unseen.get("classes")
  if not classes:
    return ""
  names = run.class_names
  value = {key: tables.percent(number, missing="–") for key, number in unseen.items() if key != "classes"}
  listed = html.escape(", ".join(names[c] if c < len(names) else str(c) for c in classes))
  return (
    f"<h2>Classes that nobody taught</h2><p>No client that took part holds {listed}. On pooled test images "
    f"of {'this class' if len(classes) == 1 else 'these classes'} the global model is right in "
    f"<strong>{value.get('accuracy', '–')}&nbsp;%</strong> (on those of the seen classes in "
    f"{value.get('seen_accuracy', '–')}&nbsp;%; harmonic mean of the two: {value.get('harmonic_mean', '–')}&nbsp;%). "
    "When it only has to choose among the unseen classes it is right in "
    f"{value.get('restricted_accuracy', '–')}&nbsp;%, where guessing gives {100 / len(classes):.1f}&nbsp;%.</p>"
  )


def _verification(run: runs.Run) -> str:
  told = tables.verification(run.summary)
  if not told:
    return ""
  listed = html.escape(", ".join(run.summary["verification"]["classes"]))
  return (
    f"<h2>Telling classes apart that nobody trained on</h2><p>Images of {listed} were taken out of everybody's data. "
    "Whether two of them show the same class is judged by the cosine of their features. In percent, means over "
    f"clients: <strong>{html.escape(told)}</strong>. EER is the error rate at the threshold that accepts as many wrong "
    "pairs as it refuses right ones, guessing gives 50; TAR is the share of right pairs that are accepted at a "
    "threshold that accepts few wrong ones.</p>"
  )


def _fairness(run: runs.Run) -> str:
  """How evenly the models serve clients and classes."""
  summary = run.summary
  number = lambda value: "–" if value is None else f"{value:.3f}"
  gap = lambda value: "–" if value is None else f"{100 * value:+.1f}"
  clients, classes = [], []
  models = [("global model", "global_accuracy", "global_model"), ("personal models", "personal_accuracy", "personal")]
  for name, key, recall in models[:1] if tables.one_model(summary) else models:
    own, spread = summary.get(key) or {}, (summary.get("recall") or {}).get(recall) or {}
    cells = [tables.percent(own.get("std"), "–"), number(own.get("gini")), number(own.get("jain"))]
    clients.append([name, *cells, *(gap(own.get(key)) for key in ("dropped_gap", "monopolist_gap"))])
    classes.append([name, *(tables.percent(spread.get(key), "–") for key in ("mean", "std", "least"))])
  parts = [
    (
      "Between clients, by their accuracy on own test examples. Standard deviation and differences of groups are in "
      "points; Gini's coefficient is 0 and Jain's index 1 where all clients are served alike.",
      ["", "standard deviation", "Gini", "Jain", "dropped - present", "monopolists - others"],
      clients,
    ),
    (
      "Between classes, by recall: the share of a class's pooled test images that is recognised, in percent.",
      ["", "mean over classes", "standard deviation", "worst class"],
      classes,
    ),
  ]
  told = [
    f"<p>{text}</p>{_grid(tables.Grid(header, known))}"
    for text, header, rows in parts
    if (known := [row for row in rows if any(cell != "–" for cell in row[1:])])
  ]
  return "".join(["<h2>How evenly</h2>", *told]) if told else ""


def _judged(run: runs.Run) -> str:
  """What the judge, students and attackers say of the samples, class by class."""
  section, privacy = run.summary.get("samples"), run.summary.get("privacy") or {}
  if not section:
    return ""

  def attack(key: str) -> str:
    """With two standard deviations of the statistic of Mann and Whitney where neither side is above the other."""
    found, number = privacy.get(key), privacy["examples"] if privacy else 0
    return (
      f"{found:.2f} (by chance .50 ± {2 * math.sqrt((2 * number + 1) / 12) / number:.2f})" if found is not None else "–"
    )

  share = lambda value: tables.percent(value, "–")
  names = run.class_names
  trust, real = ((section.get(key) or {}).get("each") or [] for key in ("trust", "judge_recall"))
  rows = [
    [
      (names[c] if c < len(names) else str(c)) + ("" if c in section["recognised"] else " (not recognised)"),
      share(agreed),
      share(real[c] if c < len(real) else None),
      share(trust[c] if c < len(trust) else None),
      str(section["modes"]["each"][c]),
    ]
    for c, agreed in enumerate(section["agreement"]["each"])
  ]
  facts = {
    "samples a class": str(section["count"]),
    "judge on real test images": share(section["judge_accuracy"]) + " %",
    "judge agrees, classes that the global model recognises": share(section["agreement_recognised"]["mean"]) + " %",
    "fresh networks taught by samples alone, on real test images of these classes": share(section["tstr"]["mean"])
    + " %",
    "the global model, their teacher, on the same images": share(section["teacher"]) + " %",
    "correlation of trust with the judge, where trust differs": _plain((section.get("trust") or {}).get("correlation")),
    "samples nearer to training than to test images": f"{share(privacy.get('closer'))} % (by chance 50)",
    "attack by distance to samples (AUC)": attack("distance_auc"),
    "attack by the global model's loss (AUC)": attack("loss_auc"),
  }
  header = [
    "class",
    "judge agrees (%)",
    "judge is right on real test images (%)",
    "trust (%)",
    "different nearest images",
  ]
  return (
    "<h2>What the samples are worth</h2><p>Judged by a classifier trained on all training images of the data set, for "
    "this page alone. "
    "What counts is what fresh networks learn from samples, not what the judge says of them. An attack that learns "
    "nothing has an AUC of .5; a generator that remembers nothing is as near to test images as to training ones: both "
    "try the samples and the model, not what clients send; ± is two standard deviations of "
    "chance. A class is recognised if the global model gets half of its test images right; trust is the mean "
    "probability that it gives the class on samples of it; different nearest images: how many real ones are the "
    "nearest to some sample.</p>"
    f"{_facts(facts)}{_grid(tables.Grid(header, rows))}"
  )


def _plain(value: float | None) -> str:
  return "–" if value is None else f"{value:.2f}"


def _figure(heading: str, caption: str, image: bytes) -> str:
  data = base64.b64encode(image).decode()
  return (
    f"<h2>{heading}</h2>\n<figure><figcaption>{caption}</figcaption>"
    f'<img alt="{heading}" src="data:image/png;base64,{data}"></figure>'
  )


def _costs(run: runs.Run) -> dict[str, str]:
  """What the run took, in words; what is not known is left out."""
  summary = run.summary
  cost, clock = summary.get("cost") or {}, summary.get("time") or {}
  lines = run.timings[-2:] if summary.get("rounds_of") else run.timings  # the others are of the run that trained
  at = [line["round"] for line in lines]
  rounds = np.diff(at, prepend=at[:1] if summary.get("rounds_of") else 0)
  seconds = np.array([line["seconds"] for line in lines])
  compiled = seconds - np.array([line["compile_seconds"] for line in lines])
  trained = rounds > 0  # what sets up, at the start and after a stop, adds a line but no round; so does the end
  scored = ~trained & (np.arange(len(lines)) == len(lines) - 1) & (len(lines) > 1)
  versions = summary.get("versions") or {}
  shared = tables.one_model(summary)
  total = lambda lines: _duration(float(seconds[lines].sum()) if lines.any() else None)
  rest = float(summary.get("seconds") or 0.0) - float(seconds.sum())
  facts = {
    "time": _duration(summary.get("seconds")),
    "of which setting up": total(~trained & ~scored),
    "of which rounds": total(trained),
    "of which personalising and scoring at the end": total(scored),
    "of which everything else": _duration(rest) if rest > 0 else "",
    "compiling, in all of these, some of it at the same time": _duration(summary.get("compile_seconds")),
    "virtual time": _virtual(clock),
    "visits begun": _visits(clock),
    "a round without compiling (median over chunks)": _duration(
      float(np.median(compiled[trained] / rounds[trained])) if trained.any() else None
    ),
    "peak memory": _amount(summary.get("peak_memory_bytes"), "B"),
    "local training": _amount(cost.get("local_flops"), "FLOP"),
    "server": _amount(cost.get("server_flops"), "FLOP"),
    "generator": _amount(cost.get("generator_flops"), "FLOP"),
    "making personal models": "" if shared else _amount(cost.get("personalize_flops"), "FLOP"),
    "evaluation": _amount(cost.get("evaluation_flops"), "FLOP"),
    "generator's share of all but evaluation": tables.percent(cost.get("generator_share"), "")
    and (tables.percent(cost.get("generator_share")) + " %"),
    "sent by clients": _amount(cost.get("bytes_up"), "B"),
    "sent to clients": _amount(cost.get("bytes_down"), "B"),
    "read by a client to make its personal model": f"as much as it sends and reads in {cost['break_even_rounds']:.2f} "
    "rounds; a client that stays away from more rounds than that moves fewer bytes in all"
    if cost.get("break_even_rounds") and not shared
    else "",
    "device": _device(str(summary.get("device") or "")),
    "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    "commit": str(summary.get("commit") or ""),
  }
  return {name: value for name, value in facts.items() if value}


def _device(told: str) -> str:
  """A run's device, with the way it computed clients in plain words."""
  ways = {", sequential": ", clients computed one after another", ", vmap": ", many clients computed at once"}
  found = next((way for way in ways if told.endswith(way)), "")
  return told.removesuffix(found) + ways.get(found, "")


def _virtual(clock: Mapping[str, Any]) -> str:
  """Virtual seconds and idle time in words; empty in plain rounds."""
  if not clock:
    return ""
  idle = tables.percent(clock["idle_share"])
  return f"{clock['virtual_seconds']:.4g} s on the {clock['clock']} clock, places idle for {idle} % of it"


def _visits(clock: Mapping[str, Any]) -> str:
  """How many visits there were and what became of them; empty in plain rounds."""
  visits = clock.get("visits") or {}
  told = ", ".join(f"{number:,} {what}" for what, number in visits.items() if number)
  return f"{sum(visits.values()):,}: {told}" if visits else ""


def _duration(seconds: float | None) -> str:
  """E.g. '400 ms' or '3 min 12 s'; empty for None."""
  if seconds is None:
    return ""
  if seconds < 120:
    return f"{1000 * seconds:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _amount(value: float | None, unit: str) -> str:
  """E.g. '1.25 GB'; empty for None."""
  if value is None:
    return ""
  prefixes = ("", "k", "M", "G", "T", "P", "E")
  power = min(int(math.log10(max(value, 1)) / 3), len(prefixes) - 1)
  return f"{value / 1000**power:.4g} {prefixes[power]}{unit}"


def _facts(facts: Mapping[str, str]) -> str:
  body = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in facts.items())
  return f'<table class="facts"><tbody>{body}</tbody></table>' if body else "<p>Not recorded.</p>"


def _whose_rounds(run: runs.Run) -> str:
  """What to know of a run that took its rounds from another."""
  first = run.summary.get("rounds_of")
  if not first:
    return ""
  return (
    f" The rounds are those of the run <code>{html.escape(first)}</code> (<code>--trained</code>): their operations and"
    " bytes are counted here as there, the times are of this run alone. Repeated without <code>--trained</code>, it"
    " trains anew, to the same numbers."
  )


def _repeat(run: runs.Run) -> str:
  if not run.flags:
    return "<p>The run left no <code>flags.txt</code>.</p>"
  program = run.summary.get("program") or "python -m experiments.train"
  command = f"{program} --flagfile={shlex.quote(str(run.path / 'flags.txt'))} --workdir=ANOTHER_DIRECTORY"
  flags = html.escape("\n".join(run.flags))
  return (
    f"<pre>{html.escape(command)}</pre>\n<details><summary>All flags of the run</summary><pre>{flags}</pre></details>"
  )
