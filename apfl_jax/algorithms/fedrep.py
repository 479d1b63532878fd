"""FedRep: Collins et al., Exploiting Shared Representations for Personalized Federated Learning, ICML 2021.

  h_i <- SGD on h_i with the base frozen;  then b_i <- SGD on the base from b^t with h_i frozen    (algorithm 1)
  b   <- b + sum_i n_i (b_i - b^t) / sum_i n_i

The head never leaves the client. All heads start alike, as in PFLlib [C], so the server holds the first one for clients
to come. The paper averages uniformly [M], PFLlib by examples [C]: `--weighting` decides.
`personalize` trains the head on the base of the download, which is all that a client that never took part can do
(method 2.11). With no personal steps it is what PFLlib scores: the new base under the client's head [C].
"""

from typing import Annotated

import jax

from apfl_jax import training
from apfl_jax.settings import Limits
from apfl_jax.types import Algorithm, Download, Params, Task, Upload


def fedrep(task: Task, *, head_epochs: Annotated[int, Limits(least=1)] = 1) -> Algorithm:
  """A shared base, a head on each client, trained in turns.

  Args:
    task: the task.
    head_epochs: head steps a round, in units of the base's; the paper has 10, PFLlib 1.
  """
  loss = training.classification_loss(task)

  def local_update(download, client, data, visit, key):
    head_key, base_key = jax.random.split(key)
    base = download.shared.base
    steps = training.num_steps(task.sgd, data.train.size, visit.work)
    client = training.local_sgd(
      task, lambda head, batch: loss(Params(base, head), batch), client, data, head_epochs * steps, head_key
    )
    trained = training.local_sgd(
      task, lambda base, batch: loss(Params(base, client), batch), base, data, steps, base_key
    )
    delta = jax.tree.map(lambda new, old: new - old, trained, base)
    return client, Upload(update=delta, weight=training.weight(task.sgd, data.train.size))

  def aggregate(server, received, key):
    return server._replace(base=jax.tree.map(lambda b, d: b + d, server.base, received.mean))

  def personalize(download, client, data, visit, key):
    del visit
    base = download.shared.base
    own = lambda head, batch: loss(Params(base, head), batch)
    return Params(base, training.fine_tune(task, own, client, data, task.sgd.personal_steps, key))

  return Algorithm(
    init=task.model.init,
    download=lambda server: Download(shared=server),
    local_update=local_update,
    aggregate=aggregate,
    predict=lambda model, images: training.predict(task.model, model, images),
    global_model=lambda server: None,
    init_client=lambda download, key: download.shared.head,
    personalize=personalize,
  )
