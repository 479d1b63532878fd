"""What AP-FL's server holds, what clients download and send, and what a model of it is."""

from typing import NamedTuple

from apfl_jax.algorithms.ap_fl.interpolation import Choice
from apfl_jax.algorithms.ap_fl.peers import Peers
from apfl_jax.algorithms.ap_fl.statistics import Moments
from apfl_jax.types import Array, Params, PyTree


class Pair(NamedTuple):
  """Two classifiers whose probabilities are mixed.

  Attributes:
    local: L.
    friend: F.
    share: float32 [], of L.
  """

  local: Params
  friend: Params
  share: Array


class Answering(NamedTuple):
  """A model and the classes that it answers with.

  Under the masked softmax nothing holds down the logits of classes that nobody taught, so an anchored head would
  answer with them at random. They are left out until something says that they can be trusted.

  Attributes:
    params: the classifier, or two.
    answers: bool [C].
    choice: how a personal model came about; () of the global model.
  """

  params: Params | Pair
  answers: Array
  choice: Choice | tuple[()] = ()


class Shared(NamedTuple):
  """What a client downloads.

  Attributes:
    params: the global model.
    seen: bool [C], classes that some client held whose upload ever arrived.
    generator: the generator's averaged parameters.
    trust: float32 [C] in [0, 1], how far synthetic samples of a class are to be believed; 0 where unseen.
    peers: other clients' models, for the friend `peer`; () otherwise.
  """

  params: Params
  seen: Array
  generator: PyTree
  trust: Array
  peers: Peers | tuple[()] = ()


class Server(NamedTuple):
  """The server between rounds.

  Attributes:
    params: the global model.
    rounds: int32 [], aggregations so far.
    counts: float32 [C], training examples a class over clients that ever arrived, each client once.
    counted: bool [N], clients that are in `counts`.
    statistics: Moments of each layer, from the last cohort; () when off.
    generator: parameters in training.
    average: their exponential moving average, what clients get.
    optimizer: the generator's optax state.
    trust: float32 [C].
    peers: see `Shared`.
  """

  params: Params
  rounds: Array
  counts: Array
  counted: Array
  statistics: tuple[Moments, ...]
  generator: PyTree
  average: PyTree
  optimizer: PyTree
  trust: Array
  peers: Peers | tuple[()] = ()


class Sent(NamedTuple):
  """What a client's update holds, averaged by the server with the clients' weights."""

  delta: Params
  statistics: tuple[Moments, ...]


class Kept(NamedTuple):
  """What the server wants client by client.

  Attributes:
    histogram: float32 [C], the client's training examples of each class.
    params: its model, for the friend `peer`; () otherwise.
  """

  histogram: Array
  params: Params | tuple[()] = ()
