"""The page of a run, and the binary that draws it again."""

import base64
import csv
import html.parser
import io
import itertools
import json
import pathlib
import sys

import pytest

from apfl_jax import report
from apfl_jax.errors import InputError
from apfl_jax.report import plots
from tests import binaries


class Page(html.parser.HTMLParser):
  """Collects what a page is made of."""

  def __init__(self, path):
    super().__init__()
    self.tags, self.images, self.links, self.words, self.open = [], {}, [], [], []
    self.feed(path.read_text())
    assert not self.open, "unclosed tags"

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append(tag)
    if tag == "img":
      self.images[attrs["alt"]] = attrs["src"]
    elif tag == "a":
      self.links.append(attrs["href"])
    if tag not in ("meta", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)

  @property
  def text(self):
    return " ".join(" ".join(self.words).split())


@pytest.fixture(autouse=True)
def unsaved(monkeypatch):
  """Pictures are made and not drawn, which takes most of the time; no two are the same."""
  numbers = itertools.count()
  monkeypatch.setattr(plots, "_png", lambda figure: b"picture %d" % next(numbers))


def change(path, **values):
  file = path / "summary.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | values))


def only(path, *names):
  """Leaves these files, so that there is little to draw."""
  for file in path.iterdir():
    if file.name not in names:
      file.unlink()


def test_a_page_of_figures_read_out_with_the_prior_says_so(unevaluated):
  assert "label prior" not in Page(report.write(unevaluated)).text
  change(unevaluated, readout="prior", softmax_mask="own")
  text = Page(report.write(unevaluated)).text
  assert "label prior" in text and "must be known at test time" in text and "softmax mask: own" in text


def test_page_holds_the_pictures_beside_it(ap_fl):
  path = report.write(ap_fl)
  assert path == ap_fl / "report.html"
  page = Page(path)
  inside = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.images.values()}
  assert inside == {file.read_bytes() for file in ap_fl.glob("*.png")} and len(inside) == 9
  assert {file.name for file in ap_fl.glob("*.png")} == {
    f"{name}.png"
    for name in ("curves", "time", "clients", "partition", "presence", "samples", "trust", "confusion", "surface")
  }


def test_page_needs_nothing_else(ap_fl):
  page = Page(report.write(str(ap_fl)))
  assert not {"script", "link", "iframe", "object"} & set(page.tags)
  assert page.links == ["https://arxiv.org/abs/2503.00407"]
  assert "url(" not in (ap_fl / "report.html").read_text() and "@import" not in (ap_fl / "report.html").read_text()


def test_page_says_what_clients_of_a_tier_send(ap_fl):
  only(ap_fl, "summary.json", "flags.txt")
  sent = lambda: Page(report.write(ap_fl)).text.split("a client that takes part sends")[1]
  assert "--ap_fl_tier=s1 ) how many examples of each class" in sent() and "that image" not in sent()
  with open(ap_fl / "flags.txt", "a") as file:
    file.write("--ap_fl_tier=s2\n")
  assert "the sum of images is that image" in sent() and "all classes together" not in sent()
  with open(ap_fl / "flags.txt", "a") as file:
    file.write("--ap_fl_image_moments=true\n")
  assert "all classes together" in sent()


def test_page_says_what_the_run_says(ap_fl):
  text = Page(report.write(ap_fl)).text
  for words in (
    "ap_fl on digits & <i>more</i>",
    "20 clients, 12 of them dropped",
    "dirichlet, alpha 0.15",
    "personal models (ap_fl) 92.0 93.0 90.0 93.0 72.0 57.1 55.0",
    "<b>eight</b>, $nine$",
    "where guessing gives 50.0",
    "3 min 12 s",
    "400 ms",
    "3.2 TFLOP",
    "812 MB",
    "jax 0.10.2",
    f"python -m experiments.train --flagfile={ap_fl}/flags.txt",
    "--alpha=0.15",
    "Deng et al.",
    "global model 58.0 35.2 83.0 35.2 38.0 60.0 personal models",
    "personal models 8.0 0.050 0.987 +3.0 –",
    "global model 8.0 0.050 0.987 -47.8 –",
    "worst class personal models 50.0 11.0 22.2",
    "Compare with --algorithm=fedavg_ft and --algorithm=local on the same seed",
    "Of 20 clients, 1 chose the friend alone (0, 0), 2 the local model alone (1, 1), 16 something between, 1 neither",
    "judge is right on real test images (%)",
    "judge agrees, classes that the global model recognises 87.6 %",
    "fresh networks taught by samples alone, on real test images of these classes 74.3 %",
    "$nine$ (not recognised)",
    "nearer to training than to test images 51.2 %",
    "generator's share of all but evaluation 81.6 %",
    "as much as it sends and reads in 0.64 rounds",
    "device 2 x cpu, clients computed one after another",
    "of which setting up 7 s",
    "of which personalising and scoring at the end 90 s",
    "of which everything else",
    "attack by distance to samples (AUC) 0.52 (by chance .50 ± 0.08)",
    "dropout: cold at rate 0.6",
    "was still at work or was cut off",
    "virtual time 1200 s on the synchronous clock, places idle for 10.0 % of it",
    "visits begun 1,340: 133 arrived, 1,207 cut off",
  ):
    assert words in text
  assert "did not finish" not in text and "makes no personal models" not in text


def test_page_of_a_run_with_the_rounds_of_another_counts_its_own_time(fedavg):
  assert "of which rounds" in Page(report.write(fedavg)).text
  change(fedavg, rounds_of="another", dropout="cold, bernoulli", drop_rate="0.6,0.2", program="python mine.py")
  lines = (fedavg / "timings.jsonl").read_text().splitlines(keepends=True)
  (fedavg / "timings.jsonl").write_text("".join([*lines[:-1], lines[-1].replace("90.0", "2.0"), lines[-1]]))
  text = Page(report.write(fedavg)).text
  assert "of which rounds" not in text
  assert "of which setting up 2 s of which personalising and scoring at the end 90 s of which everything else" in text
  assert "dropout: cold at rate 0.6, bernoulli at rate 0.2" in text
  assert "The rounds are those of the run another" in text
  assert f"python mine.py --flagfile={fedavg}/flags.txt" in text


def test_page_of_a_method_without_a_global_model_shows_none(fedavg):
  rows = list(csv.DictReader((fedavg / "clients.csv").open()))
  without = io.StringIO()
  writer = csv.DictWriter(without, rows[0])
  writer.writeheader()
  writer.writerows(row | {"global_accuracy": ""} for row in rows)
  assert "the black mark" in Page(report.write(fedavg)).text
  (fedavg / "clients.csv").write_text(without.getvalue())
  text = Page(report.write(fedavg)).text
  assert "One bar a client" in text and "the black mark" not in text


def test_where_the_global_model_is_everybodys_the_page_says_so(fedavg):
  only(fedavg, "summary.json")
  summary = json.loads((fedavg / "summary.json").read_text())

  def said():
    text = Page(report.write(fedavg)).text
    return "makes no personal models" in text, "Compare with --algorithm=fedavg_ft" in text

  assert said() == (False, True)
  pooled = {"global_model": 0.6, "personal_mean": 0.6, "personal_dropped": 0.6}
  change(fedavg, personal_accuracy=summary["global_accuracy"], pooled_accuracy=pooled)
  assert said() == (False, True)  # equal by chance: they took computation
  change(fedavg, cost=summary["cost"] | {"personalize_flops": 0.0})
  assert said() == (True, False)


def test_the_global_models_numbers_are_not_repeated_as_personal_models(fedavg):
  summary = json.loads((fedavg / "summary.json").read_text())
  pooled = {"global_model": 0.6, "personal_mean": 0.6, "personal_dropped": 0.6}
  own = {"personal_accuracy": summary["global_accuracy"], "pooled_accuracy": pooled}
  change(fedavg, **own, cost=summary["cost"] | {"personalize_flops": 1.0})
  report.write(fedavg)
  pictures = lambda: [(fedavg / f"{name}.png").read_bytes() for name in ("curves", "clients")]
  drawn = pictures()
  change(fedavg, cost=summary["cost"] | {"personalize_flops": 0.0})
  text = Page(report.write(fedavg)).text
  assert "personal models (" not in text and "personal model" not in text.split("Accuracy over the rounds")[1]
  assert "black mark" not in text and "the global model on its own test examples" in text
  # What would lie on the global model's line and bars is not drawn.
  assert all(png != before for png, before in zip(pictures(), drawn, strict=True))


@pytest.mark.parametrize("algorithm", ["local", "fedavg_ft"])
def test_what_others_are_compared_with_is_not_told_to_compare(algorithm, fedavg):
  only(fedavg, "summary.json")
  change(fedavg, algorithm=algorithm)
  assert "Compare with" not in Page(report.write(fedavg)).text


def test_a_barrier_between_the_two_models_is_warned_of(ap_fl, fedavg):
  text = Page(report.write(ap_fl)).text
  assert "1 client lost more than 0.2 of cross-entropy half-way" in text
  assert "half-way between the two models" not in Page(report.write(fedavg)).text


def test_names_are_escaped(ap_fl):
  change(ap_fl, device="<script>alert(1)</script>", algorithm="<img src=x>", versions={"<b>": "&"})
  (ap_fl / "flags.txt").write_text("--note=</pre><script>\n")
  page = Page(report.write(ap_fl))
  assert not {"script", "b", "i"} & set(page.tags)
  assert page.tags.count("img") == len(page.images) == 9
  assert "<script>alert(1)</script>" in page.text and "--note=</pre><script>" in page.text


def test_only_ap_fl_is_told_from_apfl(fedavg):
  page = Page(report.write(fedavg))
  assert "Deng" not in page.text and page.links == []
  assert "What the samples are worth" not in page.text
  assert "What the generator draws" not in page.text and not (fedavg / "samples.png").exists()


def test_a_run_with_nothing_evaluated_has_a_page(unevaluated):
  text = Page(report.write(unevaluated)).text
  assert "personal models (local) – – – – – – –" in text
  assert "Classes that nobody taught" not in text and "None" not in text and "nan" not in text.split()


def test_summary_alone_makes_a_page(ap_fl):
  only(ap_fl, "summary.json")
  assert "personal models (ap_fl) 92.0" in Page(report.write(ap_fl)).text


def test_unfinished_runs_say_so(ap_fl):
  change(ap_fl, finished=False)
  assert "did not finish" in Page(report.write(ap_fl)).text


def test_written_again_nothing_stale_or_temporary_stays(ap_fl):
  report.write(ap_fl)
  (ap_fl / "arrays.npz").unlink()
  before = {file.name for file in ap_fl.iterdir()}
  report.write(ap_fl)
  gone = before - {file.name for file in ap_fl.iterdir()}
  assert gone == {"partition.png", "presence.png", "samples.png", "trust.png", "confusion.png", "surface.png"}
  assert not list(ap_fl.glob(".*")) and not list(ap_fl.glob("*.tmp"))


@pytest.mark.parametrize(
  ("file", "content", "words"),
  [
    ("summary.json", "{", "summary.json, line 1: not JSON"),
    ("summary.json", "[]", "a JSON object is wanted"),
    ("summary.json", '{"algorithm": "x"}', "no dataset, num_clients, rounds, seed"),
    ("metrics.jsonl", '{"round": 1}\n\noops\n', "metrics.jsonl, line 3: not JSON"),
    ("clients.csv", "client,dropped\n1,0\n", "no column 'classes'; there are client, dropped"),
    ("clients.csv", "client,dropped,classes,personal_accuracy,global_accuracy\n1,x,2,,\n", "a field cannot be read"),
    ("arrays.npz", "text", "not an archive of arrays"),
  ],
)
def test_bad_files_are_named_in_one_line(ap_fl, file, content, words):
  (ap_fl / file).write_text(content)
  with pytest.raises(InputError) as caught:
    report.write(ap_fl)
  assert words in str(caught.value) and file in str(caught.value) and "\n" not in str(caught.value)
  assert not (ap_fl / "report.html").exists()


def test_without_matplotlib_the_extra_is_named(ap_fl, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(InputError, match=r"apfl_jax\[report\]"):
    report.write(ap_fl)


def test_binary_prints_the_page(unevaluated):
  result = binaries.run("experiments.report", f"--workdir={unevaluated}")
  assert result.returncode == 0, result.stderr
  assert pathlib.Path(result.stdout.strip()) == unevaluated / "report.html"
  assert (unevaluated / "report.html").exists()


@pytest.mark.parametrize(
  ("argument", "word"),
  [
    ("--workdir={nowhere}", "--workdir"),
    # Those of every binary, which train_test.py has by default.
    pytest.param("surplus", "not a flag", marks=pytest.mark.slow),
    pytest.param("--wrong=1", "wrong", marks=pytest.mark.slow),
  ],
)
def test_binary_ends_with_one_line_where_there_is_no_run(tmp_path, argument, word):
  result = binaries.run("experiments.report", argument.format(nowhere=tmp_path / "nowhere"))
  assert result.returncode == 2 and result.stdout == ""
  assert len(result.stderr.splitlines()) == 1 and word in result.stderr
