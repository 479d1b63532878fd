"""Checkpoints: what comes back is what went in, bit for bit, or the one before if the newest is damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.errors import InputError
from apfl_jax.simulation.checkpoints import Checkpoints
from apfl_jax.simulation.staging import Snapshot
from apfl_jax.types import Params, State


class Inner(NamedTuple):
  table: jax.Array
  nothing: tuple
  pair: tuple


def state(round: int) -> State:
  """A state in which every kind of leaf and of empty node occurs, other numbers in every round."""
  rng = np.random.default_rng(round)
  bits = jnp.asarray(rng.integers(0, 2**32, 8, np.uint32))
  awkward = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45, 0.1 * round])
  inner = Inner(jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16), (), (jnp.bool_(round % 2), {"a": jnp.int8(-round)}))
  return State(
    round=jnp.int32(round),
    server=Params(base={"layer": (awkward, ())}, head=inner),
    clients={"model": jnp.zeros((9, 2)), "count": (jnp.zeros(9, jnp.int32), ())},
    times=jnp.zeros(9, jnp.int32),
    population=(bits, (), jnp.asarray(rng.random(5) < 0.5)),
    history=Params(base=jnp.asarray(rng.normal(size=(2, 4)), jnp.float32), head=()),
  )


def snapshot(round: int) -> Snapshot:
  """Of nine clients, as many visited as the rounds allow."""
  rng = np.random.default_rng(round)
  count = round // 5
  clients = {"model": rng.normal(size=(count, 2)).astype(np.float32), "count": (np.arange(count, dtype=np.int32), ())}
  return Snapshot(np.sort(rng.permutation(9)[:count]).astype(np.int32), np.full(count, round, np.int32), clients)


def record(round: int) -> dict[str, Any]:
  return {"metrics": [{"round": round, "accuracy": 0.1 + round, "nothing": None}], "presence": ["012"] * round}


def assert_identical(got, want):
  assert str(jax.tree.structure(got)) == str(jax.tree.structure(want))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def written(tmp_path):
  """The folder of a run that was stopped after its checkpoints of rounds 5, 10 and 15."""
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  for round in (5, 10, 15):
    checkpoints.save(state(round), snapshot(round), record(round))
  checkpoints.close()
  return tmp_path / "checkpoints"


def assert_restores(folder, round):
  checkpoints = Checkpoints(folder)
  found = checkpoints.restore(jax.eval_shape(lambda: state(0)))
  checkpoints.close()
  if round is None:
    assert found is None
  else:
    assert found is not None
    assert_identical(found[0], state(round)._replace(clients=(), times=()))
    jax.tree.map(np.testing.assert_array_equal, found[1], snapshot(round))
    assert found[2] == record(round)


def test_the_newest_comes_back_bit_for_bit_and_quietly(written, capsys):
  assert_restores(written, 15)
  assert capsys.readouterr().out == ""


def test_none_where_there_is_none(tmp_path):
  assert_restores(tmp_path / "made" / "if" / "missing", None)


def truncate(folder, length=0):
  for path in folder.rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: length and path.stat().st_size // length])


def remove(folder, *names):
  for name in names:
    shutil.rmtree(folder / name)


DAMAGES: dict[str, Callable[[Path], object]] = {
  "emptied": truncate,
  "halved": lambda newest: truncate(newest, 2),
  "arrays emptied": lambda newest: truncate(newest / "state" / "d"),
  "record emptied": lambda newest: truncate(newest / "record"),
  "without arrays": lambda newest: remove(newest, "state"),
  "all gone": lambda newest: remove(newest, "state", "record"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over_aloud_and_the_run_goes_on(written, capsys, damage):
  DAMAGES[damage](written / "15")
  assert_restores(written, 10)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 1 and "15" in lines[0] and "unreadable" in lines[0]
  # The same run again, now quietly, and it can write what was damaged.
  checkpoints = Checkpoints(written)
  checkpoints.save(state(15), snapshot(15), record(15))
  checkpoints.close()
  assert_restores(written, 15)
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize("like", [state(0), state(0)._replace(population=jnp.zeros(9))])
def test_refuses_and_deletes_nothing_where_none_fits(written, like):
  if isinstance(like.population, tuple):
    truncate(written)
  files = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}
  checkpoints = Checkpoints(written)
  with pytest.raises(InputError, match="none of the checkpoints"):
    checkpoints.restore(jax.eval_shape(lambda: like))
  checkpoints.close()
  assert {path: path.read_bytes() for path in written.rglob("*") if path.is_file()} == files


def test_a_write_that_was_cut_off_is_no_checkpoint(written, capsys):
  (written / "15").rename(written / "15.orbax-checkpoint-tmp")
  assert_restores(written, 10)
