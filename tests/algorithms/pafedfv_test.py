"""PAFedFV: its limits, and all of it in NumPy, with clients that train while the server is late."""

import jax
import numpy as np
import pytest

from apfl_jax.algorithms import fedper, pafedfv
from apfl_jax.errors import InputError
from apfl_jax.types import Params
from tests import linear, tasks

EVERYONE = (0, 1, 2, 3)
FAR = 1e9  # a temperature at which no similarity counts
SCHEDULE = (((0, 1, 2), ()), ((2, 0), (0,)), ((1, 3, 0), ()), ((2, 3), ()))


def _row(table, id):
  return np.asarray(table)[id]


def test_without_others_it_is_local_training():
  rounds, mine = linear.Rounds(pafedfv(linear.task(), zeta=1.0, temperature=FAR)), {}
  for ids in ((0, 1, 2), (1, 2), (1, 0)):
    rounds.advance(ids)
    for id in ids:
      mine[id] = linear.descend(id, mine.get(id, linear.start()))
      linear.close(Params(_row(rounds.server.own, id), rounds.clients[id].head), mine[id])


def test_without_its_own_it_is_fedper():
  rounds = linear.Rounds(pafedfv(linear.task(), zeta=0.0, temperature=FAR))
  other = linear.Rounds(fedper(linear.task()))
  for _ in range(3):
    rounds.advance(EVERYONE)
    other.advance(EVERYONE)
    for id in EVERYONE:
      mine = Params(_row(rounds.server.own, id), rounds.clients[id].head)
      linear.close(mine, Params(other.server.base, other.clients[id]))


def test_without_waiting_it_is_synchronous_to_the_bit():
  late, prompt = (linear.Rounds(pafedfv(linear.task(batch_size=2), asynchronous=value)) for value in (True, False))
  for ids, lost in SCHEDULE:
    late.advance(ids, lost=lost)
    prompt.advance(ids, lost=lost, wait=5)
  tasks.assert_same((late.server, late.clients), (prompt.server, prompt.clients))


@pytest.mark.parametrize(("wait", "mu"), [(2, 0.5), (0, 0.5), (3, 0.0)])
def test_it_is_what_it_says(wait, mu):
  zeta, temperature, history = 0.4, 0.3, 3
  settings = {"zeta": zeta, "temperature": temperature, "history": history, "mu": mu}
  rounds, first = linear.Rounds(pafedfv(linear.task(), **settings)), linear.start()
  mean, total = first.base, lambda sizes: sum(linear.SIZES[id] for id in sizes)
  own, sent, past, waited, head = {}, {}, {}, {}, {}
  for ids, lost in SCHEDULE:
    rounds.advance(ids, lost=lost, wait=wait)
    arrived = [id for id in ids if id not in lost]
    new = {}
    for id in ids:
      start = Params(own.get(id, mean) + mu * waited.get(id, 0.0), head.get(id, first.head))
      new[id] = linear.descend(id, start)
      after = linear.descend(id, new[id], steps=wait)
      waited[id], head[id] = after.base - new[id].base, after.head
    for id in arrived:
      sent[id] = new[id].base
      past[id] = past[id] + 2 / (history + 1) * (sent[id] - past[id]) if id in past else sent[id]
    moved = {id: (p - first.base).ravel() for id, p in past.items()}
    for id in arrived:
      cosine = {j: moved[id] @ m / np.linalg.norm(moved[id]) / np.linalg.norm(m) for j, m in moved.items()}
      share = {j: linear.SIZES[j] * np.exp(c / temperature) for j, c in cosine.items()}
      others = sum(share[j] * sent[j] for j in sent) / sum(share.values())
      own[id] = zeta * sent[id] + (1 - zeta) * others
    mean = sum(linear.SIZES[j] * b for j, b in sent.items()) / total(sent)
    for id in EVERYONE:
      np.testing.assert_allclose(_row(rounds.server.own, id), own.get(id, mean), rtol=2e-5, atol=2e-5)
    for id in ids:
      linear.close(tuple(rounds.clients[id]), (waited[id], head[id]), 2e-5)
  assert len(own) == 4 and (not wait or max(np.abs(w).max() for w in waited.values()) > 1e-2)


def test_it_trains_the_head_of_its_own_base_and_a_client_never_heard_of_that_of_the_mean():
  rounds = linear.Rounds(pafedfv(linear.task(), mu=0.5))
  rounds.advance((0, 1), wait=2)
  algorithm = rounds.algorithm
  download = algorithm.download(rounds.server)
  for id in (0, 3):
    mine = download._replace(own=_row(download.own, id))
    client = rounds.clients.get(id, algorithm.init_client(mine, jax.random.key(0)))
    model = jax.jit(algorithm.personalize)(mine, client, linear.data(id), linear.visit(id), jax.random.key(1))
    np.testing.assert_allclose(model.base, mine.own + 0.5 * client.waited, rtol=1e-6)
    assert linear.oracle(id).loss(model) < linear.oracle(id).loss(Params(model.base, client.head)) - 1e-3


def test_it_is_for_few_clients():
  with pytest.raises(InputError, match="num_clients=20000"):
    pafedfv(linear.task(num_clients=20_000))
