"""What AP-FL's server holds, what clients download and send, and what a model of it is."""

from typing import NamedTuple

from apfl_jax.algorithms.ap_fl.interpolation import Choice
from apfl_jax.algorithms.ap_fl.peers import Peers
from apfl_jax.algorithms.ap_fl.statistics import ByClass, Moments, Statistics
from apfl_jax.algorithms.ap_fl.unseen import Reading
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
    reading: how it answers with the others; () for never.
    choice: how a personal model came about; () of the global model.
  """

  params: Params | Pair
  answers: Array
  reading: Reading | tuple[()] = ()
  choice: Choice | tuple[()] = ()


class Shared(NamedTuple):
  """What a client downloads.

  Attributes:
    params: the global model, which local training starts from.
    answer: the model that the server answers with and personal models start from, where a memory makes it another one;
      () where it is `params`.
    seen: bool [C], classes that some client held whose upload ever arrived.
    source: what `Source.sample` needs, or a bank of its samples.
    trust: float32 [C] in [0, 1], how far synthetic samples of a class are to be believed; 0 where unseen.
    peers: other clients' models, for the friend `peer`; () otherwise.
    reading: how to answer with classes that nobody taught, or ().
  """

  params: Params
  answer: Params | tuple[()]
  seen: Array
  source: PyTree
  trust: Array
  peers: Peers | tuple[()] = ()
  reading: Reading | tuple[()] = ()

  @property
  def start(self) -> Params:
    """Where personal models start."""
    return self.answer if isinstance(self.answer, Params) else self.params


class Trained(NamedTuple):
  """A generator in training.

  Attributes:
    params: its parameters.
    average: their exponential moving average, what clients get.
    optimizer: optax state.
    student: the model that L_adv finds samples against, distilled on samples; () without L_adv.
    rounds: int32 [], rounds in which it was trained.
    least: float32 [], the smallest mean loss of a round so far.
    stale: int32 [], rounds since then.
  """

  params: PyTree
  average: PyTree
  optimizer: PyTree
  student: Params | tuple[()]
  rounds: Array
  least: Array
  stale: Array


class Memory(NamedTuple):
  """What keeps classes whose holders left (method 8.2).

  Attributes:
    absent: int32 [C], aggregations since a client that arrived held the class.
    age: int32 [], aggregations since what follows was taken.
    params: the global model when all classes seen so far were last held by clients that arrived.
    classes: bool [C], those classes.
    average: the generator's average of that time, for L_mem; () without a generator that learns.
    answer: the model that the server answers with.
  """

  absent: Array
  age: Array
  params: Params
  classes: Array
  average: PyTree
  answer: Params


class Server(NamedTuple):
  """The server between rounds.

  Attributes:
    params: the global model.
    rounds: int32 [], aggregations so far.
    counts: float32 [C], training examples a class over clients that ever arrived, each client once; under tier s0, how
      many updates showed the class.
    counted: bool [N], clients that are in `counts`.
    statistics: of real data.
    source: Trained, the source's weights where it does not learn, or ().
    bank: samples that clients download instead of weights, or ().
    trust: float32 [C].
    memory: Memory, or ().
    peers: see `Shared`.
    reading: see `Shared`.
  """

  params: Params
  rounds: Array
  counts: Array
  counted: Array
  statistics: Statistics
  source: PyTree
  bank: PyTree
  trust: Array
  memory: Memory | tuple[()]
  peers: Peers | tuple[()] = ()
  reading: Reading | tuple[()] = ()


class Sent(NamedTuple):
  """What a client's update holds, averaged by the server with the clients' weights.

  Attributes:
    delta: the model's change.
    layers: Moments of each layer; () below tier s1.
    classes: ByClass, sums over the client's weight, so that their weighted total is the sum; () below tier s2.
  """

  delta: Params
  layers: tuple[Moments, ...]
  classes: ByClass | tuple[()]


class Kept(NamedTuple):
  """What the server wants client by client.

  Attributes:
    histogram: float32 [C], the client's training examples of each class; under tier s0, 1 for what its update shows.
    round: int32 [], the round of the upload.
    params: its model, for the friend `peer`; () otherwise.
  """

  histogram: Array
  round: Array
  params: Params | tuple[()] = ()
