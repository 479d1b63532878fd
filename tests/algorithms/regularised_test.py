"""Methods that change a client's loss or its steps: FedProx, FedDyn, MOON and FedNova, against NumPy."""

import numpy as np
import pytest

from apfl_jax.algorithms import fedavg, feddyn, fednova, fedprox, moon
from tests import linear

EVERYONE = (0, 1, 2, 3)


def moved(client, start, extra=lambda params: linear.nothing()):
  """What the client sends: its end less its start."""
  return linear.plus(linear.descend(client, start, extra), (-1, start))


def weighted(ids, values):
  """The mean by training examples."""
  total = sum(linear.SIZES[id] for id in ids)
  return [(linear.SIZES[id] / total, value) for id, value in zip(ids, values, strict=True)]


@pytest.mark.parametrize("make", [fedprox, moon])
def test_without_its_term_it_is_fedavg(make):
  plain, other = linear.Rounds(linear.fedavg()), linear.Rounds(make(linear.task(), mu=0.0))
  for _ in range(2):
    plain.advance(EVERYONE)
    other.advance(EVERYONE)
  linear.close(other.params, plain.params, 1e-6)


def test_fedprox_holds_clients_to_the_global_model():
  rounds, w, mu = linear.Rounds(fedprox(linear.task(), mu=0.8)), linear.start(), 0.8
  for ids in (EVERYONE, (1, 3)):
    rounds.advance(ids)
    held = lambda params, w=w: linear.plus(linear.nothing(), (mu, params), (-mu, w))
    w = linear.plus(w, *weighted(ids, [moved(id, w, held) for id in ids]))
    linear.close(rounds.params, w)


def test_fednova_weighs_mean_steps():
  rounds, w = linear.Rounds(fednova(linear.task())), linear.start()
  taken = {0: 4, 1: 1, 3: 2}
  for _ in range(2):
    rounds.advance((0, 1, 3), work={1: 0.25, 3: 0.5})
    ends = [linear.descend(id, w, steps=steps) for id, steps in taken.items()]
    directions = [
      linear.plus(linear.nothing(), (1 / s, e), (-1 / s, w)) for s, e in zip(taken.values(), ends, strict=True)
    ]
    shares = weighted(taken, directions)
    effective = sum(share * steps for (share, _), steps in zip(shares, taken.values(), strict=True))
    w = linear.plus(w, *((effective * share, d) for share, d in shares))
    linear.close(rounds.params, w)


def test_fednova_at_equal_steps_is_fedavg():
  plain, other = linear.Rounds(linear.fedavg()), linear.Rounds(fednova(linear.task()))
  for rounds in (plain, other):
    rounds.advance(EVERYONE)
    rounds.advance((0, 2))
  linear.close(other.params, plain.params, 1e-6)


def test_feddyn_keeps_the_sum_of_moves():
  # In the paper's own quantities: the gradients g_i and the server's h. The second upload of client 2 is lost.
  alpha, count = 0.3, len(linear.SIZES)
  rounds, w = linear.Rounds(feddyn(linear.task(), alpha=alpha)), linear.start()
  h, g = linear.nothing(), dict.fromkeys(EVERYONE, linear.nothing())
  for ids, lost in (((0, 1, 2), ()), ((0, 2, 3), (2,)), ((1, 2), ())):
    rounds.advance(ids, lost=lost)
    deltas = {}
    for id in ids:
      extra = lambda params, w=w, g=g[id]: linear.plus(linear.nothing(), (-1, g), (alpha, params), (-alpha, w))
      deltas[id] = moved(id, w, extra)
      g[id] = linear.plus(g[id], (-alpha, deltas[id]))
    arrived = [deltas[id] for id in ids if id not in lost]
    h = linear.plus(h, *((-alpha / count, d) for d in arrived))
    w = linear.plus(w, *((1 / len(arrived), d) for d in arrived), (-1 / alpha, h))
    linear.close(rounds.params, w)


def test_the_first_visit_of_moon_is_one_of_fedavg_and_the_second_contrasts():
  mu, tau = 2.0, 0.4
  rounds = linear.Rounds(moon(linear.task(steps=1), mu=mu, tau=tau))
  rounds.advance((0, 1))
  plain = linear.Rounds(fedavg(linear.task(steps=1)))
  plain.advance((0, 1))
  linear.close(rounds.params, plain.params, 1e-6)

  last = linear.Params(*map(np.float64, rounds.clients[0]))
  start = linear.Params(*map(np.float64, rounds.params))
  client = linear.oracle(0)
  cosine = lambda a, b: (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

  def loss(params):
    near, far = (np.exp(cosine(client.x @ params.base, client.x @ other.base) / tau) for other in (start, last))
    return client.loss(params) - mu * np.log(near / (near + far)).mean()

  rounds.advance((0,))
  linear.close(rounds.params, linear.plus(start, (-linear.LEARNING_RATE, linear.slope(loss, start))))


def test_features_of_zeros_do_no_harm_to_moon():
  task = linear.task()
  dead = task.model._replace(base=lambda base, images: (0 * (images.reshape(len(images), -1) @ base), ()))
  rounds = linear.Rounds(moon(task._replace(model=dead)))
  rounds.advance((0, 1))
  rounds.advance((0, 1))
  assert all(np.isfinite(p).all() for p in rounds.params)
