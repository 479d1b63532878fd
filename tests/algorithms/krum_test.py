"""Krum against NumPy, as a wrapper against clients that send garbage, and how it is asked for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.algorithms import fedbuff, krum
from apfl_jax.algorithms.wrappers.krum import chosen_by_krum
from apfl_jax.errors import InputError
from experiments import job
from experiments.config import Config
from tests import linear


def _oracle(updates, candidates, byzantine, selected):
  """The rows that multi-Krum takes."""
  scores = {}
  for i in candidates:
    distances = sorted(np.sum((updates[i] - updates[j]) ** 2) for j in candidates if j != i)
    scores[i] = sum(distances[: max(len(candidates) - byzantine - 2, 1)])
  return set(sorted(scores, key=scores.get)[:selected])


@pytest.mark.parametrize(("count", "byzantine", "selected"), [(7, 2, 1), (7, 2, 4), (5, 1, 9), (6, 0, 2), (4, 3, 1)])
def test_it_chooses_the_updates_with_near_neighbours(count, byzantine, selected):
  choose = jax.jit(lambda *tree: chosen_by_krum(tree[0], tree[1], byzantine, selected))
  for seed in range(5):
    rng = np.random.default_rng(seed)
    update = {"a": np.float32(rng.normal(size=(count, 3, 2))), "b": np.float32(rng.normal(size=(count, 4)))}
    flat = np.concatenate([update["a"].reshape(count, -1), update["b"]], axis=1)
    candidate = rng.random(count) < 0.8
    candidate[:1] = True
    got = choose(jax.tree.map(jnp.asarray, update), jnp.asarray(candidate))
    assert set(np.flatnonzero(got)) == _oracle(flat, np.flatnonzero(candidate), byzantine, selected), seed


def test_an_update_beyond_all_distances_is_not_chosen():
  update = {"a": jnp.array([[1.0], [1e20], [1.1], [0.0], [1.15]])}
  candidate = jnp.array([True, True, True, False, True])
  for selected, chosen in ((2, [2, 4]), (3, [0, 2, 4]), (4, [0, 1, 2, 4])):
    got = jax.jit(lambda update, s=selected: chosen_by_krum(update, candidate, 1, s))(update)
    assert np.flatnonzero(got).tolist() == chosen


def _garbage(algorithm, who):
  """Some clients send a large random update."""

  def local_update(download, client, data, visit, key):
    client, upload = algorithm.local_update(download, client, data, visit, key)
    noise = lambda x: 50.0 * jax.random.normal(key, x.shape)
    bad = jax.tree.map(lambda x: jnp.where(visit.id == who, noise(x), x), upload.update)
    return client, upload._replace(update=bad)

  return algorithm._replace(local_update=local_update)


def test_garbage_does_not_reach_the_method():
  task, ids, bad = linear.task(), (0, 1, 2, 3), _garbage(linear.fedavg(), 1)
  plain, wrapped, best = (linear.Rounds(a) for a in (bad, krum(bad, task), krum(bad, task, selected=3)))
  right = linear.Rounds(linear.fedavg())
  for rounds in (plain, wrapped, best):
    rounds.advance(ids)
  right.advance((0, 2, 3))
  linear.close(best.params, right.params)  # the three others, by their examples
  alone = [linear.descend(id, linear.start()) for id in (0, 2, 3)]
  far = lambda params, model: max(np.abs(a - b).max() for a, b in zip(params, model, strict=True))
  assert min(far(wrapped.params, model) for model in alone) < 1e-5  # one of them
  assert far(plain.params, right.params) > 5


def test_it_is_plain_where_all_are_chosen_and_lost_and_empty_uploads_are_never():
  task = linear.task()
  plain, wrapped = linear.Rounds(linear.fedavg()), linear.Rounds(krum(linear.fedavg(), task, selected=4))
  for ids, lost, sizes in (((0, 1, 2, 3), (), {}), ((0, 1, 2), (1,), {}), ((3, 2, 1), (), {2: 0}), ((0, 1), (0,), {})):
    for rounds in (plain, wrapped):
      rounds.advance(ids, lost=lost, sizes=sizes)
    linear.close(wrapped.params, plain.params)
  one = linear.Rounds(krum(linear.fedavg(), task))
  one.advance((0, 1, 2), lost=(0, 2))  # zeros of the lost lie close together
  linear.close(one.params, linear.descend(1, linear.start()))


def test_it_needs_updates_to_judge():
  with pytest.raises(InputError, match="sends no update"):
    linear.Rounds(krum(fedbuff(linear.task()), linear.task())).advance((0, 1))


def test_how_it_is_asked_for():
  config = Config(algorithm="fedavg", wrappers="krum", wrapper_settings={"krum": {"selected": 2}})
  assert config.wrapper_settings == {"krum": {"byzantine": 1, "selected": 2}}
  assert {"--wrappers=krum", "--krum_byzantine=1", "--krum_selected=2"} <= set(config.lines())
  for settings, words in (
    ({"wrappers": "crumb"}, "wrappers: got 'crumb' (did you mean 'krum'?), accepted are krum"),
    (
      {"wrappers": "krum", "cohort_size": 6, "wrapper_settings": {"krum": {"byzantine": 2}}},
      "got krum with --krum_byzantine=2 --krum_selected=1 and 6 clients a round, accepted are 7 clients or more",
    ),
    ({"wrappers": "krum,krum"}, "accepted is each at most once"),
    (
      {"wrappers": "krum", "wrapper_settings": {"krum": {"selected": 0}}},
      "krum_selected: got 0, accepted is 1 or more",
    ),
    ({"wrappers": "krum", "wrapper_settings": {"krum": {"f": 0}}}, "krum_f: no such setting"),
    ({"wrapper_settings": {"krum": {"selected": 2}}}, "wrapper_settings: got 'krum'"),
  ):
    with pytest.raises(InputError, match=re.escape(words)):
      Config(algorithm="fedavg", **settings)


def test_rounds_with_too_few_uploads_are_told(tmp_path, capsys):
  """Of 8 clients half never come: 4 uploads, where f = 1 wants 5."""
  small = {"dataset": "fast", "model": "mlp", "num_clients": 8, "partition": "iid", "monopolistic_classes": 0}
  brief = {"rounds": 2, "local_steps": 2, "personal_steps": 1, "min_size": 4, "report": False, "progress": False}
  brief |= {"checkpoint_every": 0, "pooled_examples": 40}
  programs = job.Programs()
  run = lambda rate: job.run(
    Config(algorithm="fedavg", wrappers="krum", drop_rate=rate, workdir=str(tmp_path / rate), **small, **brief),
    programs,
  )
  run("0.5")
  said = "note: krum promises nothing of a round with fewer than 5 uploads, as in 2 of 2"
  assert said in capsys.readouterr().err.splitlines()
  run("0.25")
  assert "promises nothing" not in capsys.readouterr().err
