"""Central: everybody draws from one pool, in no more steps than FedAvg's clients, and who held what is still told."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import data
from apfl_jax.algorithms import central
from apfl_jax.errors import InputError
from apfl_jax.types import Data, Federation, Span
from experiments import job
from experiments.config import Config
from tests import linear

FAST = {"algorithm": "central", "dataset": "fast", "model": "mlp", "num_clients": 4, "drop_rate": "0.5", "rounds": 2}


def _federation() -> Federation:
  size = np.array(linear.SIZES, np.int32)
  part = lambda share: Span(linear.STARTS.astype(np.int32) + share, np.maximum(size // 3, 1))
  store = linear.data(0).store._replace(index=np.arange(sum(size), dtype=np.int32)[::-1])
  return Federation(store, np.arange(len(size), dtype=np.int32), part(0), part(1), part(2))


def test_the_pool_is_what_all_clients_hold():
  own = _federation()
  everybody = data.pooled(own)
  held = lambda federation, span, i: federation.store.index[span.start[i] : span.start[i] + span.size[i]].tolist()
  for part in ("train", "validation"):
    spans = getattr(own, part)
    whole = sum((held(own, spans, i) for i in range(4)), [])
    assert [held(everybody, getattr(everybody, part), i) for i in range(4)] == [whole] * 4
  assert [held(everybody, everybody.test, i) for i in range(4)] == [held(own, own.test, i) for i in range(4)]
  np.testing.assert_array_equal(everybody.store.index[: len(own.store.index)], own.store.index)
  np.testing.assert_array_equal(everybody.id, own.id)


def test_a_client_takes_the_steps_of_its_share():
  # Every example of the pool is the first, so that the steps can be counted: 6 of 22 examples, two a step.
  pool = linear.data(0)
  many = len(pool.store.index)
  span = Span(jnp.int32(0), jnp.int32(many))
  pool = Data(pool.store._replace(index=jnp.zeros(many, jnp.int32)), span, span)
  algorithm = central(linear.task(steps=0, batch_size=2))
  download = algorithm.download(algorithm.init(jax.random.key(0)))
  _, upload = jax.jit(algorithm.local_update)(download, (), pool, linear.visit(0), jax.random.key(1))
  example = linear.Oracle(linear.oracle(0).x[:1], linear.oracle(0).y[:1])
  w = linear.start()
  for _ in range(3):
    w = linear.plus(w, (-linear.LEARNING_RATE, example.gradient(w)))
  linear.close(upload.update, linear.plus(w, (-1, linear.start())))


def test_a_run_tells_who_held_what(tmp_path, monkeypatch):
  monkeypatch.setattr(job, "_draw", lambda workdir: None)  # the figures take longer than the run
  summary = job.run(Config(**FAST, monopolistic_classes=1, personal_steps=2, progress=False, workdir=str(tmp_path)))
  rows = list(csv.DictReader((tmp_path / "clients.csv").open()))
  sizes = [int(row[name]) for row in rows for name in ("train_size", "validation_size", "test_size")]
  assert sum(sizes) == 2000
  with np.load(tmp_path / "arrays.npz") as arrays:
    assert arrays["histogram"].sum(1).tolist() == [int(row["train_size"]) for row in rows]
    assert arrays["seen"].all()
  assert len(summary["monopolistic_classes"]) == 1 and summary["unseen"]["classes"] == []
  assert json.loads((tmp_path / "summary.json").read_text())["finished"]


def test_the_pool_is_on_the_device():
  with pytest.raises(InputError, match="data_on: got 'host' with --algorithm=central"):
    job.prepare(Config(**FAST, data_on="host"))
