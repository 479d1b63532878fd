"""The zero-shot board: bases on the fast task, scores on a made world, the table on made rows."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from apfl_jax import data, semantics
from apfl_jax.errors import InputError
from experiments import zero_shot
from experiments.config import Config

SMALL = {
  "algorithm": "ap_fl",
  "head": "free",
  "embeddings": "onehot",
  "dataset": "fast",
  "model": "mlp",
  "num_clients": 5,
  "partition": "iid",
  "min_size": 4,
  "monopolistic_classes": 2,
  "rounds": 3,
  "local_steps": 3,
  "pooled_examples": 40,
}
# What is the quickest to compile: the generator is not trained, nobody personalises.
SETTINGS = {"source": "untrained", "friend": "global", "friend_steps": 0, "interpolation": "fixed"}


def make(seed, settings=SETTINGS, **changed):
  return Config(seed=seed, settings=settings, **SMALL | changed)


@pytest.mark.parametrize("tier", [pytest.param("s1", marks=pytest.mark.slow), "s2"])  # slow to compile
def test_sets_differ_and_what_the_server_knows_is_of_clients_that_take_part(tmp_path, monkeypatch, tier):
  settings = SETTINGS | {"tier": tier} | ({"source": "none"} if tier == "s2" else {})
  number = 2 if tier == "s2" else 1
  jobs = list(zero_shot.plan(number, 0, lambda seed: make(seed, settings=settings)))
  found = list(zero_shot.bases(tmp_path, tier, jobs))
  assert len({name for name, _, _ in found}) == number
  for _, ready, base in found:
    assert base.seen.sum() == 2
    federation = ready.federation
    here = np.flatnonzero(~ready.gone)
    spans = [slice(federation.train.start[i], federation.train.start[i] + federation.train.size[i]) for i in here]
    held = np.concatenate([federation.store.labels[federation.store.index[span]] for span in spans])
    assert set(held) == set(np.flatnonzero(base.seen))
    assert base.examples.shape == (4, 30, 200) and np.isfinite(base.examples).all()
    np.testing.assert_array_equal(np.bincount(base.test_labels), [10, 10, 10, 10])
    # The head's answers are those of a model that learnt the seen classes.
    mine = base.seen[base.test_labels]
    known = np.where(base.seen, base.test_logits, -np.inf)[mine].argmax(1)
    assert (known == base.test_labels[mine]).mean() > 0.7
    if tier == "s2":
      assert (base.means[~base.seen] == 0).all()
      for c in np.flatnonzero(base.seen):
        away = [np.linalg.norm(base.means[d] - base.test[base.test_labels == c].mean(0)) for d in range(4)]
        assert np.argmin(away) == c

  def never(*_):
    raise AssertionError

  monkeypatch.setattr(zero_shot, "train", never)
  again = zero_shot.bases(tmp_path, tier, jobs)
  for (_, _, before), (_, _, after) in zip(found, again, strict=True):
    for name in zero_shot.Base._fields:
      np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
  ready, classes = jobs[0]
  other = ready._replace(config=dataclasses.replace(ready.config, rounds=4))
  with pytest.raises(InputError, match="other settings"):
    list(zero_shot.bases(tmp_path, tier, [(other, classes)]))


def test_a_virtual_clock_is_refused():
  config = make(0, clock="synchronous")
  with pytest.raises(InputError, match="clock: got 'synchronous', accepted is rounds"):
    zero_shot.train(SimpleNamespace(config=config, clock="a plan"))


def test_more_sets_than_there_are_is_refused(monkeypatch):
  """Sets of another size, which chance makes, are passed over."""
  lost = lambda seed: np.isin(np.arange(4), [seed % 4, (seed + 1) % 4, *([2] if seed % 3 == 0 else [])])
  monkeypatch.setattr(zero_shot.job, "prepare", lambda config, like: SimpleNamespace(config=config))
  monkeypatch.setattr(zero_shot, "_seen", lambda ready: ~lost(ready.config.seed))
  config = lambda seed: SimpleNamespace(seed=seed, monopolistic_classes=2)
  found = list(zero_shot.plan(3, 12, config))
  assert [(ready.config.seed, classes) for ready, classes in found] == [(13, (1, 2)), (14, (2, 3)), (16, (0, 1))]
  with pytest.raises(InputError, match="triples: got 7, but .* 4 sets"):
    list(zero_shot.plan(7, 0, config))


def world(unseen=(0, 3, 7), num_classes=10, noise=0.2):
  """A base whose features follow the attributes of Fashion-MNIST."""
  rng = np.random.default_rng(1)
  names = tuple(semantics.ATTRIBUTES["fashion_mnist"])
  table = semantics.embeddings("attributes", names, "fashion_mnist", rng=rng)
  means = table @ rng.normal(size=(table.shape[1], 24)) + 1
  labels = np.repeat(np.arange(num_classes), 20)
  around = lambda n: (means[:, None] + noise * rng.normal(size=(num_classes, n, 24))).astype(np.float32)
  seen = ~np.isin(np.arange(num_classes), unseen)
  test = around(20).reshape(-1, 24)
  logits = -np.linalg.norm(test[:, None] - means, axis=-1).astype(np.float32)
  given = np.where(seen[:, None], means, 0).astype(np.float32)
  base = zero_shot.Base(seen, given, around(30), given, test, logits, labels.astype(np.int32))
  return base, data.Dataset("fashion_mnist", *[np.zeros(0)] * 4, names)


def test_tables_that_say_something_beat_those_that_do_not():
  base, dataset = world()
  usual = zero_shot.Scoring()
  found = zero_shot.board(base, ["onehot", "random", "attributes"], dataset, usual, seed=4, random_tables=3)
  assert len(found) == 1 + 3 + 1
  rows = [{"seed": 4, "tier": "s2", **row} for row in found]
  best, control = (next(row for row in rows if row["embeddings"] == kind) for kind in ("attributes", "onehot"))
  assert best["restricted_accuracy"] > 0.8 and best["harmonic_mean"] > 0.5
  assert best["seen_accuracy"] == pytest.approx(0.8 * best["seen_accuracy_without"], abs=0.12)
  assert control["restricted_accuracy"] == pytest.approx(1 / 3, abs=1e-6)
  assert best["p_value"] < 0.01 and control["p_value"] == 1.0
  entry = next(e for e in zero_shot.summed(rows, largest=0.05) if e["embeddings"] == "attributes")
  random = np.mean([row["restricted_accuracy"] for row in rows if row["embeddings"] == "random"])
  ahead = entry["restricted_accuracy less random"]
  assert ahead["mean"] == pytest.approx(best["restricted_accuracy"] - random)
  assert entry["passes"] == 1.0

  scored = lambda **given: zero_shot.board(
    base, ["attributes"], dataset, zero_shot.Scoring(**given), seed=4, random_tables=1
  )[0]
  assert scored(ap_fl_unseen_keep=0.95)["seen_accuracy"] > best["seen_accuracy"] + 0.05
  assert scored(ap_fl_unseen_penalty=30.0)["shift"] != best["shift"]
  assert scored(embedding_influence=0.0)["restricted_accuracy"] == control["restricted_accuracy"]
  assert scored(embedding_whitening=True)["shift"] != best["shift"]


def test_the_board_is_a_table_with_errors_over_sets():
  base = dict.fromkeys((*zero_shot._COLUMNS, "seen_accuracy_without", "shift"), 0.5)
  rows = [
    base | {"seed": seed, "tier": "s2", "embeddings": kind, "draw": 0, "restricted_accuracy": r, "p_value": 1 - r}
    for seed, kind, r in [(0, "onehot", 1 / 3), (1, "onehot", 1 / 3), (0, "attributes", 0.5), (1, "attributes", 0.7)]
  ]
  grid = zero_shot.grid(zero_shot.summed(rows, largest=0.4))
  lines = {row[0]: row[1:] for row in grid.rows}
  assert list(lines) == ["tier s2", "onehot", "attributes"]
  assert lines["attributes"][0] == "60.0 ± 10.0" and lines["attributes"][5] == "50"
  assert lines["attributes"][6] == "+26.7 (2 of 2)" and lines["onehot"][6] == "–"
