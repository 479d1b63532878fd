"""What methods share whose server wants each client's update and counts every client alike: FedBuff, FL-FDMS."""

from collections.abc import Callable
from typing import NamedTuple

from apfl_jax import training
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.types import Array, Params, Task, Upload


class Kept(NamedTuple):
  """What the server wants client by client.

  Attributes:
    delta: d_i.
    counts: bool [], whether the client has examples.
  """

  delta: Params
  counts: Array


def local_update(task: Task) -> Callable:
  """FedAvg's `local_update`, whose update is kept and not summed."""
  plain = fedavg(task)
  uniform = task.sgd._replace(weighting="uniform")

  def update(download, client, data, visit, key):
    client, upload = plain.local_update(download, client, data, visit, key)
    kept = Kept(upload.update, data.train.size > 0)
    return client, Upload(update=(), weight=training.weight(uniform, data.train.size), kept=kept)

  return update
