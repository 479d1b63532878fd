"""Rows on the device, in host memory and on disk: the same run to the bit, and only what is needed moves."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax import simulation
from apfl_jax.errors import InputError
from apfl_jax.simulation import PLACES, Simulator, Staging, memory
from apfl_jax.simulation.checkpoints import Checkpoints
from apfl_jax.types import Download, PyTree
from tests import tasks

N, COHORT, CHUNK, ROUNDS = 24, 2, 3, 9


def _with_memory(settings: PyTree) -> Any:
  """FedAvg whose clients also keep a trace of all that they computed."""
  algorithm, process = tasks.build("fedavg", N, settings)

  def init_client(download, key):
    return {"trace": jnp.zeros(3), "model": download.shared, "visits": jnp.int32(0)}

  def local_update(download, client, data, visit, key):
    _, upload = algorithm.local_update(Download(download.shared), (), data, visit, key)
    seen = jnp.stack([visit.id, visit.round, data.train.size]).astype(jnp.float32)
    model = jax.tree.map(lambda a, b: 0.5 * a + b, client["model"], upload.update)
    return {"trace": client["trace"] * 2 + seen, "model": model, "visits": client["visits"] + 1}, upload

  def personalize(download, client, data, visit, key):
    return jax.tree.map(lambda w, m: 0.5 * w + 0.5 * m, download.shared, client["model"])

  return algorithm._replace(init_client=init_client, local_update=local_update, personalize=personalize), process


@functools.cache
def _simulator() -> tuple[Simulator, simulation.Inputs]:
  inputs = jax.tree.map(np.asarray, tasks.with_settings(tasks.inputs("fedavg", N), drop_rates=[0.25, 0.3]))
  options: dict[str, Any] = {"population_size": N, "cohort_size": COHORT, "chunk": CHUNK, "how": "sequential"}
  return simulation.simulator(_with_memory, inputs, tasks.NUM_CLASSES, **options), inputs


def _run(directory: Path | None = None, rounds: int = ROUNDS, **places: Any) -> simulation.Result:
  simulator, inputs = _simulator()
  options: dict[str, Any] = {"eval_every": 4, "progress": False, "checkpoint_every": 3} | places
  return simulation.run(simulator, inputs, rounds=rounds, gone=np.zeros(N, bool), directory=directory, **options)


def _seen(result: simulation.Result) -> Any:
  record = result.record
  told = record.metrics, record.present, record.arrived, record.presence
  return told, (result.state.server, result.state.times, result.global_scores, result.personal_scores)


@functools.cache
def _on_the_device() -> Any:
  return _seen(_run())


_STAGED = pytest.param("host", "device", marks=pytest.mark.slow)  # both are in others, and in options_test.py


@pytest.mark.parametrize(("data_on", "client_state"), [("device", "host"), _STAGED, ("disk", "disk")])
def test_the_same_run_wherever_rows_live(tmp_path, data_on, client_state):
  told, arrays = _seen(_run(tmp_path, data_on=data_on, client_state=client_state))
  assert told == _on_the_device()[0]
  assert 0 < np.count_nonzero(arrays[1]) < N  # some came, some never
  tasks.assert_same(arrays, _on_the_device()[1])


def test_goes_on_from_a_checkpoint_in_another_place(tmp_path):
  _run(tmp_path, rounds=6, client_state="disk")
  assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]  # files of rows have no name
  _, arrays = _seen(_run(tmp_path, client_state="host"))
  tasks.assert_same(arrays, _on_the_device()[1])
  _run(tmp_path / "other", rounds=6)
  tasks.assert_same(_seen(_run(tmp_path / "other", client_state="disk"))[1], _on_the_device()[1])


def test_checkpoints_of_another_version_are_refused_and_kept(tmp_path, monkeypatch):
  """That is, with another record of the rounds beside the state."""
  save = Checkpoints.save
  other = lambda self, state, snapshot, record: save(self, state, snapshot, record | {"former": []})
  with monkeypatch.context() as former:
    former.setattr(Checkpoints, "save", other)
    _run(tmp_path, rounds=6)
  files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  with pytest.raises(InputError, match=f"workdir: {tmp_path} has checkpoints of another version"):
    _run(tmp_path)
  assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_only_the_rows_of_a_chunk_are_on_the_device(tmp_path):
  simulator, inputs = _simulator()
  staging = Staging(simulator, inputs, client_state="disk", directory=tmp_path)
  state, there = staging.begin()
  assert staging.size == CHUNK * COHORT < N
  assert {x.shape[0] for x in jax.tree.leaves((state.clients, state.times, there.federation.id))} == {staging.size}
  # The shapes that the plan and the compiler are given beforehand.
  expected = jax.tree.map(lambda x: (x.shape, x.dtype), (state, there))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), staging.shapes()) == expected

  wanted = np.array([20, 3, 3, 7])
  ids, ok = inputs.federation.id[wanted], np.array([True, True, True, False])
  state, there = staging.swap(state, there, staging.coming(ids, ok))
  np.testing.assert_array_equal(there.federation.id[:2], [3, 20])
  assert (np.asarray(there.federation.id[2:]) == N).all()  # nobody
  state = state._replace(clients=jax.tree.map(lambda x: x + 1, state.clients), times=state.times + 1)
  staging.flush(state)
  rows, times, clients = staging.snapshot(state)
  np.testing.assert_array_equal(rows, [3, 20])
  np.testing.assert_array_equal(times, [1, 1])
  assert all((x == 1).all() for x in jax.tree.leaves(clients))
  assert staging.coming(inputs.federation.id[[3]], np.array([True])) is None  # already there


def test_staged_examples_are_the_clients_own():
  simulator, inputs = _simulator()
  staging = Staging(simulator, inputs, data_on="host")
  state, there = staging.begin()
  rows = np.array([1, 5, 17])
  _, there, places = staging.bring(state, there, rows, 4)
  here, whole = jax.tree.map(np.asarray, there.federation), inputs.federation
  assert len(here.store.images) < len(whole.store.images)
  read = lambda store, span, row: (
    store.images[store.index[span.start[row] : span.start[row] + span.size[row]]],
    store.labels[store.index[span.start[row] : span.start[row] + span.size[row]]],
  )
  for part in ("train", "validation", "test"):
    for row, place in zip(rows, places, strict=True):
      tasks.assert_same(read(here.store, getattr(here, part), place), read(whole.store, getattr(whole, part), row))
  pooled = jax.tree.map(lambda x: np.asarray(x)[None], there.pooled), jax.tree.map(lambda x: x[None], inputs.pooled)
  tasks.assert_same(read(here.store, pooled[0], 0), read(whole.store, pooled[1], 0))


def test_plan_adds_up_and_refuses(tmp_path):
  simulator, inputs = _simulator()
  sizes = {}
  for place in PLACES:
    staging = Staging(simulator, inputs, client_state=place, directory=tmp_path)
    shapes = staging.shapes()
    plan, compiled = memory.plan(staging, ROUNDS)
    lines = {need.what: need.bytes for need in plan.needs if need.where == "device"}
    # What the compiled chunk is given, by XLA's own count, up to the padding of small arrays.
    given = sum(lines.values()) - lines["a chunk of rounds"] - lines["the next chunk's rows"]
    assert given == pytest.approx(compiled.memory_analysis().argument_size_in_bytes, abs=100)
    sizes[place] = lines["client rows"]
    assert f"{memory.human(plan.host)} on the host" in str(plan)
  row = 4 + sum(np.prod(x.shape[1:]) * 4 for x in jax.tree.leaves(shapes[0].clients))
  assert sizes == {"device": N * row, "host": CHUNK * COHORT * row, "disk": CHUNK * COHORT * row}

  memory.check(plan, N)
  memory.check(plan, N, plan.host)
  with pytest.raises(InputError, match=r"memory: the run needs .* would fit"):
    memory.check(plan, N, plan.host - 1)


def test_without_rounds_to_compute_none_are_compiled():
  simulator, inputs = _simulator()
  never = lambda *shapes: pytest.fail("the rounds were compiled")
  staging = Staging(simulator._replace(compile=never), inputs)
  plan, compiled = memory.plan(staging, ROUNDS, trained=True)
  rows = {need.what: need.bytes for need in plan.needs}
  assert compiled is None and rows["a chunk of rounds"] == 0 and rows["examples"] > 0


def test_a_plan_says_how_many_clients_fit():
  needs = (
    memory.Need("device", "client rows", 1000, True),
    memory.Need("device", "server and history", 100, False),
    memory.Need("host", "examples", 500, True),
  )
  on_cpu = memory.MemoryPlan(needs, devices=2, shared=True)
  assert (on_cpu.device, on_cpu.host) == (1100, 2700)
  with pytest.raises(InputError, match=r"--num_clients=40 would fit; --client_state=disk"):
    memory.check(on_cpu, 100, 200 + 40 * 25)
  with pytest.raises(InputError, match="no number of clients would fit"):
    memory.check(on_cpu, 100, 200)
  beside = memory.MemoryPlan(needs, devices=2, shared=False)
  assert (beside.device, beside.host) == (1100, 500)
  with pytest.raises(InputError, match=r"on the device, .*--num_clients=90 would fit"):
    memory.check(beside, 100, 1000)


@pytest.mark.parametrize("name", ["data_on", "client_state"])
def test_an_unknown_place_is_named(name):
  with pytest.raises(InputError, match=f"{name}: got 'moon', accepted are device, host, disk"):
    Staging(*_simulator(), **{name: "moon"})


def test_disk_needs_a_directory():
  with pytest.raises(InputError, match="client_state: got 'disk' without"):
    Staging(*_simulator(), client_state="disk")
