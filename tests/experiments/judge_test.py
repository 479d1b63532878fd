"""The judge and what it says, on the fast task: a generator that copies, one that draws noise, and a real run."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import algorithms, data, nn, report
from apfl_jax.types import Store
from experiments import job, judge
from experiments.config import Config
from tests import tasks

SMALL = {
  "dataset": "fast",
  "model": "mlp",
  "num_clients": 6,
  "alpha": 0.5,
  "drop_rate": "0.5",
  "monopolistic_classes": 1,
  "embeddings": "onehot",
  "rounds": 4,
  "local_steps": 5,
  "personal_steps": 10,
  "pooled_examples": 80,
  "eval_every": 0,
  "checkpoint_every": 0,
  "progress": False,
}


@pytest.fixture(autouse=True, scope="module")
def quick(tmp_path_factory):
  """Judges in a folder of their own, and short training, which is enough for the fast task."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("APFL_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(judge, "_JUDGE_STEPS", 200)
    patch.setattr(judge, "_STUDENT_STEPS", 100)
    patch.setattr(judge, "_STUDENTS", 2)
    patch.setattr(report, "write", lambda workdir: None)
    yield


def settled(kind):
  """A drawer of samples: training images as they are, or noise."""
  dataset = data.load("fast")

  def samples(task, server, key, count):
    del server, key
    rows = np.stack([np.resize(np.flatnonzero(dataset.labels == c), count) for c in range(task.num_classes)])
    images = dataset.images[rows] / 255.0
    return images if kind == "copies" else np.random.default_rng(0).random(images.shape)

  return samples


def test_a_judge_knows_the_classes_and_is_trained_once(monkeypatch):
  dataset = data.load("fast")
  model, params = judge.judge(dataset, "mlp")
  every = np.ones(len(dataset.class_names), bool)
  confusion = judge._confusion(model, params, dataset.test_images, dataset.test_labels, every)
  assert confusion.sum() == len(dataset.test_labels) and np.trace(confusion) / confusion.sum() > 0.9
  monkeypatch.setattr(judge, "fit", lambda *_: pytest.fail("trained again"))
  jax.tree.map(np.testing.assert_array_equal, judge.judge(dataset, "mlp")[1], params)


def drawing(kind):
  """FedAvg as a method with samples."""
  trust = lambda server: jnp.linspace(0, 1, tasks.NUM_CLASSES)
  return dataclasses.replace(algorithms.METHODS["fedavg"], samples=settled(kind), trust=trust)


class Copied(NamedTuple):
  summary: dict[str, Any]
  workdir: Path
  measured: tuple  # the arguments of `judge.measure`


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
  """A run whose samples are training images."""
  workdir, given = tmp_path_factory.mktemp("run"), []
  measure = judge.measure
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(algorithms.METHODS, "fedavg", drawing("copies"))
    patch.setattr(judge, "measure", lambda *arguments: given.append(arguments) or measure(*arguments))
    summary = job.run(Config(algorithm="fedavg", workdir=str(workdir), judge=16, **SMALL))
  return Copied(summary, workdir, given[0])


def test_samples_that_are_real(copied):
  section, privacy = copied.summary["samples"], copied.summary["privacy"]
  assert section["judge_accuracy"] > 0.9
  tests = np.bincount(copied.measured[0].dataset.test_labels)
  assert np.average(section["judge_recall"]["each"], weights=tests) == pytest.approx(section["judge_accuracy"])
  assert section["trust"]["each"] == pytest.approx(np.linspace(0, 1, tasks.NUM_CLASSES))
  assert set(section["recognised"]).isdisjoint(copied.summary["unseen"]["classes"]) and len(section["recognised"]) > 1
  assert section["agreement"]["mean"] > 0.9
  # With fewer classes to choose from no right answer becomes wrong.
  pairs = zip(section["agreement_among_recognised"]["each"], section["agreement_recognised"]["each"], strict=True)
  assert all(among is each is None or among >= each for among, each in pairs)
  assert section["tstr"]["mean"] > section["teacher"] - 0.15
  assert section["modes"]["each"] == [16] * len(section["modes"]["each"])
  assert privacy["closer"] > 0.6 and 0 <= privacy["loss_auc"] <= 1 and privacy["examples"] > 50
  with np.load(copied.workdir / "arrays.npz") as file:
    np.testing.assert_allclose(file["trust"], section["trust"]["each"])
    np.testing.assert_allclose(file["agreement"], section["agreement"]["each"])
  kept = json.loads((copied.workdir / "summary.json").read_text())
  assert kept["samples"] == section and kept["privacy"] == privacy


def test_samples_that_are_nothing(copied, monkeypatch):
  monkeypatch.setitem(algorithms.METHODS, "fedavg", drawing("noise"))
  section = judge.measure(*copied.measured)[0]["samples"]
  assert section["judge_accuracy"] > 0.9
  assert section["agreement"]["mean"] < 0.6
  assert section["tstr"]["mean"] < 0.8


def test_ap_fl_says_how_far_it_trusts_a_class():
  server = jax.eval_shape(tasks.simulator("ap_fl").init, tasks.inputs("ap_fl")).server
  trust: Any = algorithms.METHODS["ap_fl"].trust
  assert trust(server).shape == (tasks.NUM_CLASSES,)


def test_without_a_generator_only_the_model_can_give_something_away(copied):
  found, arrays = judge.measure(*copied.measured)
  assert found["samples"] is None and found["privacy"]["closer"] is None and not arrays
  assert 0 <= found["privacy"]["loss_auc"] <= 1


def test_members_and_others_are_of_the_same_classes_and_members_took_part(copied):
  prepared = copied.measured[0]
  times = np.array([1, 0, 2, 0, 0, 1])

  class Result:
    state = type("State", (), {"times": times})

  (images, labels), (others, other_labels) = judge._apart(prepared, Result, np.random.default_rng(0))
  np.testing.assert_array_equal(labels, other_labels)
  assert len(images) == len(others) > 0
  held = data.histogram(prepared.federation, len(prepared.dataset.class_names))[times > 0].sum(0)
  assert (np.bincount(labels, minlength=len(held)) <= held).all()


def test_plain_training_learns():
  dataset = data.load("fast")
  model = nn.classifier("mlp", dataset.images.shape[1:], len(dataset.class_names))
  key = judge.random.key(1, judge.random.Purpose.JUDGE)
  train, rows = judge._fit(model, len(dataset.class_names)), jnp.arange(len(dataset.labels))
  store = Store(jnp.asarray(dataset.images), jnp.asarray(dataset.labels, jnp.int32), rows)
  every = np.ones(len(dataset.class_names), bool)
  accuracy = []
  for steps in (0, 200):
    params = train(store, jnp.int32(steps), key)
    confusion = judge._confusion(model, params, dataset.test_images, dataset.test_labels, every)
    accuracy.append(np.trace(confusion) / confusion.sum())
  assert accuracy[1] > 0.9 > accuracy[0] + 0.2
