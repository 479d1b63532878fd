"""Every shared pytree, each field with its shape.

Letters: `N` population, `K` cohort (clients computed in a round), `B` batch, `C` classes, `F` features,
`D` embedding size, `H` server versions kept, `M` examples in the store, `L` length of the index.
A field without a leading letter is one client's; `[]` is a scalar.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
PyTree = Any
Key = jax.Array  # a typed PRNG key, []


class Span(NamedTuple):
  """A run of `Store.index`: the entries `start` to `start + size`.

  Attributes:
    start: int32 [] for one client, [N] for all.
    size: int32, same shape; 0 is an empty span.
  """

  start: Array
  size: Array


class Store(NamedTuple):
  """The examples, once, shared by all clients.

  Attributes:
    images: uint8 [M, height, width, channels].
    labels: int32 [M].
    index: int32 [L], example numbers; each span of it belongs to one client. May repeat an example.
  """

  images: Array
  labels: Array
  index: Array  # type: ignore[assignment]  # the field's name, not tuple.index


class Federation(NamedTuple):
  """Who holds what.

  Attributes:
    store: the examples.
    id: int32 [N], the client ids in row order. Randomness follows the id, never the row.
    train: Span [N].
    validation: Span [N].
    test: Span [N]; never shown to a method.
  """

  store: Store
  id: Array
  train: Span
  validation: Span
  test: Span


class HeldOut(NamedTuple):
  """Examples of classes that nobody trains on, for verification.

  Attributes:
    images: uint8 [P, height, width, channels], equally many for each class.
    identity: int32 [P], the class of each, from 0; -1 for padding.
  """

  images: Array
  identity: Array


class Data(NamedTuple):
  """What a method sees of one client.

  Attributes:
    store: the examples.
    train: Span [].
    validation: Span [].
    logit_offset: float32 [C], what losses on its real data add to logits, -inf outside the classes of their softmax; or
      None for nothing. The batches of `training.batches` carry it, so that a method need not know of it; those of
      `training.draw` and `gather` do not.
  """

  store: Store
  train: Span
  validation: Span
  logit_offset: Array | None = None


class Visit(NamedTuple):
  """One client's circumstances, all [].

  Attributes:
    id: int32, for keys and for a server's tables; a method does not branch on it.
    round: int32, the round in which its upload is due; on an asynchronous clock a client may come twice in one.
    times: int32, rounds it took part in before this one.
    staleness: int32, server versions between its download and the aggregation of its upload. A round makes one; on an
      asynchronous clock each upload that arrives does.
    work: float32 in (0, 1], the share of its steps that it does.
    wait: int32, idle local steps while the server is late.
  """

  id: Array
  round: Array
  times: Array
  staleness: Array
  work: Array
  wait: Array


class Download(NamedTuple):
  """What clients get; they never see the server's own state.

  Attributes:
    shared: pytree, the same for all; kept in the history of versions.
    own: pytree [N, ...] indexed by client id, or (); a client sees only its own row, as it was when it downloaded.
  """

  shared: PyTree
  own: PyTree = ()


class Upload(NamedTuple):
  """What one client sends.

  Attributes:
    update: pytree, not yet weighted; summed over clients as `weight * update`.
    weight: float32 [].
    kept: pytree that the server wants client by client, stacked to [K, ...], or ().
  """

  update: PyTree
  weight: Array
  kept: PyTree = ()


class Received(NamedTuple):
  """What the server gets from a cohort in which at least one upload arrived.

  Attributes:
    total: pytree, the sum of `weight * update` over the uploads that arrived.
    weight: float32 [], the sum of their weights.
    kept: pytree [K, ...]; rows that did not arrive hold zeros.
    ids: int32 [K].
    arrived: bool [K].
    staleness: int32 [K].

  Rows are in the order in which the cohort was drawn, a random one.
  """

  total: PyTree
  weight: Array
  kept: PyTree
  ids: Array
  arrived: Array
  staleness: Array

  @property
  def mean(self) -> PyTree:
    """The weighted mean of the updates, `total / weight`."""
    return jax.tree.map(lambda x: x / self.weight, self.total)


class Prediction(NamedTuple):
  """What a model says of a batch.

  Attributes:
    logits: float32 [B, C].
    features: float32 [B, F], what the head reads.
  """

  logits: Array
  features: Array


class Params(NamedTuple):
  """A classifier's parameters, split once: what the two interpolation coefficients act on.

  Attributes:
    base: pytree, images to features.
    head: pytree, features to logits.
  """

  base: PyTree
  head: PyTree


class Model(NamedTuple):
  """A classifier as functions of its parameters.

  Attributes:
    init: (key) -> Params.
    base: (params.base, images float32 [B, height, width, channels] in [0, 1])
      -> (features [B, F], taps: a tuple of pre-activations [B, ..., channels], first layer first).
    head: (params.head, features [B, F]) -> logits [B, C].
    semantics: (params.head, features [B, F]) -> [B, D], the features in the space of the class embeddings; None for
      a head that has no such space.
    by_image: the same function as `base`, computed so that the gradient by the images is the cheap one and not that by
      the parameters; None where that makes no difference.
  """

  init: Callable[[Key], Params]
  base: Callable[[PyTree, Array], tuple[Array, tuple[Array, ...]]]
  head: Callable[[PyTree, Array], Array]
  semantics: Callable[[PyTree, Array], Array] | None = None
  by_image: Callable[[PyTree, Array], tuple[Array, tuple[Array, ...]]] | None = None

  @property
  def frozen(self) -> "Model":
    """The same classifier, for where images are trained and it is not: a generator's teacher."""
    return self._replace(base=self.by_image or self.base)


class Generator(NamedTuple):
  """A semantic generator as functions of its parameters.

  Attributes:
    init: (key) -> params.
    apply: (params, noise [B, noise_size], embedding [B, D]) -> images [B, height, width, channels] in [0, 1].
    noise_size: length of the standard normal noise.
  """

  init: Callable[[Key], PyTree]
  apply: Callable[[PyTree, Array, Array], Array]
  noise_size: int


class LocalSGD(NamedTuple):
  """How every method trains on a client, so that no method wins by a budget that another was denied.

  Attributes:
    learning_rate: float32 [], traced: a sweep over it does not recompile.
    batch_size: examples a step.
    epochs: passes over the client's training span a round; used where `steps` is 0.
    steps: SGD steps a round; 0 says `epochs` decides.
    personal_steps: steps that `personalize` may spend, all told; the same for every method.
    weighting: 'examples' (a client counts as its training examples) or 'uniform'.
    augment: 'none', 'shift' (moved by up to a fourteenth of the image side) or 'full' (shift, mixup,
      label smoothing).
  """

  learning_rate: Array
  batch_size: int
  epochs: int
  steps: int
  personal_steps: int
  weighting: str
  augment: str


class Task(NamedTuple):
  """The facts that a method is built from; made inside the trace, so arrays may be traced.

  Attributes:
    num_clients: N.
    num_classes: C.
    image_shape: (height, width, channels).
    embeddings: float32 [C, D], what the classes mean: centred over classes, rows of norm 1.
    model: the classifier.
    sgd: local training.
    rounds: int32 [], how many rounds the run will have; traced, for schedules that are shares of it.
    spread: (pytree [B, ...]) -> the same, its rows shared out over the devices: for the server's own training, in
      `aggregate`. Clients' functions are on one device and do not call it.
    aggregations: how many calls of `aggregate` make a round: 1, or K on an asynchronous clock, where each upload is
      aggregated by itself.
  """

  num_clients: int
  num_classes: int
  image_shape: tuple[int, int, int]
  embeddings: Array
  model: Model
  sgd: LocalSGD
  rounds: Array
  spread: Callable[[PyTree], PyTree] = lambda batch: batch
  aggregations: int = 1


class Algorithm(NamedTuple):
  """A federated method, written for ONE client; `simulation` maps, masks, weights and shards it.

  Made by `method(task, **settings)` inside the trace: float settings are traced, all others static.

  Attributes:
    init: (key) -> server.
    download: (server) -> Download.
    local_update: (download, client, data, visit, key) -> (client, Upload). `download.own` is the client's row.
    aggregate: (server, received, key) -> server. Called only if something arrived.
    predict: (model, images float32 [B, ...] in [0, 1]) -> Prediction.
    global_model: (server) -> model, or None where the method has none.
    init_client: (download, key) -> client, at the client's first visit.
    personalize: (download, client, data, visit, key) -> model. Read-only; answers also for a client that
      never took part (`visit.times == 0`), whose `client` is then fresh from `init_client`.
    describe: (model) -> arrays by name, what there is to tell of a personal model besides its answers. A number becomes
      a column of clients.csv; of a larger array the mean over clients is kept.
  """

  init: Callable[[Key], PyTree]
  download: Callable[[PyTree], Download]
  local_update: Callable[[Download, PyTree, Data, Visit, Key], tuple[PyTree, Upload]]
  aggregate: Callable[[PyTree, Received, Key], PyTree]
  predict: Callable[[PyTree, Array], Prediction]
  global_model: Callable[[PyTree], PyTree | None]
  init_client: Callable[[Download, Key], PyTree]
  personalize: Callable[[Download, PyTree, Data, Visit, Key], PyTree]
  describe: Callable[[PyTree], dict[str, Array]] = lambda model: {}


class Availability(NamedTuple):
  """Who is there and how, for the ids looked at; every field [...] as the ids.

  Attributes:
    present: bool. Not present is *absent*: the client does not start.
    arrives: bool. Present but not arriving is *dropped*: it trains, its own state advances, its upload is lost.
    delay: int32, how many rounds ago it downloaded what it trains on (*late*; its update is *stale*).
    work: float32 in (0, 1], the share of its local steps that it does.
    speed: float32 > 0, how much faster than the mean it works on a virtual clock.
    gone: bool, not present in this round nor in any later one.
    wait: int32, local steps for which it is idle after its upload, until the server answers.
  """

  present: Array
  arrives: Array
  delay: Array
  work: Array
  speed: Array
  gone: Array
  wait: Array


class Process(NamedTuple):
  """A stochastic process of availability, looked at pointwise: no work is O(N) a round.

  Attributes:
    init: (key) -> state.
    step: (state, round, key) -> state, once a round before it is looked at.
    look: (state, round, ids int32 [...], key) -> Availability [...].
  """

  init: Callable[[Key], PyTree]
  step: Callable[[PyTree, Array, Key], PyTree]
  look: Callable[[PyTree, Array, Array, Key], Availability]


class State(NamedTuple):
  """The whole simulation between two rounds; nothing random is carried.

  Attributes:
    round: int32 [], rounds done.
    server: pytree, the method's.
    clients: pytree [N, ...] in row order, the method's; rows of clients never visited mean nothing. Where rows move,
      those of a chunk's clients, as in its federation.
    times: int32 [N], or as `clients`, rounds each client took part in.
    population: pytree, the process's; on a virtual clock as before round 0, for the schedule knows who comes.
    history: pytree [H, ...], a ring of the last H versions of `Download.shared`; version v is in slot v % H. On an
      asynchronous clock a Download: `shared` [H + 1, ...], `own` [S, ...], in slots that the schedule assigns.
  """

  round: Array
  server: PyTree
  clients: PyTree
  times: Array
  population: PyTree
  history: PyTree
