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


@pytest.mark.parametrize(("build", "found"), [(_fedavg, []), (blind_to_its_key, ["key"]), (never_in_a_hurry, ["work"])])
def test_what_a_visit_ignores_is_found(build, found):
  assert tasks.ignored(build, tasks.inputs("fedavg")) == found
