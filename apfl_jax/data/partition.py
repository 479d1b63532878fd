"""Who holds which examples: pure, seeded, and bounded in time whatever the settings.

Every partition is disjoint and complete (each example has one owner) and gives each client at least `min_size`
examples; or, with `examples_per_client`, gives each client exactly that many, drawn from the same law, without
replacement while the data last and with repeats after that (so a million clients can draw from 60,000 examples).

`allowed` [C, N] says which client may hold which class. A monopolistic class (method 2.2 [R]) is a row that is True for
a few clients only.
"""

from typing import NamedTuple

import numpy as np

from apfl_jax.errors import InputError

_DRAWS = 2_000_000  # most random numbers spent on redrawing a Dirichlet partition
_REDRAWS = 100
_ALPHA = (1e-6, 1e6)  # beyond these a Dirichlet is one client a class, or equal shares


class Partition(NamedTuple):
  """Client i owns the i-th run of `index`.

  Attributes:
    index: int64 [L], example numbers.
    sizes: int64 [N], the lengths of the runs; their sum is L.
  """

  index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
  sizes: np.ndarray


def iid(
  labels: np.ndarray,
  num_clients: int,
  *,
  rng: np.random.Generator,
  allowed: np.ndarray | None = None,
  min_size: int = 2,
  examples_per_client: int = 0,
) -> Partition:
  """Equal random parts.

  With `allowed`, the classes that share the same holders are shuffled together and dealt evenly to those holders, so
  holders of a monopolistic class have more examples.

  Args:
    labels: int [M].
    num_clients: N.
    rng: consumed; the same state gives the same partition.
    allowed: bool [C, N]; None allows everything.
    min_size: least examples of a client; 2 is the least that has a training and a test example.
    examples_per_client: exactly this many for each, `min_size` has no effect; 0 for a complete partition.

  Raises:
    InputError: not enough examples, a class without a holder, or a client that may hold nothing.
  """
  allowed = _check(labels, num_clients, allowed, min_size, examples_per_client)
  group, holders = _groups(allowed)
  if not examples_per_client:
    return _finish(_deal(group[labels], holders, rng), labels, allowed, min_size, rng)
  number = np.bincount(group[labels], minlength=len(holders))
  shares = (holders * (number / np.maximum(holders.sum(1), 1))[:, None]).T
  counts = rng.multinomial(examples_per_client, shares / shares.sum(1, keepdims=True))
  return _draw(group[labels], counts, rng)


def dirichlet(
  labels: np.ndarray,
  num_clients: int,
  *,
  rng: np.random.Generator,
  alpha: float,
  allowed: np.ndarray | None = None,
  min_size: int = 2,
  examples_per_client: int = 0,
) -> Partition:
  """Label skew by a Dirichlet law of concentration `alpha`: small is skewed, large is iid.

  Complete partition (method 2.2 [O], the capping rule as in PFLlib [C]): class by class, the holders' shares are
  Dirichlet(alpha, ..., alpha); a client that already has more than M / N examples gets none of the class, unless all
  its holders have. Drawn anew, a bounded number of times, until all clients have `min_size`. With many clients or a
  small `alpha` that never happens, so the last draw is then repaired: the richest clients give examples to those below
  `min_size`, which end with exactly that many.

  With `examples_per_client`, a client draws its own class proportions from Dirichlet(alpha * C * share of the class in
  the data), restricted to what it may hold, then its labels from those (Hsu et al. 2019 with concentration alpha * C;
  for balanced data it is Dirichlet(alpha, ..., alpha)).

  Args:
    labels: int [M].
    num_clients: N.
    rng: consumed.
    alpha: concentration, in [1e-6, 1e6].
    allowed: bool [C, N]; None allows everything.
    min_size: as in `iid`.
    examples_per_client: as in `iid`.

  Raises:
    InputError: alpha out of range, or as in `iid`.
  """
  if not _ALPHA[0] <= alpha <= _ALPHA[1]:
    raise InputError(f"alpha: got {alpha}, accepted are numbers from {_ALPHA[0]:g} to {_ALPHA[1]:g}")
  allowed = _check(labels, num_clients, allowed, min_size, examples_per_client)
  number = np.bincount(labels, minlength=len(allowed))
  if examples_per_client:
    prior = number * (np.count_nonzero(number) / len(labels))
    where = allowed.T & (number > 0)
    shares = _dirichlet(rng, np.where(number > 0, alpha * prior, 1.0), where)
    return _draw(labels, rng.multinomial(examples_per_client, shares), rng)
  for _ in range(min(_REDRAWS, 1 + _DRAWS // allowed.size)):
    counts = _dirichlet_counts(number, alpha, allowed, rng)
    if counts.sum(0).min() >= min_size:
      break
  owner = np.empty(len(labels), np.int64)
  for label, own in enumerate(counts):
    owner[labels == label] = rng.permutation(np.repeat(np.arange(num_clients), own))
  return _finish(owner, labels, allowed, min_size, rng)


def pathological(
  labels: np.ndarray,
  num_clients: int,
  *,
  rng: np.random.Generator,
  classes_per_client: int,
  allowed: np.ndarray | None = None,
  min_size: int = 2,
  examples_per_client: int = 0,
) -> Partition:
  """Each client holds `classes_per_client` classes, and a class is shared evenly by its holders.

  After the two-class split of McMahan et al. 2017, section 3, but the classes of a client are distinct and, as far as
  `allowed` permits, all classes have about equally many holders.

  Args:
    labels: int [M].
    num_clients: N.
    rng: consumed.
    classes_per_client: from 1 to the number of classes that every client may hold.
    allowed: bool [C, N]; None allows everything.
    min_size: as in `iid`.
    examples_per_client: as in `iid`; split evenly over the client's classes.

  Raises:
    InputError: `classes_per_client` out of range or too small to cover all classes, or as in `iid`.
  """
  allowed = _check(labels, num_clients, allowed, min_size, examples_per_client)
  number = np.bincount(labels, minlength=len(allowed))
  held = _choose_classes(allowed & (number > 0)[:, None], number > 0, classes_per_client, rng)
  if not examples_per_client:
    return _finish(_deal(labels, held, rng), labels, held, min_size, rng)
  turn = rng.integers(classes_per_client, size=num_clients)  # whose class gets one more than the others
  each, more = divmod(examples_per_client, classes_per_client)
  place = (np.cumsum(held, axis=0) - 1 + turn) % classes_per_client
  return _draw(labels, (held * (each + (place < more))).T, rng)


def clustered(
  labels: np.ndarray,
  num_clients: int,
  *,
  rng: np.random.Generator,
  clusters: int,
  allowed: np.ndarray | None = None,
  min_size: int = 2,
  examples_per_client: int = 0,
) -> Partition:
  """Clusters of clients that hold the same classes, each cluster others, evenly (the setting of FL-FDMS [C]).

  Client i is in cluster i mod `clusters`; which classes a cluster holds is drawn. With fewer classes than clusters some
  clusters hold the same class.

  Args:
    labels: int [M].
    num_clients: N.
    rng: consumed.
    clusters: from 1 to N.
    allowed: bool [C, N]; None allows everything.
    min_size: as in `iid`.
    examples_per_client: as in `iid`; spread over the client's classes as they are in the data.

  Raises:
    InputError: `clusters` out of range, a client that `allowed` leaves none of its cluster's classes, or as in `iid`.
  """
  if not 1 <= clusters <= num_clients:
    raise InputError(f"clusters: got {clusters}, accepted are 1 to num_clients={num_clients}")
  allowed = _check(labels, num_clients, allowed, min_size, examples_per_client)
  present = rng.permutation(np.flatnonzero(np.bincount(labels, minlength=len(allowed))))
  turn = np.arange(max(clusters, len(present)))
  held = np.zeros_like(allowed)
  for label, cluster in zip(np.resize(present, len(turn)), turn % clusters, strict=True):
    held[label, cluster::clusters] = True
  held &= allowed
  idle, lost = np.flatnonzero(~held.any(0)), [label for label in present if not held[label].any()]
  if len(idle) or lost:
    raise InputError(
      f"monopolistic_classes: with clusters={clusters} {f'client {idle[0]}' if len(idle) else f'class {lost[0]}'} is"
      " left with nothing that may be held; accepted is 0"
    )
  return iid(labels, num_clients, rng=rng, allowed=held, min_size=min_size, examples_per_client=examples_per_client)


def monopolistic(num_classes: int, holders: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """The mask bool [C, N] under which only `holders` (bool [N]) may hold `classes` (int [m]).

  Raises:
    InputError: a class out of range, or nobody to hold the classes.
  """
  holders, classes = np.asarray(holders, bool), np.asarray(classes, np.int64)
  if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
    raise InputError(f"monopolistic classes: got {classes.tolist()}, accepted are 0 to {num_classes - 1}")
  if len(classes) and not holders.any():
    raise InputError(f"monopolistic classes: {classes.tolist()} need at least one holder, got none")
  allowed = np.ones((num_classes, len(holders)), bool)
  allowed[classes] = holders
  return allowed


def choose_monopolistic(rng: np.random.Generator, num_classes: int, m: int) -> np.ndarray:
  """int64 [m]: which classes are monopolistic, uniformly, in increasing order.

  Raises:
    InputError: m is negative or leaves no class for the other clients.
  """
  if not 0 <= m < num_classes:
    raise InputError(f"monopolistic_classes: got {m}, accepted are 0 to {num_classes - 1}")
  return np.sort(rng.choice(num_classes, m, replace=False))


def _check(
  labels: np.ndarray, num_clients: int, allowed: np.ndarray | None, min_size: int, examples_per_client: int
) -> np.ndarray:
  """`allowed` bool [C, N], or InputError for what no partition can do."""
  if num_clients < 1:
    raise InputError(f"num_clients: got {num_clients}, needs at least 1")
  if min_size < 0 or examples_per_client < 0:
    raise InputError(f"min_size, examples_per_client: got {min_size}, {examples_per_client}, need at least 0")
  if not len(labels):
    raise InputError("partition: there are no examples to share")
  if not examples_per_client and num_clients * min_size > len(labels):
    raise InputError(
      f"num_clients: {num_clients} clients of at least {min_size} examples need {num_clients * min_size}, there are "
      f"{len(labels)}; take fewer clients, a smaller min_size, or examples_per_client, which repeats examples"
    )
  number = np.bincount(labels)
  if allowed is None:
    return np.ones((len(number), num_clients), bool)
  allowed = np.asarray(allowed, bool)
  if allowed.ndim != 2 or allowed.shape[0] < len(number) or allowed.shape[1] != num_clients:
    raise InputError(f"allowed: got shape {list(allowed.shape)}, needs [{len(number)} or more, {num_clients}]")
  there = np.flatnonzero(number)
  orphans = there[~allowed[there].any(1)]
  if len(orphans):
    raise InputError(f"allowed: class {orphans[0]} has examples but no client may hold it; it needs a holder")
  idle = np.flatnonzero(~allowed[there].any(0))
  if len(idle):
    raise InputError(f"allowed: client {idle[0]} may hold no class that has examples; each needs one")
  return allowed


def _groups(allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Classes with the same holders, together: group int64 [C] of each class, holders bool [G, N]."""
  keys = [row.tobytes() for row in np.packbits(allowed, axis=1)]
  first = {key: label for label, key in reversed(list(enumerate(keys)))}
  leaders = sorted(first.values())
  return np.array([leaders.index(first[key]) for key in keys]), allowed[leaders]


def _deal(group: np.ndarray, holders: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The owner int64 [M] of each example: every group [M] is shuffled and dealt evenly to its holders bool [G, N]."""
  owner = np.empty(len(group), np.int64)
  for number, who in enumerate(holders):
    examples = np.flatnonzero(group == number)
    owner[rng.permutation(examples)] = np.resize(rng.permutation(np.flatnonzero(who)), len(examples))
  return owner


def _dirichlet(rng: np.random.Generator, alpha: np.ndarray | float, where: np.ndarray) -> np.ndarray:
  """float64 [..., n]: Dirichlet over the last axis, restricted to `where`, at least one True a row.

  Made of Gamma(alpha) variables in logarithms, as Gamma(alpha + 1) * U ** (1 / alpha): they underflow for small alpha.
  """
  log = np.log(rng.standard_gamma(alpha + np.ones(where.shape)))
  log -= rng.standard_exponential(where.shape) / alpha
  log[~where] = -np.inf
  shares = np.exp(log - log.max(-1, keepdims=True))
  return shares / shares.sum(-1, keepdims=True)


def _dirichlet_counts(number: np.ndarray, alpha: float, allowed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """int64 [C, N]: how many examples of each class (of which there are `number` [C]) each client gets."""
  counts = np.zeros(allowed.shape, np.int64)
  sizes = np.zeros(allowed.shape[1], np.int64)
  for label in np.flatnonzero(number):
    below = allowed[label] & (sizes * len(sizes) <= number.sum())
    shares = _dirichlet(rng, alpha, below if below.any() else allowed[label])
    ends = np.rint(np.cumsum(shares) / shares.sum() * number[label]).astype(np.int64)
    counts[label] = np.diff(ends, prepend=0)
    sizes += counts[label]
  return counts


def _choose_classes(usable: np.ndarray, there: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
  """The mask bool [C, N] of k `usable` [C, N] classes for each client; each class that is `there` [C] has a holder."""
  num_clients, most = usable.shape[1], int(usable.sum(0).min())
  if not 1 <= k <= most:
    raise InputError(f"classes_per_client: got {k}, accepted are 1 to {most}, what every client may hold")
  if num_clients * k < there.sum():
    raise InputError(f"classes_per_client: {num_clients} clients of {k} cannot hold all {there.sum()} classes")
  held = np.zeros(usable.shape, bool)
  free = np.full(num_clients, k)
  for label in sorted(np.flatnonzero(there), key=lambda label: usable[label].sum()):  # first a holder for each class
    client = np.argmax(np.where(usable[label], free + rng.random(num_clients), 0))
    if not free[client]:
      raise InputError(f"classes_per_client: with {k}, nobody who may hold class {label} is free for it; take more")
    held[label, client] = True
    free[client] -= 1
  # Then the classes held least, client by client; in blocks of clients where there are many, which need it less.
  block = 1 + num_clients // 1000
  load = held.sum(1)
  for ids in np.array_split(rng.permutation(num_clients), -(-num_clients // block)):
    order = load[:, None] + block * rng.random((len(load), len(ids)))
    order[~usable[:, ids]] = np.inf
    order[held[:, ids]] = -np.inf
    chosen = order.argsort(0).argsort(0) < k
    load += chosen.sum(1) - held[:, ids].sum(1)
    held[:, ids] = chosen
  return held


def _draw(pool: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> Partition:
  """Examples for each client, `counts` int [N, G] from each pool; `pool` int [M] says which pool an example is in.

  A pool is gone through in a random order, then in another one, and so on.
  """
  num_clients, num_pools = counts.shape
  source = np.repeat(np.tile(np.arange(num_pools, dtype=np.int16), num_clients), counts.ravel())
  index = np.empty(len(source), np.int64)
  for number, total in enumerate(counts.sum(0)):
    if total:
      examples = np.flatnonzero(pool == number)
      rounds = np.tile(examples, (-(-total // len(examples)), 1))
      index[source == number] = rng.permuted(rounds, axis=1).ravel()[:total]
  return Partition(index, counts.sum(1))


def _finish(
  owner: np.ndarray, labels: np.ndarray, allowed: np.ndarray, min_size: int, rng: np.random.Generator
) -> Partition:
  """The partition of an ownership int64 [M], after repair."""
  owner = _repair(owner, labels, allowed, min_size, rng)
  return Partition(np.argsort(owner, kind="stable"), np.bincount(owner, minlength=allowed.shape[1]))


def _repair(
  owner: np.ndarray, labels: np.ndarray, allowed: np.ndarray, min_size: int, rng: np.random.Generator
) -> np.ndarray:
  """An ownership in which nobody has less than `min_size`: rich clients give to poor ones, within `allowed`.

  Where the rich only have what the poor may not hold, a third client takes that and passes on what they may: exact for
  monopolistic masks (two kinds of clients). Each turn of the loop leaves less to do, or it ends with InputError.
  """
  num_clients = allowed.shape[1]
  group, holders = _groups(allowed)
  last = np.inf
  while True:
    sizes = np.bincount(owner, minlength=num_clients)
    room = np.maximum(min_size - sizes, 0)
    owner = _move(owner, labels, group, holders, np.maximum(sizes - min_size, 0), room, rng)
    sizes = np.bincount(owner, minlength=num_clients)
    poor = np.flatnonzero(sizes < min_size)
    lack = int((min_size - sizes[poor]).sum())
    if not lack:
      return owner
    if lack >= last:
      raise InputError(
        f"min_size: {len(poor)} of {num_clients} clients cannot get {min_size} examples of the classes that they may "
        "hold; take a smaller min_size or fewer clients"
      )
    last = lack
    useful = np.flatnonzero(allowed[:, poor].any(1))
    room = np.bincount(owner[np.isin(labels, useful)], minlength=num_clients)
    room[poor] = 0
    owner = _move(owner, labels, group, holders, np.maximum(sizes - min_size, 0), room, rng, lack)


def _move(
  owner: np.ndarray,
  labels: np.ndarray,
  group: np.ndarray,
  holders: np.ndarray,
  spare: np.ndarray,
  room: np.ndarray,
  rng: np.random.Generator,
  limit: int | None = None,
) -> np.ndarray:
  """The ownership after clients gave up to `spare` [N] and took up to `room` [N] examples, `limit` in all.

  The largest spare is levelled first. Classes that few may hold go first, since fewer can take them; the examples of a
  move go class by class, so that a client that takes several mostly takes them of one class, as label skew wants.
  """
  owner, spare, room = owner.copy(), spare.copy(), room.copy()
  left = len(owner) if limit is None else limit
  for number in np.argsort(holders.sum(1), kind="stable"):
    takers = rng.permutation(np.flatnonzero(holders[number]))
    takers = np.repeat(takers, room[takers])
    examples = np.flatnonzero((group[labels] == number) & (spare[owner] > 0))
    examples = examples[np.argsort(owner[examples], kind="stable")]
    height = spare[owner[examples]] - _rank(owner[examples])
    examples = examples[np.argsort(-height, kind="stable")][: np.count_nonzero(height > 0)]
    size = min(len(examples), len(takers), left)
    examples, takers = examples[:size], takers[:size]
    examples = examples[np.argsort(labels[examples], kind="stable")]
    spare -= np.bincount(owner[examples], minlength=len(spare))
    room -= np.bincount(takers, minlength=len(room))
    left -= size
    owner[examples] = takers
  return owner


def _rank(runs: np.ndarray) -> np.ndarray:
  """int64 [n]: 0, 1, 2, ... within each run of equal neighbours."""
  starts = np.flatnonzero(np.diff(runs, prepend=runs[:1] - 1))
  return np.arange(len(runs)) - np.repeat(starts, np.diff(starts, append=len(runs)))
