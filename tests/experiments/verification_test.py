"""Classes held out for verification: nobody has them, pairs are made of them, and shapes are any seed's."""

import json

import jax
import numpy as np
import pytest

from apfl_jax import data, report
from apfl_jax.errors import InputError
from experiments import job
from experiments.config import Config

DIGITS = {"algorithm": "fedavg_ft", "model": "mlp", "rounds": 2, "personal_steps": 5, "progress": False}


def _prepared(**settings):
  return job.prepare(Config(**DIGITS, **settings))


def test_nobody_has_them():
  whole = data.load("digits")
  rest, held_out = data.hold_out(whole, np.array([2, 7]))
  assert rest.class_names == tuple(name for i, name in enumerate(whole.class_names) if i not in (2, 7))
  np.testing.assert_array_equal(np.unique(rest.labels), np.arange(-1, 8))
  for old, new in ((0, 0), (2, -1), (3, 2), (7, -1), (9, 7)):
    assert (rest.labels[whole.labels == old] == new).all() and (rest.test_labels[whole.test_labels == old] == new).all()
  for i, label in enumerate((2, 7)):
    own = whole.test_images[whole.test_labels == label]
    np.testing.assert_array_equal(held_out.images[held_out.identity == i], own)
  assert len(held_out.images) == 80 and (held_out.identity < 0).sum() == 8  # there are 36 of each

  prepared = _prepared(verification_classes=3)
  federation, used = prepared.federation, []
  for part in ("train", "validation", "test"):
    assert data.histogram(federation, 7, part).sum() == np.sum(getattr(federation, part).size)
    used.append(data.histogram(federation, 7, part).sum(0))
  np.testing.assert_array_equal(sum(used), np.bincount(prepared.dataset.labels[prepared.dataset.labels >= 0]))
  pooled, store = prepared.inputs.pooled, federation.store
  tests = store.labels[store.index[pooled.start : pooled.start + pooled.size]]
  np.testing.assert_array_equal(np.bincount(tests), [36] * 7)
  assert len(prepared.verified) == 3 and not set(prepared.verified) & set(prepared.dataset.class_names)


@pytest.mark.parametrize("algorithm", ["fedavg", "central"])
def test_another_seed_has_the_same_shapes(algorithm):
  settings = DIGITS | {"algorithm": algorithm, "verification_classes": 4}
  prepared = [job.prepare(Config(**settings, seed=seed)) for seed in range(3)]
  assert len({p.verified for p in prepared}) > 1
  shapes = [jax.tree.map(np.shape, p.inputs) for p in prepared]
  assert shapes[0] == shapes[1] == shapes[2]


def test_without_them_nothing_changes():
  inputs = _prepared().inputs
  assert inputs.held_out == () and len(inputs.federation.store.index) == 1437 + 360


@pytest.mark.parametrize("number", [1, 9, 10])
def test_some_are_left_and_impostors_there(number):
  with pytest.raises(InputError, match=f"verification_classes: got {number}, accepted are 0 and 2 to 8"):
    _prepared(verification_classes=number)


def test_a_run_tells_how_well_features_tell_them_apart(tmp_path, monkeypatch):
  monkeypatch.setattr(job, "_draw", lambda workdir: None)  # the figures take longer than the run
  settings = DIGITS | {
    "dataset": "fast",
    "num_clients": 5,
    "monopolistic_classes": 0,
    "checkpoint_every": 0,
    "eval_every": 0,
  }
  summary = job.run(Config(**settings, data_on="host", verification_classes=2, workdir=str(tmp_path)))
  found = summary["verification"]
  assert len(found["classes"]) == 2 and found["far"] == 0.01 and len(summary["class_names"]) == 2
  for name in ("eer", "tar"):
    assert 0 <= found[name]["global_model"] <= 1
    assert found[name]["personal_mean"] == pytest.approx(
      0.6 * found[name]["personal_dropped"] + 0.4 * found[name]["personal_present"]
    )
  assert found["eer"]["personal_mean"] < 0.45  # features of other classes already say something
  line = report.table(summary).splitlines()[-1]
  for model in ("global_model", "personal_mean"):
    assert f"{100 * found['eer'][model]:.1f} / {100 * found['tar'][model]:.1f}" in line
  assert len(line) <= 100


def test_the_page_and_the_table_tell_of_it(tmp_path):
  summary = {"algorithm": "local", "dataset": "digits", "num_clients": 3, "rounds": 2, "seed": 0}
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  assert "nobody trained on" not in report.write(tmp_path).read_text()
  rates = {"global_model": None, "personal_mean": 0.123, "personal_dropped": None, "personal_present": 0.123}
  summary["verification"] = {"classes": ["<six>", "nine"], "far": 0.01, "eer": rates, "tar": rates}
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  page = report.write(tmp_path).read_text()
  assert "&lt;six&gt;, nine" in page and "EER / TAR at FAR 1 %: personal models 12.3 / 12.3<" in page
  assert report.table(summary).endswith("personal models 12.3 / 12.3")
