"""What the common suite must not let pass, in methods that do it."""

import jax
import pytest

from tests import tasks


def _fedavg(settings):
  return tasks.build("fedavg", tasks.NUM_CLIENTS, settings)[0]


def blind_to_its_key(settings):
  def local_update(download, client, data, visit, key):
    return _fedavg(settings).local_update(download, client, data, visit, jax.random.key(5))

  return _fedavg(settings)._replace(local_update=local_update)


def never_in_a_hurry(settings):
  def local_update(download, client, data, visit, key):
    return _fedavg(settings).local_update(download, client, data, visit._replace(work=1.0), key)

  return _fedavg(settings)._replace(local_update=local_update)


def draws_what_nobody_reads(settings):
  def local_update(download, client, data, visit, key):
    visit = visit._replace(wait=jax.random.randint(key, (), 0, 9))
    return _fedavg(settings).local_update(download, client, data, visit, jax.random.key(5))

  return _fedavg(settings)._replace(local_update=local_update)


def draws_in_its_steps_what_nobody_reads(settings):
  def local_update(download, client, data, visit, key):
    def step(number, carry):
      count, drawn = carry
      return count + 1, drawn + jax.random.uniform(jax.random.fold_in(key, number))

    count, _ = jax.lax.fori_loop(0, (3 * visit.work).astype(int), step, (0.0, 0.0))
    client, upload = _fedavg(settings).local_update(download, client, data, visit, jax.random.key(5))
    return client, upload._replace(weight=upload.weight + count)

  return _fedavg(settings)._replace(local_update=local_update)


@pytest.mark.parametrize(
  ("build", "found"),
  [
    (_fedavg, []),
    (blind_to_its_key, ["key"]),
    (draws_what_nobody_reads, ["key"]),
    (draws_in_its_steps_what_nobody_reads, ["key"]),
    (never_in_a_hurry, ["work"]),
  ],
)
def test_what_a_visit_ignores_is_found(build, found):
  inputs = tasks.inputs("fedavg")

  def visit(key, work):
    keys = jax.random.key(0), jax.random.key(1), key
    return tasks.first_visit(build(inputs.settings), inputs.federation, keys, work)[-1]

  traced = jax.make_jaxpr(visit)(jax.random.key(2), jax.numpy.float32(1.0))
  assert tasks.ignored(traced, ["key", "work"], [True] * len(traced.out_avals)) == found
