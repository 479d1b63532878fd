"""FedBABU: Oh, Kim and Yun, FedBABU: Toward Enhanced Representation for Federated Image Classification, ICLR 2022.

  b_i <- SGD on the base from b^t, the head fixed as it was drawn;  b <- b + sum_i n_i (b_i - b^t) / sum_i n_i
  personal model: base and head fine-tuned on the client's data                           (algorithm 1)

Nothing stays on the client. The paper and PFLlib fine-tune for epochs (10 in PFLlib [C]); here it is the personal
steps that every method has. `base` and `head` are the ablations of the paper [M].
"""

from typing import Annotated

import jax

from apfl_jax import training
from apfl_jax.algorithms.fedrep import fedrep
from apfl_jax.settings import Limits, Personal
from apfl_jax.types import Algorithm, Params, Task, Upload

TUNED = ("all", "base", "head")


def fedbabu(task: Task, *, tune: Personal[Annotated[str, Limits(choices=TUNED)]] = "all") -> Algorithm:
  """Federated learning of the base under one fixed head; the head is learned when a client personalises.

  Args:
    task: the task.
    tune: what `personalize` trains: 'all', 'base' or 'head'.
  """
  loss = training.classification_loss(task)

  def local_update(download, client, data, visit, key):
    base, head = download.shared
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    trained = training.local_sgd(task, lambda base, batch: loss(Params(base, head), batch), base, data, steps, key)
    delta = jax.tree.map(lambda new, old: new - old, trained, base)
    return client, Upload(update=delta, weight=training.weight(task.sgd, data.train.size))

  def personalize(download, client, data, visit, key):
    del client, visit
    shared = download.shared
    if tune == "all":
      return training.fine_tune(task, loss, shared, data, task.sgd.personal_steps, key)
    own = lambda part, batch: loss(shared._replace(**{tune: part}), batch)
    tuned = training.fine_tune(task, own, getattr(shared, tune), data, task.sgd.personal_steps, key)
    return shared._replace(**{tune: tuned})

  return fedrep(task)._replace(
    local_update=local_update,
    global_model=lambda server: server,
    init_client=lambda download, key: (),
    personalize=personalize,
  )
