"""Local training only: every client alone, from a common initial model; nothing is sent. The lower bound.

A client trains on in every round that it takes part in, whether or not its (empty) upload arrives.
"""

import jax.numpy as jnp

from apfl_jax import training
from apfl_jax.types import Algorithm, Download, Task, Upload


def local(task: Task) -> Algorithm:
  """The client keeps its model; `personalize` tunes it by `personal_steps` more, as every other method may."""
  loss = training.classification_loss(task)

  def local_update(download, client, data, visit, key):
    del download
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    client = training.local_sgd(task, loss, client, data, steps, key)
    return client, Upload(update=(), weight=jnp.float32(1.0))

  def personalize(download, client, data, visit, key):
    del download, visit
    return training.fine_tune(task, loss, client, data, task.sgd.personal_steps, key)

  return Algorithm(
    init=task.model.init,
    download=lambda server: Download(shared=server),
    local_update=local_update,
    aggregate=lambda server, received, key: server,
    predict=lambda model, images: training.predict(task.model, model, images),
    global_model=lambda server: None,
    init_client=lambda download, key: download.shared,
    personalize=personalize,
  )
