"""FedALA against its equations in NumPy, visit after visit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.algorithms import fedala, fedavg
from apfl_jax.types import Download, Params
from tests import linear

RATE = 8.0


def between(head, client, weights):
  return client.head + (head - client.head) * weights


def learned(id, server, client, weights, passes):
  for _ in range(passes):
    gradient = linear.oracle(id).gradient(Params(server.base, between(server.head, client, weights)))
    weights = np.clip(weights - RATE * gradient.head * (server.head - client.head), 0, 1)
  return weights


def sgd(id, params, rates):
  for rate in rates:
    params = linear.plus(params, (-rate, linear.oracle(id).gradient(params)))
  return params


def test_visits_are_those_of_the_paper():
  algorithm = fedala(linear.task(), weight_learning_rate=RATE, percent=100, first_passes=4)
  update, id = jax.jit(algorithm.local_update), 0
  constant = np.full(linear.STEPS, linear.LEARNING_RATE)
  rng = np.random.default_rng(0)
  server, weights, own, client, at_bound = linear.start(), np.ones_like(linear.START.head), linear.start(), None, False
  for times, passes in ((0, 0), (1, 4), (2, 1), (3, 1)):
    download = Download(jax.tree.map(jnp.float32, server))
    if client is None:
      client = algorithm.init_client(download, jax.random.key(0))

    # What `personalize` makes of it before the visit.
    taken = learned(id, server, own, weights, passes)
    falling = linear.LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(3) / 3))
    model = algorithm.personalize(download, client, linear.data(id), linear.visit(id, times=times), jax.random.key(9))
    linear.close(model, sgd(id, Params(server.base, between(server.head, own, taken)), falling))

    key = jax.random.key(times)
    client, upload = update(download, client, linear.data(id), linear.visit(id, times=times), key)
    weights = learned(id, server, own, weights, passes)
    own = sgd(id, Params(server.base, between(server.head, own, weights)), constant)
    linear.close(client.params, own)
    np.testing.assert_allclose(client.weights, weights, rtol=1e-5, atol=1e-5)
    linear.close(upload.update, linear.plus(own, (-1, server)))
    at_bound |= (weights == 0).any()
    server = Params(*(p + 0.3 * rng.normal(size=p.shape) for p in server))  # what others made of it
  assert 0 < weights.mean() < 1 and at_bound


def test_the_first_round_is_fedavg():
  one, other = linear.Rounds(fedala(linear.task())), linear.Rounds(fedavg(linear.task()))
  for rounds in (one, other):
    rounds.advance((0, 1, 2))
  linear.close(one.params, other.params, 1e-6)


@pytest.mark.parametrize("percent", [30, 80])
def test_weights_are_learned_from_a_share_of_the_examples(percent, monkeypatch):
  seen = set()
  size, batch_size = 8, 1

  def losses(task):
    def loss(params, batch):
      jax.debug.callback(
        lambda images, mask: seen.add(images[0].tobytes() if mask[0] else b""), batch.images, batch.mask
      )
      return jnp.sum(params.head**2)

    return loss

  monkeypatch.setattr("apfl_jax.training.classification_loss", losses)
  algorithm = fedala(linear.task(batch_size=batch_size, personal_steps=0), percent=percent)
  download = algorithm.download(algorithm.init(jax.random.key(0)))
  client = algorithm.init_client(download, jax.random.key(0))
  model = algorithm.personalize(download, client, linear.data(2), linear.visit(2, times=2), jax.random.key(1))
  jax.block_until_ready(model)
  jax.effects_barrier()
  assert len(seen) == round(percent / 100 * size) and b"" not in seen
