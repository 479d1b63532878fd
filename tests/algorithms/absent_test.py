"""Methods that stand in for absent clients: MIFA by memory, FL-FDMS by friends; against NumPy."""

import numpy as np
import pytest

from apfl_jax.algorithms import fl_fdms, mifa
from apfl_jax.errors import InputError
from tests import linear

EVERYONE = (0, 1, 2, 3)


@pytest.mark.parametrize("make", [mifa, fl_fdms])
def test_at_full_presence_it_is_uniform_fedavg(make):
  plain, other = linear.Rounds(linear.fedavg(weighting="uniform")), linear.Rounds(make(linear.task()))
  for _ in range(3):
    plain.advance(EVERYONE)
    other.advance(EVERYONE)
  linear.close(other.params, plain.params, 1e-5)


@pytest.mark.parametrize("make", [mifa, fl_fdms])
def test_a_client_without_examples_counts_nothing(make):
  with_it, without = (linear.Rounds(make(linear.task())) for _ in range(2))
  for _ in range(2):
    with_it.advance((0, 1, 2), sizes={2: 0})
    without.advance((0, 1))
  linear.close(with_it.params, without.params, 1e-6)


def test_mifa_remembers_what_arrived_last():
  rounds, w, memory = linear.Rounds(mifa(linear.task())), linear.start(), {}
  # Client 2's uploads are lost twice in a row, client 1 comes back late, client 3 comes last.
  for ids, lost in (((0, 1, 2), ()), ((0, 2), (2,)), ((2, 0), (2,)), ((2,), ()), ((1, 3), (1,)), ((1, 2), ())):
    rounds.advance(ids, lost=lost)
    memory |= {id: linear.plus(linear.descend(id, w), (-1, w)) for id in ids if id not in lost}
    w = linear.plus(w, *((1 / len(memory), u) for u in memory.values()))
    linear.close(rounds.params, w)


def test_fdms_gives_an_absent_client_the_update_of_its_friend():
  rounds, w = linear.Rounds(fl_fdms(linear.task())), linear.start()
  seen = {}  # pair -> similarities
  stood_in = set()
  # One friend of three counts twice; of two, either might for both.
  for ids, lost in (((0, 1, 2, 3), ()), ((0, 1, 2), ()), ((0, 1, 2, 3), (1,)), ((1, 2, 3), ()), ((0, 1, 3), (1,))):
    rounds.advance(ids, lost=lost)
    updates = {id: linear.plus(linear.descend(id, w), (-1, w)) for id in ids if id not in lost}
    flat = {id: np.concatenate([p.ravel() for p in update]) for id, update in updates.items()}
    for a in flat:
      for b in flat:
        cosine = flat[a] @ flat[b] / np.linalg.norm(flat[a]) / np.linalg.norm(flat[b])
        seen.setdefault((a, b), []).append((cosine + 1) / 2)
    full = []
    for id in EVERYONE:
      friend = id if id in updates else max(updates, key=lambda other, id=id: np.mean(seen[id, other]))
      stood_in |= {(id, friend)}
      full.append(updates[friend])
    w = linear.plus(w, *((1 / len(full), u) for u in full))
    linear.close(rounds.params, w)
  assert len({friend for id, friend in stood_in if friend != id}) > 1


def test_fdms_leaves_out_who_met_nobody():
  plain, other = linear.Rounds(linear.fedavg(weighting="uniform")), linear.Rounds(fl_fdms(linear.task()))
  for ids in ((0, 1), (0, 1, 3), (1, 3, 0)):  # client 2 never comes
    plain.advance(ids)
    other.advance(ids)
  linear.close(other.params, plain.params)


def test_fdms_is_for_few_clients():
  with pytest.raises(InputError, match="num_clients=20000"):
    fl_fdms(linear.task(num_clients=20_000))
